"""Scores of a text: exact, with honest intervals, and equal to mlx-lm's."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_tiny

from flashmoe_ref import evaluate, load
from flashmoe_ref.engine import Model
from flashmoe_ref.errors import ConfigError
from flashmoe_ref.evaluate import (
    bootstrap_interval,
    continuations,
    diverging_position,
    first_difference,
    kl_divergence,
    log_softmax,
    score_file,
    score_ids,
    windows,
)

ROOT = Path(__file__).parents[1]
REDUCED = ROOT / "data" / "reduced"
TEXT = ROOT / "README.md"
IDS = np.random.default_rng(0).integers(0, 60, 90).tolist()
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(tiny: Path) -> Iterator[Model]:
    with load(tiny, engine="numpy", compiled=False, experts="resident") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reduced() -> Iterator[Model]:
    with load(REDUCED, engine="numpy", experts="resident") as loaded:
        yield loaded


# --- windows --------------------------------------------------------------------------


def test_windows_by_hand() -> None:
    assert list(windows(11, 6, 4)) == [(0, 1, 6), (4, 6, 10), (8, 10, 11)]
    assert list(windows(1, 6, 4)) == []


@given(st.integers(2, 300), st.integers(2, 40), st.data())
def test_every_token_is_scored_once_with_enough_before_it(n, window, data) -> None:
    stride = data.draw(st.integers(1, window - 1))
    scored = []
    for first, start, end in windows(n, window, stride):
        assert end - first <= window
        assert start - first >= min(window - stride, start)
        scored += range(start, end)
    assert scored == list(range(1, n))


@pytest.mark.parametrize("stride", [0, 8, 9])
def test_a_window_without_context_is_refused(stride: int) -> None:
    with pytest.raises(ConfigError, match="smaller than the window"):
        next(windows(20, 8, stride))


# --- scores ---------------------------------------------------------------------------


def test_one_window_is_one_pass(model: Model) -> None:
    score = score_ids(model, IDS, 200, window=512, stride=256)
    wanted = log_softmax(model.logits(IDS).astype(np.float64))[:-1]
    nats = -wanted[np.arange(len(IDS) - 1), IDS[1:]]
    np.testing.assert_allclose(score.nats, nats, atol=1e-4)
    assert score.perplexity == pytest.approx(np.exp(nats.mean()), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(nats.sum() / np.log(2) / 200, rel=1e-4)
    assert np.array_equal(score.best, wanted.argmax(axis=1))


def test_blocks_change_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little memory logits may take. Float32: other orders of summation."""
    whole = score_ids(model, IDS, 1, window=40, stride=30)
    monkeypatch.setattr(evaluate, "LOGITS_BYTES", 4 * 4 * model.config.vocab_size)
    blocks = [v for _, v in evaluate.log_probabilities(model, IDS, 40, 30)]
    assert max(map(len, blocks)) == 4
    parts = score_ids(model, IDS, 1, window=40, stride=30)
    np.testing.assert_allclose(parts.nats, whole.nats, atol=1e-4)


def test_a_model_agrees_with_itself(model: Model) -> None:
    kept = np.empty((len(IDS) - 1, model.config.vocab_size), np.float32)
    score_ids(model, IDS, 1, keep=kept, window=40, stride=30)
    for baseline in (kept, model):
        score = score_ids(model, IDS, 1, baseline, window=40, stride=30)
        assert score.agrees.all()
        assert score.divergence.max() < 1e-6


def test_another_k_departs_from_it(model: Model, tiny: Path) -> None:
    with load(tiny, engine="numpy", compiled=False, k=1) as one:
        beside = score_ids(one, IDS, 1, model)
        kept = np.empty((len(IDS) - 1, model.config.vocab_size), np.float32)
        base = score_ids(model, IDS, 1, keep=kept)
        by_file = score_ids(one, IDS, 1, kept)
    assert beside.divergence.mean() > 1e-4
    np.testing.assert_array_equal(beside.divergence, by_file.divergence)
    np.testing.assert_array_equal(beside.agrees, beside.best == base.best)


