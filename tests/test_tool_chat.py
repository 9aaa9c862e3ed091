"""A chat with tools: a scripted model, which tries what a model may try."""

import io
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny, write_tokenizer

from flashmoe_ref import chat, load
from flashmoe_ref.chat_widgets import ChatBox, Transcript, html_of
from flashmoe_ref.cli_chat import converse
from flashmoe_ref.errors import ConfigError, ToolError
from flashmoe_ref.tool_chat import (
    ENOUGH,
    MAX_RESULT_CHARACTERS,
    Event,
    ThinkingSplitter,
    ToolChat,
)
from flashmoe_ref.toolcalls import format_tool_call, parse_tool_calls
from flashmoe_ref.tools import EXAMPLES, TEMPERATURES, UNITS, Tool, convert_units

SCHEMAS = [tool.schema for tool in EXAMPLES]
SUM = format_tool_call("calculate", {"expression": "6 * 7"})


class Scripted:
    """Stands in for a ChatSession: answers from a list, remembers what it was told."""

    def __init__(self, *answers: str, opens: bool = False, tools=SCHEMAS) -> None:
        self.answers, self.tools = list(answers), tools
        self.enable_thinking = opens
        self.told: list[object] = []
        self.tool_calls: list = []
        self.messages: list[dict] = []
        end = "<think>\n" if opens else "<think>\n\n</think>\n\n"
        tokenizer = SimpleNamespace(apply_chat_template=lambda *_: f"assistant\n{end}")
        self.model = SimpleNamespace(tokenizer=tokenizer, report=lambda: "a report")

    def say(self, text: str, max_tokens: int) -> Iterator[str]:
        return self._next(text)

    def answer_tools(self, results: list[str], max_tokens: int) -> Iterator[str]:
        assert len(results) == len(self.tool_calls)
        return self._next(results)

    def _next(self, told: object) -> Iterator[str]:
        self.told.append(told)
        answer = self.answers.pop(0)
        yield from (answer[i : i + 3] for i in range(0, len(answer), 3))
        # as ChatSession does it: after the last thought
        text = answer.rpartition("</think>")[2]
        self.tool_calls = parse_tool_calls(text, self.tools)[1]


def _joined(events: Iterator[Event]) -> list[Event]:
    """Events, with the pieces of a thought or a text put together."""
    found: list[Event] = []
    for kind, text in events:
        if found and kind in ("thinking", "text") and found[-1].kind == kind:
            text = found.pop().text + text
        found.append(Event(kind, text))
    return found


def _run(*answers: str, opens: bool = False, **options: object):
    session = Scripted(*answers, opens=opens)
    found = _joined(ToolChat(session, EXAMPLES, **options).say("go"))
    return found, session.told


# --- the loop -------------------------------------------------------------------------


def test_a_call_is_run_and_its_result_told() -> None:
    found, told = _run(f"Let me see.\n\n{SUM}", "It is 42.")
    assert found == [
        ("text", "Let me see."),
        ("call", 'calculate(expression="6 * 7")'),
        ("result", "42"),
        ("text", "It is 42."),
    ]
    assert told == ["go", ["42"]]


def test_calls_of_one_answer_are_answered_in_order() -> None:
    feet = format_tool_call("convert_units", {"value": 3, "unit": "foot", "into": "m"})
    shape = format_tool_call("model_facts", {"model": "qwen3.5-397b-a17b"})
    _, told = _run(f"{feet}\n{shape}\n{SUM}", "Done.")
    first, second, third = told[1]
    assert (first, third) == ("0.9144 m", "42")
    assert json.loads(second)["experts_per_layer"] == 512


def test_thoughts_are_apart_and_their_calls_are_not_run() -> None:
    answer = f"I might {SUM} or not.\n</think>\n\nNo need."
    found, told = _run(answer, opens=True)
    assert [kind for kind, _ in found] == ["thinking", "text"]
    assert found[0].text.startswith("I might <tool_call>")
    assert found[1].text == "No need."
    assert told == ["go"]


