"""What of a file lies in the page cache, and how to have it dropped.

Measuring a disk means knowing that bytes come from the disk. Linux drops a file's clean
pages on request (posix_fadvise), macOS on msync(MS_INVALIDATE); either may do nothing,
in a container or on a file system that lives in memory, so success is asked for page by
page (mincore). **But:** what a virtual machine's host, or the disk itself, has cached
cannot be seen from here. *Taught in notebooks/06 and 08.*
"""

import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from .errors import ReadError

MS_INVALIDATE = 2  # of msync, on Linux and macOS
TRIES, PAUSE_S = 3, 0.02  # pages that are being read just now cannot be dropped yet


def resident_pages(
    fd: int, offset: int = 0, n_bytes: int | None = None
) -> np.ndarray | None:
    """Which pages of a range are in the page cache; None where that cannot be told.

    Shapes:  (pages,) bool, pages of mmap.PAGESIZE bytes from the one that holds offset.
    Raises:  ReadError if the file ends before the range does.
    Source:  mincore(2). Linux answers "all of them" to those who may not know.
    """
    left = os.fstat(fd).st_size - offset
    n_bytes = left if n_bytes is None else n_bytes
    if n_bytes > max(left, 0):
        raise ReadError("the file is shorter than it was; is it being changed?")
    if n_bytes <= 0:
        return np.zeros(0, bool)
    with _mapped(fd, offset, n_bytes) as (address, n_mapped):
        flags = np.zeros(-(-n_mapped // mmap.PAGESIZE), np.uint8)
        libc = _libc()
        if libc is None or libc.mincore(address, n_mapped, flags.ctypes.data) != 0:
            return None
    pages = (flags & 1).astype(bool)
    return None if pages.all() and not _may_know(fd) else pages


def resident_share(
    fd: int, offset: int = 0, n_bytes: int | None = None
) -> float | None:
    """The share of a range that is in the page cache, 0 to 1; None: cannot be told."""
    pages = resident_pages(fd, offset, n_bytes)
    return None if pages is None else float(pages.mean()) if pages.size else 0.0


def evict(fd: int, offset: int = 0, n_bytes: int | None = None) -> float | None:
    """Ask the system to drop a range from its cache; the share that stays there.

    The share is None where it cannot be told: then the range counts as cached.
    """
    n_bytes = os.fstat(fd).st_size - offset if n_bytes is None else n_bytes
    share = None
    for attempt in range(TRIES):
        if attempt:
            os.fsync(fd)  # only clean pages are dropped
            time.sleep(PAUSE_S)
        _ask_to_drop(fd, offset, n_bytes)
        share = resident_share(fd, offset, n_bytes)
        if not share:
            break
    return share


def _ask_to_drop(fd: int, offset: int, n_bytes: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, n_bytes, os.POSIX_FADV_DONTNEED)
    elif n_bytes > 0 and (libc := _libc()) is not None:
        with _mapped(fd, offset, n_bytes) as (address, n_mapped):
            libc.msync(address, n_mapped, MS_INVALIDATE)


@contextmanager
def _mapped(fd: int, offset: int, n_bytes: int) -> Iterator[tuple[int, int]]:
    """Map a range, from a page's start. Gives its address and its bytes."""
    before = offset % mmap.ALLOCATIONGRANULARITY
    length = n_bytes + before
    with mmap.mmap(fd, length, access=mmap.ACCESS_READ, offset=offset - before) as m:
        view = np.frombuffer(m, np.uint8)
        address = view.ctypes.data
        del view  # a view would keep the map from being closed
        yield address, length


def _may_know(fd: int) -> bool:
    """Whether the system tells us about this file's pages: of our own files only."""
    return os.geteuid() in (0, os.fstat(fd).st_uid)


def _libc() -> ctypes.CDLL | None:
    """The C library, with the two calls that Python lacks; None on Windows."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        libc.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    except (OSError, TypeError, AttributeError):
        return None
    return libc
