"""Quantization against MLX bit for bit, hand-worked cases, properties and errors."""

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashmoe_ref.errors import ConfigError
from flashmoe_ref.quantize import (
    BITS,
    FLOAT_DTYPES,
    GROUP_SIZES,
    RULES,
    QuantizedMatrix,
    dequantize,
    infer_quantization,
    pack,
    quantize,
    requantize,
    unpack,
)

BF16 = np.dtype(ml_dtypes.bfloat16)
MX_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

each_setting = pytest.mark.parametrize("group_size", GROUP_SIZES)
each_width = pytest.mark.parametrize("bits", BITS)
each_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)


def to_mx(array: np.ndarray) -> mx.array:
    """An MLX array with the same bits; bf16 has no buffer format of its own."""
    if array.dtype == BF16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def bits_of(array: np.ndarray | mx.array) -> np.ndarray:
    """The raw bits, so that -0.0 and NaN compare as what they are."""
    if isinstance(array, mx.array):
        array = np.array(array.view(mx.uint16 if array.itemsize == 2 else mx.uint32))
    return array.view(np.uint16 if array.itemsize == 2 else np.uint32)


def assert_equals_mlx(w: np.ndarray, bits: int, group_size: int) -> None:
    ours = quantize(w, bits, group_size)
    theirs = mx.quantize(to_mx(w), group_size, bits)
    pairs = zip((ours.weight, ours.scales, ours.biases), theirs, strict=True)
    for part, (got, want) in zip(("words", "scales", "biases"), pairs, strict=True):
        np.testing.assert_array_equal(bits_of(got), bits_of(want), err_msg=part)
    decoded = mx.dequantize(*theirs, group_size, bits)
    with np.errstate(over="ignore", invalid="ignore"):
        got = dequantize(ours, w.dtype)
    np.testing.assert_array_equal(bits_of(got), bits_of(decoded), err_msg="decoded")