def test_a_thought_that_does_not_end_runs_nothing() -> None:
    found, told = _run(f"Perhaps {SUM}", opens=True)
    assert found[-1] == ("stopped", "the answer ended inside a thought")
    assert [kind for kind, _ in found] == ["thinking", "stopped"]
    assert told == ["go"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (format_tool_call("open_file", {"path": "x"}), "there is no tool 'open_file'"),
        (format_tool_call("__init__", {}), "there is no tool"),
        (format_tool_call("calculate", {}), "'expression' is missing"),
        (format_tool_call("calculate", {"expression": "1", "x": "2"}), "not known"),
        (format_tool_call("calculate", {"expression": "1/0"}), "division by zero"),
        (format_tool_call("calculate", {"expression": "1" * 301}), "longer than 300"),
        (format_tool_call("model_facts", {"model": "gpt"}), "must be one of qwen"),
        (
            format_tool_call("convert_units", {"value": "x", "unit": "m", "into": "m"}),
            "not of type number",
        ),
        ("<tool_call>\nnonsense\n</tool_call>", "a call must be"),
        ("<tool_call>\n<function=calculate>", "ended before </tool_call>"),
    ],
)
def test_what_is_wrong_goes_back_to_the_model(call: str, error: str) -> None:
    found, told = _run(call, "Sorry.")
    (result,) = told[1]
    assert result.startswith("error: ") and error in result
    assert [kind for kind, _ in found] == ["call", "error", "text"]


def test_a_tool_that_fails_does_not_end_the_chat() -> None:
    def fail() -> None:
        raise RuntimeError("boom")

    broken = Tool("broken", "", {}, fail)
    endless = Tool("endless", "", {}, lambda: "x" * 10**6)
    strange = Tool("strange", "", {}, object)  # no JSON
    tools = (broken, endless, strange)
    calls = "\n".join(format_tool_call(tool.name, {}) for tool in tools)
    session = Scripted(calls, "Oh.", tools=[tool.schema for tool in tools])
    _joined(ToolChat(session, tools).say("go"))
    first, second, third = session.told[1]
    assert first == "error: the tool failed (RuntimeError: boom)"
    assert len(second) < MAX_RESULT_CHARACTERS + 50 and second.endswith("cut off here)")
    assert "not JSON serializable" in third


def test_rounds_are_limited() -> None:
    found, told = _run(*[SUM] * 9, max_rounds=2)
    assert told == ["go", ["42"], ["42"], [ENOUGH]]
    assert found[-1] == ("stopped", "it still calls tools after 2 rounds")
    found, told = _run(SUM, SUM, "It is 42.", max_rounds=1)  # it takes the hint
    assert told == ["go", ["42"], [ENOUGH]]
    assert found[-1] == ("text", "It is 42.")


def test_calls_of_one_answer_are_limited() -> None:
    _, told = _run("\n".join([SUM] * 10), "Done.")
    assert told[1] == ["42"] * 8 + [ENOUGH] * 2


def test_the_list_of_tools_is_fixed() -> None:
    session = Scripted("never")
    with pytest.raises(ConfigError, match="other tools"):
        ToolChat(session, EXAMPLES[:1])
    with pytest.raises(ConfigError, match="one name"):
        twice = (EXAMPLES[0], EXAMPLES[0])
        ToolChat(Scripted(tools=[t.schema for t in twice]), twice)
    talk = ToolChat(session, EXAMPLES)
    with pytest.raises(TypeError):
        talk.tools["open"] = open
    session.tools = [*session.tools, {"name": "open"}]  # whatever it may be told of
    session.answers = [format_tool_call("open", {}), "Oh."]
    assert [kind for kind, _ in talk.say("go")][1] == "error"


