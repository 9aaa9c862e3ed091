"""How fast a disk gives records: by their size, by how many are asked for at once.

Threads read records at random places with positioned reads into their own memory, as
the engine does, and as fio does with `--ioengine=psync`. Three modes:
    warm    out of the page cache
    cold    through the page cache, which holds none of it, without read-ahead
    direct  past the page cache (O_DIRECT on Linux, F_NOCACHE on macOS)
A cold or direct record is one of which no page is cached, and is read once; where the
system keeps a file cached all the same, nothing is measured and a note says so.
**But:** what the engine gets of small warm records is less, for its threads wait for
Python's lock; and a host may cache a virtual disk. *Taught in notebooks/06 and 12.*
"""

import fcntl
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from threading import Barrier

import numpy as np

from .errors import ConfigError, FlashMoeError, ReadError
from .page_cache import evict, resident_pages, resident_share
from .probe_kernels import read_records
from .reading import open_file, read_exactly

MODES = ("warm", "cold", "direct")
SIZES = tuple(4096 * 4**i for i in range(7))  # 4 KiB to 16 MiB
DEPTHS = (1, 2, 4, 8, 16, 32)
QUICK_SIZES, QUICK_DEPTHS = (*SIZES[0:6:2], SIZES[5]), (1, 4, 16)
FILE_BYTES, QUICK_BYTES = 512 << 20, 128 << 20  # the largest size at the largest depth
CELL_S = {"warm": 0.05, "cold": 0.2, "direct": 0.2}
LIMIT_S = 36.0
SPARE_BYTES = 200_000_000  # left free on the disk
MAX_SPANS = 8  # of a model's files
START_S = 10.0  # in which all threads must have been started
BATCH_BYTES = 1 << 20  # read between two looks at the clock
PIECE_BYTES = 4096  # sizes of records are multiples of it
MAX_READS = 20_000  # in one measurement
RESIDENT = 0.99  # share that counts as warm
PLAUSIBLE = 2.0  # a disk takes at least so many times as long as memory
DARWIN_RDAHEAD = 45  # fcntl.F_RDAHEAD, which Python names since 3.14


@dataclass(frozen=True)
class Span:
    """A range of an open file, from a page's start."""

    fd: int
    direct_fd: int | None  # opened past the page cache
    start: int
    n_bytes: int


@dataclass(frozen=True)
class DiskRate:
    """One measurement."""

    mode: str
    n_bytes: int  # of a record
    depth: int  # threads that read
    rate_gb_s: float
    read_us: float  # one read, on average
    n_reads: int


@dataclass(frozen=True)
class DiskProbe:
    """What was measured of a disk, and why something was not."""

    what: str
    n_bytes: int  # that records were taken from
    rates: tuple[DiskRate, ...]
    notes: tuple[str, ...]

    def get(self, mode: str, n_bytes: int, depth: int) -> DiskRate | None:
        """One measurement, if it was made."""
        wanted = (mode, n_bytes, depth)
        found = (r for r in self.rates if (r.mode, r.n_bytes, r.depth) == wanted)
        return next(found, None)

    def surface(self, mode: str) -> tuple[list[int], list[int], np.ndarray]:
        """Sizes, depths, and GB/s (sizes, depths), nan where not measured."""
        sizes = sorted({rate.n_bytes for rate in self.rates})
        depths = sorted({rate.depth for rate in self.rates})
        found = [[self.get(mode, n, d) for d in depths] for n in sizes]
        rates = [[r.rate_gb_s if r else np.nan for r in row] for row in found]
        return sizes, depths, np.array(rates).reshape(len(sizes), len(depths))


# --- what is read ---------------------------------------------------------------------


