"""Generation: the loop, the stop rules, and a chat that reuses its state."""

import numpy as np
import pytest
from tiny import write_tiny, write_tokenizer

from flashmoe_ref import chat, generate, load
from flashmoe_ref.errors import ConfigError, FlashMoeError, NumericError, ReadError
from flashmoe_ref.generation import generate_ids
from flashmoe_ref.toolcalls import format_tool_call

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
        },
    }
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_tiny(tmp_path_factory.mktemp("m"), vocab_size=272)
    return write_tokenizer(folder)


@pytest.fixture
def model(folder):
    with load(folder, engine="numpy", slots=4) as model:
        yield model


def greedy(model, ids, n):
    """The plainest loop: the whole text again for every token."""
    ids = list(ids)
    for _ in range(n):
        n_real = model.tokenizer.n_real_ids
        token = int(np.argmax(model.logits(ids)[-1][:n_real]))
        if token in model.tokenizer.stop_ids:
            break
        ids.append(token)
    return ids


def test_generation_equals_the_plainest_loop(model):
    prompt = model.tokenizer.encode("Hello, ")
    expected = greedy(model, prompt, 12)[len(prompt) :]
    assert list(generate_ids(model, prompt, 12)) == expected
    assert "".join(generate(model, "Hello, ", 12)) == model.tokenizer.decode(expected)
    assert "".join(generate(model, prompt, 12)) == model.tokenizer.decode(expected)


def test_pieces_never_hold_half_a_character(model):
    pieces = list(generate(model, "é", 60, temperature=2.0, seed=1))
    whole = "".join(pieces)
    again = list(
        generate_ids(model, model.tokenizer.encode("é"), 60, temperature=2.0, seed=1)
    )
    assert whole == model.tokenizer.decode(again)


def test_seeds(model):
    def text(seed):
        return "".join(generate(model, "a", 30, temperature=1.5, seed=seed))

    assert text(1) == text(1) != text(2)


def test_every_stop_id_stops(model, monkeypatch):
    first = next(iter(generate_ids(model, [5], 1)))
    monkeypatch.setattr(model.tokenizer, "stop_ids", frozenset({first}))
    assert list(generate_ids(model, [5], 10)) == []


def test_the_context_limit_ends_generation(tmp_path):
    folder = write_tiny(tmp_path / "m", vocab_size=272, max_position_embeddings=20)
    model = load(write_tokenizer(folder), engine="numpy")
    model.tokenizer.stop_ids = frozenset()
    assert len(list(generate_ids(model, [1] * 15, None))) == 5
    assert len(list(generate_ids(model, [1] * 15, 99))) == 5
    with pytest.raises(ConfigError, match="shorten it"):
        generate_ids(model, [1] * 20)
    with pytest.raises(ConfigError, match="20"):
        model.logits([1] * 21)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temprature": 1.0}, "temprature"),
    ],
)
def test_bad_settings_are_refused_before_the_first_token(model, arguments, word):
    with pytest.raises(ConfigError, match=word):
        generate(model, "a", **arguments)


@pytest.mark.parametrize("ids", [[], [272], [-1], [1.5], [[1]]])
def test_bad_ids_are_refused(model, ids):
    with pytest.raises(FlashMoeError):
        list(generate_ids(model, ids))
    with pytest.raises(ConfigError):
        model.logits(ids)


def test_report_counts(model):
    model.reset_report()
    list(generate_ids(model, [1, 2, 3], 5))
    report = model.report()
    n_generated = report.generated_tokens
    assert report.prompt_tokens == 3
    assert n_generated <= 4  # the first token comes from the prompt's logits
    requests = report.hits + report.misses
    assert requests >= n_generated * 4 * 3  # layers x K
    assert report.bytes_read == report.misses * model.store.files.formats[0].n_bytes
    assert report.mode["k"] == 3
    assert report.mode["slots"] == 4
    assert 0 <= report.wait_s <= report.prefill_s + report.decode_s
    assert "hit rate" in str(report)


# --- chat -----------------------------------------------------------------------------


