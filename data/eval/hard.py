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
    name, other = rng.sample(PEOPLE, 2)
    city, goal = rng.sample(PLACES, 2)
    if rng.random() < 0.5:
        items = [
            {"item": item, "price": rng.randint(100, 9999) / 100}
            for item in rng.sample(THINGS, rng.randint(2, 3))
        ]
        street = rng.choice(STREETS)
        said = ", ".join(f"{part['item']} for {part['price']}" for part in items)
        owner = {"name": name, "address": {"city": city, "street": street}}
        return json_prompt(
            record(
                owner=record(name=TEXT, address=record(city=TEXT, street=TEXT)),
                items=rows(item=TEXT, price=REAL),
            ),
            f"The shop of {name}, {street} in {city}, sells in this order: {said}.",
            {"owner": owner, "items": items},
        )
    row, hour = rng.randint(1, 60), rng.randint(0, 23)
    return json_prompt(
        record(
            passengers=record(driver=TEXT, guest=record(name=TEXT, row=WHOLE)),
            trip=record(start=record(city=TEXT, hour=WHOLE), end=TEXT),
        ),
        f"{name} drives. The guest is {other}, in row {row}. It starts in {city} at "
        f"hour {hour} and ends in {goal}.",
        {
            "passengers": {"driver": name, "guest": {"name": other, "row": row}},
            "trip": {"start": {"city": city, "hour": hour}, "end": goal},
        },
    )


