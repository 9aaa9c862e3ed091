"""`arrivals.find_bad` compiled: a token's experts in a microsecond or two.

NumPy needs two calls for each part of each expert, and a call costs more than to look
at a small part's bytes. Here one call does for all experts that were read together,
eight bytes at a time. Adding 1 to the exponent of each float, all else masked out,
carries into the place of its sign exactly if all bits of the exponent were set.
**But:** little-endian machines only, as everything here that looks at files.
*Taught in notebooks/07.*

NOTE: kernels here call none outside this file, so Numba's own check of the file's date
is enough, and the file need not be among `compiled.KERNEL_FILES`.
"""

from collections.abc import Sequence

import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from .arrivals import Floats
from .compiled import compiled

u64 = np.uint64


def find_bad(floats: Floats, slots: Sequence[int]) -> tuple[int, int] | None:
    """The first NaN or infinity in some slots: which of them, and the part's number."""
    row, position = _find(floats.table, np.array(slots))
    return None if row < 0 else (position, floats.numbers[row])


@intrinsic
def _at(_typing, address):
    """A pointer to an address."""

    def write_ir(_context, builder, _signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), write_ir


@compiled
def _find(table, slots):
    """Row of the table and index into slots of the first that is bad, or -1 and -1.

    Shapes: table (parts, 5) int64, as `arrivals.Floats` makes it; slots (n,).
    """
    for row in range(table.shape[0]):
        first, stride, n_bytes, exponent, lowest = table[row]
        for position in range(slots.size):
            address = first + slots[position] * stride
            if _is_bad(address, n_bytes, u64(exponent), u64(lowest)):
                return row, position
    return -1, -1


@compiled
def _is_bad(address, n_bytes, exponent, lowest):
    n_words = n_bytes // 8
    words = carray(_at(address), n_words, u64)
    carried = u64(0)
    for i in range(n_words):
        carried |= (words[i] & exponent) + lowest
    rest = carray(_at(address + 8 * n_words), n_bytes - 8 * n_words, np.uint8)
    word = u64(0)
    for i in range(rest.size):
        word |= u64(rest[i]) << u64(8 * i)
    carried |= (word & exponent) + lowest
    return (carried & (exponent + lowest)) != u64(0)