def test_who_stops_listening_stops_the_model() -> None:
    session = Scripted("a long story", SUM)
    events = ToolChat(session, EXAMPLES).say("go")
    assert next(events) == ("text", "a l")
    events.close()
    assert session.told == ["go"]


# --- thoughts and answers in a stream -------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_a_splitter_does_not_mind_how_it_is_fed(data: st.DataObject) -> None:
    parts = ["a", "<", "</", "think>", "<think>", "</think>", "\n", " b "]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=8)))
    is_open = data.draw(st.booleans())
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6).map(sorted))

    def split(pieces: list[str]) -> list[Event]:
        splitter = ThinkingSplitter(is_open)
        events = [event for piece in pieces for event in splitter.feed(piece)]
        return _joined(iter(events + splitter.flush()))

    ends = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in pairwise(ends)]
    whole = split([text])
    assert split(pieces) == whole
    begins = is_open or text.lstrip().startswith("<think>")
    assert any(kind == "thinking" for kind, _ in whole) <= begins
    if not begins:
        assert whole == ([("text", text)] if text else [])


# --- tools ----------------------------------------------------------------------------


def test_units_by_hand() -> None:
    assert convert_units(100, "celsius", "fahrenheit") == "212 fahrenheit"
    assert convert_units(0, "kelvin", "celsius") == "-273.15 celsius"
    assert convert_units(1, "mile", "km") == "1.609344 km"
    assert convert_units(7.08, "MB", "GB") == "0.00708 GB"
    assert convert_units(1, "GiB", "MiB") == "1024 MiB"
    for wrong, match in (
        ((1, "m", "kg"), "m is length, kg is mass"),
        ((1, "m", "kelvin"), "m is length, kelvin is temperature"),
        ((-300, "celsius", "kelvin"), "below absolute zero"),
    ):
        with pytest.raises(ToolError, match=match):
            convert_units(*wrong)


@settings(deadline=None)
@given(
    st.floats(-1e9, 1e9), *[st.sampled_from([*UNITS, *TEMPERATURES]) for _ in range(2)]
)
def test_units_there_and_back(value: float, unit: str, into: str) -> None:
    try:
        there = convert_units(value, unit, into)
        back = convert_units(float(there.split()[0]), into, unit)
    except ToolError:
        assert UNITS.get(unit, "?")[0] != UNITS.get(into, "?")[0] or value < 0
        return
    assert float(back.split()[0]) == pytest.approx(value, rel=1e-9, abs=1e-8)


def test_schemas_hold_what_they_say() -> None:
    tool = Tool(
        "f",
        "",
        {"n": {"type": "integer", "minimum": 1}, "b": {"type": "boolean"}},
        lambda n, b=False: (n, b),
        optional=("b",),
    )
    assert tool.call({"n": 1}) == (1, False)
    assert tool.schema["function"]["parameters"]["required"] == ["n"]
    for arguments in ({"n": True}, {"n": 1.0}, {"n": 0}, {"n": 1, "b": 1}, {}):
        with pytest.raises(ToolError, match="argument"):
            tool.call(arguments)
    floats = Tool("g", "", {"x": {"type": "number", "maximum": 9}}, lambda x: x)
    with pytest.raises(ToolError, match="at most 9"):
        floats.call({"x": float("nan")})


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("f", {"type": "string", "pattern": "a"}),
        ("f", {"type": "array"}),
        ("f", {}),
        ("no name", {"type": "string"}),
    ],
)
def test_a_schema_that_cannot_be_held_to_is_refused(name: str, schema: dict) -> None:
    with pytest.raises(ConfigError, match=r"no name of a tool|give a type"):
        Tool(name, "", {"x": schema}, print)


# --- with a real session, on the command line, in a notebook --------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("tools") / "model"
    write_tiny(folder, vocab_size=280, max_position_embeddings=16_384)
    write_tokenizer(folder)
    with load(folder, engine="numpy", compiled=False) as loaded:
        yield loaded


