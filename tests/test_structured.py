"""Scoring of structured answers: handmade ones stage by stage, and properties."""

import json
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_ref.structured import (
    STAGES,
    fault_of_schema,
    read_json,
    score_json,
    score_tool_calls,
    wilson,
)
from flashmoe_ref.toolcalls import format_tool_call

TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "send",
            "parameters": {
                "type": "object",
                "properties": {
                    "to": TEXT,
                    "count": WHOLE,
                    "urgent": {"type": "boolean"},
                    "tags": {"type": "array", "items": TEXT},
                    "place": {
                        "type": "object",
                        "properties": {"city": TEXT, "row": WHOLE},
                        "required": ["city"],
                    },
                    "kind": {"type": "string", "enum": ["a", "b"]},
                    "weight": {"type": "number"},
                },
                "required": ["to"],
            },
        },
    },
    {"name": "stop"},
]
ARGUMENTS = {"to": "Ida\nBo", "count": 3, "urgent": True, "tags": ["x"], "weight": 0.1}
WANTED = [{"name": "send", "arguments": ARGUMENTS}]
RIGHT = format_tool_call("send", ARGUMENTS)

SCHEMA = {
    "type": "object",
    "properties": {
        "name": TEXT,
        "age": {"type": ["integer", "null"]},
        "home": {
            "type": "object",
            "properties": {"city": TEXT, "old": {"type": "boolean"}},
            "required": ["city", "old"],
        },
        "likes": {"type": "array", "items": TEXT},
    },
    "required": ["name", "age", "home", "likes"],
}
RECORD = {
    "name": 'A "b"',
    "age": 30,
    "home": {"city": "Évora", "old": False},
    "likes": [],
}
RIGHT_JSON = json.dumps(RECORD, ensure_ascii=False)


def call(**arguments: object) -> str:
    """A call of send with the arguments."""
    return format_tool_call("send", arguments)


def changed(text: str, *pairs: str) -> str:
    """The text with parts replaced, each of which it must hold."""
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    return text


# The first wrong character stands after the | of the last column.


# --- tool calls, stage by stage -------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stage", "reason", "mark"),
    [
        ("", "none", "no tool call", "|"),
        ("I cannot do that.", "none", "no tool call", "|I cannot"),
        ("<tool_ca", "none", "no tool call", "<tool_ca|"),
        (RIGHT[:60], "none", "ended before", "</paramete|"),
        (
            changed(RIGHT, "</function>\n", ""),
            "none",
            "must be <function",
            "</|tool",
        ),
        (
            changed(RIGHT, "<parameter=to>", "to:"),
            "none",
            "is not <parameter",
            "\n|to:",
        ),
        (
            changed(RIGHT, "=count>", "=to>"),
            "none",
            "'to' is given twice",
            "=t|o>\n3",
        ),
        (
            changed(RIGHT, "=send", "=sand"),
            "parses",
            "no tool is called 'sand'",
            "=s|and",
        ),
        (call(count=3), "declared", "lacks 'to'", "<|/func"),
        (
            changed(RIGHT, "\n3\n", "\nthree\n"),
            "declared",
            "'three' is not of",
            "\n|three",
        ),
        (
            changed(RIGHT, "\n3\n", "\n3.5\n"),
            "declared",
            "'3.5' is not of",
            "3|.5",
        ),
        (
            changed(RIGHT, "=urgent", "=fast"),
            "declared",
            "has 'fast'",
            "|fast",
        ),
        (changed(RIGHT, '["x"]', "[1]"), "declared", "item 0 of 'tags' is 1", "[|1]"),
        (changed(RIGHT, '["x"]', "x"), "declared", "not of type array", "tags>\n|x"),
        (call(to="I", place={"row": 1}), "declared", "'place' lacks 'city'", "I|\n"),
        (call(to="I", place={"city": "B", "x": 1}), "declared", "has 'x'", "I|\n"),
        (call(to="I", kind="c"), "declared", "not one of", "I|\n"),
        (
            changed(RIGHT, "0.1", "1e999"),
            "declared",
            "is not of type number",
            "|1e999",
        ),
        (call(to="Ida\nBo"), "fits", "lacks 'count'", "<|/func"),
        (changed(RIGHT, "Ida\nBo", "Ida\nBa"), "fits", "not", "Ida\nB|a"),
        (changed(RIGHT, "\n3\n", "\n4\n"), "fits", "'count' is 4, not 3", "count>\n|4"),
        (
            changed(RIGHT, "true", "false"),
            "fits",
            "'urgent' is false, not true",
            "|false",
        ),
        (changed(RIGHT, "0.1", "0.10000000000000001"), "fits", "0.1", "0.1|0000"),
        (RIGHT + "\n" + RIGHT, "fits", "number of calls is 2, not 1", "|<tool"),
        (format_tool_call("stop", {}), "fits", "calls 'stop', not 'send'", "s|top"),
        (RIGHT, "right", "", ""),
    ],
)
def test_stages_of_tool_calls(text, stage, reason, mark):
    score = score_tool_calls(text, TOOLS, WANTED)
    assert score.stage == stage, score
    assert reason in score.reason and "\n" not in score.reason
    assert score.is_right == (stage == "right") == (score.position is None)
    if not score.is_right:
        before, _, after = mark.partition("|")
        assert text[: score.position].endswith(before), text[: score.position]
        assert text[score.position :].startswith(after), text[score.position :]
        assert score_tool_calls(
            text[: score.position] + score.expected, TOOLS, WANTED
        ).is_right