def test_divergence_by_hand() -> None:
    p, q = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    wanted = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    np.testing.assert_allclose(kl_divergence(p, q), [wanted, 0], atol=1e-12)


def test_texts_too_short_or_of_another_vocabulary(model: Model) -> None:
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        score_ids(model, [1], 1)
    with pytest.raises(ConfigError, match="compare settings of one model"):
        score_ids(model, IDS, 1, np.zeros((len(IDS) - 1, 7), np.float32))


def test_bytes_of_a_file_but_its_first_token(reduced: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Once upon a time there was a fox. «Où?» <|im_end|>", "utf-8")
    ids, n_bytes = evaluate.read_text(reduced, path)
    first = len(reduced.tokenizer.token_bytes(ids[0]))
    assert n_bytes == path.stat().st_size - first
    assert not set(ids) & set(reduced.tokenizer.control.values())
    assert len(evaluate.read_text(reduced, path, 5)[0]) == 5
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        evaluate.read_text(reduced, path)


def test_perplexity_is_that_of_mlx_lm(reduced: Model) -> None:
    """The same file, the same windows, its own model class, float32."""
    from test_peer_mlx_lm import load_in_float32, mx

    n, window, stride = 300, 128, 96
    score = score_file(reduced, TEXT, n, window=window, stride=stride)
    ids, _ = evaluate.read_text(reduced, TEXT, n)
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        theirs, total = load_in_float32(REDUCED), 0.0
        for first, scored, end in windows(n, window, stride):
            logits = np.array(theirs(mx.array(ids[first : end - 1])[None])[0])
            values = log_softmax(logits)[scored - 1 - first :]
            total -= values[np.arange(len(values)), ids[scored:end]].sum()
    finally:
        mx.set_default_device(device)
    assert score.perplexity == pytest.approx(np.exp(total / (n - 1)), rel=1e-3)
    assert abs(score.nats.sum() - total) / (n - 1) < 1e-4  # nats a token


# --- intervals ------------------------------------------------------------------------


def test_interval_of_a_constant_is_the_constant() -> None:
    assert bootstrap_interval(np.full(1000, 2.5)) == pytest.approx((2.5, 2.5))


def test_interval_of_independent_values_is_the_textbook_s() -> None:
    values = RNG.normal(3, 1, 5000)
    low, high = bootstrap_interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 / np.sqrt(5000), rel=0.2)
    assert low < values.mean() < high


def test_neighbours_that_are_alike_widen_it() -> None:
    """40 equal values in a row count as one, so the interval is sqrt(40) wider."""
    alike = np.repeat(RNG.normal(size=150), 40)
    single = bootstrap_interval(alike, block=1)
    blocks = bootstrap_interval(alike, block=240)
    ratio = (blocks[1] - blocks[0]) / (single[1] - single[0])
    assert ratio == pytest.approx(np.sqrt(40), rel=0.3)


def test_a_seed_gives_one_interval() -> None:
    values = RNG.normal(size=700)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)


# --- free generation ------------------------------------------------------------------


def test_first_difference_by_hand() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], []) is None


def test_one_pass_finds_where_texts_part(reduced: Model) -> None:
    prompts = [
        reduced.tokenizer.encode(text)
        for text in ("Once upon a time", "It was late in the evening when", "“No,”")
    ]
    theirs = continuations(reduced, prompts, 30)
    with load(REDUCED, engine="numpy", experts="resident", k=3) as cut:
        ours = continuations(cut, prompts, 30)
        got = [
            diverging_position(cut, *pair) for pair in zip(prompts, theirs, strict=True)
        ]
    wanted = [first_difference(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert got == [30 if place is None else place for place in wanted]
    assert min(got) < 30, "the prompts show no difference"
    assert diverging_position(reduced, prompts[0], theirs[0]) == 30
