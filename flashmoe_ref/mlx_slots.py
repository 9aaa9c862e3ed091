"""Slots in MLX's memory: room that threads read into, and the matrices in it.

**But:** where MLX shares memory with the CPU; see `cuda_slots.py` for NVIDIA's GPUs.
*Taught in notebooks/07.*
"""

import math
import mmap

import mlx.core as mx
import numpy as np

from .errors import ConfigError
from .mlx_weights import Matrix
from .numpy_model import PROJECTIONS
from .slots import SlotBank

DTYPES = {
    "uint32": mx.uint32,
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
}


def allocate(shape: tuple[int, ...], dtype: np.dtype) -> tuple[mx.array, np.ndarray]:
    """MLX memory for slots, and the same memory as bytes to read into.

    It starts at a page: on the CPU MLX's own arrays start 24 bytes after one, and the
    system then copies out of its page cache five times slower (see notebooks/06).
    Shapes: -> array (slots, ...) zeroed, bytes (slots, n) uint8, writable.
    Raises: ConfigError where this MLX gives no access to its memory.
    """
    n_items, per_page = math.prod(shape), mmap.PAGESIZE // dtype.itemsize
    spare = mx.zeros(n_items + per_page, DTYPES[np.dtype(dtype).name])
    past_page = _bytes_of(spare).ctypes.data % mmap.PAGESIZE
    skip = -past_page % mmap.PAGESIZE // dtype.itemsize
    array = spare[skip : skip + n_items].reshape(shape)  # a view
    view = _bytes_of(array).reshape(shape[0], -1)
    _check_shared(array, view)
    return array, view


def _bytes_of(array: mx.array) -> np.ndarray:
    """The memory of an array. Shapes: -> (n,) uint8."""
    as_bytes = array.reshape(-1).view(mx.uint8)
    mx.eval(array, as_bytes)
    return np.array(as_bytes, copy=False)


def _check_shared(array: mx.array, view: np.ndarray) -> None:
    """Write a byte through the view and look for it in the array."""
    view[-1, -1] = 1
    seen = array[-1:].reshape(-1)[-1:].view(mx.uint8)[-1].item()
    view[-1, -1] = 0
    if seen != 1:
        raise ConfigError(
            f"MLX {mx.__version__} on {mx.default_device()} gives no access to its "
            f"memory, so experts cannot be read into it; use engine='numpy'"
        )


def bank_matrices(bank: SlotBank) -> dict[str, Matrix]:
    """A bank's projections (slots, out, in), in the memory that the store fills."""
    matrices = {}
    for name in PROJECTIONS:
        kinds = ("weight", "scales", "biases")
        arrays = [bank.arrays.get(f"{name}.{kind}") for kind in kinds]
        matrices[name] = Matrix(*arrays, *bank.format.quantization.get(name, ()))
    return matrices


def widened_bytes(experts: dict[str, Matrix], dtype: mx.Dtype) -> int:
    """Bytes of the float arrays that MLX first converts to the dtype of activations.

    None on a GPU with a bfloat16 checkpoint; on the CPU weights or scales in 16 bits.
    """
    floats = [a for m in experts.values() for a in m.arrays if a.dtype != mx.uint32]
    return sum(a.size * dtype.size for a in floats if a.dtype != dtype)
