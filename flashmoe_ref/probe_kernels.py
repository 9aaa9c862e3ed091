"""The probe's loop of reads, compiled: what the disk gives, not what Python allows.

Between two reads a thread of Python waits for its lock, which for records that memory
has ready takes as long as the read. Here a thread lets go of the lock once for many
records. **But:** the engine reads from Python, a record or more at a time; for small
warm records it gets less than this. *Taught in notebooks/06.*

NOTE: kernels here call none outside this file, so Numba's own check of the file's date
is enough, and the file need not be among `compiled.KERNEL_FILES`.
"""

import numpy as np
from numba import types

from .compiled import compiled

# ssize_t pread(int, void *, size_t, off_t), of the C library
_pread = types.ExternalFunction(
    "pread", types.intp(types.intc, types.uintp, types.uintp, types.int64)
)


@compiled
def read_records(
    fds: np.ndarray, offsets: np.ndarray, address: int, n_bytes: int
) -> int:
    """Read records one after the other into the same memory.

    Shapes:  fds and offsets (n,) int64.
    Returns: how many were read whole: fewer than n where one failed or came short.
    """
    for i in range(offsets.size):
        if _pread(fds[i], address, n_bytes, offsets[i]) != n_bytes:
            return i
    return offsets.size
