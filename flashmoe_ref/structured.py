"""Scores one answer in stages: a tool call in Qwen3.5's XML form, or JSON.

Each stage asks more than the one before: does it parse, does it name a declared tool,
do keys and types match the schema, are the values right? Order of keys, white space,
escapes and the spelling of numbers are free; order of calls and of lists is not.
**But:** right means equal to one wanted answer; a good paraphrase counts as wrong.
*Taught in notebooks/10.*
"""

import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from .first_wrong import (
    Wrong,
    answer_start,
    exact_number,
    first_wrong_in_calls,
    first_wrong_in_json,
)
from .toolcalls import ToolCall, coerce, parse_tool_calls

STAGES = {
    "tool": ("parses", "declared", "fits", "right"),
    "json": ("parses", "fits", "right"),
}
_FENCED = re.compile(r"\s*```(?:json)?[ \t]*\n(.*?)\n?\s*```\s*", re.DOTALL)
_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
}


@dataclass(frozen=True)
class Score:
    """How far an answer got.

    passed:   how many stages of STAGES[kind] it passed, 0 to all.
    reason:   why it got no further, in one line; "" if it is right.
    position: characters before the first wrong one, also where the fault lies later;
              None if the answer is right.
    expected: what would have made it right: text[:position] + expected is right.
    """

    kind: str  # tool | json
    passed: int
    reason: str = ""
    position: int | None = None
    expected: str = ""

    @property
    def stage(self) -> str:
        """The furthest stage passed; "none" for an answer that does not parse."""
        return STAGES[self.kind][self.passed - 1] if self.passed else "none"

    @property
    def is_right(self) -> bool:
        """Passed every stage."""
        return self.passed == len(STAGES[self.kind])


def score_tool_calls(
    text: str, tools: list[dict[str, Any]], wanted: list[dict[str, Any]]
) -> Score:
    """Score the tool calls in an answer.

    tools:  JSON schemas as given to the chat template.
    wanted: the calls to make, in order: [{"name": ..., "arguments": {...}}, ...].
    Text before, between and after calls is allowed; thinking is skipped. Values are
    read as `toolcalls.coerce` does: True will do for true, and 3.0 for 3.
    """
    wrong = first_wrong_in_calls(text, wanted)
    _, calls = parse_tool_calls(text[answer_start(text) :])  # without types: raw values
    declared = {tool["name"]: tool for tool in (t.get("function", t) for t in tools)}
    fault = _fault_of_form(calls)
    if fault:
        return _score("tool", 0, fault, wrong)
    for call in calls:
        if call.name not in declared:
            return _score("tool", 1, f"no tool is called {call.name!r}", wrong)
    found = []
    for call in calls:
        try:
            parameters = declared[call.name].get("parameters") or {}
            found.append((call.name, _typed_arguments(call, parameters)))
        except ValueError as error:
            return _score("tool", 2, f"{call.name}: {error}", wrong)
    fault = _fault_of_calls(found, wanted)
    return _score("tool", 3, fault, wrong) if fault else Score("tool", 4)


def score_json(text: str, schema: dict[str, Any], wanted: Any) -> Score:
    """Score an answer that is to be one JSON value and nothing else.

    schema: JSON schema of the value; `fault_of_schema` says what of it is checked.
    A code fence around the JSON is allowed, as clients remove it; thinking is skipped.
    """
    wrong = first_wrong_in_json(text, wanted)
    answer = text[answer_start(text) :]
    fenced = _FENCED.fullmatch(answer)
    try:
        found = read_json(fenced.group(1) if fenced else answer)
    except ValueError as error:
        return _score("json", 0, f"cannot be read: {error}", wrong)
    if fault := fault_of_schema(found, schema):
        return _score("json", 1, fault, wrong)
    if fault := _difference(found, wanted):
        return _score("json", 2, fault, wrong)
    return Score("json", 3)


