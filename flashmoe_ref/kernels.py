"""Matrix kernels of decode, compiled: a quantized matrix is never decoded to memory.

Decode multiplies each weight once, so it can be no faster than packed weights arrive
from memory. Taking scale and bias out of the sum leaves one multiply-add a weight,

    sum_i (q_i s + b) x_i  =  s (sum_i q_i x_i)  +  b (sum_i x_i),

and the last sum is the same for all rows. The ladder, each step checked against the
first and measured in tests/benchmarks:
    v1  decode, then multiply (`quantize.py` and BLAS)
    v2  the rearranged sum, integers unpacked eight at a time in place (`vectors.py`)
    v3  rows shared among threads, where a matrix is worth a second one
Computes what MLX's `quantized_matmul` and `gather_qmm` do for one token.
**But:** float32 activations only. *Taught in notebooks/05.*

Results depend neither on the number of threads nor on the slot an expert lies in: each
output is one chain of operations in one thread.
"""

import numpy as np
from numba import prange
from numba.core import types
from numba.extending import overload

from .compiled import compiled, serial_and_parallel
from .errors import ConfigError
from .quantize import BITS, QuantizedMatrix
from .vectors import (
    CHUNK,
    add8,
    decode32,
    dot32,
    float_of_bits,
    float_of_half,
    load8,
    multiply_add8,
    prefetch,
    silu,
    splat8,
    sum8,
    zero8,
)

Parts = tuple[np.ndarray, ...]  # (weight, scales, biases), or (weight,) of floats

# Waking a second thread takes microseconds, but where another program holds its core,
# the step waits for that program's time slice: 4 to 8 ms. So it must be worth a lot.
PARALLEL_BYTES = 4 << 20
BLOCK_ROWS = 64  # rows that a thread takes at a time
# How far ahead weights are asked for. CPUs do so by themselves, but not past the end of
# a 4 KB page; without this, reading from memory is a third slower.
AHEAD_BYTES = 4096

f32, u32 = np.float32, np.uint32

# ---- arrays as the kernels take them -------------------------------------------------


# Numba compiles a kernel for the types of its arguments, so the width of packed weights
# must show in a type: in the integers that their bytes are viewed as, for no other use.
WIDTH_VIEWS = {2: "int8", 3: "int16", 4: "uint32", 5: "uint16", 6: "int32", 8: "uint8"}
WIDTHS = {name: bits for bits, name in WIDTH_VIEWS.items()}
# Numba has neither bfloat16 nor, on CPUs, float16: their bits travel as integers.
FLOAT_VIEWS = {"float32": "float32", "bfloat16": "uint16", "float16": "int16"}


def prepare(matrix: QuantizedMatrix | np.ndarray) -> Parts:
    """View a matrix as the kernels take it: (weight, scales, biases), or (weight,).

    No copy. Raises: ConfigError for dtypes or memory layouts that no kernel reads.
    """
    if isinstance(matrix, QuantizedMatrix):
        scales, biases = (_view_floats(part) for part in (matrix.scales, matrix.biases))
        if not matrix.weight.flags.c_contiguous:
            raise ConfigError("quantized weights must be C-contiguous for the kernels")
        return matrix.weight.view(WIDTH_VIEWS[matrix.bits]), scales, biases
    return (_view_floats(matrix),)


def _view_floats(array: np.ndarray) -> np.ndarray:
    if array.dtype.name not in FLOAT_VIEWS or not array.flags.c_contiguous:
        raise ConfigError(
            f"kernels cannot read {array.dtype} with strides {array.strides}; pass a "
            f"C-contiguous float32, bfloat16, float16 or quantized matrix"
        )
    return array.view(FLOAT_VIEWS[array.dtype.name])


def widen(value):
    """float32 of a float32, of the bits of a bfloat16, or of those of a float16."""


