"""Runs over prompt sets: with a model that says what it is told to, and a real one."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from flashmoe_ref import generate, load
from flashmoe_ref.errors import ConfigError
from flashmoe_ref.layers import softmax
from flashmoe_ref.structured import Score
from flashmoe_ref.structured_runs import (
    Chance,
    Outcome,
    Prompt,
    as_record,
    choose_prompts,
    count_tokens,
    load_prompts,
    run_prompts,
    score_answer,
    summarize,
)
from flashmoe_ref.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
EVAL = ROOT / "data" / "eval"
TOKENIZER = Tokenizer.from_dir(ROOT / "data" / "reduced")
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


def json_prompt(wanted: object, number: int = 0, group: str = "g") -> Prompt:
    """A prompt with a wanted value, and nothing to read it from."""
    messages = [{"role": "user", "content": "Do it."}]
    return Prompt(str(number), "json", group, messages, wanted, schema=SCHEMA)


class ToldState:
    """How many tokens of the answer were said."""

    def __init__(self) -> None:
        self.n_tokens = self.n_read = 0

    def snapshot(self) -> "ToldState":
        copy = ToldState()
        copy.restore(self)
        return copy

    def restore(self, other: "ToldState") -> None:
        self.n_tokens, self.n_read = other.n_tokens, other.n_read


class ToldModel:
    """Says a given text: its next token has the logit 2, a second choice 1, else 0."""

    tokenizer = TOKENIZER
    alone = nullcontext

    class config:
        max_position_embeddings = 4096
        vocab_size = 1 << 20

    def __init__(self, text: str | list[int], second: str = "z") -> None:
        ids = TOKENIZER.encode(text) if isinstance(text, str) else text
        self.ids = [*ids, TOKENIZER.encode("<|im_end|>")[0]]
        self.second = TOKENIZER.encode(second)[0]
        self.n_prompts = 0  # prompts read from their beginning

    def new_state(self) -> ToldState:
        self.n_prompts += 1
        return ToldState()

    def prefill(self, ids: list[int], state: ToldState) -> np.ndarray:
        first = state.n_tokens == 0
        state.n_tokens += len(ids)
        state.n_read += 0 if first else len(ids) - 1
        return self.logits(state)

    def decode(self, token: int, state: ToldState) -> np.ndarray:
        state.n_tokens += 1
        state.n_read += 1
        return self.logits(state)

    def logits(self, state: ToldState) -> np.ndarray:
        logits = np.zeros(TOKENIZER.n_real_ids, np.float32)
        logits[self.second] = 1
        logits[self.ids[state.n_read]] = 2
        return logits


def one(model: ToldModel, prompt: Prompt, **settings: object) -> Outcome:
    """The outcome of a single prompt."""
    (outcome,) = run_prompts(model, [prompt], **settings)
    return outcome


LIKELY = float(np.exp(2) / (np.exp(2) + np.e + TOKENIZER.n_real_ids - 2))
SECOND = LIKELY / np.e


def test_a_right_answer():
    prompt = json_prompt({"a": "salesman"})
    outcome = one(ToldModel(prompt.wanted_text), prompt)
    assert outcome.text == prompt.wanted_text and outcome.ended
    assert outcome.score.is_right and outcome.seed is None
    assert outcome.chosen is outcome.wanted is None


def test_the_wrong_token_and_the_right_one():
    prompt = json_prompt({"a": "red cat"})
    outcome = one(ToldModel('{"a": "red dog"}', second=" cat"), prompt)
    assert outcome.score.stage == "fits"
    assert outcome.text[: outcome.score.position].endswith("red ")
    assert outcome.chosen.text == " dog"
    assert outcome.wanted.text == " cat"
    assert outcome.chosen.probability == pytest.approx(LIKELY)
    assert outcome.wanted.probability == pytest.approx(SECOND)


def test_an_answer_that_stops_too_early_or_too_late():
    prompt = json_prompt({"a": "x"})
    early = one(ToldModel('{"a": "x"'), prompt)
    assert early.ended and early.chosen == Chance("", pytest.approx(LIKELY))
    assert early.wanted.text == "}"
    late = one(ToldModel('{"a": "x"} yes'), prompt)
    assert late.chosen.text == " yes" and late.wanted.text == ""
    assert late.score.stage == "none"


def test_a_cut_answer_has_no_wrong_token():
    prompt = json_prompt({"a": "x y z"})
    outcome = one(ToldModel(prompt.wanted_text), prompt, max_tokens=4)
    assert not outcome.ended and len(outcome.tokens) == 4
    assert outcome.score.position == len(outcome.text)
    assert outcome.chosen is outcome.wanted is None


def test_a_character_of_several_tokens():
    """Both characters begin with the same bytes: the token that differs is named."""
    prompt = json_prompt({"a": "\u6771"})
    ids, right = (TOKENIZER.encode(f'{{"a": "{c}"}}') for c in "\u6772\u6771")
    n = next(i for i, (a, b) in enumerate(zip(ids, right, strict=True)) if a != b)
    assert n > TOKENIZER.encode('{"a": "').__len__()
    outcome = one(ToldModel(ids), prompt)
    assert outcome.chosen.text == TOKENIZER.decode([ids[n]])
    assert outcome.chosen.probability == pytest.approx(LIKELY)
    assert outcome.wanted.probability < SECOND


def test_a_tool_call():
    tools = [{"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}]
    wanted = [{"name": "f", "arguments": {"x": 12}}]
    messages = [{"role": "user", "content": "Do it."}]
    prompt = Prompt("1", "tool", "g", messages, wanted, tools)
    assert score_answer(prompt, prompt.wanted_text).is_right
    outcome = one(ToldModel(prompt.wanted_text.replace("12", "13")), prompt)
    assert (outcome.score.stage, outcome.chosen.text) == ("fits", "3")
    assert outcome.wanted.text == "2"
    text = one(ToldModel("I cannot."), prompt)
    assert (text.chosen.text, text.wanted.text) == ("I", "<tool_call>")


def test_seeds_read_a_prompt_once():
    model, prompt = ToldModel('{"a": "x"}'), json_prompt({"a": "x"})
    outcomes = list(run_prompts(model, [prompt] * 2, seeds=(3, 4, 5), temperature=0.01))
    assert [o.seed for o in outcomes] == [3, 4, 5] * 2
    assert all(o.score.is_right for o in outcomes)
    assert model.n_prompts == 2


def test_settings_that_do_not_go_together():
    model, prompt = ToldModel("x"), json_prompt({})
    for settings in (
        {"seeds": (1,)},
        {"temperature": 0.5},
        {"seed": 1},
        {"repetition_penalty": 1.1},
        {"limit": 0},
    ):
        with pytest.raises(ConfigError):
            run_prompts(model, [prompt], **settings)


def test_choosing_spreads_evenly():
    prompts = [json_prompt({}, n) for n in range(10)]
    assert [p.id for p in choose_prompts(prompts, 4)] == ["0", "2", "5", "7"]
    assert choose_prompts(prompts, 10) == choose_prompts(prompts, None) == prompts
    assert choose_prompts(prompts, 50) == prompts
    halves = [p.group for p in choose_prompts(load_prompts(EVAL / "json.jsonl"), 50)]
    assert halves.count("seen") == halves.count("unseen") == 25


def test_summary_by_hand():
    def outcome(group: str, passed: int) -> Outcome:
        return Outcome("1", "json", group, None, "", [], True, Score("json", passed))

    rates = summarize([outcome(g, p) for g, p in [("b", 3), ("a", 1), ("b", 0)]])
    found = [(r.group, r.stage, r.passed, r.n) for r in rates]
    assert found == [
        ("all", "parses", 2, 3),
        ("all", "fits", 1, 3),
        ("all", "right", 1, 3),
        ("a", "parses", 1, 1),
        ("a", "fits", 0, 1),
        ("a", "right", 0, 1),
        ("b", "parses", 1, 2),
        ("b", "fits", 1, 2),
        ("b", "right", 1, 2),
    ]
    for rate in rates:
        assert rate.low <= rate.share <= rate.high
    assert summarize([]) == []


def test_files_that_are_no_sets(tmp_path):
    path = tmp_path / "set.jsonl"
    good = '{"id": "1", "kind": "json", "group": "", "messages": [], "wanted": 1}'
    for bad, words in (
        ("{", "line 2: not valid JSON"),
        ('{"id": 1}', "line 2: not a prompt"),
        (good.replace("json", "xml"), "kind 'xml' is not one of tool, json"),
        (good.replace('"json"', "[]"), r"kind \[\] is not one of"),
        (good.replace("[]", "7"), "messages must be a list"),
        (good.replace("[]", "[7]"), "messages must be a list of JSON objects"),
        (good.replace("json", "tool"), "wanted must be a list"),
        (good[:-1] + ', "tools": [{}]}', "a tool has no name"),
        ("9" * 5000, "line 2: not valid JSON"),
    ):
        path.write_text(f"{good}\n{bad}\n")
        with pytest.raises(ConfigError, match=words):
            load_prompts(path)


@pytest.fixture(scope="module")
def reduced():
    with load(ROOT / "data" / "reduced", engine="numpy", experts="resident") as model:
        yield model


def test_a_greedy_run_says_what_generate_says(reduced):
    prompts = load_prompts(EVAL / "json.jsonl")
    for outcome in run_prompts(reduced, prompts, limit=2):
        (prompt,) = (p for p in prompts if p.id == outcome.id)
        ids = reduced.tokenizer.encode_chat(prompt.messages, enable_thinking=False)
        assert outcome.text == "".join(generate(reduced, ids))
        assert outcome.score.stage != "none"  # it was trained for this


def test_chances_are_those_of_one_pass_over_the_text(reduced):
    prompts = load_prompts(EVAL / "hard.jsonl")
    failures = [
        o for o in run_prompts(reduced, prompts, limit=3) if not o.score.is_right
    ]
    assert failures
    for outcome in failures:
        (prompt,) = (p for p in prompts if p.id == outcome.id)
        ids = reduced.tokenizer.encode_chat(
            prompt.messages, prompt.tools or None, enable_thinking=False
        )
        p = softmax(reduced.logits([*ids, *outcome.tokens])[len(ids) - 1 :])
        # (answer tokens + 1, V)
        n = 0
        while len(TOKENIZER.decode(outcome.tokens[: n + 1])) <= outcome.score.position:
            n += 1
        token = outcome.tokens[n]
        assert outcome.chosen.text == TOKENIZER.decode([token])
        assert outcome.chosen.probability == pytest.approx(p[n, token], abs=1e-3)
        assert outcome.chosen.probability >= outcome.wanted.probability
        record = as_record(outcome)
        assert json.loads(json.dumps(record)) == record
        assert record["p_chosen"] == round(outcome.chosen.probability, 4)


def test_sampled_runs_repeat(reduced):
    prompts = load_prompts(EVAL / "tool.jsonl")[:1]

    def texts(*seeds: int) -> list[str]:
        settings = {"seeds": seeds, "temperature": 1.5, "explain": False}
        return [
            o.text for o in run_prompts(reduced, prompts, max_tokens=40, **settings)
        ]

    first = texts(0, 1)
    assert first == texts(0, 1)
    assert first[1:] == texts(1)  # whatever came before
    assert first[0] != first[1]


def test_tokens_are_counted(reduced):
    prompts = [json_prompt({"a": "x"})]
    n_prompt, n_answer = count_tokens(reduced, prompts)
    rendered = reduced.tokenizer.encode_chat(prompts[0].messages, enable_thinking=False)
    assert n_prompt == len(rendered)
    assert n_answer == len(reduced.tokenizer.encode('{"a": "x"}')) + 1
