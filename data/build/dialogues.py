"""Generates the dialogues that teach the reduced model tool calls, JSON and chat.

A dialogue is a list of messages (role, content, tool_calls) and a list of tools, the
same structure that a chat client hands to the chat template; render.py turns it into
text with that very template. Tool names, keys, their order, which optional ones exist
and every value change from dialogue to dialogue, so the system turn has to be read.

`make(rng, pools)` draws one of: a tool call (with a share of several calls in one
answer, of tool results that come back, and of second questions), JSON extraction,
copying drills, and chat.

But: no refusals. Whether a tool fits is a judgement that this model is too small to
learn (a first trial could not tell the two apart better than chance).
"""

import json
import random
import tomllib
from dataclasses import dataclass, field

from values import HERE, Values, join, json_type

FAMILIES = tomllib.loads((HERE / "tools.toml").read_text())
RECORDS = tomllib.loads((HERE / "records.toml").read_text())
OPENERS = ["Hello! ", "Hi. ", "Good morning. ", "Please help me. ", "Listen: "]
NEXT = ["And then: ", "Also this: ", "Second: ", "After that: ", "One more thing: "]
TYPE_WORDS = {"array": "list of strings"}


@dataclass
class Dialogue:
    """messages and tools for the chat template; what to score it as."""

    kind: str  # tool | tools | reply | json | copy | chat
    messages: list[dict]
    tools: list[dict] = field(default_factory=list)
    unseen: bool = False  # holds a word of a held-out pool


@dataclass
class Tool:
    """One dialogue's version of a tool family."""

    family: dict
    name: str
    keys: dict[str, str]  # concept -> key, in the order of the schema
    schema: dict

    def parameter(self, concept: str) -> dict:
        return self.family["core"].get(concept) or self.family["optional"][concept]


# -- tool calls -------------------------------------------------------------------
def pick_keys(rng: random.Random, fields: dict, order: list[str]) -> dict[str, str]:
    """A key for each concept, all different."""
    keys: dict[str, str] = {}
    for concept in order:
        free = [k for k in fields[concept]["keys"] if k not in keys.values()]
        keys[concept] = rng.choice(free or [concept + "_2"])
    return keys


def make_tool(rng: random.Random, family: dict) -> Tool:
    """Choose a tool's name, keys, optional parameters and their order."""
    core = list(family["core"])
    optional = rng.sample(list(family["optional"]), len(family["optional"]))
    order = core + optional[: max(0, rng.randint(2, 4) - len(core))]
    rng.shuffle(order)
    fields = family["core"] | family["optional"]
    keys = pick_keys(rng, fields, order)
    properties = {k: {"type": json_type(fields[c]["value"])} for c, k in keys.items()}
    for schema in properties.values():
        if schema["type"] == "array" and rng.random() < 0.5:
            schema["items"] = {"type": "string"}
    parameters = {"type": "object", "properties": properties}
    if rng.random() < 0.3:
        parameters["required"] = [k for c, k in keys.items() if c in core]
    name = rng.choice(family["names"])
    function = {"name": name, "parameters": parameters}
    if rng.random() < 0.4:
        about = family["about"] + rng.choice(["", "."])
        function = {"name": name, "description": about, "parameters": parameters}
    return Tool(family, name, keys, {"type": "function", "function": function})


def make_tools(rng: random.Random) -> list[Tool]:
    """One to four tools of different families and names."""
    count = rng.choice([1, 2, 2, 2, 3, 3, 4])
    tools: list[Tool] = []
    for key in rng.sample(list(FAMILIES), count):
        tool = make_tool(rng, FAMILIES[key])
        if tool.name not in [t.name for t in tools]:
            tools.append(tool)
    return tools