def read_json(text: str) -> Any:
    """JSON read strictly: decimals exact, no NaN, no key twice in one object.

    Raises: ValueError in one line.
    """
    try:
        return json.loads(
            text,
            parse_float=Decimal,
            parse_constant=_refuse,
            object_pairs_hook=_unique,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ArithmeticError as error:
        raise ValueError("a number beyond all limits") from error


def fault_of_schema(
    value: Any, schema: dict[str, Any], where: str = "the answer"
) -> str:
    """What of a JSON schema a value breaks, in one line; "" if nothing.

    Checked: type, enum, properties, required, items. Keys beyond `properties` are a
    fault where a schema lists any.
    """
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_is_of_type(value, kind) for kind in types):
        return f"{where} is {_shown(value)}, not of type {' or '.join(types)}"
    if "enum" in schema and not any(not _difference(value, e) for e in schema["enum"]):
        return f"{where} is {_shown(value)}, not one of {_shown(schema['enum'])}"
    if isinstance(value, dict) and "properties" in schema:
        return _fault_of_keys(value, schema, where)
    if isinstance(value, list):
        for n, item in enumerate(value):
            if fault := fault_of_schema(
                item, schema.get("items", {}), f"item {n} of {where}"
            ):
                return fault
    return ""


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share; z = 1.96 for 95 %. Without trials: (0, 1).

    Source: E. B. Wilson, Probable inference (1927). Assumes independent trials.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    if n == 0:
        return 0.0, 1.0
    p, spread = successes / n, z * z / n
    middle = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / n + spread / n / 4) / (1 + spread)
    low, high = min(p, middle - half), max(p, middle + half)  # against rounding
    return max(0.0, low), min(1.0, high)


def _score(kind: str, passed: int, reason: str, wrong: Wrong | None) -> Score:
    reason = " ".join(reason.split())
    if wrong is None:  # the schema refuses what is wanted: a fault of the set
        return Score(kind, passed, reason)
    return Score(kind, passed, reason, wrong.position, wrong.expected)


def _fault_of_form(calls: list[ToolCall]) -> str:
    if not calls:
        return "no tool call in the answer"
    return next((f"{call.error}" for call in calls if call.error), "")


def _typed_arguments(call: ToolCall, parameters: dict[str, Any]) -> dict[str, Any]:
    """The raw arguments as their schema wants them. Raises: ValueError."""
    schemas = parameters.get("properties") or {}
    typed = {}
    for key, raw in call.arguments.items():
        value = coerce(raw, schemas.get(key))  # decides what kind of value it is
        is_exact = isinstance(value, str | bool) or value is None
        typed[key] = value if is_exact else read_json(raw.strip())
    if fault := _fault_of_keys(typed, parameters, "the call"):
        raise ValueError(fault)
    return typed


def _fault_of_keys(value: dict[str, Any], schema: dict[str, Any], where: str) -> str:
    known = schema.get("properties") or {}
    for key in schema.get("required", []):
        if key not in value:
            return f"{where} lacks {key!r}"
    for key, part in value.items():
        if key not in known:
            return f"{where} has {key!r}, which the schema does not"
        if fault := fault_of_schema(part, known[key], f"{key!r}"):
            return fault
    return ""


def _fault_of_calls(
    found: list[tuple[str, dict[str, Any]]], wanted: list[dict[str, Any]]
) -> str:
    for (name, arguments), call in zip(found, wanted, strict=False):
        if name != call["name"]:
            return f"calls {name!r}, not {call['name']!r}"
        if fault := _difference(arguments, call["arguments"], name):
            return fault
    if len(found) != len(wanted):
        return f"number of calls is {len(found)}, not {len(wanted)}"
    return ""


def _difference(found: Any, wanted: Any, where: str = "the answer") -> str:
    """Where two JSON values differ, in one line; "" if they are the same.

    Numbers are compared by value (5 is 5.0), and true is not 1.
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        return _difference_of_objects(found, wanted, where)
    if isinstance(found, list) and isinstance(wanted, list):
        for n, (a, b) in enumerate(zip(found, wanted, strict=False)):
            if fault := _difference(a, b, f"item {n} of {where}"):
                return fault
        n_found, n_wanted = len(found), len(wanted)
        same = n_found == n_wanted
        return "" if same else f"{where} has {n_found} items, not {n_wanted}"
    if _is_of_type(found, "number") and _is_of_type(wanted, "number"):
        same = exact_number(found) == exact_number(wanted)
    else:
        same = type(found) is type(wanted) and found == wanted
    return "" if same else f"{where} is {_shown(found)}, not {_shown(wanted)}"


def _difference_of_objects(
    found: dict[str, Any], wanted: dict[str, Any], where: str
) -> str:
    for key, value in wanted.items():
        if key not in found:
            return f"{where} lacks {key!r}"
        if fault := _difference(found[key], value, f"{key!r}"):
            return fault
    extra = [key for key in found if key not in wanted]
    return f"{where} has {extra[0]!r}, which was not wanted" if extra else ""


def _is_of_type(value: Any, kind: str) -> bool:
    """As JSON schema has it: 3.0 is an integer, true is no number."""
    if kind in ("integer", "number"):
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
            return False
        return kind == "number" or exact_number(value).to_integral_value() == value
    return kind not in _TYPES or isinstance(value, _TYPES[kind])


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} is given twice")
        found[key] = value
    return found