@contextmanager
def own_file(folder: str | Path, n_bytes: int) -> Iterator[list[Span]]:
    """Make a file of random bytes; nothing is left of it, however the program ends.

    Its name is removed before the first byte is written, so not even a kill leaves it.
    Raises: ConfigError if the folder cannot be written to or has no room.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is no folder; give one on the disk to be probed")
    n_bytes -= n_bytes % mmap.PAGESIZE
    _check_room(folder, n_bytes)
    with ExitStack() as stack:
        try:
            fd, name = tempfile.mkstemp(prefix=".flashmoe-probe-", dir=folder)
        except OSError as error:
            raise ConfigError(
                f"{folder}: cannot be written to ({error.strerror}); give another "
                f"folder, or probe a model's own files"
            ) from None
        stack.callback(os.close, fd)
        try:
            direct_fd = _open_direct(Path(name), stack)
        finally:
            os.unlink(name)
        _fill(fd, n_bytes, folder)
        _advise_random(fd)
        yield [Span(fd, direct_fd, 0, n_bytes)]


def _check_room(folder: Path, n_bytes: int) -> None:
    largest_page = 1 << 16
    if n_bytes < largest_page:
        raise ConfigError(f"a probe's file needs {largest_page:,} bytes at least")
    free = shutil.disk_usage(folder).free
    if free < n_bytes + SPARE_BYTES:
        raise ConfigError(
            f"{folder}: the probe's file needs {n_bytes / 1e9:.2f} GB and should leave "
            f"{SPARE_BYTES / 1e9:.1f} GB, but {free / 1e9:.2f} GB are free; make it "
            f"smaller or give a folder on another disk"
        )


def _fill(fd: int, n_bytes: int, folder: Path) -> None:
    """Write bytes that no file system can compress, and wait until they are stored."""
    if hasattr(fcntl, "F_NOCACHE"):  # macOS cannot always drop what it has cached
        fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
    rng, block = np.random.default_rng(), 1 << 22
    try:
        for start in range(0, n_bytes, block):
            view = memoryview(rng.bytes(min(block, n_bytes - start)))
            while view:
                view = view[os.write(fd, view) :]
        os.fsync(fd)
    except OSError as error:
        raise ConfigError(f"{folder}: writing failed ({error.strerror})") from None


@contextmanager
def spans_of_files(paths: Sequence[str | Path], n_bytes: int) -> Iterator[list[Span]]:
    """Open parts of existing files, n_bytes together at most; nothing is written.

    Raises: ReadError if one cannot be opened; ConfigError if they are too small.
    """
    step = -(-len(paths) // MAX_SPANS) or 1
    paths = [Path(path) for path in paths][::step]
    left, spans = n_bytes, []
    with ExitStack() as stack:
        for number, path in enumerate(paths):
            fd, _ = open_file(path)
            stack.callback(os.close, fd)
            _advise_random(fd)
            share = min(os.fstat(fd).st_size, left // (len(paths) - number))
            share -= share % mmap.PAGESIZE
            left -= share
            if share:
                spans.append(Span(fd, _open_direct(path, stack), 0, share))
        if not spans:
            raise ConfigError("there is no file of a page or more to be probed")
        yield spans


def _open_direct(path: Path, stack: ExitStack) -> int | None:
    """Open past the page cache; None if the system or file system has no such way."""
    try:
        fd, _ = open_file(path, bypass_page_cache=True)
    except FlashMoeError:
        return None
    stack.callback(os.close, fd)
    return fd


def _advise_random(fd: int) -> None:
    """No read-ahead: it would make the neighbours of a record warm."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    elif hasattr(fcntl, "F_NOCACHE"):
        fcntl.fcntl(fd, getattr(fcntl, "F_RDAHEAD", DARWIN_RDAHEAD), 0)


# --- measuring ------------------------------------------------------------------------

Record = tuple[int, int]  # descriptor and offset


def probe_disk(
    spans: Sequence[Span],
    what: str,
    sizes: Sequence[int] = SIZES,
    depths: Sequence[int] = DEPTHS,
    limit_s: float = LIMIT_S,
    step: Callable[[], object] = lambda: None,
) -> DiskProbe:
    """Measure every mode, size and depth; `step` is called after each.

    Each mode gets an equal share of limit_s; what does not fit is left out.
    """
    rates, notes = [], []
    memory = _touched(max(sizes) * max(depths))
    deadline = time.perf_counter()
    for mode in MODES:
        deadline = max(deadline, time.perf_counter()) + limit_s / len(MODES)
        reason = _why_not(spans, mode)
        for size in sizes:
            for depth in depths:
                if reason is None and time.perf_counter() < deadline:
                    rates.append(measure(spans, mode, size, depth, memory=memory))
                elif reason is None:
                    reason = f"{mode}: some of it did not fit into the time limit"
                step()
        notes += [reason] if reason else []
    measured = [rate for rate in rates if rate is not None]
    if len(measured) < len(rates):
        notes.append("where records were too few for the depth, nothing was measured")
    n_bytes = sum(span.n_bytes for span in spans)
    return _plausible(DiskProbe(what, n_bytes, tuple(measured), tuple(notes)))


def measure(
    spans: Sequence[Span],
    mode: str,
    n_bytes: int,
    depth: int,
    limit_s: float | None = None,
    memory: memoryview | None = None,
) -> DiskRate | None:
    """Read records of n_bytes with depth threads for about limit_s, or to the end.

    memory: depth * n_bytes or more, from a page's start; made if not given.
    Returns: None if there is not one record for each thread that fits the mode.
    """
    memory = _touched(n_bytes * depth) if memory is None else memory
    records = _records(spans, mode, n_bytes)
    if len(records) < depth:
        return None
    if mode == "warm":
        _warm(spans)
    shares = [records[i::depth] for i in range(depth)]
    views = [memory[i * n_bytes : (i + 1) * n_bytes] for i in range(depth)]
    n_reads, seconds = _read_shares(shares, views, limit_s or CELL_S[mode], mode)
    rate = n_reads * n_bytes / seconds / 1e9
    return DiskRate(
        mode, n_bytes, depth, rate, seconds * depth / n_reads * 1e6, n_reads
    )


def _touched(n_bytes: int) -> memoryview:
    """Memory that is there already: getting it page by page takes longer than reads."""
    memory = mmap.mmap(-1, n_bytes)
    np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1
    return memoryview(memory)