def test_a_session_and_its_template(model, monkeypatch) -> None:
    answers = [f"Hm.\n</think>\n\n{SUM}", "So.\n</think>\n\nIt is <b>42</b>."]

    def write(model, ids, max_tokens, state, **_) -> Iterator[int]:
        yield from model.tokenizer.encode(answers.pop(0))

    monkeypatch.setattr("flashmoe_ref.generation.generate_ids", write)
    monkeypatch.setattr(type(model), "prefill", lambda *_: None)
    session = chat(model, tools=SCHEMAS)
    found = _joined(ToolChat(session, EXAMPLES).say("6 times 7?"))
    assert [kind for kind, _ in found] == (
        ["thinking", "call", "result", "thinking", "text"]
    )
    assert session.messages[-2] == {"role": "tool", "content": "42"}
    assert session.messages[-1]["content"].strip() == "It is <b>42</b>."


def test_on_the_command_line(monkeypatch) -> None:
    session = Scripted(f"I think.</think>Now\n{SUM}", "</think>42!", opens=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
    said, noted = [], []

    def say(text: str, end: str = "\n") -> None:
        said.append(text + end)

    converse(session, 9, say, noted.append, EXAMPLES)
    out = "".join(said)
    assert out == 'Now\n[call] calculate(expression="6 * 7")\n[result] 42\n42!\n'
    assert noted == ["[thought for 8 characters]"]


EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>&amp;</details>'


@pytest.mark.parametrize(
    "kind", ["you", "thinking", "text", "call", "result", "error", "stopped"]
)
def test_nothing_that_is_written_becomes_html(kind: str) -> None:
    html = html_of(kind, EVIL, is_growing=True)
    for tag in ("<script", "<img", "</script"):
        assert tag not in html
    assert "&lt;script&gt;" in html and "&amp;amp;" in html
    assert html.count("</details>") == (kind == "thinking")


def test_a_transcript_grows_and_folds() -> None:
    pane = Transcript()
    seen = []

    def events() -> Iterator[Event]:
        for event in (
            Event("thinking", "<b>"),
            Event("thinking", "hm"),
            Event("call", "f()"),
            Event("text", "a"),
            Event("text", "b"),
        ):
            yield event
            seen.append(pane.children[0].value)

    assert pane.stream(events()) == "ab"
    assert "<details open>" in seen[0] and "&lt;b&gt;hm" in seen[1]
    assert "open" not in seen[2]
    assert pane.parts == [("thinking", "<b>hm"), ("call", "f()"), ("text", "ab")]
    assert len(pane.children) == 3


def test_two_models_side_by_side() -> None:
    chats = {
        name: ToolChat(Scripted(SUM, f"{name}: 42"), EXAMPLES)
        for name in ("4 bits", "2 bits")
    }
    box = ChatBox(chats)
    assert box.send() == ()
    box.field.value = "<i>go</i>"
    assert box.send() == ["4 bits: 42", "2 bits: 42"]
    assert box.field.value == "" and not box.button.disabled
    kinds = [part.kind for part in box.transcripts["2 bits"].parts]
    assert kinds == ["you", "call", "result", "text"]
    box.field.value = "again"
    with pytest.raises(IndexError):  # the scripts are at their end
        box.send()
    assert not box.button.disabled


def test_an_error_is_shown_in_the_transcript_that_met_it() -> None:
    class Full(Scripted):
        def say(self, text, max_tokens):
            raise ConfigError("<b>601</b> tokens exceed the maximum")

    kinds = {"full": Full, "good": Scripted}
    chats = {name: ToolChat(kind("42"), EXAMPLES) for name, kind in kinds.items()}
    box = ChatBox(chats, "go")
    assert box.send() == ["42"] and not box.button.disabled
    parts = box.transcripts["full"].parts
    assert parts == [("you", "go"), ("error", "<b>601</b> tokens exceed the maximum")]
    assert "error: &lt;b&gt;601" in box.transcripts["full"].children[-1].value
