"""Qwen3.5's XML tool calls: read from finished text or from a stream, and written.

A call looks like this; several may follow each other, text may come before:

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Oslo
    </parameter>
    </function>
    </tool_call>

The format has no escapes: a value ends at the </parameter> that another parameter or
the end of the call follows, a call at the first </tool_call>.
**But:** cut off the thinking (up to </think>) first. Types come from the tools' JSON
schemas, which are otherwise not enforced: a missing argument is the tool's business.
*Taught in notebooks/04.*
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import TokenizerError

CALL, CALL_END = "<tool_call>", "</tool_call>"
MAX_ERRORS = 5  # of a call that are told: the model reads them
MAX_NESTED = 20  # choices inside choices of a schema
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(
    r"\s*<parameter=([^>\n]+)>(.*?)</parameter>\s*(?=<parameter=|\Z)", re.DOTALL
)


@dataclass(frozen=True)
class ToolCall:
    """One call that the model made.

    error: None, or what is wrong with it, in words that can be given to the user or
           back to the model. name and arguments then hold what could be read.
    text:  the call as the model wrote it, without the tags around it.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    text: str = field(default="", compare=False, repr=False)


def _constant(value: str, **meanings: Any) -> Any:
    if value.lower() not in meanings:
        raise ValueError
    return meanings[value.lower()]


def _json(value: str, *kinds: type) -> Any:
    """A JSON value of one of the kinds; true is not a number here."""
    try:
        found = json.loads(value)
    except RecursionError as error:
        raise ValueError from error
    if type(found) not in kinds:
        raise ValueError
    if isinstance(found, float) and not math.isfinite(found):  # NaN, 1e999
        raise ValueError
    return found


def _integer(value: str) -> int:
    found = _json(value, int, float)
    if found != int(found):  # 3.0 will do, 3.5 not
        raise ValueError
    return int(found)


# In this order where a schema allows several. Models also write Python's True and None.
_READERS: dict[str, Callable[[str], Any]] = {
    "null": lambda value: _constant(value, null=None, none=None),
    "boolean": lambda value: _constant(value, true=True, false=False),
    "integer": _integer,
    "number": lambda value: _json(value, int, float),
    "array": lambda value: _json(value, list),
    "object": lambda value: _json(value, dict),
}


def coerce(value: str, schema: dict[str, Any] | None) -> Any:
    """A raw value as the type that a JSON schema asks for; a string without one.

    Of several types ("anyOf", or a list) the first that fits, strings last.
    Raises: ValueError saying what the value is not.
    """
    types = _types(schema)
    for kind, read in _READERS.items():
        if kind in types:
            try:
                return read(value.strip())
            except ValueError:
                continue
    if not types or not types <= _READERS.keys():
        return value  # a string, or a type that JSON schema does not know
    raise ValueError(f"{_shortened(value)} is not of type {' or '.join(sorted(types))}")


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    named = schema.get("type")
    types = {named} if isinstance(named, str) else set(named or [])
    for choice in ("anyOf", "oneOf"):
        for option in schema.get(choice) or []:
            types |= _types(option) or {"string"}
    return types


def _parameter_schemas(
    name: str, tools: list[dict[str, Any]] | None
) -> dict[str, dict[str, Any]]:
    """{parameter: JSON schema} of a tool; {} if there is no such tool or no schema."""
    for tool in tools or []:
        function = tool.get("function", tool)  # with or without OpenAI's wrapper
        if function.get("name") == name:
            return (function.get("parameters") or {}).get("properties") or {}
    return {}


