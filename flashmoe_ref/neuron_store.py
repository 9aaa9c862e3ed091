"""Neurons on disk, and memory for those of one layer that are needed just now.

Two ways of storing: apart (a file of up-projection rows and one of down-projection
columns a layer), or bundled (row and column of a neuron side by side: one read where
there were two). Two ways of keeping them in memory: a pool that is allocated once,
where the last row moves into the hole of a deleted one and new rows are appended; or
memory that is made anew, and copied, whenever the neurons change.
Follows arXiv 2312.11514, sections 3.2 and 3.3. **But:** float32, as the paper's CPU.
*Taught in notebooks/11.*
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import ConfigError, ReadError
from .neuron_kernels import read_rows
from .page_cache import evict
from .reading import open_file, read_exactly, read_through_buffer
from .relu_model import ReluConfig, ReluModel
from .slots import allocate_numpy
from .writing import new_file

LARGE_BYTES = 1 << 20  # of one read, where a whole range is wanted
THREADS = 8  # as many reads are under way at once
ROUNDS = 5  # of which the median counts
SHARE = 4  # small reads a thread, at least: handing over takes as long as one
NONE = -1  # no neuron, no row


# --- on disk --------------------------------------------------------------------------


def layer_files(layer: int, bundled: bool) -> tuple[str, ...]:
    """Names of a layer's files: one of pairs, or one of rows and one of columns."""
    stem = f"neurons_{layer:02d}"
    return (f"{stem}.bin",) if bundled else (f"{stem}_up.bin", f"{stem}_down.bin")


def write_neurons(model: ReluModel, folder: str | Path, bundled: bool) -> int:
    """Write the neurons of all layers. Returns the bytes written."""
    n_bytes = 0
    for layer, w in enumerate(model.layers):
        parts = [np.hstack([w.up, w.down])] if bundled else [w.up, w.down]
        for name, part in zip(layer_files(layer, bundled), parts, strict=True):
            n_bytes += write_stored(Path(folder) / name, part)
    return n_bytes


def write_stored(path: Path, values: np.ndarray) -> int:
    """Write an array's bytes and wait until the disk has them. Returns how many."""
    with new_file(path) as file:  # synced: only what is stored can leave the cache
        file.write(np.ascontiguousarray(values, np.float32).data)
    return values.size * 4


@dataclass
class ReadCounters:
    """What a reader did; counted where the reads are made."""

    reads: int = 0
    bytes_read: int = 0
    read_s: float = 0.0  # by the clock of the caller, who waits for all threads


