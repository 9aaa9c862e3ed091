"""Positioned reads: bytes of a file into given memory, all of them or an error.

Also past the operating system's page cache, so that memory is not filled with a second
copy of what the slots hold. **But:** reads only; which bytes is for `experts.py`.
*Taught in notebooks/06 and 08.*

Linux: O_DIRECT. Offset, length and memory must be multiples of the disk's block. Where
they are, bytes go straight to their place; else through an aligned buffer, with a copy.

macOS: F_NOCACHE. NOTE: it only keeps *new* bytes out of the cache. What is cached
already is still served from memory and stays there, so a "cold" measurement after any
earlier read of the file shows the speed of memory. Nothing but a reboot or `sudo purge`
drops it. Any offset and length will do.
"""

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from .errors import ConfigError, ReadError

MAX_READ_BYTES = 1 << 30  # one preadv of more than 2 GB fails on macOS
BOUNCE_BYTES = 1 << 23  # of the aligned buffer, one a thread
BLOCKS = (512, 4096)  # what disks want offsets and lengths to be multiples of
_own = threading.local()  # each thread's buffer


def open_file(path: Path, bypass_page_cache: bool = False) -> tuple[int, int]:
    """Open for reading. Returns the descriptor, and what offsets must be multiples of.

    Raises: ReadError if it cannot be opened, ConfigError if the cache cannot be
    bypassed here.
    """
    if bypass_page_cache and not hasattr(os, "O_DIRECT"):
        return _open_without_caching(path), 1
    direct = os.O_DIRECT if bypass_page_cache else 0
    try:
        fd = os.open(path, os.O_RDONLY | direct)
    except OSError as error:
        if direct and error.errno == errno.EINVAL:
            raise _no_bypass(path) from None
        raise ReadError(f"{path}: cannot be opened ({error.strerror})") from None
    return fd, _block_of(fd, path) if direct else 1


def _no_bypass(path: Path) -> ConfigError:
    return ConfigError(
        f"bypass_page_cache: the file system or system that {path} is on offers no "
        f"way to read past its cache; leave this option out"
    )


def _open_without_caching(path: Path) -> int:
    """As macOS does it."""
    if not hasattr(fcntl, "F_NOCACHE"):
        raise _no_bypass(path)
    fd, _ = open_file(path)
    fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
    return fd


def _block_of(fd: int, path: Path) -> int:
    """The smallest block that the disk accepts, by trying. Closes fd if none is."""
    for block in BLOCKS:
        try:
            os.preadv(fd, [_buffer()[:block]], block)
            return block
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                os.close(fd)
                raise ReadError(f"{path}: cannot be read ({error.strerror})") from None
    os.close(fd)
    raise _no_bypass(path)


def _buffer() -> memoryview:
    """This thread's aligned memory."""
    if not hasattr(_own, "buffer"):
        _own.buffer = memoryview(mmap.mmap(-1, BOUNCE_BYTES))
    return _own.buffer


def read_exactly(fd: int, views: Sequence[memoryview], offset: int) -> None:
    """Fill the views with the bytes at offset, one after the other.

    Python repeats a read that a signal interrupts; a short one is continued here.
    Raises: OSError, also where the file ends before the views are full.
    """
    n_wanted = sum(map(len, views))
    if n_wanted <= MAX_READ_BYTES:  # the usual case: one call, done
        n = os.preadv(fd, views, offset)
        if n == n_wanted:
            return
        views, offset = _drop(views, n), offset + _progress(n)
    for view in views:
        at = 0
        while at < len(view):
            piece = view[at : at + MAX_READ_BYTES]
            at += _progress(os.preadv(fd, [piece], offset + at))
        offset += len(view)


def read_through_buffer(
    fd: int, views: Sequence[memoryview], offset: int, block: int
) -> None:
    """The same from whole blocks of the file, which are read aside and copied.

    Raises: OSError, also where the file ends before the views are full.
    """
    buffer, first, last = _buffer(), 0, 0  # it holds bytes first..last of the file
    stop = offset + sum(len(view) for view in views)
    for view in views:
        at = 0
        while at < len(view):
            if offset >= last:
                first = offset - offset % block
                n_blocks = -((first - stop) // block)
                n = os.preadv(fd, [buffer[: n_blocks * block]], first)
                last = first + n
                _progress(max(last - offset, 0))
            n = min(len(view) - at, last - offset)
            view[at : at + n] = buffer[offset - first : offset - first + n]
            at, offset = at + n, offset + n


def _progress(n: int) -> int:
    if n == 0:
        raise OSError("the file ends too early")
    return n


def _drop(views: Sequence[memoryview], n: int) -> list[memoryview]:
    """The views without their first n bytes."""
    rest = []
    for view in views:
        rest.append(view[min(n, len(view)) :])
        n -= min(n, len(view))
    return rest