@overload(widen, inline="always")
def _widen(value):
    if value == types.uint16:  # bfloat16 is the upper half of a float32
        return lambda value: float_of_bits(u32(u32(value) << u32(16)))
    if value == types.int16:
        return lambda value: float_of_half(value)
    return lambda value: value


@compiled
def dot(a, b):
    """Sum of products, in 4 x 8 lanes. Shapes: a (n,) as stored, b (n,) float32."""
    n = b.size
    sum0, sum1, sum2, sum3 = zero8(), zero8(), zero8(), zero8()
    for i in range(0, n - 31, 32):
        sum0 = multiply_add8(load8(a, i), load8(b, i), sum0)
        sum1 = multiply_add8(load8(a, i + 8), load8(b, i + 8), sum1)
        sum2 = multiply_add8(load8(a, i + 16), load8(b, i + 16), sum2)
        sum3 = multiply_add8(load8(a, i + 24), load8(b, i + 24), sum3)
    for i in range(n - n % 32, n - 7, 8):
        sum0 = multiply_add8(load8(a, i), load8(b, i), sum0)
    total = sum8(add8(add8(sum0, sum1), add8(sum2, sum3)))
    for i in range(n - n % 8, n):
        total += widen(a[i]) * b[i]
    return total


# ---- ranges of rows ------------------------------------------------------------------


def _rows_of_width(bits: int):
    """The kernel for one width: out[start:stop] = rows of the matrix times x."""
    chunk_bytes = CHUNK * bits // 8

    def rows(weight, scales, biases, x, sums, out, start, stop):
        n_groups = scales.shape[1]
        chunks = x.size // n_groups // CHUNK  # in a group
        # Two rows at a time share what is loaded of x; an odd last row is its own pair.
        for row in range(start, stop, 2):
            other = min(row + 1, stop - 1)
            packed, packed_other = weight[row], weight[other]
            total, total_other = zero8(), zero8()
            bias, bias_other = f32(0), f32(0)
            for group in range(n_groups):
                ahead = group * chunks * chunk_bytes + AHEAD_BYTES
                prefetch(packed, ahead)
                prefetch(packed_other, ahead)
                part, part_other = zero8(), zero8()
                for i in range(group * chunks, (group + 1) * chunks):
                    at, x_at = i * chunk_bytes, i * CHUNK
                    part = dot32(bits, packed, at, x, x_at, part)
                    part_other = dot32(bits, packed_other, at, x, x_at, part_other)
                scale = splat8(widen(scales[row, group]))
                scale_other = splat8(widen(scales[other, group]))
                total = multiply_add8(part, scale, total)
                total_other = multiply_add8(part_other, scale_other, total_other)
                bias += widen(biases[row, group]) * sums[group]
                bias_other += widen(biases[other, group]) * sums[group]
            out[row] = sum8(total) + bias
            out[other] = sum8(total_other) + bias_other

    return compiled(rows)


ROWS = {bits: _rows_of_width(bits) for bits in BITS}


@compiled
def _float_rows(weight, x, out, start, stop):
    for row in range(start, stop):
        out[row] = dot(weight[row], x)


# ---- one interface for quantized and float matrices ----------------------------------


def fill_rows(matrix, x, sums, out, start, stop):
    """out[start:stop] = those rows of the matrix times x, which `arrange` prepared."""


@overload(fill_rows)
def _fill_rows(matrix, x, sums, out, start, stop):
    if len(matrix) == 1:
        return lambda matrix, x, sums, out, start, stop: _float_rows(
            matrix[0], x, out, start, stop
        )
    rows = ROWS[WIDTHS[matrix[0].dtype.name]]
    return lambda matrix, x, sums, out, start, stop: rows(
        matrix[0], matrix[1], matrix[2], x, sums, out, start, stop
    )


def arrange(matrix, x, scaled, sums):
    """Scale x by position, and sum its groups, as the kernel of this matrix needs."""


