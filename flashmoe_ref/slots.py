"""A slot bank: memory of the engine that holds some experts, ready to compute from.

Bytes are read straight into a bank's views, and the engine computes from its arrays,
which are the same memory: no copy in between. **But:** memory alone; `policies.py` says
which expert is in which slot. *Taught in notebooks/07.*
"""

import mmap
from collections.abc import Callable, Sequence
from math import gcd

import numpy as np

from .arrivals import FindBad, Floats
from .experts import ExpertFormat, Run
from .quantize import QuantizedMatrix

# Returns an array of the engine, and the same memory as writable bytes (slots, n).
Allocate = Callable[[tuple[int, ...], np.dtype], tuple[object, np.ndarray]]


def allocate_numpy(shape: tuple[int, ...], dtype: np.dtype) -> tuple:
    """Page-aligned zeroed memory as a NumPy array, and the same bytes by slot."""
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    buffer = np.frombuffer(mmap.mmap(-1, max(n_bytes, 1)), np.uint8, n_bytes)
    return buffer.view(dtype).reshape(shape), buffer.reshape(shape[0], -1)


CACHE_BYTES = 1 << 19  # of records: what the processor keeps until they are checked


class SlotBank:
    """Memory for n_slots experts of one format, in arrays of the engine."""

    def __init__(
        self, fmt: ExpertFormat, n_slots: int, allocate: Allocate = allocate_numpy
    ) -> None:
        self.format = fmt
        self.n_slots = n_slots
        self.arrays: dict[str, object] = {}  # part name -> (slots, *part shape)
        views = []
        for part in fmt.parts:
            array, as_bytes = allocate((n_slots, *part.shape), part.dtype)
            self.arrays[part.name] = array
            views.append(as_bytes)
        # by part: what divides the address and length of its bytes in every slot
        self.granules = [gcd(v.ctypes.data, v.shape[1]) for v in views]
        # [slot][part]: made once, a memoryview costs more than a small read
        self.views = [[memoryview(v[slot]) for v in views] for slot in range(n_slots)]
        self._floats = Floats(fmt.parts, views)
        # experts that a thread reads before it checks them: a check has a fixed price
        self.n_at_once = max(1, CACHE_BYTES // fmt.n_bytes)

    def find_bad(self, find: FindBad, slots: Sequence[int]) -> tuple[int, int] | None:
        """The first NaN or infinity in slots whose views this thread has just filled.

        Returns the index into slots, and the number of the part.
        """
        return find(self._floats, slots)

    def arrived(self, slot: int) -> None:
        """Called when a slot's views are filled and checked: here all is in place."""

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole bank."""
        return self.n_slots * self.format.n_bytes

    def matrix(self, projection: str) -> np.ndarray | QuantizedMatrix:
        """A projection of all slots. Shapes: (slots, out, in), perhaps quantized."""
        return self.format.matrix(self.arrays, projection)

    def is_aligned(self, run: Run, offset: int, block: int) -> bool:
        """Whether a read of a run needs no buffer where blocks must be whole."""
        granules = self.granules[run.first : run.last]
        return offset % block == 0 and all(g % block == 0 for g in granules)


# Makes a bank of so many slots: SlotBank, or another of the same kind.
MakeBank = Callable[[ExpertFormat, int], SlotBank]


def kinds_of(formats: Sequence[ExpertFormat]) -> list[int]:
    """Number the formats of the layers: the same number, the same slots fit.

    Shapes: formats (L,) -> (L,), from 0 in order of appearance.
    """
    numbers: dict[tuple, int] = {}
    return [numbers.setdefault(fmt.parts, len(numbers)) for fmt in formats]
