"""Tool calls: by hand, cut into pieces anywhere, and written and read back."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_ref.errors import TokenizerError
from flashmoe_ref.toolcalls import (
    ToolCall,
    ToolCallParser,
    coerce,
    format_tool_call,
    parse_tool_calls,
)

WEATHER = "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
WEATHER += "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"name": "bare", "parameters": {"properties": {"on": {"type": "boolean"}}}},
    {"type": "function", "function": {"name": "no_schema"}},
]
OSLO = ToolCall("get_weather", {"city": "Oslo", "days": 3})


def events_of(pieces: list[str]) -> list[str | ToolCall]:
    """All events, with neighbouring texts joined; checks what is shown on the way."""
    parser = ToolCallParser(TOOLS)
    events: list[str | ToolCall] = []
    for found in [*map(parser.feed, pieces), parser.flush()]:
        for event in found:
            assert event != ""
            if events and isinstance(event, str) and isinstance(events[-1], str):
                events[-1] += event
            else:
                events.append(event)
    return events


def test_a_call_with_text_before():
    text = f"I will look.\n\n{WEATHER}"
    assert parse_tool_calls(text, TOOLS) == ("I will look.", [OSLO])
    assert parse_tool_calls("Nothing to call.") == ("Nothing to call.", [])
    untyped = ToolCall("get_weather", {"city": "Oslo", "days": "3"})
    assert parse_tool_calls(text) == ("I will look.", [untyped])


def test_several_calls_and_text_between():
    other = "<tool_call>\n<function=bare>\n<parameter=on>\nTrue\n</parameter>\n"
    other += "</function>\n</tool_call>"
    text = f"One. {WEATHER}\n{other}\n\n and {WEATHER} end "
    on = ToolCall("bare", {"on": True})
    assert events_of([text]) == ["One.", OSLO, on, "and", OSLO, "end "]


def test_values_are_taken_as_they_are():
    values = {
        "code": "if a < b:\n    print(\"<b>é</b>\", 'x')\n\n",
        "empty": "",
        "lines": "\n\n",
        "tags": "</parameter> and <parameter=x> and </function> <tool_cal",
        "spaces": "  two  ",
    }
    text = format_tool_call("no_schema", values)
    assert parse_tool_calls(text, TOOLS) == ("", [ToolCall("no_schema", values)])


def test_calls_on_one_line():
    text = "<tool_call><function=get_weather><parameter=city>Oslo</parameter>"
    text += "<parameter=days>3</parameter></function></tool_call>"
    assert parse_tool_calls(text, TOOLS) == ("", [OSLO])
    none = ToolCall("now", {})
    assert parse_tool_calls("<tool_call><function=now></function></tool_call>") == (
        "",
        [none],
    )


@pytest.mark.parametrize(
    ("kind", "value", "want"),
    [
        ("integer", "42", 42),
        ("integer", " -7 ", -7),
        ("integer", "3.0", 3),
        ("number", "2.5", 2.5),
        ("number", "1e3", 1000.0),
        ("number", "5", 5),
        ("boolean", "true", True),
        ("boolean", "False", False),
        ("null", "None", None),
        ("array", '["a", 1, null]', ["a", 1, None]),
        ("object", '{"a": {"b": "é"}}', {"a": {"b": "é"}}),
        ("string", "42", "42"),
        ("string", " null ", " null "),
        ("strange", "[1", "[1"),
        (["integer", "null"], "null", None),
        (["string", "integer"], "12", 12),
        (["string", "integer"], "twelve", "twelve"),
        (["number", "integer"], "1.5", 1.5),
    ],
)
def test_values_take_the_type_of_the_schema(kind, value, want):
    got = coerce(value, {"type": kind})
    assert (got, type(got)) == (want, type(want))


def test_a_choice_of_schemas():
    choice = {"anyOf": [{"type": "array"}, {"type": "null"}]}
    assert coerce("[1]", choice) == [1]
    assert coerce("null", choice) is None
    with pytest.raises(ValueError, match="'x' is not of type array or null"):
        coerce("x", choice)
    assert coerce("x", {"oneOf": [{"type": "integer"}, {"enum": ["x"]}]}) == "x"
    for schema in (None, {}, {"description": "no type"}, True):
        assert coerce("1", schema) == "1"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("integer", "3.5"),
        ("integer", "true"),
        ("integer", "1_000"),
        ("integer", "9" * 5000),
        ("number", "NaN"),
        ("number", "1e999"),
        ("number", "ten"),
        ("boolean", "1"),
        ("null", "0"),
        ("array", '{"a": 1}'),
        ("array", "[" * 200_000),
        ("object", "[1]"),
        ("object", "{'a': 1}"),
    ],
)
def test_values_of_another_type_are_named(kind, value):
    with pytest.raises(ValueError, match=f"is not of type {kind}"):
        coerce(value, {"type": kind})
    schema = {"name": "f", "parameters": {"properties": {"x": {"type": kind}}}}
    _, [call] = parse_tool_calls(format_tool_call("f", {"x": value}), [schema])
    assert call.arguments == {"x": value}
    assert call.error.startswith("argument 'x': ")
    assert len(call.error) < 100


@pytest.mark.parametrize(
    ("block", "name", "complaint"),
    [
        ("", "", "a call must be <function=NAME>"),
        ('{"name": "get_weather"}', "", "a call must be <function=NAME>"),
        ("<function=>\n</function>", "", "a call must be <function=NAME>"),
        ("<function=f>\n", "f", "a call must be <function=NAME>"),
        ("<function=f>\n</function> more", "f", "a call must be <function=NAME>"),
        ("<function=f>\nwords\n</function>", "f", "'words' is not <parameter=NAME>"),
        ("<function=f>\n<parameter=a>\n1\n</function>", "f", "not closed by </param"),
        (
            "<function=f>\n<parameter=a>\n1\n</parameter>\nmore\n</function>",
            "f",
            "is not <parameter=NAME>",
        ),
        (
            "<function=f><parameter=a>1</parameter><parameter=a>2</parameter></function>",
            "f",
            "argument 'a' is given twice",
        ),
    ],
)
def test_a_malformed_call_says_what_is_wrong(block, name, complaint):
    text, calls = parse_tool_calls(
        f"Hm.\n<tool_call>\n{block}\n</tool_call>\n{WEATHER}"
    )
    assert text == "Hm."
    assert calls[0].name == name
    assert complaint in calls[0].error
    assert calls[0].text == f"\n{block}\n"
    assert calls[1].error is None


def test_an_unfinished_call_is_an_error_at_the_end():
    parser = ToolCallParser(TOOLS)
    assert parser.feed("Wait. " + WEATHER[:-1]) == ["Wait."]
    [call] = parser.flush()
    assert (call.name, call.error) == (
        "get_weather",
        "the text ended before </tool_call>",
    )
    assert parser.flush() == []


def test_nothing_of_a_tag_is_shown():
    parser = ToolCallParser(TOOLS)
    shown = [parser.feed(character) for character in "a <b> <tool_box> \n<tool_call>"]
    assert "".join(event for events in shown for event in events) == "a <b> <tool_box>"
    # text is shown as soon as it cannot begin a tag
    assert shown[:3] == [["a"], [], []]
    assert shown[3] == [" <b"]


def test_what_looked_like_a_tag_is_shown_at_the_end():
    assert events_of(["x ", "<tool", "_cal"]) == ["x <tool_cal"]
    assert events_of([WEATHER, "\n "]) == [OSLO]


PARTS = [
    "<tool_call>",
    "</tool_call>",
    "<function=get_weather>",
    "</function>",
    "<tool",
]
PARTS += ["<parameter=days>", "<parameter=city>", "</parameter>", "\n", " ", "7", "é<x"]


@settings(deadline=None, max_examples=400)
@given(
    st.lists(
        st.sampled_from([*PARTS, WEATHER, format_tool_call("bare", {"on": True})])
    ),
    st.lists(st.integers(0, 400), max_size=30),
)
def test_any_cutting_gives_the_same_events(parts, cuts):
    text = "".join(parts)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    want = events_of([text])
    assert events_of(pieces) == want
    assert events_of(list(text)) == want
    for event in want:
        assert isinstance(event, ToolCall) or "<tool_call>" not in event


# no closing tags: the format cannot write them, see below
TEXT = st.text().filter(lambda text: "</" not in text)
LEAF = st.none() | st.booleans() | st.integers() | TEXT
LEAF |= st.floats(allow_nan=False, allow_infinity=False)
VALUES = LEAF | st.lists(LEAF) | st.dictionaries(TEXT, LEAF)
NAMES = st.text("abcXYZ_.-09é", min_size=1, max_size=8)
KINDS = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


@settings(deadline=None, max_examples=150)
@given(NAMES, st.dictionaries(NAMES, VALUES, max_size=4))
def test_what_is_written_is_read_back(name, arguments):
    schemas = {key: {"type": KINDS[type(value)]} for key, value in arguments.items()}
    tools = [{"name": name, "parameters": {"properties": schemas}}]
    text = format_tool_call(name, arguments)
    assert parse_tool_calls(text, tools) == ("", [ToolCall(name, arguments)])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(PARTS)).map("".join))
def test_what_cannot_be_written_is_refused(value):
    try:
        text = format_tool_call("f", {"a": value, "b": "x"})
    except TokenizerError as error:
        assert "has no escapes" in str(error)
    else:
        want = ("", [ToolCall("f", {"a": value, "b": "x"})])
        assert parse_tool_calls(text) == want
    for name in ("", "a>b", "a\nb"):
        with pytest.raises(TokenizerError):
            format_tool_call(name, {})
        with pytest.raises(TokenizerError):
            format_tool_call("f", {name: value})


def test_a_value_that_is_not_json_is_refused():
    for value in (math.nan, {1, 2}):
        with pytest.raises(TokenizerError, match="is not JSON"):
            format_tool_call("f", {"x": value})


def test_the_error_of_a_call_stays_short():
    name = "x" * 500
    parameters = f"<parameter={name}>\n1\n</parameter>\n" * 200
    _, [call] = parse_tool_calls(
        f"<tool_call>\n<function=f>\n{parameters}</function>\n</tool_call>"
    )
    assert call.error.endswith("and 194 more faults") and len(call.error) < 500