@overload(arrange)
def _arrange(matrix, x, scaled, sums):
    if len(matrix) == 1:
        return lambda matrix, x, scaled, sums: _copy(x, scaled)
    bits = WIDTHS[matrix[0].dtype.name]
    return lambda matrix, x, scaled, sums: _arrange_quantized(
        bits, matrix[1].shape[1], x, scaled, sums
    )


@compiled
def _copy(x, out):
    for i in range(x.size):
        out[i] = x[i]


@compiled
def _arrange_quantized(bits, n_groups, x, scaled, sums):
    scales = np.empty(8, f32)
    for i in range(8):
        scales[i] = f32(1) / f32(1 << (i * bits % 8))
    for i in range(x.size):
        scaled[i] = x[i] * scales[i & 7]
    size = x.size // n_groups
    for group in range(n_groups):
        total = zero8()
        for i in range(group * size, (group + 1) * size, 8):
            total = add8(total, load8(x, i))
        sums[group] = sum8(total)


def n_sums(matrix):
    """How many group sums of x the kernel of this matrix reads."""


@overload(n_sums)
def _n_sums(matrix):
    if len(matrix) == 1:
        return lambda matrix: 0
    return lambda matrix: matrix[1].shape[1]


def one_of(matrix, slot):
    """One matrix of a stack: an expert's, from the bank of its layer."""


@overload(one_of)
def _one_of(matrix, slot):
    if len(matrix) == 1:
        return lambda matrix, slot: (matrix[0][slot],)
    return lambda matrix, slot: (matrix[0][slot], matrix[1][slot], matrix[2][slot])


# ---- matrix times vector -------------------------------------------------------------


@compiled
def n_blocks(n_rows):
    """How many blocks of BLOCK_ROWS cover so many rows."""
    return (n_rows + BLOCK_ROWS - 1) // BLOCK_ROWS


@serial_and_parallel
def _multiply(matrix, x, out):
    scaled, sums = np.empty(x.size, f32), np.empty(n_sums(matrix), f32)
    arrange(matrix, x, scaled, sums)
    for block in prange(n_blocks(out.size)):
        start = block * BLOCK_ROWS
        stop = min(start + BLOCK_ROWS, out.size)
        fill_rows(matrix, scaled, sums, out, start, stop)


multiply_serial, multiply_parallel = _multiply


@compiled
def multiply(matrix, x, out):
    """out = matrix times x; a second thread joins where that pays."""
    if matrix[0].size * matrix[0].itemsize < PARALLEL_BYTES:
        multiply_serial(matrix, x, out)
    else:
        multiply_parallel(matrix, x, out)


