"""One-token steps against the specification in layers.py, block by block."""

import ml_dtypes
import numba
import numpy as np
import pytest

from flashmoe_ref import layers, steps
from flashmoe_ref.kernels import prepare
from flashmoe_ref.layers import AttentionState, DeltaState
from flashmoe_ref.quantize import dequantize, quantize

EPS = 1e-6
D, HK, HV, DK, DV, WIDTH = (
    96,
    2,
    6,
    16,
    32,
    4,
)  # Gated DeltaNet; 3 value heads a key head
H, HKV, DH, ROTARY, THETA = 6, 2, 48, 12, 1e4  # attention; 3 query heads a key head
E, F = 12, 64
C = 2 * HK * DK + HV * DV

# Both sides work in float32 and sum in different orders: about 1e-6 a block where
# values are near 1. Over many tokens it adds up, since the memory carries errors on.
LIMIT = 2e-5


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def matrix(n_out: int, n_in: int, seed: int):
    """An 8-bit matrix that keeps the scale of x."""
    w = normal(n_out, n_in, seed=seed) / np.sqrt(n_in)
    return quantize(w.astype(ml_dtypes.bfloat16), 8, 32)


def plain(weights: dict) -> dict[str, np.ndarray]:
    return {
        name: w if isinstance(w, np.ndarray) else dequantize(w)
        for name, w in weights.items()
    }


def near_one(*shape: int, seed: int) -> np.ndarray:
    return 1 + normal(*shape, seed=seed) / 10


DELTA_NET = {
    "in_proj_qkv": matrix(C, D, 1),
    "in_proj_z": matrix(HV * DV, D, 2),
    "in_proj_b": matrix(HV, D, 3),
    "in_proj_a": matrix(HV, D, 4),
    "out_proj": matrix(D, HV * DV, 5),
    "conv1d": normal(C, WIDTH, seed=6),
    "A_log": normal(HV, seed=7),
    "dt_bias": normal(HV, seed=8),
    "norm": near_one(DV, seed=9),
}
ATTENTION = {
    "q_proj": matrix(2 * H * DH, D, 11),
    "k_proj": matrix(HKV * DH, D, 12),
    "v_proj": matrix(HKV * DH, D, 13),
    "o_proj": matrix(D, H * DH, 14),
    "q_norm": near_one(DH, seed=15),
    "k_norm": near_one(DH, seed=16),
}
SHARED = {
    "shared_gate_proj": matrix(F, D, 21),
    "shared_up_proj": matrix(F, D, 22),
    "shared_down_proj": matrix(D, F, 23),
    "shared_expert_gate": matrix(1, D, 24),
}
NORM = near_one(D, seed=25)


def arguments(weights: dict) -> list:
    """Matrices prepared, vectors as they are: the order of the dictionaries above."""
    return [w if isinstance(w, np.ndarray) else prepare(w) for w in weights.values()]


def assert_near(got: np.ndarray, want: np.ndarray, what: str) -> None:
    error = np.abs(got - want)
    assert error.max() <= LIMIT, f"{what}: {error.max()=} at {np.argmax(error)}"


def test_delta_net_over_many_tokens():
    want = DeltaState.empty(WIDTH, C, HV, DV, DK)
    got, weights, tokens = want.copy(), plain(DELTA_NET), normal(30, D, seed=30)
    for t, x in enumerate(tokens):
        h = layers.rms_norm(x[None], NORM, EPS)
        wanted = x + layers.gated_delta_net(h, weights, want, HK, EPS)[0]
        out = x.copy()
        steps.delta_net_step(out, NORM, *arguments(DELTA_NET), got.conv, got.s, HK, EPS)
        assert_near(out, wanted, f"token {t}")
        assert_near(got.s, want.s, f"memory after token {t}")
        assert_near(got.conv, want.conv, f"convolution after token {t}")


def test_delta_step_by_hand():
    # An empty memory, a key of unit length, beta 1: the value is written under the key,
    # so that a query equal to the key reads it back, whatever the decay.
    s = np.zeros((2, 3, 4), np.float32)
    k = np.array([[[0, 1, 0, 0]]], np.float32)
    v = normal(1, 2, 3)
    ones = np.ones((1, 2), np.float32)
    o = steps.delta_step(s, k, k, v, ones / 2, ones)
    np.testing.assert_array_equal(o, v)
    np.testing.assert_array_equal(s[:, :, 1], v[0])
    # The next token decays it by a half and, with beta 0, writes nothing.
    o = steps.delta_step(s, k, k, v, ones / 2, 0 * ones)
    np.testing.assert_array_equal(o, v / 2)


