"""The harder set: what real clients send and small training sets leave out.

Each function below makes one prompt of its topic from a random generator: nested
objects, quotes, escapes, other scripts, unusual numbers, many calls in one answer,
empty values, strings that look like other types, keys that differ only by case, and
markup inside arguments. The text always states every value, word for word.

Instructions are worded as in training, so that what is measured is the content.
But: nothing else here was part of the reduced model's training; see README.md.
"""

import json
import random

PEOPLE = "Ada Bruno Carla Dmitri Elif Farid Greta Hamid Ines Jonas Keiko Lars".split()
PLACES = "Bergen Cádiz Delft Évora Graz Hanoi Izmir Kraków Lima Mombasa Nara".split()
THINGS = "lamp rope kettle saw blanket compass ladder bucket candle axe".split()
STREETS = "Mill Lane|Station Road|Harbour Street|Old Square|Fifth Avenue".split("|")

TEXT, WHOLE, REAL = {"type": "string"}, {"type": "integer"}, {"type": "number"}
YES_NO, TEXTS = {"type": "boolean"}, {"type": "array", "items": TEXT}


def record(**properties: dict) -> dict:
    """JSON schema of an object all of whose keys must be there."""
    return {"type": "object", "properties": properties, "required": [*properties]}


def rows(**properties: dict) -> dict:
    """JSON schema of a list of such objects."""
    return {"type": "array", "items": record(**properties)}


def tool(name: str, about: str, /, **properties: dict) -> dict:
    """A tool as chat clients declare it."""
    function = {"name": name, "description": about, "parameters": record(**properties)}
    return {"type": "function", "function": function}


def shape(schema: dict) -> object:
    """A schema in the short form in which the training dialogues state it."""
    if "properties" in schema:
        return {key: shape(part) for key, part in schema["properties"].items()}
    if schema == TEXTS:
        return "list of strings"
    if "items" in schema:
        return [shape(schema["items"])]
    kinds = schema["type"]
    return kinds if isinstance(kinds, str) else " or ".join(kinds)


def json_prompt(schema: dict, text: str, wanted: object) -> dict:
    """A prompt that asks for one JSON object of this shape."""
    ask = f"Answer with one JSON object. Keys: {json.dumps(shape(schema))}."
    messages = [
        {"role": "system", "content": ask},
        {"role": "user", "content": text},
    ]
    return {"kind": "json", "messages": messages, "wanted": wanted, "schema": schema}


def tool_prompt(tools: list[dict], text: str, *calls: tuple[str, dict]) -> dict:
    """A prompt that asks for calls of the tools."""
    wanted = [{"name": name, "arguments": arguments} for name, arguments in calls]
    messages = [{"role": "user", "content": text}]
    return {"kind": "tool", "messages": messages, "wanted": wanted, "tools": tools}


# -- nested objects -------------------------------------------------------------------
def nested(rng: random.Random) -> dict:
    """Objects in lists in objects, as JSON."""
    if rng.random() < 0.5:
        rooms = [
            {"name": name, "windows": rng.randint(0, 6)}
            for name in rng.sample(["kitchen", "hall", "attic", "cellar", "study"], 3)
        ]
        street, number = rng.choice(STREETS), rng.randint(1, 250)
        owner, city = rng.choice(PEOPLE), rng.choice(PLACES)
        said = "; ".join(f"{r['name']}, {r['windows']} windows" for r in rooms)
        address = {"street": street, "number": number, "city": city}
        return json_prompt(
            record(
                owner=TEXT,
                address=record(street=TEXT, number=WHOLE, city=TEXT),
                rooms=rows(name=TEXT, windows=WHOLE),
            ),
            f"The house of {owner} stands in {city}, {street}, number {number}. "
            f"Its rooms in order: {said}.",
            {"owner": owner, "address": address, "rooms": rooms},
        )
    leader, guide, cook = rng.sample(PEOPLE, 3)
    peak, camp = rng.sample(PLACES, 2)
    height, days = rng.randint(900, 6900), rng.randint(2, 30)
    team = {"leader": leader, "staff": {"guide": guide, "cook": cook}}
    return json_prompt(
        record(
            team=record(leader=TEXT, staff=record(guide=TEXT, cook=TEXT)),
            goal=record(name=TEXT, metres=WHOLE, camp=record(name=TEXT, days=WHOLE)),
        ),
        f"{leader} leads the climb; {guide} is the guide and {cook} the cook. They go "
        f"up Mount {peak}, {height} metres (write only {peak}). The camp, {camp}, "
        f"stays for {days} days.",
        {
            "team": team,
            "goal": {
                "name": peak,
                "metres": height,
                "camp": {"name": camp, "days": days},
            },
        },
    )


