"""Damaged inputs, made from good ones: seeded, so that number i is always the same.

`mutant(source, kind, i)` gives the i-th damaged form of a file's bytes. JSON is damaged
by its structure (delete, repeat, retype, extremes, nest, swap), tables by rows and
fields, anything by its bytes (flip, truncate, insert, splice, lengths). `distinct`
leaves out what came before. `fuzz.py` feeds them to readers.
"""

import json
import random
from collections.abc import Callable, Iterator
from itertools import count
from json.encoder import encode_basestring_ascii

DEEP = 100_000  # levels: more than any parser's stack
DIGITS = 5000  # more than int() takes
# What stands where something else was expected, as JSON text.
EXTREMES = (
    *("0", "-0", "1", "-1", "2", "3", "7", "0.5", "1.0", "-0.0", "1e3", "1E2"),
    *("2147483647", "2147483648", "4294967296", "9223372036854775807"),
    *("9223372036854775808", "18446744073709551615", "18446744073709551616"),
    *(
        "1000000000000",
        "1" + "0" * 40,
        "1" + "0" * 400,
        "9" * DIGITS,
        "-" + "9" * DIGITS,
    ),
    *("1e308", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "5e-324"),
    *("null", "true", "false", '""', '"x"', '"0"', '"1"', '"true"', '" "'),
    *("[]", "{}", "[0]", "[null]", '{"a":1}', "[[]]", "[1,2,3]", '[""]'),
    *('"\\u0000"', '"\\ud800"', '"\\n"', '"../x"', '"/"', '".."', '"."'),
    *('"é\\u0301😀"', '"%s%d{0}"', '"' + "long " * 4000 + '"', '"\\u202e"'),
    *(
        "[" * 200 + "]" * 200,
        "[" * DEEP + "]" * DEEP,
        '{"a":' * DEEP + "1" + "}" * DEEP,
    ),
    *("01", "+1", ".5", "1.", "0x10", "1_0", "'x'", "nan", "None", "True", "/**/1"),
)
FIELDS = (  # of a table
    *("", " ", "0", "-0", "-1", "1", "007", "1.0", "1e3", "1_0", "+1", "0x1", "nan"),
    *("inf", "-inf", "1e999", "32767", "32768", "2147483648", "1" + "0" * 40),
    *("9" * DIGITS, "true", "None", "x", "é", "\u0661\u0662", "²", '"', '"a', 'a"b'),
    *('"a\nb"', "a,b", "#1", "1;2", "\t1", "=1+1", "\ufeff1", "x" * 200_000, "\0"),
)
WHOLE = (  # in place of the file
    b"",
    b"\0",
    b" ",
    b"\n" * 9,
    b"\xff\xfe{\0}\0",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"<!DOCTYPE html><html>404</html>",
    b"null",
    b"[]",
    b"{}",
    b'"x"',
    b"1",
    b"NaN",
    b"PK\x03\x04",
    bytes(range(256)),
    b"[" * DEEP,
    b'{"a":' * DEEP,
    b"9" * 100_000,
)
LENGTHS = (0, 1, 7, 8, 9, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63)
N_DUPLICATES = 200_000  # in a row, until a source is held to give no more

Mutator = Callable[[bytes, random.Random], bytes]


def mutant(source: bytes, kind: str, i: int, change: Mutator) -> bytes:
    """Number i of a kind: the same bytes in every run."""
    return change(source, random.Random(f"{kind}/{i}"))


def distinct(
    source: bytes, kind: str, n: int, change: Mutator
) -> Iterator[tuple[int, bytes]]:
    """n mutants with their numbers; none equals the source or one before it."""
    seen = {hash(source)}
    for i in count():
        made = mutant(source, kind, i, change)
        if hash(made) not in seen:
            seen.add(hash(made))
            yield i, made
        if len(seen) > n:
            return
        assert i < N_DUPLICATES, f"{kind}: only {len(seen) - 1} distinct mutants"


