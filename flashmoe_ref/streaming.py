"""Experts from disk into the engine's own memory, as the router picks them.

A slot bank holds some experts of a layer; a store knows which expert is in which slot,
reads missing ones with positioned reads straight into the slot (no copy in between),
and evicts the least recently used. Resident experts are a bank with a slot for each.
**But:** one replacement policy, no prefetch. *Taught in notebooks/07.*

Rules that keep this exact, whatever the slots and threads: a short read is an error,
never data; a slot whose read failed is forgotten; the caller computes from the slots of
a request before it makes the next request to the same bank, because that may refill
them; threads only read bytes and never call an engine.
"""

import mmap
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from .config import ModelConfig
from .errors import ConfigError, ReadError
from .experts import ExpertFiles, ExpertFormat
from .quantize import QuantizedMatrix
from .recording import REQUEST, SILENT, WAIT, Silent

MAX_READ_BYTES = 1 << 30  # one preadv of more than 2 GB fails on macOS
INLINE_BYTES = 1 << 20  # fewer missing bytes are read at once: handing over costs more

# Returns an array of the engine, and the same memory as writable bytes (slots, n).
Allocate = Callable[[tuple[int, ...], np.dtype], tuple[object, np.ndarray]]


def allocate_numpy(shape: tuple[int, ...], dtype: np.dtype) -> tuple:
    """Page-aligned zeroed memory as a NumPy array, and the same bytes by slot."""
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    buffer = np.frombuffer(mmap.mmap(-1, max(n_bytes, 1)), np.uint8, n_bytes)
    return buffer.view(dtype).reshape(shape), buffer.reshape(shape[0], -1)


class SlotBank:
    """Memory for n_slots experts of one format, in arrays of the engine."""

    def __init__(self, fmt: ExpertFormat, n_slots: int, allocate: Allocate) -> None:
        self.format = fmt
        self.n_slots = n_slots
        self.arrays: dict[str, object] = {}  # part name -> (slots, *part shape)
        views = []
        for part in fmt.parts:
            array, as_bytes = allocate((n_slots, *part.shape), part.dtype)
            self.arrays[part.name] = array
            views.append(as_bytes)
        # [slot][part]: made once, a memoryview costs more than a small read
        self.views = [[memoryview(v[slot]) for v in views] for slot in range(n_slots)]

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole bank."""
        return self.n_slots * self.format.n_bytes

    def matrix(self, projection: str) -> np.ndarray | QuantizedMatrix:
        """A projection of all slots. Shapes: (slots, out, in), perhaps quantized."""
        return self.format.matrix(self.arrays, projection)


class LruSlots:
    """Which expert is in which slot of a bank; evicts the least recently used."""

    def __init__(self, n_slots: int) -> None:
        self.slots: OrderedDict[int, int] = (
            OrderedDict()
        )  # expert -> slot, oldest first
        self.free = list(range(n_slots - 1, -1, -1))

    def assign(self, experts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Give every expert a slot; at most n_slots distinct experts.

        Returns the slots in the order of experts, and the experts to be read.
        """
        missing = []
        for expert in experts:  # first keep what is here from being evicted
            if expert in self.slots:
                self.slots.move_to_end(expert)
            else:
                missing.append(expert)
        for expert in missing:
            slot = self.free.pop() if self.free else self.slots.popitem(last=False)[1]
            self.slots[expert] = slot
        return [self.slots[expert] for expert in experts], missing

    def forget(self, experts: Sequence[int]) -> None:
        """Free the slots of experts whose bytes cannot be trusted."""
        for expert in experts:
            slot = self.slots.pop(expert, None)
            if slot is not None:
                self.free.append(slot)


@dataclass
class Counters:
    """What a store did. Times in seconds, summed over threads for read_s."""

    hits: int = 0  # experts found in a slot
    misses: int = 0  # experts read
    reads: int = 0  # positioned reads issued
    bytes_read: int = 0
    read_s: float = 0.0  # spent inside reads, all threads together
    wait_s: float = 0.0  # the computing thread stood still for reads


@dataclass
class Ticket:
    """A request under way. Call wait() before computing from the slots."""

    slots: list[int]
    _missing: list[int] = field(default_factory=list)
    _futures: list[Future] = field(default_factory=list)
    _cache: LruSlots | None = None
    _counters: Counters | None = None
    _recorder: Silent = SILENT

    def wait(self) -> list[int]:
        """Block until all experts are in their slots; returns the slots.

        Raises: ReadError; then the slots of this request are forgotten.
        """
        if not self._futures:
            return self.slots
        start = time.perf_counter()
        try:
            wait(self._futures)  # all of them: none may still write after an error
            for future in self._futures:
                self._counters.read_s += future.result()
        except BaseException:
            wait(self._futures)
            self._cache.forget(self._missing)
            raise
        finally:
            self._futures = []
            self._counters.wait_s += time.perf_counter() - start
            self._recorder.lap(WAIT)
        return self.slots