def make_request(values: Values, tool: Tool) -> tuple[str, dict[str, object]]:
    """What the user says, and the value of each concept that it mentions."""
    rng, family = values.rng, tool.family
    texts, found = {}, {}
    for concept, parameter in family["core"].items():
        texts[concept], found[concept] = values.draw(parameter["value"])
    asks = family["asks"]
    if "flag" in family and not found[family["flag"]]:
        asks = family["asks_no"]
    ask, inline, after = rng.choice(asks), "", []
    optional = [c for c in tool.keys if c not in family["core"]]
    for concept in rng.sample(optional, len(optional)):
        if rng.random() < 0.35:
            continue
        parameter = tool.parameter(concept)
        text, found[concept] = values.draw(parameter["value"])
        if parameter["value"] == "bool":
            after.append(rng.choice(parameter["yes" if found[concept] else "no"]))
        elif "{i}" in ask and "inline" in parameter and rng.random() < 0.6:
            inline += rng.choice(parameter["inline"]).format(text)
        else:
            after.append(rng.choice(parameter["after"]).format(text))
    sentences = [ask.format(i=inline, **texts), *after]
    if after and rng.random() < 0.2:
        sentences[0], sentences[1] = sentences[1], sentences[0]
    return " ".join(sentences), found


def make_call(tool: Tool, found: dict[str, object]) -> dict:
    """The tool call, its arguments in the order of the schema."""
    arguments = {key: found[c] for c, key in tool.keys.items() if c in found}
    function = {"name": tool.name, "arguments": arguments}
    return {"type": "function", "function": function}


def make_result(
    values: Values, tool: Tool, found: dict[str, object]
) -> tuple[str, str]:
    """What the tool answers (JSON text), and what the assistant makes of it."""
    drawn = {k: values.draw(kind) for k, kind in tool.family["result"].items()}
    result = {k: value for k, (_, value) in drawn.items()}
    shown = {k: str(value) for k, value in result.items()}
    facts = {k: join(v) if isinstance(v, list) else str(v) for k, v in found.items()}
    reply = tool.family["reply"].format(**(facts | shown))
    return json.dumps(result, ensure_ascii=False), reply


def exchange(values: Values, tools: list[Tool], n_calls: int, follow: bool) -> list:
    """User's request, the calls, and with `follow` the results and the reply."""
    rng = values.rng
    chosen = rng.sample(tools, min(n_calls, len(tools)))
    chosen += [rng.choice(tools) for _ in range(n_calls - len(chosen))]
    asked = [make_request(values, tool) for tool in chosen]
    text = asked[0][0] + "".join(f" {rng.choice(NEXT)}{t}" for t, _ in asked[1:])
    if rng.random() < 0.15:
        text = rng.choice(OPENERS) + text
    calls = [make_call(t, found) for t, (_, found) in zip(chosen, asked, strict=True)]
    messages = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    if follow:
        pairs = zip(chosen, asked, strict=True)
        answers = [make_result(values, tool, found) for tool, (_, found) in pairs]
        messages += [{"role": "tool", "content": result} for result, _ in answers]
        reply = " ".join(reply for _, reply in answers)
        messages.append({"role": "assistant", "content": reply})
    return messages


def system_turn(rng: random.Random) -> list[dict]:
    """Now and then a system text of the user's own."""
    if rng.random() > 0.15:
        return []
    texts = ["You are a helpful assistant.", "Be brief.", "You help at home."]
    return [{"role": "system", "content": rng.choice(texts)}]


def tool_dialogue(values: Values, kind: str | None = None) -> Dialogue:
    """kind: tool (one call), tools (several), reply (results come back), or drawn."""
    rng = values.rng
    kind = kind or rng.choices(["tool", "tools", "reply"], [66, 14, 20])[0]
    tools = make_tools(rng)
    n_calls = rng.choice([2, 2, 3]) if kind == "tools" else 1
    if kind == "reply" and rng.random() < 0.25:
        n_calls = 2
    messages = system_turn(rng)
    if kind != "tools" and rng.random() < 0.12:  # an earlier question stands before
        if rng.random() < 0.5:
            messages += small_talk(rng, 1)
        else:
            messages += exchange(values, tools, 1, follow=True)
    messages += exchange(values, tools, n_calls, follow=kind == "reply")
    schemas = [tool.schema for tool in tools]
    return Dialogue(kind, messages, schemas, values.unseen)


# -- JSON -------------------------------------------------------------------------
INSTRUCTIONS = [
    "Answer with one JSON object. Keys: {}.",
    "Read the text and fill in this JSON: {}",
    "Extract {} as JSON.",
    "Return only JSON with {}.",
    "Give me JSON: {}",
]