# --- any bytes ------------------------------------------------------------------------


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat, overwrite, move; or another file altogether."""
    if rng.random() < 0.02:
        return rng.choice(WHOLE)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_BYTE_CHANGES)(data, rng)
    return data


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    """A range of bytes, mostly a short one."""
    start = rng.randrange(len(data) + 1)
    length = rng.choice((1, 2, 4, 8, 16, rng.randrange(1, len(data) + 2)))
    return start, min(len(data), start + length)


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    i = rng.randrange(len(data))
    return data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _remove(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[end:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:end] + data[start:end] * rng.choice((1, 1, 2, 50)) + data[end:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    i = rng.randrange(len(data) + 1)
    text = rng.choice((*EXTREMES, *FIELDS, *'{}[]",:<>/\n')).encode("utf-8", "replace")
    return data[:i] + rng.choice((text, rng.randbytes(rng.randrange(1, 9)))) + data[i:]


def _move(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    i = rng.randrange(len(data) + 1)
    rest = data[:start] + data[end:]
    return rest[:i] + data[start:end] + rest[i:]


def _length(data: bytes, rng: random.Random) -> bytes:
    """Write a number over some bytes, as formats write lengths."""
    width = rng.choice((2, 4, 8))
    near = max(0, len(data) + rng.randrange(-9, 10))
    value = rng.choice((*LENGTHS, near, rng.randrange(300)))
    i = rng.choice((0, rng.randrange(len(data) + 1)))
    number = value.to_bytes(9, "little")[:width]
    return data[:i] + number + data[i + width :]


def _digits(data: bytes, rng: random.Random) -> bytes:
    """Replace a digit by others."""
    places = [i for i, byte in enumerate(data[:5000]) if 48 <= byte < 58]
    if not places:
        return data
    i = rng.choice(places)
    new = rng.choice((b"", b"0", b"9", b"-", b"00", b"99999999999", b".", b"e9"))
    return data[:i] + new + data[i + 1 :]


_BYTE_CHANGES = (
    *(_flip, _flip, _cut, _remove, _repeat, _insert, _insert, _move, _length),
    *(_digits, _digits),
)


# --- JSON -----------------------------------------------------------------------------


class Pairs(list):
    """An object as a list of [key, value], in which a key may stand twice."""


class Raw(str):
    """A value as JSON text, perhaps not a valid one."""


def _as_lists(pairs: list[tuple[str, object]]) -> Pairs:
    return Pairs(map(list, pairs))


def dump(value: object) -> str:
    """The text of what `json.loads(..., object_pairs_hook=...)` made here."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{dump(k)}:{dump(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    return json.dumps(value)