def nested_call(rng: random.Random) -> dict:
    """One call whose arguments are objects and lists of objects."""
    order = tool(
        "place_order",
        "Order goods",
        customer=record(name=TEXT, address=record(city=TEXT, street=TEXT)),
        lines=rows(item=TEXT, count=WHOLE),
        gift=YES_NO,
    )
    name, city, street = rng.choice(PEOPLE), rng.choice(PLACES), rng.choice(STREETS)
    items = rng.sample(THINGS, rng.randint(2, 3))
    lines = [{"item": item, "count": rng.randint(1, 20)} for item in items]
    gift = rng.random() < 0.5
    said = ", ".join(f"{line['count']} x {line['item']}" for line in lines)
    customer = {"name": name, "address": {"city": city, "street": street}}
    return tool_prompt(
        [order],
        f"Place an order for {name}, {street}, {city}: {said}. "
        f"It is {'' if gift else 'not '}a gift.",
        ("place_order", {"customer": customer, "lines": lines, "gift": gift}),
    )


# -- strings that need care -----------------------------------------------------------
QUOTED = [
    'The sign says "No entry".',
    "It's Tom's, not the boys'.",
    '"Run!" she cried; "it\'s behind you!"',
    "a 3\" nail and a 10' pole",
    'He wrote "yes", then \'no\', then "".',
    "`ls` prints 'a b' and \"c\"",
    'the so-called "quick" fix',
    '{"not": "an object"}',
    "[1, 2] is text here, not a list",
    'key: "value", other: "thing"',
    '“curly” and "straight" and ‘single’',
]


def quotes(rng: random.Random) -> dict:
    """Quotation marks and JSON inside JSON strings."""
    first, second = rng.sample(QUOTED, 2)
    author = rng.choice(PEOPLE)
    return json_prompt(
        record(author=TEXT, first_note=TEXT, second_note=TEXT),
        f"Two notes by {author}, one a line, to be copied to the letter.\n"
        f"{first}\n{second}",
        {"author": author, "first_note": first, "second_note": second},
    )


PATHS = [
    r"C:\new\tools\readme.txt",
    r"\\server\share\b\n",
    r"D:\temp\u0041\file",
    r"C:\Users\Public\\double",
]
PATTERNS = [r"\d+\s*\w", r"^\\begin\{x\}$", r"a\tb\nc", r"\"[^\"]*\"", r"\/\*.*\*\/"]
BLOCKS = [
    "one\ntwo",
    "name\tage\nIda\t9",
    "  indented\n\tby a tab",
    "end with\n\nblank",
]


def escapes(rng: random.Random) -> dict:
    """Backslashes, tabs and line ends, which JSON must write as escapes."""
    path, pattern, block = rng.choice(PATHS), rng.choice(PATTERNS), rng.choice(BLOCKS)
    return json_prompt(
        record(path=TEXT, pattern=TEXT, block=TEXT),
        f"Copy exactly.\nPath: {path}\nPattern: {pattern}\n"
        f"Block, all that stands between the lines of dashes:\n---\n{block}\n---",
        {"path": path, "pattern": pattern, "block": block},
    )


