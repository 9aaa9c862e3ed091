"""Reads of many small rows, compiled: a thread lets go of Python's lock once for all.

A neuron's row takes microseconds to read, and about as long to ask for from Python,
which lets one thread ask at a time: 119 rows of 2 KiB out of the page cache took 0.43
ms from Python and 0.16 ms from here, past it, by eight threads, 4.8 and 3.7 (two busy
cores). Window and pool gained too little (12 us to 8) and are plain NumPy.
**But:** rows of one length; a read that comes short is for the caller to repeat.
*Taught in notebooks/11.*

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
def read_rows(fd: int, offsets: np.ndarray, addresses: np.ndarray, n_bytes: int) -> int:
    """Read row after row of one file, each to an address of its own.

    Shapes:  offsets and addresses (n,) int64.
    Returns: how many were read whole: fewer than n where one failed or came short.
    """
    for i in range(offsets.size):
        if _pread(fd, addresses[i], n_bytes, offsets[i]) != n_bytes:
            return i
    return offsets.size