def nested_call(rng: random.Random) -> dict:
    """One call whose arguments are objects and lists of objects."""
    items = [
        {"item": item, "count": rng.randint(1, 20)}
        for item in rng.sample(THINGS, rng.randint(2, 3))
    ]
    shop = {"name": rng.choice(PEOPLE), "city": rng.choice(PLACES)}
    urgent = rng.random() < 0.5
    buy = tool(
        "buy_list",
        "Add to the shopping list",
        items=rows(item=TEXT, count=WHOLE),
        shop=record(name=TEXT, city=TEXT),
        urgent=YES_NO,
    )
    said = ", ".join(f"{part['count']} of {part['item']}" for part in items)
    return tool_prompt(
        [buy],
        f"Add to the list {said}. The shop is that of {shop['name']} in "
        f"{shop['city']}. It is {'' if urgent else 'not '}urgent.",
        ("buy_list", {"items": items, "shop": shop, "urgent": urgent}),
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
    title, text = rng.sample(QUOTED, 2)
    author = rng.choice(PEOPLE)
    return json_prompt(
        record(author=TEXT, title=TEXT, text=TEXT),
        f"The author is {author}. Title and text, a line each, word for word:\n"
        f"{title}\n{text}",
        {"author": author, "title": title, "text": text},
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
        record(file=TEXT, code=TEXT, text=TEXT),
        f"The file is {path}\nThe code is {pattern}\n"
        f"The text is all that stands between the lines of dashes:\n---\n{block}\n---",
        {"file": path, "code": pattern, "text": block},
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
            record(name=TEXT, city=TEXT),
            f"The name is: {first}\nThe city is: {second}",
            {"name": first, "city": second},
        )
    send = tool("send_message", "Send a message to a person", to=TEXT, text=TEXT)
    return tool_prompt(
        [send],
        f"Send a message.\nTo: {first}\nText: {second}",
        ("send_message", {"to": first, "text": second}),
    )


def numbers(rng: random.Random) -> dict:
    """Negative, tiny, huge and many-digit numbers, to be kept exactly."""
    wanted = {
        "score": round(-rng.uniform(0.1, 273), rng.randint(1, 3)),
        "weight": float(f"{rng.randint(11, 99) / 10}e-{rng.randint(5, 30)}"),
        "price": float(f"{rng.randint(101, 999) / 100}e{rng.randint(17, 40)}"),
        "count": rng.randint(2**53, 2**63),
        "size": round(rng.random(), 12),
        "total": -rng.randint(1_000, 9_999_999),
    }
    said = "; ".join(f"{key} is {number}" for key, number in wanted.items())
    schema = record(score=REAL, weight=REAL, price=REAL, count=WHOLE, size=REAL)
    schema["properties"]["total"] = WHOLE
    schema["required"].append("total")
    return json_prompt(schema, f"Keep every digit: {said}.", wanted)


# -- several calls --------------------------------------------------------------------
HOUSE = [
    tool("light", "Switch the lights", room=TEXT, on=YES_NO),
    tool("set_timer", "Start a timer", minutes=WHOLE, label=TEXT),
    tool("play_song", "Play a piece of music", song=TEXT, volume=WHOLE),
]


def several(rng: random.Random) -> dict:
    """Four to six calls in one answer, some of the same tool."""
    calls, said = [], []
    for _ in range(rng.randint(4, 6)):
        kind, number = rng.choice(["light", "timer", "song"]), rng.randint(1, 90)
        if kind == "light":
            room = rng.choice(["kitchen", "hall", "attic", "study", "bath"])
            on = rng.random() < 0.5
            calls.append(("light", {"room": room, "on": on}))
            said.append(f"Turn the {room} light {'on' if on else 'off'}.")
        elif kind == "timer":
            label = rng.choice(THINGS)
            calls.append(("set_timer", {"minutes": number, "label": label}))
            said.append(f"Start a timer of {number} minutes for the {label}.")
        else:
            song = f"The {rng.choice(PLACES)} Waltz"
            calls.append(("play_song", {"song": song, "volume": number}))
            said.append(f"Play {song} at volume {number}.")
    return tool_prompt(rng.sample(HOUSE, 3), " And then: ".join(said), *calls)


# -- traps of type and name -----------------------------------------------------------
def empty(rng: random.Random) -> dict:
    """Empty lists, strings and objects, and null, in JSON or in a call."""
    who, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    if rng.random() < 0.5:
        maybe = {"type": ["string", "null"]}
        inside = {"type": "object"}
        return json_prompt(
            record(owner=TEXT, text=TEXT, tags=TEXTS, contents=inside, phone=maybe),
            f"The owner is {who}. The text is an empty string and the tags are an "
            "empty list. The contents are an empty object. The phone is null.",
            {"owner": who, "text": "", "tags": [], "contents": {}, "phone": None},
        )
    plan = tool("add_event", "Plan", title=TEXT, time=TEXT, guests=TEXTS)
    texts = [
        f"Plan the event {thing}. The time is an empty string, the guests an empty "
        "list.",
        f"Make an event {thing}, with no guests, and with an empty text as its time.",
    ]
    arguments = {"title": thing, "time": "", "guests": []}
    return tool_prompt([plan], rng.choice(texts), ("add_event", arguments))


LOOKALIKES = (
    "true false null yes no 007 1e5 0 -1 3.50 1,000 NaN None 2024-01-02".split()
)


def typed(rng: random.Random) -> dict:
    """Text that looks like a boolean or a number beside real ones."""
    word, code = rng.sample(LOOKALIKES, 2)
    flag, line = rng.random() < 0.5, rng.randint(1, 99)
    if rng.random() < 0.5:
        return json_prompt(
            record(name=TEXT, code=TEXT, solved=YES_NO, line=WHOLE),
            f"The name is {word}. The code is {code}. "
            f"It is {'' if flag else 'not '}solved. See line {line}.",
            {"name": word, "code": code, "solved": flag, "line": line},
        )
    show = tool("open_file", "Open a file", file=TEXT, code=TEXT, line=WHOLE)
    return tool_prompt(
        [show],
        f"Open the file {word}. The code is {code}. Begin at line {line}.",
        ("open_file", {"file": word, "code": code, "line": line}),
    )


def case(rng: random.Random) -> dict:
    """Keys that differ only by case, in JSON or in a call."""
    a, b, c = rng.sample(PEOPLE, 3)
    x, y = rng.sample(range(1, 999), 2)
    if rng.random() < 0.5:
        return json_prompt(
            record(name=TEXT, Name=TEXT, NAME=TEXT, id=WHOLE, ID=WHOLE),
            f"The name is {a}, the Name is {b}, the NAME is {c}, the id is {x} and "
            f"the ID is {y}.",
            {"name": a, "Name": b, "NAME": c, "id": x, "ID": y},
        )
    table = tool("book_table", "Reserve", name=TEXT, Name=TEXT, people=WHOLE)
    return tool_prompt(
        [table],
        f"Book a table for {x} people. The name is {a} and the Name is {b}.",
        ("book_table", {"name": a, "Name": b, "people": x}),
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
    send = tool("send_message", "Send", to=TEXT, text=TEXT, urgent=YES_NO)
    text, urgent = rng.choice(SNIPPETS), rng.random() < 0.5
    person = rng.choice(PEOPLE)
    return tool_prompt(
        [send],
        f"It is {'' if urgent else 'not '}urgent. Send {person} this message, all that "
        f"stands between the lines of dashes:\n---\n{text}\n---",
        ("send_message", {"to": person, "text": text, "urgent": urgent}),
    )


KEYS = "tariff_zone firstNote x-origin retry_after Gauge spindle_rpm batchNo".split()


def names(rng: random.Random) -> dict:
    """Tools and keys named as nothing in training was; plain values."""
    first, second, third = rng.sample(KEYS, 3)
    word, person, number = rng.choice(THINGS), rng.choice(PEOPLE), rng.randint(1, 999)
    text = f"The {first} is {word}, the {second} is {person}, the {third} is {number}."
    wanted = {first: word, second: person, third: number}
    properties = {first: TEXT, second: TEXT, third: WHOLE}
    if rng.random() < 0.5:
        return json_prompt(record(**properties), text, wanted)
    name = rng.choice(["calibrate_sensor", "post_entry", "grantAccess", "seal-crate"])
    about = rng.choice(["Calibrate", "Post an entry", "Grant access", "Seal a crate"])
    return tool_prompt(
        [tool(name, about, **properties)], f"Call {name}. {text}", (name, wanted)
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
        names,
    )
}