class ExpertStore:
    """The experts of a model behind banks of slots.

    slots=n: every layer has n slots of its own, the least recently used is evicted.
    slots=None: all layers share K slots and nothing is kept from one layer to the next;
    what caches is the operating system's page cache.
    Raises: ConfigError for slots outside K..E or fewer than one thread.
    """

    def __init__(
        self,
        files: ExpertFiles,
        config: ModelConfig,
        allocate: Allocate = allocate_numpy,
        slots: int | None = None,
        threads: int = 4,
    ) -> None:
        k, n_experts = config.num_experts_per_tok, config.num_experts
        if slots is not None and not k <= slots <= n_experts:
            raise ConfigError(
                f"slots={slots} is outside {k}..{n_experts}: a layer needs a slot for "
                f"each of the {k} experts of a token, and has {n_experts} experts"
            )
        if threads < 1:
            raise ConfigError(f"threads={threads}: at least one thread must read")
        self.files = files
        self.slots = slots
        self.threads = threads
        self.inline_bytes = INLINE_BYTES
        self.n_layers = config.num_hidden_layers
        self.capacity = k if slots is None else slots  # experts per request
        self.counters = Counters()
        self.recorder = SILENT  # see trace.record
        self._banks = self._make_banks(allocate)
        n_caches = 1 if slots is None else self.n_layers
        self._caches = [LruSlots(self.capacity) for _ in range(n_caches)]
        self._pool: ThreadPoolExecutor | None = None
        self._fds: list[int] = []
        self._open_files()

    def _make_banks(self, allocate: Allocate) -> list[SlotBank]:
        """One bank a layer; a shared one for each format where slots is None."""
        if self.slots is not None:
            return [SlotBank(f, self.slots, allocate) for f in self.files.formats]
        shared: dict[tuple, SlotBank] = {}
        banks = []
        for fmt in self.files.formats:
            if fmt.parts not in shared:
                shared[fmt.parts] = SlotBank(fmt, self.capacity, allocate)
            banks.append(shared[fmt.parts])
        return banks

    def _open_files(self) -> None:
        for path in self.files.files:
            try:
                self._fds.append(os.open(path, os.O_RDONLY))
            except OSError as error:
                self.close()
                raise ReadError(
                    f"{path}: cannot be opened ({error.strerror})"
                ) from None

    @property
    def n_bytes(self) -> int:
        """Bytes of all banks together."""
        return sum(bank.n_bytes for bank in {id(b): b for b in self._banks}.values())

    def bank(self, layer: int) -> SlotBank:
        """The bank that a layer's experts are read into."""
        return self._banks[layer]

    def request(self, layer: int, experts: Sequence[int]) -> Ticket:
        """Start to bring experts into slots; at most `capacity` distinct ones.

        The ticket's slots are in the order of experts. Small reads are done at once,
        larger ones by the threads while the caller computes something else.
        """
        if self.slots is None:
            self._caches[0] = LruSlots(self.capacity)
        cache = self._caches[0 if self.slots is None else layer]
        slots, missing = cache.assign(experts)
        counters, recorder = self.counters, self.recorder
        recorder.requested(experts, missing)
        counters.hits += len(experts) - len(missing)
        if not missing:
            recorder.lap(REQUEST)
            return Ticket(slots)
        fmt, n_runs = self.files.formats[layer], len(self.files.runs[layer])
        n_bytes = len(missing) * fmt.n_bytes
        counters.misses += len(missing)
        counters.reads += len(missing) * n_runs
        counters.bytes_read += n_bytes
        jobs = [(expert, cache.slots[expert]) for expert in missing]
        if n_bytes <= self.inline_bytes:
            recorder.lap(REQUEST)
            self._read_now(layer, jobs, cache, missing)
            recorder.lap(WAIT)
            return Ticket(slots)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, "flashmoe-read")
        shares = [jobs[i :: self.threads] for i in range(min(self.threads, len(jobs)))]
        futures = [self._pool.submit(self._read_all, layer, share) for share in shares]
        recorder.lap(REQUEST)
        return Ticket(slots, missing, futures, cache, counters, recorder)

    def _read_now(
        self, layer: int, jobs: list[tuple[int, int]], cache: LruSlots, missing: list
    ) -> None:
        try:
            seconds = self._read_all(layer, jobs)
        except BaseException:
            cache.forget(missing)
            raise
        self.counters.read_s += seconds
        self.counters.wait_s += seconds

    def _read_all(self, layer: int, jobs: list[tuple[int, int]]) -> float:
        """Read some experts into their slots; returns the seconds it took."""
        clock, start = [], time.perf_counter()
        for expert, slot in jobs:
            views = self._banks[layer].views[slot]
            for run in self.files.runs[layer]:
                file, offset = run.places[expert]
                try:
                    read_exactly(self._fds[file], views[run.first : run.last], offset)
                except OSError as error:
                    raise ReadError(
                        f"{self.files.files[file]}: reading expert {expert} of layer "
                        f"{layer} failed ({error.strerror or error}); was the file "
                        f"changed? check it with 'flashmoe verify'"
                    ) from None
            clock.append(time.perf_counter())
        self.recorder.read(layer, jobs, start, clock)
        return clock[-1] - start

    def fill(self) -> None:
        """Read every expert of every layer: makes a store with E slots resident."""
        n_experts = self.files.n_experts
        for layer in range(self.n_layers):
            for first in range(0, n_experts, self.capacity):
                last = min(first + self.capacity, n_experts)
                self.request(layer, range(first, last)).wait()
        self.counters = Counters()

    def close(self) -> None:
        """Stop the threads and close the files. The store cannot be used afterwards."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        while self._fds:
            os.close(self._fds.pop())


def read_exactly(fd: int, views: Sequence[memoryview], offset: int) -> None:
    """Fill the views with the bytes at offset, one after the other.

    Python repeats a read that a signal interrupts; a short one is continued here.
    Raises: OSError, also where the file ends before the views are full.
    """
    n_wanted = sum(len(view) for view in views)
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