def test_right_calls_in_other_forms():
    other_order = call(**dict(reversed(ARGUMENTS.items())))
    for text in (
        other_order,
        "I will do it.\n\n" + RIGHT + "\n",
        "<think>\n<tool_call>no</tool_call>\n</think>\n\n" + RIGHT,
        changed(RIGHT, "true", "True", "\n3\n", "\n 3.0 \n"),
        changed(RIGHT, ">\nIda", ">Ida", "Bo\n<", "Bo<"),
        changed(RIGHT, '["x"]', '[ "\\u0078" ]', "0.1", "1e-1"),
        changed(RIGHT, "</parameter>\n<", "</parameter><"),
    ):
        score = score_tool_calls(text, TOOLS, WANTED)
        assert score.is_right and score.position is None, (text, score)


def test_order_and_number_of_calls_count():
    two = [*WANTED, {"name": "stop", "arguments": {}}]
    stop = format_tool_call("stop", {})
    assert score_tool_calls(f"{RIGHT}\nand\n{stop}", TOOLS, two).is_right
    turned = score_tool_calls(f"{stop}\n{RIGHT}", TOOLS, two)
    assert (turned.stage, turned.reason) == ("fits", "calls 'stop', not 'send'")
    short = score_tool_calls(RIGHT, TOOLS, two)
    assert short.reason == "number of calls is 1, not 2"
    assert (short.position, short.expected) == (len(RIGHT), stop)


# --- JSON, stage by stage -------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stage", "reason", "mark"),
    [
        ("", "none", "cannot be read", "|"),
        ("Here it is: " + RIGHT_JSON, "none", "cannot be read", "|Here"),
        (RIGHT_JSON + " I hope", "none", "Extra data", "} |I hope"),
        (RIGHT_JSON[:20], "none", "cannot be read", "|"),
        (changed(RIGHT_JSON, '\\"b', '"b'), "none", "cannot be read", 'A |"b'),
        (changed(RIGHT_JSON, "30", "NaN"), "none", "NaN is no number", 'age": |NaN'),
        (changed(RIGHT_JSON, "30", "030"), "none", "cannot be read", "|030"),
        (changed(RIGHT_JSON, "false", "False"), "none", "cannot be read", "|Fal"),
        (
            changed(RIGHT_JSON, '"age"', '"name"'),
            "none",
            "'name' is given twice",
            ', "|name',
        ),
        ("[" * 5000, "none", "nested too deeply", "|["),
        ("[]", "parses", "not of type object", "|["),
        ('{"name": "x"}', "parses", "lacks 'age'", 'name": "|x'),
        (changed(RIGHT_JSON, "30", '"30"'), "parses", "integer or null", '|"30"'),
        (changed(RIGHT_JSON, "30", "30.5"), "parses", "integer or null", "30|.5"),
        (changed(RIGHT_JSON, "false", "0"), "parses", "not of type boolean", "|0}"),
        (changed(RIGHT_JSON, "[]", "[null]"), "parses", "item 0 of 'likes'", "[|null"),
        (changed(RIGHT_JSON, "likes", "Likes"), "parses", "lacks 'likes'", "|Likes"),
        (RIGHT_JSON[:-1] + ', "x": 1}', "parses", "has 'x'", ']|, "x"'),
        (changed(RIGHT_JSON, "30", "null"), "fits", "'age' is null, not 30", "|null"),
        (changed(RIGHT_JSON, "30", "300"), "fits", "'age' is 300, not 30", "30|0"),
        (
            changed(RIGHT_JSON, "Évora", "Evora"),
            "fits",
            '"Evora", not "Évora"',
            "|Evora",
        ),
        (changed(RIGHT_JSON, "[]", '["a"]'), "fits", "has 1 items, not 0", '[|"a"'),
        (RIGHT_JSON, "right", "", ""),
    ],
)
def test_stages_of_json(text, stage, reason, mark):
    score = score_json(text, SCHEMA, RECORD)
    assert score.stage == stage, score
    assert reason in score.reason and "\n" not in score.reason
    assert score.is_right == (stage == "right") == (score.position is None)
    if not score.is_right:
        before, _, after = mark.partition("|")
        assert text[: score.position].endswith(before), text[: score.position]
        assert text[score.position :].startswith(after), text[score.position :]
        assert score_json(
            text[: score.position] + score.expected, SCHEMA, RECORD
        ).is_right


