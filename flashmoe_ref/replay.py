"""Replay a trace's reads in a process of its own: real memory, real disk, no model.

A file of records stands for the experts, slots of the process for a private cache, and
the system's page cache does what it does; in a control group both share one limit.
    run = replay_limited(file, picks, 65_536, slots=32, how="direct", limit_bytes=60e6)
    run.disk_records, run.seconds     # a token, after the warm-up
**But:** nothing computes between reads, one thread reads, and what comes from the disk
is counted on Linux only. *Taught in notebooks/08.*
"""

import json
import mmap
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from .errors import ReadError
from .memory_limit import run_limited
from .page_cache import evict
from .policies import make_slots
from .reading import open_file, read_exactly
from .writing import new_file

HOWS = ("page cache", "no read-ahead", "direct")
BLOCK_BYTES = 512  # in which Linux counts what a process had read from disks
WRITE_RECORDS = 64  # made and written at a time


@dataclass(frozen=True)
class Replayed:
    """What one token took, on average over the tokens after the warm-up."""

    seconds: float
    copies: float  # records that were read, from the page cache or the disk
    disk_records: float  # by bytes: what came from the disk
    peak_bytes: int = 0  # of the control group; 0: not known, or none


def write_records(path: str | Path, n_records: int, record_bytes: int) -> Path:
    """Write a file of random bytes; it is whole on the disk when this returns."""
    rng, path = np.random.default_rng(0), Path(path)
    with new_file(path) as file:
        for first in range(0, n_records, WRITE_RECORDS):
            n = min(WRITE_RECORDS, n_records - first)
            file.write(rng.bytes(n * record_bytes))
    return path


def replay(
    file: str | Path,
    picks: np.ndarray,
    record_bytes: int,
    slots: int,
    how: str = HOWS[0],
    n_warm: int = 0,
) -> Replayed:
    """Read what an LRU cache misses, token by token.

    Shapes: picks (T, L, K); file: L layers of equally many records, a multiple of 4,096
            bytes each.
    slots:  of each layer; 0 keeps nothing, so that every expert is read.
    how:    "page cache"; "no read-ahead", the same, but the system is told that reads
            come in no order; or "direct", past the page cache.
    Raises: ReadError, ConfigError as `reading.open_file`; ValueError for another how.
    """
    n_layers = picks.shape[1]
    with _opened(Path(file), how) as fd:
        n_experts = os.fstat(fd).st_size // (n_layers * record_bytes)
        cache = _Cache(picks.shape, slots, record_bytes)
        n_read, blocks, start = 0, _blocks_read(), time.perf_counter()
        for token, requests in enumerate(picks.tolist()):
            if token == n_warm:
                n_read, blocks, start = 0, _blocks_read(), time.perf_counter()
            for layer, keys in enumerate(requests):
                wanted = cache.places(layer, keys)
                for key, into in wanted:
                    at = (layer * n_experts + key) * record_bytes
                    read_exactly(fd, [into], at)
                n_read += len(wanted)
    n = max(len(picks) - n_warm, 1)
    from_disk = (_blocks_read() - blocks) * BLOCK_BYTES / record_bytes
    return Replayed((time.perf_counter() - start) / n, n_read / n, from_disk / n)


class _Cache:
    """Slots of each layer under LRU, and the memory that they are; or one layer's."""

    def __init__(self, shape: tuple[int, int, int], slots: int, n_bytes: int) -> None:
        _, n_layers, k = shape
        self.layers = [make_slots("lru", slots) for _ in range(n_layers)]
        self.slots, self.n_bytes = slots, n_bytes
        self.bank = memoryview(mmap.mmap(-1, max(n_layers * slots, k) * n_bytes))

    def places(self, layer: int, keys: Sequence[int]) -> list[tuple[int, memoryview]]:
        """The keys of a request that must be read, and into which memory."""
        if not self.slots:
            return [(key, self._place(i)) for i, key in enumerate(keys)]
        mine = self.layers[layer]
        _, missing = mine.assign(keys)
        first = layer * self.slots
        return [(key, self._place(first + mine.slot_of(key))) for key in missing]

    def _place(self, number: int) -> memoryview:
        return self.bank[number * self.n_bytes :][: self.n_bytes]


@contextmanager
def _opened(file: Path, how: str) -> Iterator[int]:
    """The file, opened in one of the ways."""
    if how not in HOWS:
        raise ValueError(f"how={how!r} is not one of {', '.join(HOWS)}")
    fd, _ = open_file(file, bypass_page_cache=how == "direct")
    try:
        if how == "no read-ahead" and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        yield fd
    finally:
        os.close(fd)


def _blocks_read() -> int:
    """What this process had read from disks so far, in blocks."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock


# --- in a process of its own, under a limit -------------------------------------------


def replay_limited(
    file: str | Path,
    picks: np.ndarray,
    record_bytes: int,
    slots: int,
    how: str,
    n_warm: int,
    limit_bytes: float,
) -> Replayed | None:
    """The same in a control group that holds process and page cache; None: killed.

    Cold: the file is dropped from the page cache first, and read by nobody else.
    Raises: ConfigError where no group can be made; ReadError where the replay failed.
    """
    file = Path(file)
    with open(file, "rb") as opened:
        evict(opened.fileno())
    saved = file.with_name(f"{file.name}.picks.npy")
    np.save(saved, picks)
    try:
        settings = [str(record_bytes), str(slots), how, str(n_warm)]
        command = [sys.executable, "-m", __name__, str(file), str(saved), *settings]
        done = run_limited(command, int(limit_bytes))
    finally:
        saved.unlink()
    if done.was_killed:
        return None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ReadError(f"{file}: the replay failed: {last[0]}")
    return replace(Replayed(**json.loads(done.stdout)), peak_bytes=done.peak_bytes)


def main(arguments: Sequence[str]) -> None:
    """What runs under the limit: writes a Replayed as JSON for who started it."""
    file, saved, record_bytes, slots, how, n_warm = arguments
    picks = np.load(saved)
    found = replay(file, picks, int(record_bytes), int(slots), how, int(n_warm))
    sys.stdout.write(json.dumps(asdict(found)))


if __name__ == "__main__":
    main(sys.argv[1:])
