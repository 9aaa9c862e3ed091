"""Where an answer goes wrong: the first character with which it cannot be right.

The answer is read beside the value that was wanted. Where the format leaves a choice
(order of keys, white space, escapes, 1.50 for 1.5) the answer's own choice is followed.
With what `Wrong` says, `answer[: position] + expected` is a right answer.
**But:** JSON and Qwen3.5's XML tool calls only; no value may hold </think>.
*Taught in notebooks/10.*
"""

import json
import re
from decimal import Decimal
from typing import Any

from .chat_template import THINK_END
from .toolcalls import CALL, format_tool_call

_GAP = re.compile(r"\s*")
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d{1,9})?(?![\w.+-])")
_CHARACTER = re.compile(  # of a JSON string, perhaps written as an escape
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r'|\\u[0-9a-fA-F]{4}|\\["\\/bfnrt]|[^"\\\x00-\x1f]'
)
_FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n")


class Wrong(Exception):
    """position: characters before the first wrong one. expected: a right way on."""

    def __init__(self, position: int, expected: str) -> None:
        super().__init__(f"wrong from character {position}")
        self.position = position
        self.expected = expected


def answer_start(text: str) -> int:
    """Where the answer begins: after the last </think>, if there is any."""
    found = text.rfind(THINK_END)
    return 0 if found < 0 else found + len(THINK_END)


def first_wrong_in_json(text: str, wanted: Any) -> Wrong | None:
    """The first character of a JSON answer that is wrong; None for a right answer.

    Code fences around the JSON are allowed, other text is not.
    """
    fence = _FENCE.match(text, answer_start(text))
    start = fence.end() if fence else answer_start(text)
    end = "\n```" if fence else ""
    try:
        i = _value(text, _space(text, start), wanted, end)
        i = _space(text, i)
        if fence:
            i = _space(text, _literal(text, i, "```", ""))
        if i < len(text):
            raise Wrong(i, "")
    except Wrong as wrong:
        return wrong
    return None


def first_wrong_in_calls(text: str, wanted: list[dict[str, Any]]) -> Wrong | None:
    """The first wrong character of tool calls; None if they are right.

    wanted: [{"name", "arguments"}], in order. Text around calls counts for nothing,
    but an answer without any call is wrong from its beginning.
    """
    written = [format_tool_call(c["name"], c["arguments"]) for c in wanted]
    i = answer_start(text)
    try:
        for number, call in enumerate(wanted):
            rest = written[number + 1 :]
            i = _call_start(text, i, "\n".join(written[number:]))
            i = _call(text, i, call, "".join("\n" + other for other in rest))
        if (extra := text.find(CALL, i)) >= 0:
            raise Wrong(extra, "")
    except Wrong as wrong:
        return wrong
    return None


def as_json(value: Any) -> str:
    """A value on one line, as the training dialogues write it."""
    return json.dumps(value, ensure_ascii=False)


def exact_number(value: float | Decimal) -> Decimal:
    """A number as it is written: 0.1 is a tenth. Not for booleans."""
    return Decimal(repr(value)) if isinstance(value, float) else Decimal(value)


# --- pieces of both formats -----------------------------------------------------------
# Each function reads a piece at i and returns where it ends, or raises Wrong. `then` is
# one right text after that piece: with it, what was expected is the whole rest.


def _space(text: str, i: int) -> int:
    return _SPACE.match(text, i).end()


def _gap(text: str, i: int) -> int:
    """White space of any kind, as the format has it around tags."""
    return _GAP.match(text, i).end()


def _literal(text: str, i: int, literal: str, then: str) -> int:
    """The end of what must stand at i. `then`: what comes after it."""
    if text.startswith(literal, i):
        return i + len(literal)
    n = _n_common(literal, text, i)
    raise Wrong(i + n, literal[n:] + then)


def _n_common(written: str, text: str, i: int) -> int:
    """How many characters of `written` stand at i in the text."""
    pairs = enumerate(zip(written, text[i : i + len(written)], strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(written), len(text) - i))


def _one_of(attempts: list) -> Any:
    """The result of the first attempt that succeeds.

    Raises: Wrong of the attempt that came furthest.
    """
    furthest = None
    for attempt in attempts:
        try:
            return attempt()
        except Wrong as wrong:
            if furthest is None or wrong.position > furthest.position:
                furthest = wrong
    raise furthest


# --- JSON -----------------------------------------------------------------------------


def _value(text: str, i: int, wanted: Any, then: str) -> int:
    """The end of a JSON value that begins at i."""
    if isinstance(wanted, dict):
        return _object(text, i, wanted, then)
    if isinstance(wanted, list):
        return _array(text, i, wanted, then)
    if isinstance(wanted, str):
        return _string(text, i, wanted, then)
    if isinstance(wanted, bool) or wanted is None:
        return _literal(text, i, as_json(wanted), then)
    return _number(text, i, wanted, then)


def _object(text: str, i: int, wanted: dict[str, Any], then: str) -> int:
    left, comma = dict(wanted), ""  # keys that are still to come, in any order
    i = _literal(text, i, "{", as_json(left)[1:] + then)
    while left:
        i = _space(text, i)
        if comma:
            i = _literal(text, i, ",", " " + as_json(left)[1:] + then)
            i = _space(text, i)
        i, key = _key(text, i, left, then)
        value = left.pop(key)
        comma = ","
        after = (", " + as_json(left)[1:] if left else "}") + then
        i = _space(text, i)
        i = _space(text, _literal(text, i, ":", " " + as_json(value) + after))
        i = _value(text, i, value, after)
    return _literal(text, _space(text, i), "}", then)


