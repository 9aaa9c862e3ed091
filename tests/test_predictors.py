"""Predictors of the next layer's experts: by hand, and what they are worth."""

import numpy as np
import pytest
from test_policies import local_picks
from tiny import write_tiny

from flashmoe_ref.engine import load
from flashmoe_ref.predictors import (
    CoOccurrence,
    Frequency,
    LastToken,
    LookAhead,
    best,
    make_predictor,
    predict,
    quality,
    scores_ahead,
)
from flashmoe_ref.simulator import decode_requests, simulate

E = 6  # experts in these examples; two layers


def test_best_is_sorted_and_leaves_out_what_has_no_score():
    assert best(np.array([0.0, 2.0, 5.0, 2.0]), 3) == [2, 1, 3]
    assert best(np.array([0.0, 2.0, 0.0, 0.0]), 3) == [1]


def test_last_token_by_hand():
    last = LastToken(2, E, 2)
    assert last.after(0, [1, 2, 3]) == []  # layer 1 has not picked yet
    assert last.after(1, [4, 5, 0]) == [1, 2]  # for layer 0 of the next token
    assert last.after(0, [3, 2, 1]) == [4, 5]


def test_frequency_by_hand():
    often = Frequency(2, E, 2)
    for _ in range(2):
        often.after(0, [1, 2])
        often.after(1, [4, 5])
    often.after(0, [2, 3])
    assert often.after(1, [5, 0]) == [2, 1]
    assert often.after(0, [0, 1]) == [5, 4]


def test_co_occurrence_by_hand():
    both = CoOccurrence(2, E, 2)
    for first, second in ((0, 3), (0, 3), (0, 5), (1, 4)):
        both.after(0, [first])
        both.after(1, [second])
    assert both.after(0, [0]) == [3, 5]
    assert both.after(1, [3])[:1] == [0]  # twice token 0 came after 3 in layer 1
    assert both.after(0, [1]) == [4]


def test_look_ahead_follows_the_scores():
    look = LookAhead(2, E, 2)
    assert look.after(0, [1], np.array([-1.0, -3.0, 2.0, 0.0, -2.0, -5.0])) == [2, 3]
    assert look.after(1, [1]) == []


def test_quality_by_hand():
    picks = np.array([[[0, 1], [2, 3]], [[0, 1], [4, 5]]])  # (T, L, K)
    predicted = np.array([[[-1, -1, -1], [3, 0, 2]], [[1, 2, 0], [0, 1, -1]]])
    got = quality(predicted, picks, record_bytes=100)
    assert got.recall == 4 / 8
    assert got.precision == 4 / 8
    assert got.wasted_bytes == 4 * 100 / 2
    assert got.recall_by_layer.tolist() == [2 / 4, 2 / 4]
    first = quality(predicted, picks, 100, n=1)
    assert (first.recall, first.precision) == (2 / 8, 2 / 3)


def test_predictions_are_aligned_with_the_layer_they_are_for():
    picks = local_picks(50, n_layers=3)
    predicted = predict(LastToken(3, 32, 4), picks)
    np.testing.assert_array_equal(predicted[1:], picks[:-1])
    assert (predicted[0] == -1).all()
    scores = np.zeros((50, 3, 32))
    np.put_along_axis(scores, picks, np.arange(4, 0, -1.0)[None, None], axis=2)
    predicted = predict(LookAhead(3, 32, 4), picks, scores)
    np.testing.assert_array_equal(predicted[:, 1:], picks[:, 1:])
    assert (predicted[:, 0] == -1).all()


@pytest.mark.parametrize("name", ["last-token", "frequency", "co-occurrence"])
def test_recall_grows_with_the_budget_and_beats_chance(name):
    picks = local_picks(800)
    predicted = predict(make_predictor(f"{name}:32", 3, 32, 4, None), picks)
    for row in predicted.reshape(-1, 32):
        named = row[row >= 0]
        assert len(set(named)) == len(named)
    recalls = [quality(predicted, picks, 1, n).recall for n in (1, 2, 4, 8, 16)]
    assert recalls == sorted(recalls)
    assert recalls[2] > 2 * 4 / 32


