"""Kernels for prompts against the plain NumPy forms, and against themselves."""

import ml_dtypes
import numba
import numpy as np
import pytest

from flashmoe_ref import layers, prompt_kernels
from flashmoe_ref.kernels import prepare
from flashmoe_ref.numpy_model import linear, widen
from flashmoe_ref.quantize import quantize

# Both sides sum the same float32 products in different orders: the error of a sum of n
# terms of size one grows like sqrt(n) * 6e-8, and n is at most 512 here.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_matmul_of_quantized_matrices(bits, dtype):
    w = quantize(random(37, 128).astype(dtype), bits, 32)
    x = random(9, 128, seed=1)
    np.testing.assert_allclose(prompt_kernels.matmul(w, x), linear(x, w), **TOLERANCE)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("n_rows", [1, 4, 16, 17, 63])
@pytest.mark.parametrize(("t", "n_in"), [(2, 8), (3, 12), (5, 7), (64, 100)])
def test_matmul_of_float_matrices_of_odd_shapes(dtype, n_rows, t, n_in):
    w, x = random(n_rows, n_in).astype(dtype), random(t, n_in, seed=1)
    np.testing.assert_allclose(prompt_kernels.matmul(w, x), linear(x, w), **TOLERANCE)


def test_threads_change_no_bit(monkeypatch):
    w, x = quantize(random(500, 256), 4, 64), random(40, 256, seed=1)
    serial = prompt_kernels.matmul(w, x)
    monkeypatch.setattr(prompt_kernels, "PARALLEL_WORK", 0)
    for n in (1, 2):
        numba.set_num_threads(n)
        np.testing.assert_array_equal(prompt_kernels.matmul(w, x), serial)


def test_a_token_gives_the_same_bits_in_any_company():
    w, x = quantize(random(50, 64), 4, 32), random(30, 64, seed=1)
    whole = prompt_kernels.matmul(w, x)
    for rows in (slice(0, 2), slice(7, 20), slice(29, 30)):
        np.testing.assert_array_equal(prompt_kernels.matmul(w, x[rows]), whole[rows])


@pytest.mark.parametrize("k", [1, 3, 12])
def test_routing(k):
    logits = random(40, 12)
    logits[:5] = np.round(logits[:5])  # ties
    before = logits.copy()
    experts, weights = prompt_kernels.route_topk(logits, k)
    expected, expected_weights = layers.route_topk(logits, k)
    np.testing.assert_array_equal(experts, expected)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)
    np.testing.assert_array_equal(logits, before)


def bank_of(bits, n_slots=6, f=24, d=40):
    shapes = [(n_slots, f, d), (n_slots, f, d), (n_slots, d, f)]
    if bits == 16:
        return [
            random(*s, seed=i).astype(ml_dtypes.bfloat16) for i, s in enumerate(shapes)
        ]
    shapes = [(n_slots, 64, 96), (n_slots, 64, 96), (n_slots, 96, 64)]
    return [quantize(random(*s, seed=i) / 8, bits, 32) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("parallel", [False, True])
def test_experts_of_prompt(bits, parallel, monkeypatch):
    bank = bank_of(bits)
    d = bank[0].shape[-1]
    x, y = random(11, d, seed=5), random(11, d, seed=6)
    slots = np.array([4, 0, 2])
    starts = np.array([0, 5, 6, 11])
    tokens = np.array([0, 3, 4, 9, 10, 7, 0, 1, 2, 3, 8])
    shares = random(11, seed=7)
    expected = y.copy()
    for i, slot in enumerate(slots):
        rows = slice(starts[i], starts[i + 1])
        weights = (widen(m[slot]) for m in bank)
        part = layers.expert_mlp(x[tokens[rows]], *weights)
        expected[tokens[rows]] += shares[rows, None] * part
    monkeypatch.setattr(prompt_kernels, "PARALLEL_WORK", 0 if parallel else 1 << 60)
    prepared = tuple(prepare(m) for m in bank)
    prompt_kernels.experts_of_prompt(prepared, slots, starts, tokens, shares, x, y)
    np.testing.assert_allclose(y, expected, **TOLERANCE)


# Tokens before and now, head width: whole tiles, and remainders of every kind.
@pytest.mark.parametrize(
    ("n_before", "t", "dh"), [(0, 2, 8), (0, 96, 16), (5, 97, 12), (50, 3, 6)]
)
@pytest.mark.parametrize("parallel", [False, True])
def test_attend(n_before, t, dh, parallel, monkeypatch):
    q = random(t, 6, dh)
    k, v = (random(n_before + t, 2, dh, seed=i) for i in (1, 2))
    monkeypatch.setattr(prompt_kernels, "PARALLEL_WORK", 0 if parallel else 1 << 60)
    got = prompt_kernels.attend(q, k, v)
    np.testing.assert_allclose(got, layers.attend(q, k, v), **TOLERANCE)


def test_attention_has_the_same_bits_in_chunks():
    q, k, v = random(60, 4, 16), random(60, 2, 16, seed=1), random(60, 2, 16, seed=2)
    whole = prompt_kernels.attend(q, k, v)
    for start, stop in ((0, 7), (7, 58), (58, 60)):
        part = prompt_kernels.attend(q[start:stop], k[:stop], v[:stop])
        np.testing.assert_array_equal(part, whole[start:stop])


@pytest.mark.parametrize("t", [1, 2, 70])
@pytest.mark.parametrize("dk", [16, 11])
@pytest.mark.parametrize("parallel", [False, True])
def test_delta_rule(t, dk, parallel, monkeypatch):
    n_heads, n_keys, dv = 6, 2, 12
    s = random(n_heads, dv, dk)
    q, k = (layers.l2_normalize(random(t, n_keys, dk, seed=i)) for i in (1, 2))
    log_decay = -np.abs(random(t, n_heads, seed=3))
    beta = layers.sigmoid(random(t, n_heads, seed=4))
    inputs = (q, k, random(t, n_heads, dv, seed=5), log_decay, beta)
    expected, s_expected = layers.delta_rule(s, *inputs)
    monkeypatch.setattr(prompt_kernels, "PARALLEL_WORK", 0 if parallel else 1 << 60)
    before = s.copy()
    o, s_new = prompt_kernels.delta_rule(s, *inputs)
    np.testing.assert_allclose(o, expected, **TOLERANCE)
    np.testing.assert_allclose(s_new, s_expected, **TOLERANCE)
    np.testing.assert_array_equal(s, before)  # the caller's state is untouched