def _records(spans: Sequence[Span], mode: str, n_bytes: int) -> list[Record]:
    """Records that may be read, in random order: where they should come from the disk,
    those of which nothing is cached."""
    records = []
    for span in spans:
        fd = span.direct_fd if mode == "direct" else span.fd
        places = np.arange(span.n_bytes // n_bytes) * n_bytes + span.start
        if mode != "warm":
            places = places[~_cached(span, places.size, n_bytes)]
        records += [(fd, place) for place in places.tolist()]
    order = np.random.default_rng().permutation(len(records))[:MAX_READS]
    return [records[i] for i in order]


def _warm(spans: Sequence[Span]) -> None:
    """Bring into the page cache what is not there yet."""
    for span in spans:
        if resident_share(span.fd, span.start, span.n_bytes) == 1.0:
            continue
        stop = span.start + span.n_bytes
        for at in range(span.start, stop, 1 << 24):
            os.pread(span.fd, min(1 << 24, stop - at), at)


def _cached(span: Span, n_records: int, n_bytes: int) -> np.ndarray:
    """Of which records something stays in the page cache. Shapes: -> (records,) bool"""
    pages = resident_pages(span.fd, span.start, n_records * n_bytes)
    if pages is None or pages.any():
        evict(span.fd, span.start, span.n_bytes)
        pages = resident_pages(span.fd, span.start, n_records * n_bytes)
    if pages is None:
        return np.ones(n_records, bool)
    pieces = pages.repeat(mmap.PAGESIZE // PIECE_BYTES)
    pieces = pieces[: n_records * n_bytes // PIECE_BYTES]
    return pieces.reshape(n_records, -1).any(axis=1)


def _read_shares(
    shares: list[list[Record]], views: list[memoryview], limit_s: float, mode: str
) -> tuple[int, float]:
    """One thread a share, all starting together. Returns reads and seconds."""
    start: list[float] = []
    barrier = Barrier(len(shares), lambda: start.append(time.perf_counter()))
    n_batch = max(1, BATCH_BYTES // len(views[0]))

    def read(share: list[Record], view: memoryview) -> tuple[int, float]:
        fds, offsets = np.array(share, np.int64).T.copy()
        starts, n_reads = range(0, len(share), n_batch), 0
        barrier.wait(START_S)
        deadline = start[0] + limit_s
        for first in cycle(starts) if mode == "warm" else starts:
            batch = slice(first, first + n_batch)
            n_reads += _read(fds[batch], offsets[batch], view)
            now = time.perf_counter()
            if now >= deadline:
                break
        return n_reads, now

    with ThreadPoolExecutor(len(shares), "flashmoe-probe") as pool:
        done = list(pool.map(read, shares, views))
    return sum(n for n, _ in done), max(end for _, end in done) - start[0]


def _read(fds: np.ndarray, offsets: np.ndarray, view: memoryview) -> int:
    """Read records into the same memory; what the kernel could not, once more here.

    Returns: how many, which is all of them.
    """
    address = np.frombuffer(view, np.uint8).ctypes.data
    n_done = read_records(fds, offsets, address, len(view))
    try:
        for i in range(n_done, len(fds)):
            read_exactly(int(fds[i]), [view], int(offsets[i]))
    except OSError as error:
        raise ReadError(
            f"the probe's read failed ({error.strerror or error})"
        ) from None
    return len(fds)


# --- what cannot be measured ----------------------------------------------------------


def _why_not(spans: Sequence[Span], mode: str) -> str | None:
    """A sentence if a mode cannot be measured here at all."""
    if mode == "direct" and any(span.direct_fd is None for span in spans):
        return "direct: this file system offers no way past the page cache"
    if mode == "warm":
        return _why_not_warm(spans)
    shares = [evict(span.fd, span.start, span.n_bytes) for span in spans]
    if None in shares:
        return f"{mode}: the system does not tell what of these files is cached"
    if min(shares) > 0.5:
        return (
            f"{mode}: the system keeps {min(shares):.0%} of the file in memory though "
            f"asked to drop it (a container's or a memory file system?)"
        )
    return None


def _why_not_warm(spans: Sequence[Span]) -> str | None:
    _warm(spans)
    for span in spans:
        share = resident_share(span.fd, span.start, span.n_bytes)
        if share is not None and share < RESIDENT:
            return f"warm: memory holds only {share:.0%} of the file"
    return None


def _plausible(probe: DiskProbe) -> DiskProbe:
    """Drop what claims to come from a disk, but as fast as from memory."""
    smallest = min((rate.n_bytes for rate in probe.rates), default=0)
    warm = probe.get("warm", smallest, 1)
    rates, notes = probe.rates, probe.notes
    for mode in MODES[1:]:
        other = probe.get(mode, smallest, 1)
        if warm and other and other.read_us < PLAUSIBLE * warm.read_us:
            rates = tuple(rate for rate in rates if rate.mode != mode)
            notes += (f"{mode}: as fast as memory, so it did not come from a disk",)
    return DiskProbe(probe.what, probe.n_bytes, rates, notes)
