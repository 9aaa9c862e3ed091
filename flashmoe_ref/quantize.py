"""Affine quantization: 2 to 8 bits a weight, a scale and a bias for every group.

Each row of a matrix is cut into groups of 32, 64 or 128 neighbouring weights, and
inside a group  w = q * scale + bias,  where q is an unsigned integer of `bits` bits.
The integers of a row are written one after the other as a single stream of bits,
lowest bit first, and stored as uint32 words. At 4 bits and groups of 64, with 16-bit
scales and biases, a weight takes 4.5 bits: 3.6 times less to read from disk than bf16.

Follows the affine mode of MLX; words, scales, biases and decoded weights equal those
of `mx.quantize` and `mx.dequantize` on the CPU bit for bit.
**But:** no block floating point (mxfp4, nvfp4), no 1-bit; `kernels.py` has the fast
decoder. *Taught in notebooks/05.*
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .errors import ConfigError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
FLOAT_DTYPES = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))

MIN_SCALE = np.float32(1e-7)  # MLX's floor; a constant group would divide by zero
LEAST_SQUARES_ROUNDS = 8  # 24 more lower the error of 2-bit by 0.2 %
BLOCK_VALUES = 1 << 18  # weights worked on at a time, so temporaries stay in cache


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A weight matrix in packed form; leading axes, such as experts, come first.

    Shapes: weight (..., out, in * bits / 32) uint32; scales and biases
            (..., out, in / group_size), both float32, float16 or bfloat16.
    Raises: ConfigError if the shapes or dtypes do not fit each other.
    """

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        _check_settings(self.bits, self.group_size)
        if self.weight.dtype != np.uint32:
            raise ConfigError(
                f"quantized weight has dtype {self.weight.dtype}; expected uint32 words"
            )
        _check_float(self.scales.dtype, "scales")
        scales, biases = self.scales, self.biases
        if (biases.shape, biases.dtype) != (scales.shape, scales.dtype):
            raise ConfigError(
                f"biases are {biases.dtype} {biases.shape} but scales are "
                f"{scales.dtype} {scales.shape}; expected the same dtype and shape"
            )
        *rows, n_groups = scales.shape
        words = (*rows, n_groups * self.group_size * self.bits // 32)
        if self.weight.shape != words:
            raise ConfigError(
                f"quantized weight has shape {self.weight.shape}; {self.bits} bits in "
                f"groups of {self.group_size} with scales {scales.shape} "
                f"need {words}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (..., out, in) of the matrix that this stands for."""
        return (*self.weight.shape[:-1], self.weight.shape[-1] * 32 // self.bits)

    @property
    def n_bytes(self) -> int:
        """Bytes of the words, scales and biases together."""
        return self.weight.nbytes + self.scales.nbytes + self.biases.nbytes

    def __getitem__(self, index: int | slice | np.ndarray) -> "QuantizedMatrix":
        """Select along the first axis: one expert of a layer, or rows of a matrix."""
        return QuantizedMatrix(
            self.weight[index],
            self.scales[index],
            self.biases[index],
            self.bits,
            self.group_size,
        )


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Write the integers of each row as one stream of bits, lowest bit first.

    Shapes: values (..., n) of 0..2**bits - 1 -> words (..., n * bits / 32) uint32.
    Raises: ConfigError if n is no multiple of 32, or a value needs more bits.
    """
    _check_settings(bits)
    *rows, n = values.shape
    if n % 32:
        raise ConfigError(
            f"cannot pack rows of {n} values; pad them to a multiple "
            f"of 32, so that each row ends on a whole word"
        )
    if values.size and (values.min() < 0 or values.max() >= 1 << bits):
        raise ConfigError(
            f"cannot pack values {values.min()}..{values.max()} into {bits} bits; "
            f"they must lie in 0..{(1 << bits) - 1}"
        )
    eights = np.ascontiguousarray(values, np.uint8).reshape(-1, 8)  # (n/8, 8) bytes
    stream = eights.view("<u8").copy()  # (n/8, 1)
    for lane in (8, 16, 32):  # 8 fields become 4, then 2, then 1
        used, low, high = _fields(bits, lane)
        upper = (stream >> np.uint64(lane - used)) & (high >> np.uint64(lane - used))
        stream &= low
        stream |= upper
    packed = _copy_bytes(stream.view(np.uint8), np.empty((len(stream), bits), np.uint8))
    return packed.reshape(*rows, n * bits // 8).view("<u4")


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Read the integers back out of the packed words; the inverse of `pack`.

    Shapes: words (..., n * bits / 32) uint32 -> values (..., n) uint8.
    """
    _check_settings(bits)
    *rows, n_words = words.shape
    packed = np.ascontiguousarray(words).view(np.uint8).reshape(-1, bits)
    # Whatever the width, eight values fill exactly `bits` bytes: one uint64 holds them.
    stream = _copy_bytes(packed, np.zeros((len(packed), 8), np.uint8)).view("<u8")
    for lane in (32, 16, 8):  # 1 field becomes 2, then 4, then 8
        used, low, high = _fields(bits, lane)
        upper = (stream << np.uint64(lane - used)) & high
        stream &= low
        stream |= upper
    return stream.view(np.uint8).reshape(*rows, n_words * 32 // bits)


def _fields(bits: int, lane: int) -> tuple[int, np.uint64, np.uint64]:
    """Used bits of each lane of a uint64, and masks of them in even and odd lanes.

    A lane of 8, 16 or 32 bits holds 1, 2 or 4 values in its lowest bits. Moving the odd
    lanes down onto the even ones packs eight values at once; moving them up unpacks.
    """
    used = bits * lane // 8
    low = sum((1 << used) - 1 << at for at in range(0, 64, 2 * lane))
    return used, np.uint64(low), np.uint64(low << lane)


def _copy_bytes(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Copy columns of bytes, as many as both have; faster than rows so short."""
    for i in range(min(source.shape[1], target.shape[1])):
        target[:, i] = source[:, i]
    return target


# ---- rules: how a group chooses its scale and bias -----------------------------------
# Shapes of all three: groups (..., group_size) float32 -> scale, bias (..., 1) float32.


def mlx_rule(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """MLX's rule: zero, and the end of the range further from it, are exact.

    The bias is that end, so the scale points from it to zero and on to the other
    end; NOTE: it is negative whenever the largest magnitude is positive.
    """
    low, high = _range(groups)
    scale = np.maximum((high - low) / np.float32(2**bits - 1), MIN_SCALE)
    from_low = np.abs(low) > np.abs(high)
    scale = np.where(from_low, scale, -scale)
    edge = np.where(from_low, low, high)
    # A whole number of steps from the edge to zero puts zero on the grid.
    with np.errstate(over="ignore"):
        steps = np.rint(edge / scale)
    scale = np.divide(edge, steps, out=scale, where=steps != 0)
    return scale, np.where(steps != 0, edge, np.float32(0))


def minmax_rule(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The textbook rule, which flash-moe repacks with: both ends exact, zero not."""
    low, high = _range(groups)
    return np.maximum((high - low) / np.float32(2**bits - 1), MIN_SCALE), low


def least_squares_rule(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Smallest squared error: fit the line, reassign the integers, and again.

    Each half of a round can only lower the error: for fixed integers the line
    w = q * scale + bias is ordinary regression, and for a fixed line the nearest
    integer is best (Lloyd's algorithm for quantizers). Where it ends depends on the
    start: at 2 bits, the full range leaves 3 % less error than MLX's scale.
    """
    scale, bias = minmax_rule(groups, bits)
    mean = groups.mean(-1, keepdims=True)
    centred = groups - mean
    for _ in range(LEAST_SQUARES_ROUNDS):
        q = nearest_levels(groups, scale, bias, bits)
        q_mean = q.mean(-1, keepdims=True)
        # sum (q - q_mean)^2 and sum (q - q_mean) (w - mean), without the differences
        spread = np.vecdot(q, q)[..., None] - q.shape[-1] * np.square(q_mean)
        slope = np.vecdot(q, centred)[..., None]
        # Where all q are equal there is no slope to fit: keep the old scale.
        fits = (spread > 0) & (np.abs(slope) > MIN_SCALE * spread)
        scale = np.divide(slope, spread, out=scale, where=fits)
        bias = mean - scale * q_mean
    return scale, bias


RULES = {"mlx": mlx_rule, "minmax": minmax_rule, "least_squares": least_squares_rule}


def nearest_levels(
    groups: np.ndarray, scale: np.ndarray, bias: np.ndarray, bits: int
) -> np.ndarray:
    """The integer of each weight, still as float32: ties round to even, as in MLX."""
    levels = groups - bias
    with np.errstate(invalid="ignore"):
        levels /= scale
    np.rint(levels, out=levels)
    if not scale.all():  # 0 / 0 in a constant group too large for any finite scale
        np.fmax(levels, 0, out=levels)  # turns NaN into 0
    return np.clip(levels, 0, 2**bits - 1, out=levels)


def quantize(
    w: np.ndarray, bits: int, group_size: int = 64, rule: str = "mlx"
) -> QuantizedMatrix:
    """Quantize a matrix; scales and biases take the dtype of the weights.

    Shapes: w (..., out, in) float32, float16 or bfloat16; in % group_size == 0.
    Rules:  "mlx" (equal to `mx.quantize` on the CPU, bit for bit), "minmax" or
            "least_squares"; all work in float32.
    Raises: ConfigError on unsupported settings or dtypes, and on NaN or infinity.
    """
    _check_settings(bits, group_size)
    _check_float(w.dtype, "weights")
    if w.ndim < 2 or w.shape[-1] % group_size:
        raise ConfigError(
            f"cannot quantize a shape of {w.shape} in groups of {group_size}; "
            f"rows of a matrix must be a multiple of the group size long"
        )
    rows = w.reshape(-1, w.shape[-1])  # (rows, in)
    return _encode(
        lambda block: rows[block].astype(np.float32),
        w.shape,
        w.dtype,
        (bits, group_size, rule),
    )


def dequantize(matrix: QuantizedMatrix, dtype: np.dtype = np.float32) -> np.ndarray:
    """Decode to plain weights: q * scale + bias, in the arithmetic of `dtype`.

    In bfloat16 and float16 the product and the sum are both rounded, as by
    `mx.dequantize`; NOTE: float32 is the more accurate, for 16-bit scales too.
    Shapes: -> (..., out, in) of `dtype`.
    """
    _check_float(np.dtype(dtype), "decoded weights")
    weights = np.empty(matrix.shape, dtype)
    rows = weights.reshape(-1, weights.shape[-1])  # (rows, in), sharing memory
    packed = _flatten(matrix)
    for block in _row_blocks(*rows.shape):
        part = packed[block]
        q = unpack(part.weight, part.bits)  # (block, in)
        q = q.reshape(*part.scales.shape, part.group_size)  # (block, groups, size)
        decoded = rows[block].reshape(q.shape)  # shares memory too
        np.multiply(q.astype(dtype), part.scales[..., None].astype(dtype), out=decoded)
        decoded += part.biases[..., None].astype(dtype)
    return weights


def requantize(
    matrix: QuantizedMatrix,
    bits: int,
    group_size: int | None = None,
    rule: str = "mlx",
) -> QuantizedMatrix:
    """Quantize decoded weights anew, for example 4 bits to 2; same group by default.

    The weights are decoded in float32; scales and biases keep their dtype.
    Rules and errors: as in `quantize`.
    """
    group_size = group_size or matrix.group_size
    _check_settings(bits, group_size)
    if matrix.shape[-1] % group_size:
        raise ConfigError(
            f"cannot requantize rows of {matrix.shape[-1]} in groups of {group_size}; "
            f"choose a group size that divides them"
        )
    packed = _flatten(matrix)
    return _encode(
        lambda block: dequantize(packed[block]),
        matrix.shape,
        matrix.scales.dtype,
        (bits, group_size, rule),
    )


def infer_quantization(
    weight_shape: tuple[int, ...], scales_shape: tuple[int, ...], in_features: int
) -> tuple[int, int]:
    """Bits and group size of a stored matrix, from the shapes of its parts.

    Mixed checkpoints (8-bit router in a 4-bit model) do not always say so elsewhere.
    Raises: ConfigError if no supported width and group size give these shapes.
    """
    n_words, n_groups = weight_shape[-1], scales_shape[-1]
    for bits in BITS:
        for group_size in GROUP_SIZES:
            expected = (in_features * bits, n_groups * group_size)
            if (n_words * 32, in_features) == expected:
                return bits, group_size
    raise ConfigError(
        f"{n_words} words and {n_groups} groups a row fit no supported quantization of "
        f"{in_features} inputs; expected bits in {BITS} and groups in {GROUP_SIZES}"
    )


# ---- working through big arrays in blocks of rows ------------------------------------


def _encode(
    read_rows: Callable[[slice], np.ndarray],
    shape: tuple[int, ...],
    scale_dtype: np.dtype,
    settings: tuple[int, int, str],
) -> QuantizedMatrix:
    """Quantize block by block; `read_rows` gives float32 rows (block, in)."""
    bits, group_size, rule = settings
    if rule not in RULES:
        raise ConfigError(f"unknown quantization rule {rule!r}; choose from {[*RULES]}")
    n_in = shape[-1]
    n_rows = int(np.prod(shape[:-1]))
    weight = np.empty((n_rows, n_in * bits // 32), np.uint32)
    scales = np.empty((n_rows, n_in // group_size), scale_dtype)
    biases = np.empty_like(scales)
    for block in _row_blocks(n_rows, n_in):
        groups = read_rows(block).reshape(-1, n_in // group_size, group_size)
        scale, bias = RULES[rule](groups, bits)  # (block, groups, 1)
        # MLX assigns integers with the scale and bias before they are rounded.
        levels = nearest_levels(groups, scale, bias, bits).astype(np.uint8)
        weight[block] = pack(levels.reshape(-1, n_in), bits)
        scales[block], biases[block] = scale[..., 0], bias[..., 0]
    parts = (part.reshape(*shape[:-1], -1) for part in (weight, scales, biases))
    return QuantizedMatrix(*parts, bits, group_size)


def _flatten(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The same matrix with all leading axes joined into one axis of rows."""
    parts = (matrix.weight, matrix.scales, matrix.biases)
    rows = (part.reshape(-1, part.shape[-1]) for part in parts)
    return QuantizedMatrix(*rows, matrix.bits, matrix.group_size)


def _row_blocks(n_rows: int, row_values: int) -> Iterator[slice]:
    step = max(1, BLOCK_VALUES // row_values)
    return (slice(start, start + step) for start in range(0, n_rows, step))


def _range(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest weight of each group, refusing what cannot be encoded."""
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(high - low).all()  # NaN and infinity reach both ends
    if not finite:
        raise ConfigError(
            "cannot quantize: the weights hold NaN, infinity or a range beyond "
            "float32; the file they came from may be damaged"
        )
    return low, high


def _check_settings(bits: int, group_size: int = GROUP_SIZES[0]) -> None:
    if bits not in BITS:
        raise ConfigError(
            f"{bits}-bit quantization is not supported; use one of {BITS}"
        )
    if group_size not in GROUP_SIZES:
        raise ConfigError(
            f"a group size of {group_size} is not supported; use one of {GROUP_SIZES}"
        )


def _check_float(dtype: np.dtype, what: str) -> None:
    if dtype not in FLOAT_DTYPES:
        raise ConfigError(
            f"{what} have dtype {dtype}; expected float32, float16 or bfloat16"
        )