def test_right_json_in_other_forms():
    for text in (
        json.dumps(RECORD),  # escapes
        json.dumps(RECORD, indent=4),
        json.dumps(RECORD, separators=(",", ":")),
        json.dumps(dict(reversed(RECORD.items()))),
        f"```json\n{RIGHT_JSON}\n```",
        f"<think>\n{{}}\n</think>\n\n```\n{RIGHT_JSON}```\n",
        changed(RIGHT_JSON, "30", "3.0e1"),
    ):
        score = score_json(text, SCHEMA, RECORD)
        assert score.is_right and score.position is None, (text, score)


def test_numbers_are_exact():
    assert not score_json("0.30000000000000004", {}, 0.3).is_right
    assert score_json("0.30", {}, 0.3).is_right
    assert not score_json("9007199254740993", {}, 9007199254740992).is_right
    assert score_json("6.02E23", {}, 6.02e23).is_right
    assert score_json("602000000000000000000000", {"type": "integer"}, 6.02e23).is_right
    assert not score_json("1", {}, True).is_right
    assert not score_json("1e999999999", {}, 1).is_right
    assert not score_json("1e9999999999999999999999", {}, 1).is_right


def test_schemas():
    assert fault_of_schema(True, WHOLE) == "the answer is true, not of type integer"
    assert fault_of_schema(read_json("3.0"), WHOLE) == ""
    assert fault_of_schema(None, {"type": ["string", "null"]}) == ""
    assert fault_of_schema([1], {"items": TEXT}).startswith("item 0 of the answer is 1")
    assert fault_of_schema({"a": 1}, {"type": "object"}) == ""  # any keys
    assert "lacks 'a'" in fault_of_schema({}, {"properties": {}, "required": ["a"]})


# --- intervals ------------------------------------------------------------------------


def test_wilson_by_hand():
    # 8 of 10, z = 2: middle (0.8 + 0.2) / 1.4, half 2 sqrt(0.016 + 0.01) / 1.4
    low, high = wilson(8, 10, z=2)
    assert low == pytest.approx(1 / 1.4 - 2 * 0.026**0.5 / 1.4)
    assert high == pytest.approx(1 / 1.4 + 2 * 0.026**0.5 / 1.4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 50)[0] == 0.0 and wilson(50, 50)[1] == 1.0
    assert wilson(0, 50)[1] == pytest.approx(0.0713, abs=1e-4)
    with pytest.raises(ValueError, match="3 successes in 2 trials"):
        wilson(3, 2)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_share_and_narrows(n, data):
    successes = data.draw(st.integers(0, n))
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    low_4, high_4 = wilson(4 * successes, 4 * n)
    assert high_4 - low_4 < high - low
    mirrored = wilson(n - successes, n)
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_wilson_covers_as_it_promises():
    for p in (0.1, 0.5, 0.9):
        inside = sum(
            comb(60, k) * p**k * (1 - p) ** (60 - k)
            for k in range(61)
            if wilson(k, 60)[0] <= p <= wilson(k, 60)[1]
        )
        assert 0.92 < inside < 0.98


def test_stage_names():
    assert STAGES["tool"][0] == STAGES["json"][0] == "parses"
    assert STAGES["tool"][-1] == STAGES["json"][-1] == "right"