SCRIPTS = [
    "Žofia Müller-Łukasz",
    "Ærøskøbing",
    "東京タワー",
    "Владивосток",
    "مرحبا بالعالم",
    "नमस्ते",
    "서울역 3번 출구",
    "naïve café, déjà vu",
    "Ελληνικά",
    "שלום",
    "½ × ¾ ≈ ⅜",
    "π ≥ 3 → ∞",
    "I♥NY 🐢🚲",
    "👩‍🚀 and 👨‍👩‍👧",
    "non\u00a0breaking – dash — “quotes”",
]


def unicode(rng: random.Random) -> dict:
    """Other scripts, combining marks, emoji; in JSON or in a call."""
    first, second = rng.sample(SCRIPTS, 2)
    if rng.random() < 0.5:
        return json_prompt(
            record(left=TEXT, right=TEXT),
            f"The left label reads: {first}\nThe right label reads: {second}",
            {"left": first, "right": second},
        )
    label = tool("print_label", "Print a label", top=TEXT, bottom=TEXT, copies=WHOLE)
    copies = rng.randint(1, 40)
    return tool_prompt(
        [label],
        f"Print {copies} copies of a label.\nTop: {first}\nBottom: {second}",
        ("print_label", {"top": first, "bottom": second, "copies": copies}),
    )


def numbers(rng: random.Random) -> dict:
    """Negative, tiny, huge and many-digit numbers, to be kept exactly."""
    wanted = {
        "cold": round(-rng.uniform(0.1, 273), rng.randint(1, 3)),
        "tiny": float(f"{rng.randint(11, 99) / 10}e-{rng.randint(5, 30)}"),
        "huge": float(f"{rng.randint(101, 999) / 100}e{rng.randint(17, 40)}"),
        "count": rng.randint(2**53, 2**63),
        "precise": round(rng.random(), 12),
        "debt": -rng.randint(1_000, 9_999_999),
    }
    said = "; ".join(f"{key} is {number}" for key, number in wanted.items())
    schema = record(cold=REAL, tiny=REAL, huge=REAL, count=WHOLE, precise=REAL)
    schema["properties"]["debt"] = WHOLE
    schema["required"].append("debt")
    return json_prompt(schema, f"Keep every digit: {said}.", wanted)


# -- several calls --------------------------------------------------------------------
HOUSE = [
    tool("set_lamp", "Switch a lamp", room=TEXT, on=YES_NO),
    tool("set_heat", "Set a room's temperature", room=TEXT, degrees=REAL),
    tool("play", "Play music", title=TEXT, rooms=TEXTS),
]


def several(rng: random.Random) -> dict:
    """Three to five calls in one answer, some of the same tool."""
    calls, said = [], []
    for _ in range(rng.randint(3, 5)):
        room, other = rng.sample(["kitchen", "hall", "attic", "study", "bath"], 2)
        kind = rng.choice(["lamp", "heat", "play"])
        if kind == "lamp":
            on = rng.random() < 0.5
            calls.append(("set_lamp", {"room": room, "on": on}))
            said.append(f"switch the lamp in the {room} {'on' if on else 'off'}")
        elif kind == "heat":
            degrees = rng.randint(30, 52) / 2
            calls.append(("set_heat", {"room": room, "degrees": degrees}))
            said.append(f"heat the {room} to {degrees} degrees")
        else:
            title = f"{rng.choice(PLACES)} Waltz"
            calls.append(("play", {"title": title, "rooms": [room, other]}))
            said.append(f"play {title} in the {room} and the {other}")
    text = "Make one call for each of these, in this order: " + "; ".join(said) + "."
    return tool_prompt(rng.sample(HOUSE, 3), text, *calls)