def fault_of_tool(tool: object) -> str | None:
    """What is wrong with a tool's schema as far as calls are read by it, or None."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return (
            "has no name; a tool is "
            '{"type": "function", "function": {"name": ..., "parameters": ...}}'
        )
    parameters = function.get("parameters") or {}
    schemas = parameters.get("properties") or {} if isinstance(parameters, dict) else 0
    if not isinstance(schemas, dict):
        return "has parameters or properties that are no JSON object"
    for name, schema in schemas.items():
        if not _is_schema(schema):
            return f"has no JSON schema for its parameter {name!r}"
    return None


def _is_schema(schema: object, depth: int = 0) -> bool:
    if not isinstance(schema, dict) or depth > MAX_NESTED:
        return False
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or not all(isinstance(k, str) for k in kinds):
        return False
    choices = [schema.get(name, []) for name in ("anyOf", "oneOf")]
    return all(
        isinstance(options, list) and all(_is_schema(o, depth + 1) for o in options)
        for options in choices
    )


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _without_frame(value: str) -> str:
    """The value without the line ends that the format puts around it."""
    return value.removeprefix("\n").removesuffix("\n")


def _function_name(block: str) -> str:
    found = re.search(r"<function=([^>\n]+)>", block)
    return found.group(1) if found else ""


def _written(key: str, value: Any) -> str:
    try:
        as_json = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TokenizerError(
            f"argument {key!r} is not JSON ({error}); give text, numbers, lists, dicts"
        ) from error
    return value if isinstance(value, str) else as_json


def _what_is_wrong(rest: str) -> str:
    if rest.startswith("<parameter=") and "</parameter>" not in rest:
        return f"{_shortened(rest)} is not closed by </parameter>"
    return f"{_shortened(rest)} is not <parameter=NAME> ... </parameter>"


def _certain_part(text: str) -> str:
    """The text without white space at its end and without a tag that may begin there.

    White space waits as well: none is shown before a call.
    """
    for length in range(len(CALL) - 1, 0, -1):
        if text.endswith(CALL[:length]):
            text = text[:-length]
            break
    return text.rstrip()


def read_tool_call(block: str, tools: list[dict[str, Any]] | None = None) -> ToolCall:
    """One call from what stands between <tool_call> and </tool_call>."""
    function = _FUNCTION.fullmatch(block)
    if not function:
        error = "a call must be <function=NAME> ... </function>"
        return ToolCall(_function_name(block), {}, error, block)
    name, body = function.group(1), function.group(2)
    schemas = _parameter_schemas(name, tools)
    arguments: dict[str, Any] = {}
    errors = []
    position = 0
    while body[position:].strip():
        found = _PARAMETER.match(body, position)
        if not found:
            errors.append(_what_is_wrong(body[position:].strip()))
            break
        key, value = found.group(1), _without_frame(found.group(2))
        position = found.end()
        if key in arguments:
            errors.append(f"argument {_shortened(key)} is given twice")
        try:
            arguments[key] = coerce(value, schemas.get(key))
        except ValueError as error:
            arguments[key] = value
            errors.append(f"argument {_shortened(key)}: {error}")
    if len(errors) > MAX_ERRORS:
        errors[MAX_ERRORS:] = [f"and {len(errors) - MAX_ERRORS} more faults"]
    return ToolCall(name, arguments, "; ".join(errors) or None, block)


class ToolCallParser:
    """Splits generated text, as it comes, into text to show and finished calls.

    Never gives out a part of a <tool_call> tag, however the text is cut. White space
    around calls is dropped.
    """

    def __init__(self, tools: list[dict[str, Any]] | None = None) -> None:
        self._tools = tools
        self._buffer = ""  # not given out yet
        self._searched = 0  # characters of the buffer in which no </tool_call> begins
        self._inside = False  # after a <tool_call>
        self._after_call = False  # no text yet since the last call

    def feed(self, piece: str) -> list[str | ToolCall]:
        """Add a piece of text. Returns what is certain by now: texts and calls."""
        self._buffer += piece
        events: list[str | ToolCall] = []
        while self._take_call(events) if self._inside else self._take_text(events):
            pass
        return events

    def flush(self) -> list[str | ToolCall]:
        """The text ends here: what was held back, or an unfinished call's error."""
        rest, self._buffer = self._buffer, ""
        if self._inside:
            self._inside = False
            error = f"the text ended before {CALL_END}"
            return [ToolCall(_function_name(rest), {}, error, rest)]
        rest = rest.lstrip() if self._after_call else rest
        return [rest] if rest else []

    def _take_text(self, events: list[str | ToolCall]) -> bool:
        """Move text from the buffer to the events; True if a call begins after it."""
        text, tag, rest = self._buffer.partition(CALL)
        certain = text.rstrip() if tag else _certain_part(text)
        self._buffer = rest if tag else text[len(certain) :]
        self._inside = bool(tag)
        if certain:
            events.append(certain.lstrip() if self._after_call else certain)
            self._after_call = False
        return self._inside

    def _take_call(self, events: list[str | ToolCall]) -> bool:
        """Move a finished call from the buffer to the events; True if there was one."""
        end = self._buffer.find(CALL_END, self._searched)
        if end < 0:
            self._searched = max(0, len(self._buffer) - len(CALL_END) + 1)
            return False
        events.append(read_tool_call(self._buffer[:end], self._tools))
        self._buffer = self._buffer[end + len(CALL_END) :]
        self._searched = 0
        self._inside, self._after_call = False, True
        return True


def parse_tool_calls(
    text: str, tools: list[dict[str, Any]] | None = None
) -> tuple[str, list[ToolCall]]:
    """The text around the calls (normally before them), and the calls in order.

    tools: as given to the chat template; they say how to read the values.
    """
    parser = ToolCallParser(tools)
    events = parser.feed(text) + parser.flush()
    content = "".join(event for event in events if isinstance(event, str))
    return content, [event for event in events if isinstance(event, ToolCall)]


def readable_call(call: ToolCall) -> str:
    """A call on one line, for example get_weather(city="Oslo", days=3)."""
    arguments = ", ".join(
        f"{name}={json.dumps(value, ensure_ascii=False)}"
        for name, value in call.arguments.items()
    )
    text = f"{call.name or '?'}({arguments})"
    return f"{text}  -- faulty: {call.error}" if call.error else text


def format_tool_call(name: str, arguments: dict[str, Any]) -> str:
    """A call as the model would write it: strings raw, all else as JSON.

    Raises: TokenizerError if reading it would give something else, as when a value
            contains </tool_call>.
    """
    values = {key: _written(key, value) for key, value in arguments.items()}
    parameters = [
        f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items()
    ]
    text = f"{CALL}\n<function={name}>\n{''.join(parameters)}</function>\n{CALL_END}"
    if parse_tool_calls(text) != ("", [ToolCall(name, values)]):
        raise TokenizerError(
            f"a call of {name!r} with these arguments cannot be written in Qwen's "
            "format, which has no escapes; remove tool-call tags from names and values"
        )
    return text