def test_value_heads_share_key_heads_in_order():
    s, q, k = normal(6, 4, 8), normal(2, 8, seed=1), normal(2, 8, seed=2)
    v, decay, beta = (
        normal(6, 4, seed=3),
        np.full(6, 0.9, np.float32),
        normal(6, seed=4),
    )
    repeated = (np.repeat(a, 3, axis=0) for a in (q, k))
    want, memory = layers.delta_rule_step(s, *repeated, v, decay, beta)
    got = steps.delta_step(s, *(a[None] for a in (q, k, v, decay, beta)))
    assert_near(got[0], want, "output")
    assert_near(s, memory, "memory")


def frequencies() -> np.ndarray:
    exponents = np.arange(0, ROTARY, 2, dtype=np.float32) / np.float32(ROTARY)
    return (1 / np.float32(THETA) ** exponents).astype(np.float32)


def test_attention_over_many_tokens():
    want, weights = AttentionState.empty(HKV, DH), plain(ATTENTION)
    keys, values = np.full((2, 40, HKV, DH), np.nan, np.float32)  # unfilled: not read
    for t, x in enumerate(normal(40, D, seed=31)):
        h = layers.rms_norm(x[None], NORM, EPS)
        wanted = x + layers.gated_attention(h, weights, want, ROTARY, THETA, EPS)[0]
        out = x.copy()
        steps.attention_step(
            out, NORM, *arguments(ATTENTION), keys, values, t, frequencies(), EPS
        )
        assert_near(out, wanted, f"token {t}")
        assert_near(keys[t], want.k[t], f"key of token {t}")
        assert_near(values[t], want.v[t], f"value of token {t}")


def test_attention_refuses_a_full_cache():
    keys, values = np.zeros((2, 3, HKV, DH), np.float32)
    with pytest.raises(IndexError, match="cache is full"):
        steps.attention_step(
            normal(D), NORM, *arguments(ATTENTION), keys, values, 3, frequencies(), EPS
        )


@pytest.mark.parametrize("k", [1, 3, E])
def test_router(k):
    gate = matrix(E, D, 40)
    for seed in range(20):
        x = normal(D, seed=50 + seed)
        want_h = layers.rms_norm(x[None], NORM, EPS)
        experts, weights = layers.route_topk(want_h @ dequantize(gate).T, k)
        h, got_experts, got_weights = steps.route_step(x, NORM, prepare(gate), k, EPS)
        assert_near(h, want_h[0], "h")
        assert got_experts.tolist() == experts[0].tolist()
        assert_near(got_weights, weights[0], "weights")


def test_equal_experts_are_picked_in_order_of_their_ids():
    gate = np.repeat(normal(4, D), 3, axis=0)  # experts 0 1 2 equal, 3 4 5 equal ..
    x = normal(D, seed=1)
    _, experts, weights = steps.route_step(x, NORM, prepare(gate), 12, EPS)
    triples = experts.reshape(4, 3)
    assert (np.diff(triples, axis=1) == 1).all(), f"{triples=}"
    assert (triples[:, 0] % 3 == 0).all(), f"{triples=}"
    assert np.abs(weights.sum() - 1) < 1e-6


def test_a_broken_router_stays_within_the_experts():
    gate = np.full((E, D), np.nan, np.float32)
    _, experts, _ = steps.route_step(normal(D), NORM, prepare(gate), 3, EPS)
    assert ((experts >= 0) & (experts < E)).all()


def test_shared_expert():
    for seed in range(5):
        x, h = normal(D, seed=60 + seed), normal(D, seed=70 + seed)
        want = x + layers.shared_expert(h[None], plain(SHARED))[0]
        steps.shared_expert_step(x, h, *arguments(SHARED))
        assert_near(x, want, "shared expert")


def test_logits():
    head, x = matrix(77, D, 80), normal(D, seed=81)
    want = layers.rms_norm(x[None], NORM, EPS) @ dequantize(head).T
    assert_near(steps.logits_step(x, NORM, prepare(head), EPS), want[0], "logits")


def test_threads_change_no_bit():
    q, k, v = normal(1, 2, 16), normal(1, 2, 16, seed=1), normal(1, 6, 8, seed=2)
    decay, beta = np.full((1, 6), 0.9, np.float32), np.full((1, 6), 0.5, np.float32)
    keys, values = normal(50, 2, 16), normal(50, 2, 16, seed=3)
    before, results = numba.get_num_threads(), []
    for rule, attend, threads in (
        (steps.delta_rule_serial, steps._attend_serial, before),
        (steps.delta_rule_parallel, steps._attend_parallel, 1),
        (steps.delta_rule_parallel, steps._attend_parallel, before),
    ):
        numba.set_num_threads(threads)
        s, o = normal(6, 8, 16), np.empty((1, 6, 8), np.float32)
        mixed = np.empty((6, 16), np.float32)
        rule(s, q, k, v, decay, beta, o)
        attend(normal(6, 16), keys, values, mixed)
        results.append((s, o, mixed))
    numba.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(got, want)
