"""Compiled kernels against NumPy, for every width, group, dtype and odd shapes."""

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_ref import compiled, kernels
from flashmoe_ref.errors import ConfigError
from flashmoe_ref.kernels import (
    dequantize_f32,
    experts_parallel,
    experts_serial,
    experts_step,
    matvec,
    multiply_parallel,
    multiply_serial,
    prepare,
)
from flashmoe_ref.layers import expert_mlp
from flashmoe_ref.quantize import (
    BITS,
    FLOAT_DTYPES,
    GROUP_SIZES,
    QuantizedMatrix,
    dequantize,
    quantize,
    unpack,
)
from flashmoe_ref.vectors import exp, silu

BF16 = np.dtype(ml_dtypes.bfloat16)
EPS = 2.0**-24  # half a unit in the last place of float32

each_width = pytest.mark.parametrize("bits", BITS)
each_group = pytest.mark.parametrize("group_size", GROUP_SIZES)
each_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def product_of(matrix: QuantizedMatrix | np.ndarray, x: np.ndarray) -> np.ndarray:
    """The serial kernel alone; `matvec` compiles the parallel one too."""
    out = np.full(matrix.shape[0], np.nan, np.float32)
    multiply_serial(prepare(matrix), x, out)
    return out


def assert_product(got: np.ndarray, matrix: QuantizedMatrix, x: np.ndarray) -> None:
    """Compare with float64, allowing for the roundings of each lane's chain.

    The rearranged sum adds q s x and b x, which may cancel: the error is relative to
    the sum of their magnitudes. A lane adds n/8 terms; their roundings, of random sign,
    stay far below the 8 + n/64 units allowed here.
    """
    q = unpack(matrix.weight, matrix.bits).reshape(*matrix.scales.shape, -1)
    scale = np.abs(matrix.scales.astype(np.float64))[..., None]
    bias = np.abs(matrix.biases.astype(np.float64))[..., None]
    size = (q * scale + bias).reshape(matrix.shape) @ np.abs(x.astype(np.float64))
    want = dequantize(matrix).astype(np.float64) @ x
    error = np.abs(got - want)
    allowed = size * EPS * (8 + x.size / 64)
    assert (error <= allowed).all(), f"{error.max()=} {np.argmax(error - allowed)=}"


@each_dtype
@each_group
@each_width
def test_matrix_times_vector(bits, group_size, dtype):
    for rows, groups in ((1, 1), (5, 3), (67, 2)):
        w, x = normal(rows, groups * group_size), normal(groups * group_size, seed=1)
        matrix = quantize(w.astype(dtype), bits, group_size)
        assert_product(product_of(matrix, x), matrix, x)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    rows=st.integers(1, 70),
    groups=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_shape(bits, group_size, rows, groups, seed):
    w = normal(rows, groups * group_size, seed=seed).astype(BF16)
    matrix = quantize(w, bits, group_size)
    x = normal(w.shape[1], seed=seed + 1)
    assert_product(product_of(matrix, x), matrix, x)


@each_width
def test_one_hot_x_gives_a_decoded_column_exactly(bits):
    matrix = quantize(normal(9, 128).astype(BF16), bits, 32)
    decoded = dequantize(matrix)
    for column in range(128):
        x = np.zeros(128, np.float32)
        x[column] = 1
        np.testing.assert_array_equal(product_of(matrix, x), decoded[:, column])


@each_dtype
def test_float_matrices(dtype):
    for rows, n_in in ((1, 1), (7, 5), (3, 8), (40, 100), (2, 1031)):
        w, x = normal(rows, n_in).astype(dtype), normal(n_in, seed=1)
        want = w.astype(np.float64) @ x
        size = np.abs(w.astype(np.float64)) @ np.abs(x)
        error = np.abs(product_of(w, x) - want)
        assert (error <= size * EPS * (8 + n_in / 64)).all(), f"{error.max()=}"


@each_dtype
def test_every_16_bit_float_is_widened_exactly(dtype):
    if dtype == np.float32:
        return
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    every = every[np.isfinite(every.astype(np.float32))]
    one = np.ones(1, np.float32)
    got = product_of(every[:, None].copy(), one)  # one at a time
    np.testing.assert_array_equal(got, every.astype(np.float32))
    eight = np.zeros((len(every), 8), dtype)
    eight[:, 3] = every
    got = product_of(eight, np.ones(8, np.float32))  # eight at a time
    np.testing.assert_array_equal(got, every.astype(np.float32))