class Reader:
    """Positioned reads of many pieces at once, shared by threads.

    bypass_page_cache: read past the system's cache, so that every read is the disk's.
    Raises: ConfigError if that is not possible here, ReadError.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        threads: int = THREADS,
        bypass_page_cache: bool = False,
    ) -> None:
        if threads < 1:
            raise ConfigError(f"threads={threads}: at least one thread must read")
        self.paths, self.threads = [Path(path) for path in paths], threads
        self.counters = ReadCounters()
        self._files: list[tuple[int, int]] = []  # descriptor, block
        self._pool = ThreadPoolExecutor(threads, "flashmoe-neurons")
        try:
            for path in self.paths:
                self._files.append(open_file(path, bypass_page_cache))
        except BaseException:
            self.close()
            raise
        if hasattr(os, "posix_fadvise"):
            for fd, _ in self._files:  # neurons are read at random: no read-ahead
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, file: int, offsets: np.ndarray, out: np.ndarray) -> None:
        """Read a piece for each row of `out`, which may be columns of a larger array.

        Shapes: offsets (n,) int, out (n, values), rows contiguous.
        Raises: ReadError if bytes are missing.
        """
        n_bytes = out.shape[1] * out.itemsize
        if len(offsets) == 0:
            return
        start = time.perf_counter()
        addresses = out.ctypes.data + np.arange(len(out)) * out.strides[0]
        n = min(self.threads, len(offsets))
        if n_bytes < LARGE_BYTES:
            n = min(n, -(-len(offsets) // SHARE))
        shares = [(file, offsets[i::n], addresses[i::n], n_bytes) for i in range(n)]
        done = list(self._pool.map(lambda share: self._read_share(*share, out), shares))
        self.counters.reads += sum(done)
        self.counters.bytes_read += sum(done) * n_bytes
        self.counters.read_s += time.perf_counter() - start

    def _read_share(
        self,
        file: int,
        offsets: np.ndarray,
        addresses: np.ndarray,
        n_bytes: int,
        out: np.ndarray,
    ) -> int:
        """One thread's pieces. Returns how many it read, which is all of them."""
        fd, block = self._files[file]
        aligned = not ((offsets | addresses) % block).any() and n_bytes % block == 0
        n_done = read_rows(fd, offsets, addresses, n_bytes) if aligned else 0
        for i in range(n_done, len(offsets)):
            row = (addresses[i] - out.ctypes.data) // out.strides[0]
            view = memoryview(out[row]).cast("B")
            try:
                if block == 1:
                    read_exactly(fd, [view], int(offsets[i]))
                else:
                    read_through_buffer(fd, [view], int(offsets[i]), block)
            except OSError as error:
                raise ReadError(
                    f"{self.paths[file]}: reading {n_bytes} bytes at {offsets[i]} "
                    f"failed ({error.strerror or error}); write the neurons again"
                ) from None
        return len(offsets)

    def read_range(self, file: int, offset: int, out: np.ndarray) -> None:
        """Fill a contiguous array from one place of a file, in large reads."""
        flat = out.reshape(-1)
        step = LARGE_BYTES // flat.itemsize
        n_whole = len(flat) // step
        whole = flat[: n_whole * step].reshape(n_whole, step)
        self.read(file, offset + np.arange(n_whole) * LARGE_BYTES, whole)
        rest = flat[n_whole * step :]
        if len(rest):
            at = np.array([offset + n_whole * LARGE_BYTES])
            self.read(file, at, rest[None])

    def evict(self) -> bool:
        """Drop the files from the system's cache; whether nothing of them is left."""
        left = [evict(fd) for fd, _ in self._files]  # of each file
        return all(share == 0 for share in left)

    def close(self) -> None:
        """Stop the threads and close the files."""
        self._pool.shutdown()
        while self._files:
            os.close(self._files.pop()[0])