def change_json(data: bytes, rng: random.Random) -> bytes:
    """Change values and structure of a JSON text; now and then its bytes as well."""
    if rng.random() < 0.15:
        return change_bytes(data, rng)
    tree = [json.loads(data, object_pairs_hook=_as_lists)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if places := _places(tree):
            owner, key = rng.choice(places)
            rng.choice(_JSON_CHANGES)(tree, owner, key, rng)
    data = dump(tree[0]).encode("utf-8", "surrogatepass") if tree else b""
    return change_bytes(data, rng) if rng.random() < 0.05 else data


def _places(tree: list) -> list[tuple[list, int]]:
    """Where all values stand: the list that holds one, and its index.

    The value of an object's key stands at index 1 of its pair.
    """
    found, left = [], [tree]
    while left:
        owner = left.pop()
        for i, value in enumerate(owner):
            if isinstance(owner, Pairs):
                found.append((value, 1))
                value = value[1]
            else:
                found.append((owner, i))
            if isinstance(value, list):
                left.append(value)
    return found


def _owner_of(tree: list, pair: list) -> tuple[list, int] | None:
    """The object that holds a pair, and at which index."""
    left = [tree]
    while left:
        owner = left.pop()
        for i, value in enumerate(owner):
            if isinstance(owner, Pairs):
                if value is pair:
                    return owner, i
                value = value[1]
            if isinstance(value, list):
                left.append(value)
    return None


def _put_extreme(tree: list, owner: list, key: int, rng: random.Random) -> None:
    owner[key] = Raw(rng.choice(EXTREMES))


def _retype(tree: list, owner: list, key: int, rng: random.Random) -> None:
    value = owner[key]
    text = dump(value)
    forms = (json.dumps(text), f"[{text}]", f'{{"a":{text}}}', f"[{text},{text}]")
    owner[key] = Raw(rng.choice(forms))


def _nudge(tree: list, owner: list, key: int, rng: random.Random) -> None:
    """A number near by, or a text with a character changed."""
    value = owner[key]
    if type(value) in (int, float):
        near = (value + 1, value - 1, value * 2, value // 2, -value, float(value))
        owner[key] = rng.choice(near)
    elif isinstance(value, str) and value and not isinstance(value, Raw):
        i = rng.randrange(len(value))
        new = rng.choice(("", "x", "0", ".", "/", value[i] * 2, value[i].swapcase()))
        owner[key] = value[:i] + new + value[i + 1 :]
    else:
        _put_extreme(tree, owner, key, rng)


def _delete(tree: list, owner: list, key: int, rng: random.Random) -> None:
    if (found := _owner_of(tree, owner)) and key == 1:
        del found[0][found[1]]
    else:
        del owner[key]


def _twice(tree: list, owner: list, key: int, rng: random.Random) -> None:
    """A key, or an item, stands twice; the second time perhaps with another value."""
    if (found := _owner_of(tree, owner)) and key == 1:
        value = rng.choice((owner[1], Raw(rng.choice(EXTREMES))))
        found[0].insert(rng.randrange(len(found[0]) + 1), [owner[0], value])
    elif owner is not tree:
        owner.insert(key, owner[key])


def _rename(tree: list, owner: list, key: int, rng: random.Random) -> None:
    """Another name for a key, perhaps that of its neighbour."""
    if (found := _owner_of(tree, owner)) and key == 1:
        others = [pair[0] for pair in found[0]]
        new = (f"{owner[0]}x", owner[0][:-1], owner[0].upper(), "", "__metadata__")
        owner[0] = rng.choice((*new, *others))
    else:
        _put_extreme(tree, owner, key, rng)


def _nest(tree: list, owner: list, key: int, rng: random.Random) -> None:
    n, text = rng.choice((2, 30, 1200, DEEP)), dump(owner[key])
    left, right = rng.choice((("[", "]"), ('{"a":', "}")))
    owner[key] = Raw(left * n + text + right * n)


def _splice(tree: list, owner: list, key: int, rng: random.Random) -> None:
    """A value from somewhere else in the file."""
    other, place = rng.choice(_places(tree))
    owner[key] = Raw(dump(other[place]))


def _exchange(tree: list, owner: list, key: int, rng: random.Random) -> None:
    other, place = rng.choice(_places(tree))
    texts = dump(owner[key]), dump(other[place])
    other[place], owner[key] = map(Raw, texts)


_JSON_CHANGES = (
    *(_put_extreme, _put_extreme, _put_extreme, _nudge, _nudge, _nudge, _retype),
    *(_delete, _delete, _twice, _rename, _splice, _exchange, _nest),
)


# --- tables ---------------------------------------------------------------------------


def change_table(data: bytes, rng: random.Random) -> bytes:
    """Change fields, rows and columns of a CSV text; now and then its bytes."""
    if rng.random() < 0.2:
        return change_bytes(data, rng)
    rows = [line.split(",") for line in data.decode().split("\n")]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(_TABLE_CHANGES)(rows, rng)
    end = rng.choice(("\n",) * 9 + ("\r\n", "\r", "\n\n"))
    return end.join(map(",".join, rows)).encode("utf-8", "surrogatepass")


def _change_field(rows: list, rng: random.Random) -> None:
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = rng.choice(FIELDS)


def _nudge_field(rows: list, rng: random.Random) -> None:
    row = rng.choice(rows)
    i = rng.randrange(len(row))
    try:
        row[i] = str(int(row[i]) + rng.choice((-1, 1, 2, 100, 2**40)))
    except ValueError:
        row[i] = rng.choice((row[i].upper(), f" {row[i]} ", f'"{row[i]}"', row[i][:-1]))


def _change_rows(rows: list, rng: random.Random) -> None:
    i, j = rng.randrange(len(rows)), rng.randrange(len(rows))
    change = rng.randrange(4)
    if change == 0 and len(rows) > 1:
        del rows[i]
    elif change == 1:
        rows.insert(i, [*rows[j]])
    elif change == 2:
        rows[i], rows[j] = rows[j], rows[i]
    else:
        rows[i] = rows[i][: rng.randrange(len(rows[i]))] or [""]


def _change_column(rows: list, rng: random.Random) -> None:
    i, j = (rng.randrange(len(rows[0])) for _ in range(2))
    change = rng.randrange(3)
    for row in rows:
        if len(row) <= max(i, j):
            continue
        if change == 0 and len(row) > 1:
            del row[i]
        elif change == 1:
            row.insert(i, row[j])
        else:
            row[i], row[j] = row[j], row[i]


_TABLE_CHANGES = (
    *(_change_field, _change_field, _change_field, _nudge_field, _nudge_field),
    *(_change_rows, _change_rows, _change_column),
)