def matvec(
    matrix: Parts | QuantizedMatrix | np.ndarray,
    x: np.ndarray,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Multiply a stored matrix by a vector, without decoding the matrix.

    Shapes: matrix (out, in), best as `prepare` returned it; x (in,) float32 -> (out,).
    Raises: ConfigError if x does not fit the matrix.
    """
    parts = matrix if isinstance(matrix, tuple) else prepare(matrix)
    if x.dtype != f32 or x.ndim != 1 or not x.flags.c_contiguous:
        raise ConfigError(f"x must be a contiguous float32 vector, not {x.dtype}")
    check_fits(parts, x.size)
    if out is None:
        out = np.empty(len(parts[0]), f32)
    multiply(parts, x, out)
    return out


def check_fits(parts: Parts, n_in: int) -> None:
    """Raise ConfigError unless a prepared matrix has n_in columns."""
    weight = parts[0]
    columns = weight.shape[-1]
    if len(parts) == 3:
        columns = columns * weight.itemsize * 8 // WIDTHS[weight.dtype.name]
    if columns != n_in:
        raise ConfigError(f"x has {n_in} values, but the matrix has {columns} columns")


# ---- decoding ------------------------------------------------------------------------


def _decoder_of_width(bits: int):
    """The kernel for one width: out = the matrix, decoded."""
    chunk_bytes = CHUNK * bits // 8

    def decode(weight, scales, biases, out):
        chunks = out.shape[1] // scales.shape[1] // CHUNK  # in a group
        for row in range(len(out)):
            packed, values = weight[row], out[row]
            for i in range(out.shape[1] // CHUNK):
                scale = widen(scales[row, i // chunks])
                bias = widen(biases[row, i // chunks])
                decode32(bits, packed, i * chunk_bytes, scale, bias, values, i * CHUNK)

    return compiled(decode)


DECODERS = {bits: _decoder_of_width(bits) for bits in BITS}


def dequantize_f32(matrix: QuantizedMatrix) -> np.ndarray:
    """Decode to float32, bit for bit as `quantize.dequantize` does, but faster.

    Shapes: -> (..., out, in).
    """
    out = np.empty(matrix.shape, f32)
    parts = (part.reshape(-1, part.shape[-1]) for part in prepare(matrix))
    rows = out.reshape(-1, out.shape[-1])
    DECODERS[matrix.bits](*parts, rows)
    return out


# ---- the experts of a token ----------------------------------------------------------


@serial_and_parallel
def _experts(gate, up, down, slots, weights, x, out):
    k, n_f = slots.size, gate[0].shape[1]
    for slot in slots:
        if slot < 0 or slot >= gate[0].shape[0]:
            raise IndexError("a slot is outside the bank")
    x_gate, sums_gate = np.empty(x.size, f32), np.empty(n_sums(one_of(gate, 0)), f32)
    x_up, sums_up = np.empty(x.size, f32), np.empty(n_sums(one_of(up, 0)), f32)
    arrange(one_of(gate, 0), x, x_gate, sums_gate)
    arrange(one_of(up, 0), x, x_up, sums_up)
    hidden, raised = np.empty((k, n_f), f32), np.empty((k, n_f), f32)
    blocks = n_blocks(n_f)
    for task in prange(k * blocks):
        i, start = task // blocks, task % blocks * BLOCK_ROWS
        stop = min(start + BLOCK_ROWS, n_f)
        fill_rows(one_of(gate, slots[i]), x_gate, sums_gate, hidden[i], start, stop)
        fill_rows(one_of(up, slots[i]), x_up, sums_up, raised[i], start, stop)
        for f in range(start, stop):
            hidden[i, f] = silu(hidden[i, f]) * raised[i, f]
    sums = np.empty((k, n_sums(one_of(down, 0))), f32)
    for i in range(k):
        arrange(one_of(down, 0), hidden[i], raised[i], sums[i])
    products = np.empty((k, out.size), f32)
    for block in prange(n_blocks(out.size)):
        start = block * BLOCK_ROWS
        stop = min(start + BLOCK_ROWS, out.size)
        for i in range(k):  # best first
            one = one_of(down, slots[i])
            fill_rows(one, raised[i], sums[i], products[i], start, stop)
            for d in range(start, stop):
                out[d] += weights[i] * products[i, d]


experts_serial, experts_parallel = _experts


def experts_step(
    bank: tuple[Parts, Parts, Parts],
    slots: np.ndarray,
    weights: np.ndarray,
    x: np.ndarray,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The K experts of a layer for one token: sum_k weight_k * expert_k(x).

    Shapes: bank holds gate_proj and up_proj (slots, F, D) and down_proj (slots, D, F),
    each as `prepare` returned it; slots (K,) integers, weights (K,) float32, best
    first, which is also the order of the sum; x (D,) float32 -> (D,).
    With out, it is added to that instead: a residual, or the shared expert.
    Raises: IndexError if a slot is outside the bank.
    """
    if out is None:
        out = np.zeros(x.size, f32)
    n_bytes = sum(parts[0].nbytes for parts in bank) // len(bank[0][0]) * len(slots)
    add = experts_serial if n_bytes < PARALLEL_BYTES else experts_parallel
    add(*bank, np.asarray(slots, np.int64), weights, x, out)
    return out