def difficult_rows(dtype: np.dtype) -> np.ndarray:
    """Rows of 256 with the groups that tend to break encoders, each named in place."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((24, 256)).astype(np.float32)
    rows[0] = 0
    rows[1] = -0.0
    rows[2], rows[3] = 0.3, -0.25  # constant
    rows[4], rows[5] = -np.abs(rows[4]), np.abs(rows[5])  # one sign
    rows[6] *= 1e-40  # subnormal in float32 and bf16, zero in float16
    rows[7], rows[8] = 1e-44, np.where(np.arange(256) % 2, 1e-41, -1e-41)
    rows[9], rows[10], rows[11] = rows[9] * 1e-6, rows[10] * 1e-7, rows[11] * 1e-9
    rows[12], rows[13] = rows[12] + 100, rows[13] - 100  # zero far outside the range
    rows[14] = np.round(rows[14] * 4) / 4  # ties
    rows[15] = np.where(np.arange(256) % 64, 0, 7)  # one outlier
    huge = 6e4 if dtype == np.float16 else 1.6e38
    rows[16] = np.clip(rows[16], -1, 1) * huge
    rows[17], rows[18] = huge, -huge
    rows[19] = np.where(np.arange(256) % 2, huge, 0)
    return rows.astype(dtype)


@each_dtype
@each_setting
@each_width
def test_equals_mlx_bit_for_bit(bits, group_size, dtype):
    assert_equals_mlx(difficult_rows(dtype), bits, group_size)
    experts = np.random.default_rng(bits).standard_normal((3, 5, 128))
    assert_equals_mlx(experts.astype(dtype), bits, group_size)


@settings(max_examples=60, deadline=None)
@given(
    w=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.just(128)),
        elements=st.floats(-(2.0**126), 2.0**126, width=32),
    ),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
)
def test_equals_mlx_for_any_float32(w, bits, group_size):
    assert_equals_mlx(w, bits, group_size)


@each_dtype
@each_width
def test_decodes_in_float32_from_scales_of_any_dtype(bits, dtype):
    matrix = quantize(difficult_rows(dtype)[:16], bits)
    q = unpack(matrix.weight, bits).reshape(*matrix.scales.shape, 64)
    scale = matrix.scales.astype(np.float32)[..., None]
    bias = matrix.biases.astype(np.float32)[..., None]
    want = (q.astype(np.float32) * scale + bias).reshape(matrix.shape)
    np.testing.assert_array_equal(dequantize(matrix), want)
    theirs = mx.dequantize(
        mx.array(matrix.weight), *map(mx.array, (scale[..., 0], bias[..., 0])), 64, bits
    )
    np.testing.assert_array_equal(dequantize(matrix), np.array(theirs))


def test_four_bit_words_hold_the_first_value_in_the_lowest_bits():
    words = pack(np.arange(32, dtype=np.uint8) % 16, 4)
    assert [hex(word) for word in words] == ["0x76543210", "0xfedcba98"] * 2


def test_three_bit_values_cross_byte_borders():
    # 1, 2, 3 and zeros: 0b...011_010_001 = 0xd1, read from the lowest bit up.
    values = np.zeros(32, np.uint8)
    values[:3] = 1, 2, 3
    assert pack(values, 3).view(np.uint8)[:3].tolist() == [0xD1, 0, 0]


def test_a_group_by_hand():
    # 0..6 in 2 bits: 6 is further from zero, so it is the bias, and the step is
    # -(6 - 0) / 3 = -2: q = 3 stands for 0, q = 0 for 6; ties go to the even q.
    w = (np.arange(32, dtype=np.float32) % 7)[None]
    matrix = quantize(w, 2, 32)
    assert (matrix.scales.item(), matrix.biases.item()) == (-2, 6)
    assert unpack(matrix.weight, 2)[0, :7].tolist() == [3, 2, 2, 2, 1, 0, 0]
    assert dequantize(matrix)[0, :7].tolist() == [0, 2, 2, 2, 4, 6, 6]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    bits=st.sampled_from(BITS),
    lead=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    words=st.integers(1, 5),
)
def test_unpack_inverts_pack(data, bits, lead, words):
    values = data.draw(
        hnp.arrays(np.uint8, (*lead, 32 * words), elements=st.integers(0, 2**bits - 1))
    )
    packed = pack(values, bits)
    assert packed.dtype == np.uint32
    assert packed.shape == (*lead, words * bits)
    np.testing.assert_array_equal(unpack(packed, bits), values)


def test_packing_is_one_bit_stream():
    rng = np.random.default_rng(0)
    for bits in BITS:
        values = rng.integers(0, 2**bits, 96).astype(np.uint8)
        stream = np.unpackbits(pack(values, bits).view(np.uint8), bitorder="little")
        places = stream.reshape(96, bits) << np.arange(bits)
        np.testing.assert_array_equal(places.sum(1), values)


@pytest.mark.parametrize("rule", RULES)
@each_width
def test_every_weight_is_within_half_a_step(bits, rule):
    w = np.random.default_rng(1).standard_normal((16, 256)).astype(np.float32)
    matrix = quantize(w, bits, 64, rule)
    error = np.abs(dequantize(matrix) - w).reshape(16, 4, 64)
    half_step = np.abs(matrix.scales)[..., None] / 2
    inside = error <= half_step * 1.0001  # float32 rounds the decoded weight
    if rule == "minmax":
        assert inside.all()
    else:  # the ends of the range may be clipped: a few weights a group
        assert inside.mean() > (0.8 if bits == 2 else 0.9)


@each_width
def test_zero_is_exact_under_the_mlx_rule(bits):
    w = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32)
    w[:, 0] = 0
    # q * scale + bias rounds twice, so zero comes out within one rounding of the bias.
    error = np.abs(dequantize(quantize(w, bits))[:, 0])
    assert (error <= np.abs(w).max(1) * 2**-22).all()


def test_least_squares_beats_the_other_rules_when_four_bits_become_two():
    w = np.random.default_rng(3).standard_normal((64, 1024)).astype(BF16)
    matrix = quantize(w, 4)
    error = {}
    for rule in RULES:
        smaller = requantize(matrix, 2, rule=rule)
        assert smaller.scales.dtype == BF16
        error[rule] = np.sqrt(
            np.square(dequantize(smaller) - w.astype(np.float32)).mean()
        )
    # Known for normal weights: 0.44, 0.41 and 0.35 of their standard deviation.
    assert error["minmax"] == pytest.approx(0.445, abs=0.01)
    assert error["mlx"] == pytest.approx(0.414, abs=0.01)
    assert error["least_squares"] == pytest.approx(0.348, abs=0.01)


@pytest.mark.parametrize("rule", RULES)
def test_constant_and_tiny_groups_survive_every_rule(rule):
    for dtype in FLOAT_DTYPES:
        w = difficult_rows(dtype)[:12]
        matrix = quantize(w, 2, 32, rule)
        decoded = dequantize(matrix)
        assert np.isfinite(decoded).all()
        assert np.abs(decoded - w.astype(np.float32)).max() < 2


def test_requantize_changes_bits_and_group():
    w = np.random.default_rng(4).standard_normal((2, 6, 256)).astype(np.float32)
    matrix = quantize(w, 8, 32)
    for bits, group_size in ((4, 128), (8, 32), (2, None)):
        again = requantize(matrix, bits, group_size)
        want = quantize(dequantize(matrix), bits, group_size or 32)
        assert again.group_size == (group_size or 32)
        np.testing.assert_array_equal(again.weight, want.weight)
        np.testing.assert_array_equal(again.scales, want.scales)


def test_blocks_of_rows_change_nothing(monkeypatch):
    w = np.random.default_rng(6).standard_normal((3, 7, 128)).astype(np.float32)
    whole = quantize(w, 3)
    monkeypatch.setattr("flashmoe_ref.quantize.BLOCK_VALUES", 2 * 128)
    parts = quantize(w, 3)
    np.testing.assert_array_equal(parts.weight, whole.weight)
    np.testing.assert_array_equal(dequantize(parts), dequantize(whole))


def test_indexing_takes_experts_and_rows():
    w = np.random.default_rng(7).standard_normal((4, 6, 64)).astype(np.float32)
    matrix = quantize(w, 4)
    assert matrix.shape == (4, 6, 64)
    assert matrix.n_bytes == 4 * 6 * (64 // 2 + 2 * 4)
    np.testing.assert_array_equal(dequantize(matrix[2]), dequantize(matrix)[2])
    ids = np.array([5, 0, 5])
    np.testing.assert_array_equal(
        dequantize(matrix[1][ids]), dequantize(matrix)[1][ids]
    )


@each_setting
@each_width
def test_infers_bits_and_group_from_shapes(bits, group_size):
    matrix = quantize(np.ones((2, 3, 384), np.float32), bits, group_size)
    found = infer_quantization(matrix.weight.shape, matrix.scales.shape, 384)
    assert found == (bits, group_size)


@pytest.mark.parametrize(
    "words, groups, n_in", [(49, 6, 384), (48, 5, 384), (12, 6, 384)]
)
def test_refuses_shapes_that_fit_nothing(words, groups, n_in):
    with pytest.raises(ConfigError, match="fit no supported quantization"):
        infer_quantization((2, words), (2, groups), n_in)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda w: quantize(w, 7), "7-bit quantization is not supported"),
        (lambda w: quantize(w, 4, 16), "group size of 16 is not supported"),
        (lambda w: quantize(w[:, :96], 4), "multiple of the group size"),
        (lambda w: quantize(w[0], 4), "multiple of the group size"),
        (lambda w: quantize(w.astype(np.float64), 4), "expected float32, float16"),
        (lambda w: quantize(w, 4, rule="best"), "unknown quantization rule 'best'"),
        (lambda w: quantize(w * np.float32(np.nan), 4), "NaN, infinity or a range"),
        (lambda w: quantize(w / np.float32(0), 4), "NaN, infinity or a range"),
        (lambda w: requantize(quantize(w[:, :64], 4), 2, 128), "cannot requantize"),
        (lambda w: dequantize(quantize(w, 4), np.float64), "expected float32, float16"),
        (lambda w: pack(np.full((1, 32), 4, np.uint8), 2), "cannot pack values 4..4"),
        (lambda w: pack(np.zeros((1, 30), np.uint8), 2), "multiple of 32"),
        (lambda w: unpack(np.zeros((1, 2), np.uint32), 9), "9-bit quantization"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.filterwarnings("ignore:invalid value")
def test_errors_say_what_is_wrong_in_one_line(call, message):
    w = np.random.default_rng(8).standard_normal((2, 128)).astype(np.float32)
    with pytest.raises(ConfigError, match=message) as caught:
        call(w)
    assert "\n" not in str(caught.value)


def test_a_matrix_checks_its_parts():
    good = quantize(np.ones((4, 128), np.float32), 4)
    parts = good.weight, good.scales, good.biases
    with pytest.raises(ConfigError, match="expected uint32 words"):
        QuantizedMatrix(parts[0].view(np.int32), *parts[1:], 4, 64)
    with pytest.raises(ConfigError, match="same dtype and shape"):
        QuantizedMatrix(parts[0], parts[1], parts[2][:, :1], 4, 64)
    with pytest.raises(ConfigError, match=r"4 bits in groups of 32 .* need \(4, 8\)"):
        QuantizedMatrix(*parts, 4, 32)
    with pytest.raises(ConfigError, match="scales have dtype uint16"):
        QuantizedMatrix(parts[0], *(p.view(np.uint16) for p in parts[1:]), 4, 64)