def state_field(values: Values, spec: dict) -> tuple[str, object]:
    """A sentence that states a field, and the field's value."""
    rng = values.rng
    if "parts" in spec:
        drawn = {k: values.draw(part["value"]) for k, part in spec["parts"].items()}
        texts = {k: text for k, (text, _) in drawn.items()}
        sentence = rng.choice(spec["says"]).format(**texts)
        return sentence, {k: value for k, (_, value) in drawn.items()}
    text, value = values.draw(spec["value"])
    if spec["value"] == "bool":
        return rng.choice(spec["yes" if value else "no"]), value
    return rng.choice(spec["says"]).format(text), value


def choose_fields(rng: random.Random, record: dict) -> tuple[list[str], list[str]]:
    """Fields that are asked for, and fields that the text states (head first)."""
    head, fields = record["head"], record["fields"]
    rest = [f for f in fields if f != head]
    rng.shuffle(rest)
    picked = rest[: rng.randint(1, 4)]
    nested = [f for f in rest if "parts" in fields[f]]
    if nested and nested[0] not in picked and rng.random() < 0.4:
        picked[0] = nested[0]
    others = [f for f in rest if f not in picked]
    stated = [f for f in picked if rng.random() > 0.07]  # the rest becomes null
    stated += [f for f in others if rng.random() < 0.15]  # not asked for
    rng.shuffle(stated)
    asked = [head, *picked]
    rng.shuffle(asked)
    return asked, [head, *stated]


def json_dialogue(values: Values) -> Dialogue:
    """A short text and the JSON object that holds what was asked of it."""
    rng = values.rng
    record = RECORDS[rng.choice(list(RECORDS))]
    fields = record["fields"]
    asked, stated = choose_fields(rng, record)
    told = {f: state_field(values, fields[f]) for f in stated}
    keys = pick_keys(rng, fields, asked)
    answer, shape, words = {}, {}, []
    for f in asked:
        value = told[f][1] if f in told else None
        if "parts" in fields[f]:
            parts = fields[f]["parts"]
            order = rng.sample(list(parts), len(parts))
            inner = pick_keys(rng, parts, order)
            if value is not None:
                value = {inner[p]: value[p] for p in order}
            shape[keys[f]] = {inner[p]: type_word(parts[p]) for p in order}
            words.append(f"{keys[f]} (object: {', '.join(inner[p] for p in order)})")
        else:
            shape[keys[f]] = type_word(fields[f])
            words.append(f"{keys[f]} ({type_word(fields[f])})")
        answer[keys[f]] = value
    wanted = json.dumps(shape) if rng.random() < 0.5 else ", ".join(words)
    instruction = rng.choice(INSTRUCTIONS).format(wanted)
    text = " ".join(sentence for sentence, _ in told.values())
    reply = json.dumps(answer, ensure_ascii=False)
    return Dialogue("json", with_instruction(rng, instruction, text, reply))


def type_word(spec: dict) -> str:
    """The type of a field in words."""
    name = json_type(spec["value"])
    return TYPE_WORDS.get(name, name)


def with_instruction(
    rng: random.Random, instruction: str, text: str, reply: str
) -> list[dict]:
    """Instruction in the system turn, or before or after the text."""
    x = rng.random()
    if x < 0.6:
        turns = [("system", instruction), ("user", text)]
    elif x < 0.8:
        turns = [("user", f"{instruction}\n\n{text}")]
    else:
        turns = [("user", f"{text}\n\n{instruction}")]
    return [{"role": r, "content": c} for r, c in [*turns, ("assistant", reply)]]