def test_co_occurrence_finds_what_frequency_cannot():
    """Layer 1 picks e + 1 wherever layer 0 picked e, all equally often."""
    rng = np.random.default_rng(0)
    first = np.stack([rng.permutation(16)[:2] for _ in range(400)])
    picks = np.stack([first, (first + 1) % 16], axis=1)
    found = {
        name: quality(
            predict(make_predictor(f"{name}:2", 2, 16, 2, None), picks), picks, 1
        ).recall_by_layer[1]
        for name in ("frequency", "co-occurrence")
    }
    assert found["co-occurrence"] > 0.9
    assert found["frequency"] < 0.3


def test_a_profile_is_learned_before_the_run():
    picks = local_picks(100)
    fresh = make_predictor("frequency", 3, 32, 4, None)
    taught = make_predictor("frequency", 3, 32, 4, picks)
    assert fresh.after(0, picks[0, 0]) == []
    assert len(taught.after(0, picks[0, 0])) == 4


def test_a_perfect_prophet_leaves_no_misses():
    """Prefetched in time, all is there; of a useless one nothing is."""
    picks = local_picks(200)
    right = decode_requests(picks, 32, predicted=picks)
    got = simulate(right, "lru", 8)
    plain = simulate(decode_requests(picks, 32), "lru", 8)
    assert got.misses == 0
    assert got.prefetched == got.prefetch_hits == plain.misses
    wrong = decode_requests(picks, 32, (picks.max(2, keepdims=True) + 1) % 32)
    assert (
        simulate(wrong, "lru", 8).prefetch_hits < simulate(wrong, "lru", 8).prefetched
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small random checkpoint."""
    return write_tiny(tmp_path_factory.mktemp("m"))


@pytest.mark.parametrize("compiled", [True, False])
def test_scores_ahead_are_the_next_router_on_this_hidden_state(tiny, compiled):
    """Against the definition: normalize the residual as the next layer would."""
    from flashmoe_ref import layers
    from flashmoe_ref.numpy_model import widen

    ids, options = [5, 9, 33, 71], {"engine": "numpy", "compiled": compiled}
    with load(tiny, experts="resident", **options) as model:
        engine, eps = model.engine, model.config.rms_norm_eps
        picks, scores = scores_ahead(engine, ids)
        x, state = engine.embed(np.array(ids)), engine.new_state()
        for layer in range(3):
            x, h = engine.before_experts(layer, x, state)
            after = engine.layers[layer + 1]
            seen = layers.rms_norm(x, after["post_attention_layernorm"], eps)
            want = seen @ widen(after["gate"]).T
            np.testing.assert_allclose(scores[:, layer + 1], want, rtol=2e-4, atol=2e-4)
            x = x + engine.moe(layer, h)
        assert picks.shape == (4, 4, 3)
        assert not scores[:, 0].any()


def test_both_engines_look_ahead_alike(tiny):
    mx = pytest.importorskip("mlx.core")
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        with (
            load(tiny, engine="numpy", experts="resident") as one,
            load(tiny, engine="mlx", experts="resident") as other,
        ):
            h = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
            for layer in range(3):
                want = one.engine.scores_ahead(layer, h)
                got = other.engine.scores_ahead(layer, mx.array(h))
                np.testing.assert_allclose(np.array(got), want, rtol=1e-4, atol=1e-4)
    finally:
        mx.set_default_device(device)


def test_recorded_picks_are_those_of_a_run(tiny):
    from flashmoe_ref.trace import record

    ids = list(range(30))
    with load(tiny, engine="numpy", compiled=False) as model:
        with record(model) as trace:
            model.logits(ids)
        picks, _ = scores_ahead(model.engine, ids)
    np.testing.assert_array_equal(picks, trace.picks)