# -- traps of type and name -----------------------------------------------------------
def empty(rng: random.Random) -> dict:
    """Empty lists, strings and objects, and null, in JSON or in a call."""
    who, label = rng.choice(PEOPLE), rng.choice(THINGS)
    if rng.random() < 0.5:
        schema = record(
            owner=TEXT,
            nickname=TEXT,
            children=TEXTS,
            options={"type": "object"},
            phone={"type": ["string", "null"]},
            pets=WHOLE,
        )
        wanted = {"owner": who, "nickname": "", "children": [], "options": {}}
        return json_prompt(
            schema,
            f"{who} has no children and 0 pets. The nickname is an empty string, the "
            f"options are an empty object, and the phone is null.",
            wanted | {"phone": None, "pets": 0},
        )
    save = tool("save_item", "Save an item", name=TEXT, note=TEXT, tags=TEXTS)
    texts = [
        f"Save the item {label} with an empty note and an empty list of tags.",
        f"Save an item: name {label}, note an empty string, no tags at all.",
    ]
    arguments = {"name": label, "note": "", "tags": []}
    return tool_prompt([save], rng.choice(texts), ("save_item", arguments))


LOOKALIKES = (
    "true false null yes no 007 1e5 0 -1 3.50 1,000 NaN None 2024-01-02".split()
)


def typed(rng: random.Random) -> dict:
    """Text that looks like a boolean or a number beside real ones."""
    word, code = rng.sample(LOOKALIKES, 2)
    flag, count = rng.random() < 0.5, rng.randint(0, 99)
    answer = "yes" if flag else "no"
    if rng.random() < 0.5:
        return json_prompt(
            record(word=TEXT, code=TEXT, active=YES_NO, count=WHOLE),
            f'The word is the text "{word}" and the code is the text "{code}". '
            f"Is it active? {answer.capitalize()}. The count is {count}.",
            {"word": word, "code": code, "active": flag, "count": count},
        )
    fill = tool("fill_in", "Fill in a form", answer=TEXT, agreed=YES_NO, pin=TEXT)
    return tool_prompt(
        [fill],
        f"Fill in the form. The answer is the word {word}. Agreed: {answer}. "
        f"The pin is the text {code}.",
        ("fill_in", {"answer": word, "agreed": flag, "pin": code}),
    )


def case(rng: random.Random) -> dict:
    """Keys that differ only by case, in JSON or in a call."""
    a, b, c = rng.sample(PEOPLE, 3)
    x, y = rng.sample(range(1, 999), 2)
    if rng.random() < 0.5:
        return json_prompt(
            record(name=TEXT, Name=TEXT, NAME=TEXT, id=WHOLE, ID=WHOLE),
            f"Key name holds {a}, key Name holds {b}, key NAME holds {c}, "
            f"key id holds {x}, key ID holds {y}.",
            {"name": a, "Name": b, "NAME": c, "id": x, "ID": y},
        )
    link = tool("link", "Link two people", a=TEXT, A=TEXT, weight=WHOLE, Weight=WHOLE)
    return tool_prompt(
        [link],
        f"Link with a = {a}, A = {b}, weight = {x} and Weight = {y}.",
        ("link", {"a": a, "A": b, "weight": x, "Weight": y}),
    )


SNIPPETS = [
    "<b>bold</b> & <i>more</i>",
    "if a < b and b > c:\n    return a",
    "</div>",
    '<a href="x?y=1&z=2">link</a>',
    "SELECT * FROM t WHERE n <> 'it''s'",
    "<parameter>",
    "x = [1, 2]\ny = {'k': None}",
    "<function name>",
    "&lt;not a tag&gt;",
    "for (i = 0; i < n; i++) {\n\ta[i] <<= 2;\n}",
]


def markup(rng: random.Random) -> dict:
    """Markup and code inside the arguments of a call, which has no escapes."""
    write = tool("write_file", "Write a file", path=TEXT, content=TEXT, append=YES_NO)
    content, append = rng.choice(SNIPPETS), rng.random() < 0.5
    path = f"{rng.choice(THINGS)}/{rng.choice(THINGS)}.txt"
    return tool_prompt(
        [write],
        f"{'Append' if append else 'Write, without appending,'} to {path} exactly "
        f"what stands between the lines of dashes:\n---\n{content}\n---",
        ("write_file", {"path": path, "content": content, "append": append}),
    )


TOPICS = {
    make.__name__: make
    for make in (
        nested,
        nested_call,
        quotes,
        escapes,
        unicode,
        numbers,
        several,
        empty,
        typed,
        case,
        markup,
    )
}