def _key(text: str, i: int, left: dict[str, Any], then: str) -> tuple[int, str]:
    """The end of a key and the key: any of those that are left."""

    def attempt(key: str) -> tuple[int, str]:
        others = {k: v for k, v in left.items() if k != key}
        rest = ", " + as_json(others)[1:] if others else "}"
        rest = f": {as_json(left[key])}{rest}{then}"
        return _string(text, i, key, rest), key

    return _one_of([lambda key=key: attempt(key) for key in left])


def _array(text: str, i: int, wanted: list[Any], then: str) -> int:
    i = _literal(text, i, "[", as_json(wanted)[1:] + then)
    for n, value in enumerate(wanted):
        i = _space(text, i)
        if n:
            i = _literal(text, i, ",", " " + as_json(wanted[n:])[1:] + then)
            i = _space(text, i)
        rest = ", " + as_json(wanted[n + 1 :])[1:] if n + 1 < len(wanted) else "]"
        i = _value(text, i, value, rest + then)
    return _literal(text, _space(text, i), "]", then)


def _string(text: str, i: int, wanted: str, then: str) -> int:
    i = _literal(text, i, '"', as_json(wanted)[1:] + then)
    for n, character in enumerate(wanted):
        found = _CHARACTER.match(text, i)
        if not found or json.loads(f'"{found.group()}"') != character:
            raise _wrong_character(text, i, wanted[n:], then)
        i = found.end()
    return _literal(text, i, '"', then)


def _wrong_character(text: str, i: int, rest: str, then: str) -> Wrong:
    """Inside the escape, if the answer writes one that begins rightly."""
    plain, escaped = as_json(rest)[1:], json.dumps(rest)[1:]
    written = max(plain, escaped, key=lambda w: _n_common(w, text, i))
    n = _n_common(written, text, i)
    return Wrong(i + n, written[n:] + then)


def _number(text: str, i: int, wanted: float, then: str) -> int:
    found = _NUMBER.match(text, i)
    if found and Decimal(found.group()) == exact_number(wanted):
        return found.end()
    written = as_json(wanted)
    n = _n_common(written, text, i)
    raise Wrong(i + n, written[n:] + then)


# --- XML tool calls -------------------------------------------------------------------


def _call_start(text: str, i: int, written: str) -> int:
    """Where the next <tool_call> begins, after any text."""
    if (found := text.find(CALL, i)) >= 0:
        return found
    return _literal(text, _gap(text, i), CALL, written[len(CALL) :])  # raises


def _call(text: str, i: int, wanted: dict[str, Any], then: str) -> int:
    """The end of one call that begins at i."""
    left = dict(wanted["arguments"])
    head = f"<function={wanted['name']}>"
    rest = "\n" + _parameters(left, then)
    i = _gap(text, _literal(text, i, CALL, "\n" + head + rest))
    i = _literal(text, i, head, rest)
    while left:
        i = _gap(text, i)
        i, key = _parameter_start(text, i, left, then)
        value = left.pop(key)
        i = _parameter_value(text, i, value, "\n" + _parameters(left, then))
    i = _literal(text, _gap(text, i), "</function>", "\n</tool_call>" + then)
    return _literal(text, _gap(text, i), "</tool_call>", then)


def _parameters(arguments: dict[str, Any], then: str) -> str:
    """What is to follow once the function's name, or a parameter, is written."""
    call = format_tool_call("f", arguments)
    return call[len(f"{CALL}\n<function=f>\n") :] + then


def _parameter_start(
    text: str, i: int, left: dict[str, Any], then: str
) -> tuple[int, str]:
    def attempt(key: str) -> tuple[int, str]:
        others = {k: v for k, v in left.items() if k != key}
        tag = f"<parameter={key}>"
        rest = _parameters({key: left[key]} | others, then)
        return _literal(text, i, tag, rest[len(tag) :]), key

    return _one_of([lambda key=key: attempt(key) for key in left])


def _parameter_value(text: str, i: int, wanted: Any, then: str) -> int:
    """The end of </parameter> after a value: strings raw, all else as JSON."""
    end = "</parameter>"
    if not isinstance(wanted, str):
        i = _gap(text, i)
        if isinstance(wanted, bool) or wanted is None:  # coerce() reads Python's too
            for word in (as_json(wanted), str(wanted).lower()):
                if text[i : i + len(word)].lower() == word:
                    return _literal(text, _gap(text, i + len(word)), end, then)
        i = _value(text, i, wanted, f"\n{end}{then}")
        return _literal(text, _gap(text, i), end, then)
    # The parser takes one line end off on each side, so these are the same value.
    frames = [("\n", "\n"), ("\n", ""), ("", "\n"), ("", "")]
    fit = [
        before + wanted + after + end
        for before, after in frames
        if (before + wanted + after).removeprefix("\n").removesuffix("\n") == wanted
    ]
    return _one_of([lambda w=w: _literal(text, i, w, then) for w in fit])