def test_nan_and_infinity_are_not_hidden():
    matrix = quantize(normal(4, 64).astype(BF16), 4)
    for value in (np.nan, np.inf):
        x = normal(64)
        x[5] = value
        assert not np.isfinite(product_of(matrix, x)).any()


@each_dtype
@each_width
def test_decodes_bit_for_bit(bits, dtype):
    for group_size in GROUP_SIZES:
        w = normal(3, 5, 2 * group_size).astype(dtype)
        w[0, 0], w[1, 1] = 0, 0.25  # constant groups
        w[2, 2] = w[2, 2] * w.dtype.type(1e-6)
        matrix = quantize(w, bits, group_size)
        got, want = dequantize_f32(matrix), dequantize(matrix)
        np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


@pytest.fixture
def each_thread_count():
    before = numba.get_num_threads()
    yield range(1, numba.config.NUMBA_NUM_THREADS + 1)
    numba.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_threads_change_no_bit(rows, each_thread_count):
    matrix = prepare(quantize(normal(rows, 192).astype(BF16), 4))
    x, want = normal(192, seed=1), np.empty(rows, np.float32)
    multiply_serial(matrix, x, want)
    for threads in each_thread_count:
        numba.set_num_threads(threads)
        out = np.empty(rows, np.float32)
        multiply_parallel(matrix, x, out)
        np.testing.assert_array_equal(out, want)


def test_big_matrices_go_to_threads():
    matrix = quantize(normal(4100, 2048).astype(BF16), 4)
    assert matrix.weight.nbytes >= kernels.PARALLEL_BYTES
    x = normal(2048, seed=1)
    np.testing.assert_array_equal(matvec(matrix, x), product_of(matrix, x))


# ---- experts -------------------------------------------------------------------------


def expert_weights(n, f, d, bits=4, dtype=BF16):
    shapes = ((n, f, d), (n, f, d), (n, d, f))
    weights = [normal(*s, seed=i) / np.sqrt(s[-1]) for i, s in enumerate(shapes)]
    if bits is None:
        return [w.astype(dtype) for w in weights]
    return [quantize(w.astype(dtype), bits, 32) for w in weights]


def wanted(weights, slots, shares, x):
    plain = [
        w.astype(np.float64)
        if isinstance(w, np.ndarray)
        else dequantize(w).astype(np.float64)
        for w in weights
    ]
    x = x.astype(np.float64)[None]
    return sum(
        share * expert_mlp(x, *(w[slot] for w in plain))[0]
        for slot, share in zip(slots, shares, strict=True)
    )


@pytest.mark.parametrize("bits", [4, None])
def test_experts_of_a_token(bits):
    weights = expert_weights(7, 96, 160, bits)
    x, shares = normal(160), np.array([0.5, 0.3, 0.2], np.float32)
    slots = np.array([4, 0, 6], np.int32)
    bank = tuple(map(prepare, weights))
    want = wanted(weights, slots, shares, x)
    got = experts_step(bank, slots, shares, x)
    # Two products of up to 160 terms and an exponential: some 1e-6 of the largest.
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max() * 3)
    residual = normal(160, seed=9)
    added = experts_step(bank, slots, shares, x, residual.copy())
    np.testing.assert_allclose(added, want + residual, atol=1e-5)


def test_projections_may_differ_in_bits():
    mixed = [
        quantize(w.astype(BF16), bits, group)
        for w, bits, group in zip(
            expert_weights(3, 64, 128, None, np.float32),
            (4, 4, 8),
            (64, 32, 32),
            strict=True,
        )
    ]
    x, shares, slots = normal(128), np.ones(2, np.float32), np.array([2, 1])
    got = experts_step(tuple(map(prepare, mixed)), slots, shares, x)
    np.testing.assert_allclose(got, wanted(mixed, slots, shares, x), atol=1e-5)


def test_slots_change_no_bit():
    weights = expert_weights(6, 64, 96)
    x, shares = normal(96), np.array([0.6, 0.4], np.float32)
    order = np.array([3, 5, 0, 1, 4, 2])  # slot -> expert
    moved = tuple(prepare(w[order]) for w in weights)
    bank = tuple(map(prepare, weights))
    experts = np.array([5, 2])
    slots = np.array([list(order).index(e) for e in experts])
    np.testing.assert_array_equal(
        experts_step(moved, slots, shares, x), experts_step(bank, experts, shares, x)
    )