@pytest.mark.parametrize("enable_thinking", [False, True])
def test_reusing_state_changes_nothing(folder, enable_thinking):
    """Each turn's answer equals that of a model that reads the whole chat anew."""
    with (
        load(folder, engine="numpy", slots=5) as model,
        load(folder, engine="numpy", experts="resident") as other,
    ):
        session = chat(model, system="Be brief.", enable_thinking=enable_thinking)
        reused = []
        for text in ("Hello", "Why?", "And then <|im_end|> what?"):
            answer = "".join(session.say(text, max_tokens=12))
            reused.append(session.n_reused)
            prompt = other.tokenizer.encode_chat(
                session.messages[:-1], None, enable_thinking
            )
            assert answer == "".join(generate(other, prompt, 12))
        assert reused[0] == 0
        assert reused[1] > 0
        assert reused[2] > reused[1]


def test_an_answer_broken_off_leaves_a_usable_session(model):
    session = chat(model)
    pieces = session.say("Hello", max_tokens=40)
    next(pieces)
    pieces.close()
    assert session.messages == []  # the turn was not finished
    answer = "".join(session.say("Hi", max_tokens=5))
    expected = "".join(
        generate(
            model, model.tokenizer.encode_chat([{"role": "user", "content": "Hi"}]), 5
        )
    )
    assert answer == expected


def test_a_failed_read_leaves_a_usable_session(model, monkeypatch):
    session = chat(model)
    "".join(session.say("Hello", max_tokens=3))
    request = model.store.request

    def fail(layer, experts):
        if layer == 2:
            raise ReadError("disk gone")
        return request(layer, experts)

    with monkeypatch.context() as patch:
        patch.setattr(model.store, "request", fail)
        with pytest.raises(ReadError):
            "".join(session.say("Why?", max_tokens=3))
    answer = "".join(session.say("Why?", max_tokens=8))
    prompt = model.tokenizer.encode_chat(session.messages[:-1])
    assert answer == "".join(generate(model, prompt, 8))


def test_tool_calls_are_parsed_and_answered(model, monkeypatch):
    session = chat(model, tools=TOOLS)
    call = format_tool_call("f", {"x": 7})
    written = model.tokenizer.encode_plain(f"Let me see.\n\n{call}")

    def write(model, ids, max_tokens, state, **_):
        model.prefill(ids, state)
        for token in written:
            yield token
            model.decode(token, state)

    with monkeypatch.context() as patch:
        patch.setattr("flashmoe_ref.generation.generate_ids", write)
        text = "".join(session.say("Call f."))
    assert text.endswith("</tool_call>")
    assert [(c.name, c.arguments) for c in session.tool_calls] == [("f", {"x": 7})]
    assert session.messages[-1]["content"] == "Let me see."
    with pytest.raises(ConfigError, match="0 results for 1"):
        session.answer_tools([])
    "".join(session.answer_tools([{"y": 1}], max_tokens=3))
    assert session.messages[-2] == {"role": "tool", "content": '{"y": 1}'}
    assert session.tool_calls == []


def test_snapshots_are_independent(model):
    state = model.new_state()
    model.prefill([1, 2, 3], state)
    snapshot = state.snapshot()
    first = model.decode(4, state)
    model.decode(5, state)
    for _ in range(2):  # a snapshot can be used more than once
        state.restore(snapshot)
        assert state.n_tokens == 3
        np.testing.assert_array_equal(model.decode(4, state), first)


@pytest.mark.parametrize("engine", ["numpy", "mlx"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_never_data(folder, engine, value, monkeypatch):
    if engine == "mlx":
        pytest.importorskip("mlx")
    with load(folder, engine=engine) as model:
        forward = model.engine.forward

        def spoiled(*args):
            logits = np.array(forward(*args))
            logits.ravel()[3] = value
            return logits

        monkeypatch.setattr(model.engine, "forward", spoiled)
        for run in (model.prefill, lambda ids, s: model.decode(ids[0], s)):
            with pytest.raises(NumericError, match="try the other engine"):
                run([4, 5], model.new_state())
