"""Weights in MLX's memory, in the form that the file has them, and how to apply them.

Follows `mlx.nn.QuantizedLinear`. A matrix stays packed; what MLX multiplies slowly in
that form is decoded a few rows at a time. **But:** affine quantization only.
*Taught in notebooks/05.*
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .quantize import QuantizedMatrix

BLOCK_VALUES = 1 << 22  # values widened at a time: 16 MB as float32
MANY_ROWS = 16  # from here on the CPU gains by decoding a quantized matrix first


@dataclass(frozen=True)
class Matrix:
    """A stored weight matrix in MLX's memory; leading axes, such as slots, come first.

    Shapes: weight (..., out, in), or packed uint32 words with scales and biases.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int | None = None
    group_size: int | None = None

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the floats in the file: of the scales where quantized."""
        return (self.weight if self.scales is None else self.scales).dtype

    @property
    def widths(self) -> dict[str, int]:
        """Bits and group size, as MLX's functions take them."""
        return {"bits": self.bits, "group_size": self.group_size}

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays that the matrix consists of."""
        arrays = (self.weight, self.scales, self.biases)
        return [a for a in arrays if a is not None]

    def __getitem__(self, index: mx.array | slice) -> "Matrix":
        """Select along the first axis. A slice shares memory; an array copies."""
        arrays = [a[index] for a in self.arrays]
        return Matrix(*arrays, **(self.widths if len(arrays) == 3 else {}))


@dataclass(frozen=True)
class Stack:
    """Matrices that one input is multiplied by, row after row in as few as possible.

    A product has a fixed price in MLX, however small; rows of the result do not depend
    on each other, so one product with the stacked rows gives the same bits.
    """

    matrices: list[Matrix]
    cuts: list[list[int]]  # for each matrix, where to cut its output

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays that the matrices consist of."""
        return [array for matrix in self.matrices for array in matrix.arrays]


def to_mlx(array: np.ndarray) -> mx.array:
    """Copy an array into MLX's memory, bit for bit; also bfloat16."""
    if array.dtype.name == "bfloat16":  # unknown to Python's buffer protocol
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def to_matrix(w: np.ndarray | QuantizedMatrix) -> Matrix:
    """Copy a stored matrix into MLX's memory."""
    if not isinstance(w, QuantizedMatrix):
        return Matrix(to_mlx(w))
    arrays = (to_mlx(a) for a in (w.weight, w.scales, w.biases))
    return Matrix(*arrays, bits=w.bits, group_size=w.group_size)


def to_stack(parts: list[np.ndarray | QuantizedMatrix]) -> Stack:
    """Copy matrices into MLX's memory, stacking neighbours that are stored alike."""
    runs: list[list] = []
    for part in parts:
        if runs and _storage(runs[-1][0]) == _storage(part):
            runs[-1].append(part)
        else:
            runs.append([part])
    cuts = [np.cumsum([m.shape[0] for m in run])[:-1].tolist() for run in runs]
    return Stack([to_matrix(_concatenate(run)) for run in runs], cuts)


def _storage(w: np.ndarray | QuantizedMatrix) -> tuple:
    if isinstance(w, QuantizedMatrix):
        return w.bits, w.group_size, w.scales.dtype
    return (w.dtype,)


def _concatenate(run: list) -> np.ndarray | QuantizedMatrix:
    first = run[0]
    if len(run) == 1:
        return first
    if not isinstance(first, QuantizedMatrix):
        return np.concatenate(run)
    names = ("weight", "scales", "biases")
    arrays = (np.concatenate([getattr(m, name) for m in run]) for name in names)
    return QuantizedMatrix(*arrays, first.bits, first.group_size)


def widen(w: Matrix, dtype: mx.Dtype) -> mx.array:
    """The values of a stored matrix, decoded in float32."""
    if w.scales is None:
        return w.weight.astype(dtype)
    # NOTE: with bf16 scales mx.dequantize would round twice on the way.
    scales, biases = (a.astype(mx.float32) for a in (w.scales, w.biases))
    return mx.dequantize(w.weight, scales, biases, **w.widths).astype(dtype)


def linear(x: mx.array, w: Matrix) -> mx.array:
    """Apply a stored weight matrix. Shapes: x (T, in), w (out, in) -> (T, out)."""
    if w.scales is None:
        return x @ w.weight.T if w.dtype == x.dtype else _linear_in_blocks(x, w)
    if len(x) > 1 and is_decoded_first(len(x), x.shape[-1]):
        return _linear_in_blocks(x, w)
    y = mx.quantized_matmul(x, w.weight, w.scales, w.biases, **w.widths)
    return y.astype(x.dtype)


def is_decoded_first(n_rows: int, n_columns: int) -> bool:
    """Whether a product of several rows is better off with a decoded matrix.

    On the CPU it is faster. On CUDA MLX 0.32.4 gives infinities for short rows.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        return n_rows >= MANY_ROWS
    return mx.cuda.is_available() and n_columns % 128 != 0


def _linear_in_blocks(x: mx.array, w: Matrix) -> mx.array:
    """Widen some rows of the matrix at a time, transposed: so the CPU is 2.5x faster.

    There MLX decodes a quantized row anew for each row of x, and multiplies by a matrix
    that only looks transposed in an order that misses the cache.
    """
    n_rows, n_columns = len(w.weight), x.shape[-1]
    step = max(1, BLOCK_VALUES // n_columns)
    blocks = (w[i : i + step] for i in range(0, n_rows, step))
    products = [x @ mx.contiguous(widen(block, x.dtype).T) for block in blocks]
    return mx.concatenate(products, axis=-1)


def linears(x: mx.array, stack: Stack) -> list[mx.array]:
    """Apply each matrix of a stack to x."""
    outputs = []
    for matrix, cuts in zip(stack.matrices, stack.cuts, strict=True):
        outputs += mx.split(linear(x, matrix), cuts, axis=-1)
    return outputs