def time_reads(path: Path, n: int, n_bytes: int, bypass_page_cache: bool) -> float:
    """Seconds for n reads of n_bytes at random places of a file, each place once.

    The median of ROUNDS rounds, all of them cold.
    """
    n_places = path.stat().st_size // n_bytes
    reader = Reader([path], bypass_page_cache=bypass_page_cache)
    times, out = [], allocate(n, n_bytes // 4)
    for seed in range(ROUNDS):
        places = np.random.default_rng(seed).permutation(n_places)[:n]
        reader.evict()
        before = reader.counters.read_s
        reader.read(0, places * n_bytes, out)
        times.append(reader.counters.read_s - before)
    reader.close()
    return float(np.median(times))


class NeuronReader:
    """Brings neurons of a model from disk: rows of 2D values, up first, then down."""

    def __init__(
        self,
        folder: str | Path,
        config: ReluConfig,
        bundled: bool,
        threads: int = THREADS,
        bypass_page_cache: bool = False,
    ) -> None:
        self.config, self.bundled = config, bundled
        self.n_files = 1 if bundled else 2
        layers = range(config.num_hidden_layers)
        names = [name for layer in layers for name in layer_files(layer, bundled)]
        paths = [Path(folder) / name for name in names]
        self.reader = Reader(paths, threads, bypass_page_cache)
        self.width = 2 * config.hidden_size // self.n_files  # values of a stored piece

    def neurons(self, layer: int, neurons: np.ndarray, out: np.ndarray) -> None:
        """Read some neurons: one read for each, or two. Shapes: (n,) -> out (n, 2D)."""
        offsets = neurons.astype(np.int64) * (4 * self.width)
        for part in range(self.n_files):
            columns = out[:, part * self.width : (part + 1) * self.width]
            self.reader.read(layer * self.n_files + part, offsets, columns)

    def tail(self, layer: int, first: int, out: Sequence[np.ndarray]) -> None:
        """Read all neurons from the first, in large reads.

        Shapes: out: one array (F - first, 2D) if bundled, else two (F - first, D).
        """
        for part, array in enumerate(out):
            offset = first * 4 * self.width
            self.reader.read_range(layer * self.n_files + part, offset, array)


# --- in memory ------------------------------------------------------------------------


def allocate(n_rows: int, width: int) -> np.ndarray:
    """Rows of float32 from a page's start, as reads past the cache want them."""
    if n_rows == 0:
        return np.empty((0, width), np.float32)
    return allocate_numpy((n_rows, width), np.dtype(np.float32))[0]


class Pool:
    """Neurons of a layer in one block that is allocated once, without holes.

    Rows 0..n-1 are in use, in no order. Deleting moves last rows into the holes;
    appending uses the rows after. Nothing else is ever copied.
    Raises: ConfigError if more rows are appended than fit.
    """

    def __init__(self, n_neurons: int, width: int, capacity: int | None = None) -> None:
        capacity = n_neurons if capacity is None else capacity
        self.block = allocate(capacity, width)
        self.neuron_of = np.full(capacity, NONE)  # row -> neuron
        self.row_of = np.full(n_neurons, NONE)  # neuron -> row
        self.n = 0

    @property
    def rows(self) -> np.ndarray:
        """What is in use. Shapes: (n, 2D)."""
        return self.block[: self.n]

    @property
    def neurons(self) -> np.ndarray:
        """Which neuron each row is. Shapes: (n,)."""
        return self.neuron_of[: self.n]

    def delete(self, neurons: np.ndarray) -> None:
        """Forget neurons that are in the pool. Costs as many moves, at most."""
        rows, n_left = self.row_of[neurons], self.n - len(neurons)
        self.neuron_of[rows] = NONE
        self.row_of[neurons] = NONE
        holes = rows[rows < n_left]
        last = np.arange(n_left, self.n)
        movers = last[self.neuron_of[last] != NONE]  # as many as holes
        self.block[holes] = self.block[movers]
        self.neuron_of[holes] = self.neuron_of[movers]
        self.row_of[self.neuron_of[holes]] = holes
        self.neuron_of[movers] = NONE
        self.n = n_left

    def append(self, neurons: np.ndarray) -> np.ndarray:
        """Make room for new neurons; returns their rows (n, 2D), to be filled."""
        first, last = self.n, self.n + len(neurons)
        if last > len(self.block):
            raise ConfigError(f"the pool has {len(self.block)} rows, not {last}")
        self.neuron_of[first:last] = neurons
        self.row_of[neurons] = np.arange(first, last)
        self.n = last
        return self.block[first:last]


class Rebuilt:
    """The same without a pool: memory is made anew for every change, and copied."""

    def __init__(self, n_neurons: int, width: int) -> None:
        self.rows = allocate(0, width)
        self.neurons = np.empty(0, np.int64)

    @property
    def n(self) -> int:
        """Rows in use."""
        return len(self.neurons)

    def delete(self, neurons: np.ndarray) -> None:
        """Copy what stays."""
        stays = ~np.isin(self.neurons, neurons)
        self.neurons = self.neurons[stays]
        rows = allocate(len(self.neurons), self.rows.shape[1])
        self.rows = np.compress(stays, self.rows, axis=0, out=rows)

    def append(self, neurons: np.ndarray) -> np.ndarray:
        """Copy all into larger memory; returns the new rows, to be filled."""
        n = len(self.neurons)
        rows = allocate(n + len(neurons), self.rows.shape[1])
        rows[:n] = self.rows
        self.rows, self.neurons = rows, np.concatenate([self.neurons, neurons])
        return rows[n:]
