"""The specification: hand-worked cases, properties, and two forms that must agree."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_ref import layers

rng = np.random.default_rng(0)


def random(*shape, dtype=np.float64):
    return rng.standard_normal(shape).astype(dtype)


# --- small functions ------------------------------------------------------------------


def test_rms_norm_by_hand():
    x = np.array([[3.0, 4.0]])  # root mean square: sqrt(12.5)
    got = layers.rms_norm(x, np.array([1.0, 2.0]), 0.0)
    np.testing.assert_allclose(got, [[3 / 12.5**0.5, 8 / 12.5**0.5]])


@pytest.mark.parametrize("value", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_activations_do_not_overflow(value):
    with np.errstate(all="raise", under="ignore"):
        x = np.array([value], np.float32)
        assert 0 <= layers.sigmoid(x)[0] <= 1
        assert layers.softplus(x)[0] >= max(value, 0) - 1e-6
        assert np.isfinite(layers.silu(x)).all()


def test_functions_keep_float32():
    x = random(3, 4, dtype=np.float32)
    for result in (
        layers.rms_norm(x, x[0], 1e-6),
        layers.sigmoid(x),
        layers.silu(x),
        layers.softplus(x),
        layers.softmax(x),
        layers.l2_normalize(x),
        *layers.rope_angles(np.arange(3), 4, 1e7),
    ):
        assert result.dtype == np.float32


# --- attention ------------------------------------------------------------------------


def test_rotation_by_hand_and_its_untouched_rest():
    u = np.array([[[1.0, 0.0, 5.0, 6.0]]])  # one token, one head; 2 of 4 rotate
    cos, sin = np.array([[0.0]]), np.array([[1.0]])  # a quarter turn
    np.testing.assert_allclose(layers.rotate(u, cos, sin), [[[0.0, 1.0, 5.0, 6.0]]])


def test_rotated_dot_products_depend_on_the_distance_only():
    q, k = random(8), random(8)

    def score(i, j):
        cos, sin = layers.rope_angles(np.array([i, j]), 8, 1e4)
        a, b = layers.rotate(np.stack([q, k])[:, None], cos, sin)[:, 0]
        return a @ b

    assert score(3, 1) == pytest.approx(score(42, 40), abs=1e-5)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def attend_slowly(q, k, v):
    """Attention one token, one head at a time."""
    (t, n_heads, dh), n = q.shape, len(k)
    out = np.zeros_like(q)
    for i in range(t):
        for h in range(n_heads):
            kv = h // (n_heads // k.shape[1])
            last = n - t + i + 1
            p = layers.softmax(k[:last, kv] @ q[i, h] / np.sqrt(dh))
            out[i, h] = p @ v[:last, kv]
    return out


@pytest.mark.parametrize(("t", "n"), [(1, 1), (1, 9), (5, 5), (4, 9)])
def test_attend_against_the_slow_form(t, n):
    q, k, v = random(t, 6, 8), random(n, 2, 8), random(n, 2, 8)
    np.testing.assert_allclose(layers.attend(q, k, v), attend_slowly(q, k, v))


def test_the_cache_grows_and_keeps_its_contents():
    state = layers.AttentionState.empty(2, 4)
    k, v = random(700, 2, 4, dtype=np.float32), random(700, 2, 4, dtype=np.float32)
    for first, last in ((0, 1), (1, 255), (255, 258), (258, 700)):
        state.append(k[first:last], v[first:last])
    np.testing.assert_array_equal(state.k[: state.n], k)
    np.testing.assert_array_equal(state.v[: state.n], v)
    copy = state.copy()
    state.append(k[:1], v[:1])
    assert (copy.n, len(copy.k)) == (700, 700)


def attention_weights(d=16, heads=4, n_kv=2, dh=8):
    shapes = {
        "q_proj": (2 * heads * dh, d),
        "k_proj": (n_kv * dh, d),
        "v_proj": (n_kv * dh, d),
        "o_proj": (d, heads * dh),
        "q_norm": (dh,),
        "k_norm": (dh,),
    }
    return {name: random(*shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("pieces", [[10], [1] * 10, [3, 7], [9, 1]])
def test_attention_in_pieces_equals_attention_at_once(pieces):
    w, h = attention_weights(), random(10, 16)

    def run(sizes):
        state = layers.AttentionState(np.zeros((0, 2, 8)), np.zeros((0, 2, 8)))
        parts = np.split(h, np.cumsum(sizes)[:-1])
        outs = [layers.gated_attention(x, w, state, 4, 1e4, 1e-6) for x in parts]
        return np.concatenate(outs)

    np.testing.assert_allclose(run(pieces), run([10]), atol=1e-12)


# --- Gated DeltaNet -------------------------------------------------------------------


def test_causal_conv_by_hand():
    x = np.array([[1.0], [2.0], [3.0]])
    kernel = np.array([[10.0, 1.0]])  # ten times the token before, plus this one
    y, tail = layers.causal_conv(x, kernel, np.array([[7.0]]))
    np.testing.assert_allclose(y, [[71.0], [12.0], [23.0]])
    np.testing.assert_allclose(tail, [[3.0]])


def test_delta_rule_stores_and_corrects():
    s = np.zeros((1, 2, 2))
    key, one = np.array([[1.0, 0.0]]), np.array([1.0])
    for value in ([[5.0, 6.0]], [[1.0, 2.0]]):  # the second replaces the first
        o, s = layers.delta_rule_step(s, key, key, np.array(value), one, one)
        np.testing.assert_allclose(o, value)
    o, _ = layers.delta_rule_step(s, key, key, np.zeros((1, 2)), one * 0.5, one * 0)
    np.testing.assert_allclose(o, [[0.5, 1.0]])  # half forgotten, nothing written


def delta_inputs(t, heads=3, dk=8, dv=6, seed=0):
    r = np.random.default_rng(seed)
    q, k = (layers.l2_normalize(r.standard_normal((t, heads, dk))) for _ in range(2))
    log_decay = -r.exponential(0.3, (t, heads))
    beta = layers.sigmoid(r.standard_normal((t, heads)))
    s = r.standard_normal((heads, dv, dk))
    return s, q, k, r.standard_normal((t, heads, dv)), log_decay, beta


@settings(deadline=None, max_examples=30)
@given(t=st.integers(2, 200), seed=st.integers(0, 99))
def test_chunks_equal_steps(t, seed):
    """In float64 the two forms agree to rounding; 1e-10 leaves room for 200 tokens."""
    s, *inputs = delta_inputs(t, seed=seed)
    chunked, s_chunked = layers.delta_rule(s, *inputs)
    outputs = []
    for i in range(t):
        step = [x[i : i + 1] for x in inputs]
        o, s = layers.delta_rule(s, *step)
        outputs.append(o)
    np.testing.assert_allclose(chunked, np.concatenate(outputs), atol=1e-10)
    np.testing.assert_allclose(s_chunked, s, atol=1e-10)


def test_strong_decay_does_not_overflow():
    s, q, k, v, _, beta = delta_inputs(64)
    with np.errstate(over="raise", invalid="raise"):
        o, s = layers.delta_rule(s, q, k, v, np.full((64, 3), -50.0), beta)
    assert np.isfinite(o).all()


# --- Mixture of Experts ---------------------------------------------------------------


def test_routing_by_hand():
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3]]))
    experts, weights = layers.route_topk(logits, 2)
    assert experts.tolist() == [[1, 3]]
    np.testing.assert_allclose(weights, [[4 / 7, 3 / 7]])


def test_ties_go_to_the_lower_expert():
    experts, _ = layers.route_topk(np.zeros((1, 5)), 3)
    assert experts.tolist() == [[0, 1, 2]]


@given(k=st.integers(1, 8), seed=st.integers(0, 99))
def test_routing_properties(k, seed):
    logits = np.random.default_rng(seed).standard_normal((4, 8))
    experts, weights = layers.route_topk(logits, k)
    np.testing.assert_allclose(weights.sum(-1), 1)
    assert (np.diff(weights) <= 0).all()  # best first
    order = np.random.default_rng(seed).permutation(8)  # renaming experts changes names
    renamed, same = layers.route_topk(logits[:, order], k)
    np.testing.assert_array_equal(order[renamed], experts)
    np.testing.assert_allclose(same, weights)


@pytest.mark.parametrize("k", [0, 6, -1])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=r"1\.\.5"):
        layers.route_topk(np.zeros((1, 5)), k)


def test_expert_by_hand():
    one = np.array([[1.0]])
    x = np.array([[2.0]])
    silu_2 = 2 / (1 + np.exp(-2))
    got = layers.expert_mlp(x, one, 3 * one, 10 * one)
    np.testing.assert_allclose(got, [[silu_2 * 6 * 10]])