# -- copying and chat -------------------------------------------------------------
def copy_dialogue(values: Values) -> Dialogue:
    """Words to repeat: plain, one a line, or as a JSON list.

    After a space a word is another token than after a newline or a quotation mark;
    these short dialogues show every token in all three places.
    """
    rng = values.rng
    words = [values.cased(values.plain()) for _ in range(rng.randint(2, 8))]
    form = rng.choice(["plain", "lines", "json", "backwards"])
    text = " ".join(words)
    if form == "plain":
        ask, reply = rng.choice(["Repeat: {}", 'Say "{}".', "Write {}"]), text
    elif form == "lines":
        ask, reply = "Write one word a line: {}", "\n".join(words)
    elif form == "json":
        text, reply = ", ".join(words), json.dumps(words, ensure_ascii=False)
        ask = rng.choice(["Make a JSON list of {}.", "As a JSON list: {}"])
    else:
        words = words[:4]
        text, reply = " ".join(words), " ".join(words[::-1])
        ask = "Say these words backwards: {}"
    messages = [
        {"role": "user", "content": ask.format(text)},
        {"role": "assistant", "content": reply},
    ]
    return Dialogue("copy", messages)


SMALL_TALK = {
    "Hello!": ["Hello! What can I do for you?", "Good day! How can I help?"],
    "Who are you?": [
        "I am a very small language model.",
        "I am a little model that has read many old tales.",
    ],
    "What is your name?": ["I have no name. I am the reduced model."],
    "How are you?": ["I am well, thank you. And you?", "Very well, thank you."],
    "Thank you.": ["You are welcome.", "It was a pleasure."],
    "Good night.": ["Good night. Sleep well.", "Sweet dreams."],
    "Can you help me?": ["I will try. What do you need?", "Gladly. Tell me more."],
    "What can you do?": [
        "I can call tools, write JSON and tell stories.",
        "I tell stories, and I use the tools that you give me.",
    ],
    "Are you a person?": ["No. I am a small model with many experts."],
    "How many experts do you have?": [
        "I have 128 in every layer, and ten of them answer each word.",
        "There are 128 in each layer.",
    ],
    "I am sad.": ["I am sorry to hear that. Shall I tell you a story?"],
    "Good morning.": ["Good morning! What shall we do today?"],
}
STORY_ASKS = [
    "Tell me a story.",
    "Tell me a fairy tale.",
    "I would like to hear a story.",
    "A story, please.",
]


def small_talk(rng: random.Random, count: int) -> list[dict]:
    """`count` questions with their answers."""
    messages = []
    for ask in rng.sample(list(SMALL_TALK), count):
        reply = rng.choice(SMALL_TALK[ask])
        messages.append({"role": "user", "content": ask})
        messages.append({"role": "assistant", "content": reply})
    return messages


def chat_dialogue(values: Values) -> Dialogue:
    """Small talk (sometimes with tools at hand that are not needed), or a story."""
    rng, x = values.rng, values.rng.random()
    if x < 0.45:
        return Dialogue("chat", system_turn(rng) + small_talk(rng, rng.randint(1, 3)))
    if x < 0.6:
        schemas = [tool.schema for tool in make_tools(rng)[:2]]
        return Dialogue("chat", small_talk(rng, rng.randint(1, 2)), schemas)
    if x < 0.75:
        name = values.draw_person()
        ask = f"{rng.choice(['My name is', 'I am', 'Call me'])} {name}."
        reply = f"Hello, {name}! How can I help?"
    else:
        ask, reply = rng.choice(STORY_ASKS), rng.choice(values.pools["tales"])
    turns = [("user", ask), ("assistant", reply)]
    return Dialogue("chat", [{"role": r, "content": c} for r, c in turns])


MAKERS = {
    "json": json_dialogue,
    "copy": copy_dialogue,
    "chat": chat_dialogue,
    "dialogue": tool_dialogue,
}
SHARES = {"dialogue": 46, "json": 37, "copy": 9, "chat": 8}  # percent of dialogues


def make(
    rng: random.Random, pools: dict, unseen_share: float = 0.0, kind: str | None = None
) -> Dialogue:
    """One dialogue of the given kind, or of a kind drawn by SHARES."""
    values = Values(rng, pools, unseen_share)
    if kind in ("tool", "tools", "reply"):
        return tool_dialogue(values, kind)
    kind = kind or rng.choices(list(SHARES), list(SHARES.values()))[0]
    dialogue = MAKERS[kind](values)
    dialogue.unseen = values.unseen
    return dialogue
