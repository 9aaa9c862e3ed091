"""Properties of the scorer: other spellings are right, changed values are not.

Also that the first wrong character is what it says: what comes before it can still
become a right answer, and `expected` makes it one.
"""

import json
import string

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from flashmoe_ref.errors import TokenizerError
from flashmoe_ref.structured import score_json, score_tool_calls
from flashmoe_ref.toolcalls import format_tool_call

TEXT, WHOLE = {"type": "string"}, {"type": "integer"}

words = st.text(st.characters(codec="utf-8"), max_size=8)
words |= st.text('"\\\n\t/u{}[],: ', max_size=8)
words = words.filter(
    lambda word: "</think>" not in word
)  # what comes before is cut off
scalars = st.none() | st.booleans() | st.integers() | words
scalars |= st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)
    ),
    max_leaves=5,
)
objects = st.dictionaries(words, values, min_size=1, max_size=4)


def shuffled(value: object, data: st.DataObject) -> object:
    """The same value, keys in another order."""
    if isinstance(value, dict):
        keys = data.draw(st.permutations(list(value)))
        return {key: shuffled(value[key], data) for key in keys}
    if isinstance(value, list):
        return [shuffled(item, data) for item in value]
    return value


@given(objects, st.data())
@settings(max_examples=40)
def test_other_spellings_of_a_right_json_are_right(wanted, data):
    text = json.dumps(
        shuffled(wanted, data),
        ensure_ascii=data.draw(st.booleans()),
        indent=data.draw(st.none() | st.integers(0, 3)),
    )
    score = score_json(text, {"type": "object"}, wanted)
    assert score.is_right and score.position is None, (text, score)


@given(objects, st.data())
@settings(max_examples=50)
def test_a_cut_or_changed_json_can_be_mended_from_the_first_wrong_character(
    wanted, data
):
    right = json.dumps(wanted, ensure_ascii=data.draw(st.booleans()))
    at = data.draw(st.integers(0, len(right)))
    new = data.draw(st.text("0a\"\\,:{}[] \n-.eE'", max_size=2))
    text = right[:at] + new + right[at + data.draw(st.integers(0, 2)) :]
    score = score_json(text, {"type": "object"}, wanted)
    assert score.is_right == (score.position is None), (text, score)
    if not score.is_right:
        mended = text[: score.position] + score.expected
        assert score_json(mended, {"type": "object"}, wanted).is_right, (text, mended)


def changed_once(text: str, data: st.DataObject) -> str:
    """The text with one character replaced by another."""
    at = data.draw(st.integers(0, len(text) - 1))
    letters = string.printable + "éß東"
    new = data.draw(st.sampled_from([c for c in letters if c != text[at]]))
    return text[:at] + new + text[at + 1 :]


# Values whose every character matters: 1.0 and 1e0, say, are the same number.
plain_words = st.text(
    st.characters(codec="utf-8", exclude_characters='"\\\r\n\0'), min_size=1, max_size=9
)


@given(plain_words | st.integers(), st.data())
@example(0, None)
def test_a_changed_character_in_a_value_is_never_right(value, data):
    if data is None:
        wrong = "-0x"
    elif isinstance(value, int):
        wrong = changed_once(str(value), data)
        # a leading or trailing space is white space, and so allowed
        assume(wrong.strip() == wrong)
    else:
        wrong = changed_once(value, data)
    in_json = json.dumps(wrong) if isinstance(value, str) else wrong
    text = f'{{"a": [{{"b": {in_json}}}]}}'
    assert not score_json(text, {}, {"a": [{"b": value}]}).is_right
    kind = TEXT if isinstance(value, str) else WHOLE
    tool = {"name": "f", "parameters": {"properties": {"x": kind}}}
    text = f"<tool_call>\n<function=f>\n<parameter=x>\n{wrong}\n</parameter>\n"
    text += "</function>\n</tool_call>"
    wanted = [{"name": "f", "arguments": {"x": value}}]
    assert not score_tool_calls(text, [tool], wanted).is_right


KINDS = {"s": words, "i": st.integers(), "b": st.booleans(), "o": objects}
KINDS |= {"l": st.lists(values, max_size=3)}
KINDS |= {"n": st.floats(allow_nan=False, allow_infinity=False)}
TYPES = {"s": "string", "i": "integer", "b": "boolean", "o": "object", "l": "array"}
TYPES |= {"n": "number"}
TYPED = {"name": "f", "parameters": {"properties": {}}}
TYPED["parameters"]["properties"] = {key: {"type": t} for key, t in TYPES.items()}
arguments = st.fixed_dictionaries({}, optional=KINDS)


def written(calls: list[dict]) -> str:
    """The calls as text; nothing that the format cannot write."""
    try:
        return "\n".join(format_tool_call("f", c) for c in calls)
    except TokenizerError:
        assume(False)


def spaced(arguments: dict, data: st.DataObject) -> str:
    """A call with other white space between its tags, and around all but strings."""

    def space() -> str:
        return data.draw(st.text(" \n\t", max_size=2))

    text = f"<tool_call>{space()}<function=f>"
    for key, value in arguments.items():
        raw = f"\n{value}\n"
        if not isinstance(value, str):
            raw = space() + json.dumps(value) + space()
        text += f"{space()}<parameter={key}>{raw}</parameter>"
    return f"{text}{space()}</function>{space()}</tool_call>{space()}"


@given(arguments, st.data())
@settings(max_examples=40)
def test_calls_with_other_white_space_are_right(call, data):
    written([call])  # can it be written at all?
    wanted = [{"name": "f", "arguments": call}]
    score = score_tool_calls(spaced(call, data), [TYPED], wanted)
    assert score.is_right and score.position is None, (call, score)


@given(st.lists(arguments, min_size=1, max_size=3), st.data())
@settings(max_examples=40)
def test_calls_with_arguments_in_any_order_are_right(calls, data):
    wanted = [{"name": "f", "arguments": c} for c in calls]
    text = written([shuffled(c, data) for c in calls])
    written(calls)
    score = score_tool_calls(text, [TYPED], wanted)
    assert score.is_right and score.position is None, (text, score)


@given(st.lists(arguments, min_size=1, max_size=2), st.data())
@settings(max_examples=50)
def test_changed_calls_can_be_mended_from_the_first_wrong_character(calls, data):
    right = written(calls)
    at = data.draw(st.integers(0, len(right)))
    new = data.draw(st.text("0a\"<>=/ \n-.ep'", max_size=2))
    text = right[:at] + new + right[at + data.draw(st.integers(0, 2)) :]
    wanted = [{"name": "f", "arguments": c} for c in calls]
    score = score_tool_calls(text, [TYPED], wanted)
    assert score.is_right == (score.position is None), (text, score)
    if not score.is_right:
        mended = text[: score.position] + score.expected
        assert score_tool_calls(mended, [TYPED], wanted).is_right, (text, mended)