def test_threads_change_no_bit_of_experts(each_thread_count):
    bank = tuple(map(prepare, expert_weights(6, 96, 160)))
    arguments = (
        np.array([5, 2, 0]),
        np.array([0.5, 0.3, 0.2], np.float32),
        normal(160),
    )
    want = np.zeros(160, np.float32)
    experts_serial(*bank, *arguments, want)
    for threads in each_thread_count:
        numba.set_num_threads(threads)
        out = np.zeros(160, np.float32)
        experts_parallel(*bank, *arguments, out)
        np.testing.assert_array_equal(out, want)


# ---- refusals ------------------------------------------------------------------------


def test_refuses_what_it_would_misread():
    matrix = quantize(normal(4, 128).astype(BF16), 4)
    with pytest.raises(ConfigError, match=r"x has 64 values, but .* 128 columns"):
        matvec(matrix, normal(64))
    with pytest.raises(ConfigError, match="contiguous float32 vector, not float64"):
        matvec(matrix, np.ones(128))
    with pytest.raises(ConfigError, match="contiguous"):
        matvec(matrix, normal(256)[::2])
    with pytest.raises(ConfigError, match="kernels cannot read float64"):
        prepare(np.ones((2, 2)))
    with pytest.raises(ConfigError, match="C-contiguous"):
        prepare(normal(4, 4).T)
    with pytest.raises(ConfigError, match="C-contiguous"):
        prepare(
            QuantizedMatrix(
                matrix.weight.T.copy().T, matrix.scales, matrix.biases, 4, 64
            )
        )


@pytest.mark.parametrize("slot", [-1, 7, 1 << 40])
def test_refuses_slots_outside_the_bank(slot):
    bank = tuple(map(prepare, expert_weights(7, 96, 160)))
    with pytest.raises(IndexError, match="outside the bank"):
        experts_step(bank, np.array([slot]), np.ones(1, np.float32), normal(160))


# ---- exponential ---------------------------------------------------------------------


@numba.njit
def _each(function_is_exp, x, out):
    for i in range(x.size):
        out[i] = exp(x[i]) if function_is_exp else silu(x[i])


def test_exp_and_silu():
    x = np.concatenate([np.linspace(-87, 88, 100_001), np.linspace(-1, 1, 100_001)])
    x = x.astype(np.float32)
    want, out = np.exp(x.astype(np.float64)), np.empty_like(x)
    _each(True, x, out)
    assert np.abs(out / want - 1).max() < 4 * EPS  # two roundings, and the series
    _each(False, x, out)
    np.testing.assert_allclose(out, x / (1 + 1 / want), rtol=8 * EPS, atol=1e-30)
    ends = np.array([np.nan, np.inf, -np.inf, -1e30, 1e30], np.float32)
    out = np.empty_like(ends)
    _each(True, ends, out)
    assert np.isnan(out[0])
    assert (out[1:] >= 0).all()
    _each(False, ends, out)
    assert np.isnan(out[0])
    assert out[4] == np.float32(1e30)


# ---- compiling -----------------------------------------------------------------------

IN_A_PROCESS = """
import numpy as np, ml_dtypes
from flashmoe_ref.compiled import announce_compiling
announce_compiling(print)
from flashmoe_ref.kernels import multiply_serial, prepare
from flashmoe_ref.quantize import quantize
w = np.random.default_rng(0).standard_normal((9, 96)).astype(ml_dtypes.bfloat16)
out = np.empty(9, np.float32)
multiply_serial(prepare(quantize(w, 8, 32)), w[0].astype(np.float32), out)
print(out.tobytes().hex())
"""


def test_compiles_once_says_so_and_computes_the_same(tmp_path):
    run = [sys.executable, "-c", IN_A_PROCESS]
    root = Path(__file__).parent.parent
    env = {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    first, second = (
        subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    notes, bits = first.splitlines()
    assert notes.startswith("compiling kernels")
    assert second.splitlines() == [bits]


def test_cache_falls_back_to_a_folder_that_can_be_written(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    places = [blocked, tmp_path / "good"]
    monkeypatch.setattr(compiled, "_candidates", lambda: places)
    folder = compiled._cache_folder()
    assert folder.parent == tmp_path / "good"
    assert folder.is_dir()
    monkeypatch.setattr(compiled, "_candidates", lambda: [blocked])
    assert compiled._cache_folder() is None
