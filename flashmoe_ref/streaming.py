"""Experts from disk into the engine's own memory, as the router picks them.

A slot bank holds some experts of a layer; a store knows which expert is in which slot,
reads missing ones with positioned reads straight into the slot (no copy in between),
and evicts by a policy. Resident experts are a bank with a slot for each. A predictor
may name experts to be read ahead, while a layer computes. *Taught in notebooks/07.*
**But:** one engine uses a store, from one thread at a time.

Rules that keep this exact, whatever the slots, policy and threads: a short read is an
error, never data; a slot whose read failed is forgotten; the caller computes from the
slots of a request before it makes the next request, because that may refill them, and a
read ahead spares them until then; no slot is read into twice at the same time; threads
only read bytes and never call an engine. An interrupt (Ctrl-C) may come between any two
of these steps: the next request makes good whatever it left half done.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Lock

import numpy as np

from .arrivals import Checks, bad_expert, changed_expert, checksum
from .caching import Caching
from .config import ModelConfig
from .errors import ConfigError, NumericError, ReadError
from .experts import ExpertFiles
from .headers import stamp
from .policies import LruSlots
from .ranges import is_whole
from .reading import open_file, read_exactly, read_through_buffer
from .recording import REQUEST, SILENT, WAIT
from .slots import MakeBank, SlotBank, kinds_of
from .tickets import Counters, Ticket

MAX_THREADS = 1024  # no disk gains by more reads at a time
INLINE_BYTES = 1 << 20  # fewer missing bytes are read at once: handing over costs more


class ExpertStore:
    """The experts of a model behind banks of slots.

    caching.slots=n:  every layer has n slots of its own.
    caching.budget=n: all layers share n slots; where experts are of several sizes, each
                      kind of layers has a share of them.
    neither:          all layers share K slots and nothing is kept from one layer to the
                      next; what caches is the operating system's page cache.
    Raises: ConfigError for settings that cannot work, ReadError.
    """

    def __init__(
        self,
        files: ExpertFiles,
        config: ModelConfig,
        make_bank: MakeBank = SlotBank,
        caching: Caching = Caching(),  # noqa: B008 (it is frozen)
        threads: int = 4,
        bypass_page_cache: bool = False,
        checks: Checks = Checks(),  # noqa: B008
    ) -> None:
        if not is_whole(threads, 1, MAX_THREADS):
            raise ConfigError(f"threads={threads} is outside 1..{MAX_THREADS}")
        self.files, self.caching, self.threads = files, caching, threads
        self.checks = checks  # of experts that were read
        self.n_layers, n_experts = config.num_hidden_layers, config.num_experts
        shape = (config.num_experts_per_tok, self.n_layers, n_experts)
        kinds = kinds_of(files.formats)
        self.capacity = caching.capacity(*shape, kinds)  # experts per request
        self.predictor = caching.predictor
        self.inline_bytes = INLINE_BYTES
        self.counters = Counters()
        self.is_resident = False  # whether expert e stays in slot e of its layer
        self.recorder = SILENT  # see trace.record
        self._banks = self._make_banks(make_bank, kinds)
        self._caches = caching.make_caches(*shape, kinds)  # by layer, perhaps the same
        step = n_experts if caching.is_shared else 0
        self._first_key = [layer * step for layer in range(self.n_layers)]
        # by layer: slot -> the read ahead that went into it, until it is used or gone
        shared: dict[int, dict[int, Future]] = {kind: {} for kind in kinds}
        self._ahead = [shared[kind] if step else {} for kind in kinds]
        self._last = Ticket([])  # the latest request
        self._changing: int | None = None  # a layer whose cache is being changed
        self._lock = Lock()  # of counters.read_s
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._fds: list[int] = []
        self._blocks: list[int] = []  # by file: what its reads must be aligned to
        self._stamps: list[tuple] = []  # by file
        self.is_closed = False
        try:
            self._open_files(bypass_page_cache)
            self._read_pinned(caching.pins(*shape[1:]))
        except BaseException:
            self.close()
            raise

    def _make_banks(self, make_bank: MakeBank, kinds: list[int]) -> list[SlotBank]:
        caching, formats = self.caching, self.files.formats
        if caching.slots is not None:
            return [make_bank(fmt, caching.slots) for fmt in formats]
        sizes = dict.fromkeys(kinds, self.capacity)
        if caching.is_shared:
            sizes = caching.shares(kinds)
        banks = {
            kind: make_bank(formats[kinds.index(kind)], n_slots)
            for kind, n_slots in sizes.items()
        }
        return [banks[kind] for kind in kinds]

    def _open_files(self, bypass_page_cache: bool) -> None:
        for path in self.files.files:
            fd, block = open_file(path, bypass_page_cache)
            self._fds.append(fd)
            self._blocks.append(block)
            self._stamps.append(stamp(fd, path))

    def check_unchanged(self) -> None:
        """Raises: ReadError if somebody wrote to a file since it was opened.

        One that was replaced or removed is fine: the old one stays until it is closed.
        """
        self._check_open()
        for path, fd, before in zip(
            self.files.files, self._fds, self._stamps, strict=True
        ):
            if stamp(fd, path) != before:
                raise ReadError(
                    f"{path}: was changed while the model had it open; load the model "
                    f"again, and check it with 'flashmoe verify'"
                )

    def _check_open(self) -> None:
        if self.is_closed:
            raise ReadError("this model is closed: load it again")

    def _read_pinned(self, pinned: np.ndarray) -> None:
        for layer, row in enumerate(pinned):
            first, cache = self._first_key[layer], self._caches[layer]
            jobs = [(e, cache.slot_of(first + e)) for e in np.flatnonzero(row).tolist()]
            if jobs:
                self._read_all(layer, jobs)
        self.counters = Counters()

    @property
    def n_bytes(self) -> int:
        """Bytes of all banks together."""
        return sum(bank.n_bytes for bank in {id(b): b for b in self._banks}.values())

    def bank(self, layer: int) -> SlotBank:
        """The bank that a layer's experts are read into."""
        return self._banks[layer]

    # --- requests ---------------------------------------------------------------------

    def request(self, layer: int, experts: Sequence[int]) -> Ticket:
        """Start to bring experts into slots; at most `capacity` distinct ones.

        The ticket's slots are in the order of experts. Small reads are done at once,
        larger ones by the threads while the caller computes something else.
        """
        self._begin(layer)
        ticket = self._request(layer, experts)
        self._changing = None
        return ticket

    def _begin(self, layer: int) -> None:
        """Note that a layer's cache is about to change; make good an interrupt."""
        if self._last._futures:  # it came before the caller had waited
            self._give_up(self._last, self._last._keys)
        if self._changing is not None:  # it came while a cache was being changed
            self._end_reads()
            self.is_resident = False
            self._caches[self._changing].clear()
            self._ahead[self._changing].clear()
        self._changing = layer

    def _request(self, layer: int, experts: Sequence[int]) -> Ticket:
        cache, first = self._caches[layer], self._first_key[layer]
        if not self.caching.keeps:
            cache = LruSlots(self.capacity)
        keys = [first + e for e in experts] if first else experts
        slots, missing = cache.assign(keys)
        counters, recorder = self.counters, self.recorder
        self._last = ticket = Ticket(slots, [], [], cache, counters, recorder)
        if self._ahead[layer]:
            self._meet_reads_ahead(layer, keys, missing, ticket)
        wanted = [key - first for key in missing] if first else missing
        recorder.requested(experts, wanted)
        counters.hits += len(experts) - len(wanted)
        if not wanted:
            recorder.lap(REQUEST)
            return ticket
        counters.misses += len(wanted)
        jobs = [(key - first, cache.slots[key]) for key in missing]
        if self._count_reads(layer, jobs) <= self.inline_bytes:
            recorder.lap(REQUEST)
            self._read_now(layer, jobs, missing, ticket)
            recorder.lap(WAIT)
            return ticket
        ticket._keys += missing
        ticket._futures += dict.fromkeys(self._submit("read", layer, jobs).values())
        recorder.lap(REQUEST)
        return ticket

    def _meet_reads_ahead(
        self, layer: int, keys: Sequence[int], missing: list[int], ticket: Ticket
    ) -> None:
        """What was read ahead into the slots of a request: use it, or let it end."""
        ahead, absent = self._ahead[layer], set(missing)
        for key, slot in zip(keys, ticket.slots, strict=True):
            future = ahead.get(slot)
            if future is None:
                continue
            if key in absent:  # another expert was on its way into this slot
                self._let_end([future])
            else:
                self.counters.prefetch_hits += 1
                ticket._keys.append(key)
                if future not in ticket._futures:
                    ticket._futures.append(future)
            del ahead[slot]

    def _give_up(self, ticket: Ticket, keys: Sequence[int]) -> None:
        """Forget what may not have been read; nothing may write into it any more."""
        wait(ticket._futures)
        ticket._cache.forget(keys)
        ticket._futures = []

    def _let_end(self, futures: Sequence[Future]) -> None:
        """Wait until reads are over, whatever came of them."""
        if all(future.done() for future in futures):
            return
        self.recorder.lap(REQUEST)
        start = time.perf_counter()
        wait(futures)
        self.counters.wait_s += time.perf_counter() - start
        self.recorder.lap(WAIT)

    def prefetch(
        self, layer: int, experts: Sequence[int], scores: np.ndarray | None = None
    ) -> None:
        """Let threads read what the next layer may need, while this one computes.

        To be called after the request of a decoded token, with its experts; scores
        (E,) of `NumpyModel.scores_ahead` if the predictor wants them. Never overwrites
        a slot of that request. Demanded reads do not queue behind these: the threads
        are others.
        """
        after = (layer + 1) % self.n_layers
        cache, ahead, first = self._caches[after], self._ahead[after], self._first_key
        named = self.predictor.after(layer, experts, scores)
        keep = [first[layer] + e for e in experts] if self.caching.is_shared else ()
        self._changing = after
        keys, slots = cache.prefetch([first[after] + e for e in named], keep)
        # what was read ahead into these slots was never used, and is gone now
        self._let_end([ahead[slot] for slot in slots if slot in ahead])
        jobs = [(k - first[after], s) for k, s in zip(keys, slots, strict=True)]
        if jobs:
            ahead.update(self._submit("ahead", after, jobs))
        self._changing = None
        self.counters.prefetched += len(jobs)
        self._count_reads(after, jobs)
        self.recorder.lap(REQUEST)

    def _count_reads(self, layer: int, jobs: Sequence) -> int:
        """Count reads that are about to be done; returns their bytes."""
        n_bytes = len(jobs) * self.files.formats[layer].n_bytes
        self.counters.reads += len(jobs) * len(self.files.runs[layer])
        self.counters.bytes_read += n_bytes
        return n_bytes

    def _submit(
        self, name: str, layer: int, jobs: list[tuple[int, int]]
    ) -> dict[int, Future]:
        """Share reads among the threads of that name. Returns each slot's read."""
        if name not in self._pools:
            self._pools[name] = ThreadPoolExecutor(self.threads, f"flashmoe-{name}")
        n_shares = min(self.threads, len(jobs))
        if len(jobs) * self.files.formats[layer].n_bytes <= self.inline_bytes:
            n_shares = 1
        reads = {}
        for i in range(n_shares):
            share = jobs[i::n_shares]
            future = self._pools[name].submit(self._read_all, layer, share)
            reads |= {slot: future for _, slot in share}
        return reads

    def _read_now(
        self, layer: int, jobs: list[tuple[int, int]], missing: list, ticket: Ticket
    ) -> None:
        try:
            self.counters.wait_s += self._read_all(layer, jobs)
        except (ReadError, NumericError):
            self._give_up(ticket, [*missing, *ticket._keys])
            self._changing = None
            raise

    def _read_all(self, layer: int, jobs: list[tuple[int, int]]) -> float:
        """Read some experts into their slots, and check them; returns the seconds."""
        clock, start, bank = [], time.perf_counter(), self._banks[layer]
        for first in range(0, len(jobs), bank.n_at_once):
            some = jobs[first : first + bank.n_at_once]
            for expert, slot in some:
                self._read(layer, expert, bank.views[slot])
                clock.append(time.perf_counter())
            self._check(layer, some)
            for _, slot in some:
                bank.arrived(slot)
            clock[-1] = time.perf_counter()
        self.recorder.read(layer, jobs, start, clock)
        with self._lock:
            self.counters.read_s += clock[-1] - start
        return clock[-1] - start

    def _read(self, layer: int, expert: int, views: list[memoryview]) -> None:
        bank = self._banks[layer]
        for run in self.files.runs[layer]:
            self._check_open()  # whoever closes waits for one read, not for all
            file, offset = run.places[expert]
            filled, block = views[run.first : run.last], self._blocks[file]
            try:
                if block == 1 or bank.is_aligned(run, offset, block):
                    read_exactly(self._fds[file], filled, offset)
                else:
                    read_through_buffer(self._fds[file], filled, offset, block)
            except OSError as error:
                raise ReadError(
                    f"{self.files.files[file]}: reading expert {expert} of layer "
                    f"{layer} failed ({error.strerror or error}); was the file "
                    f"changed? check it with 'flashmoe verify'"
                ) from None

    def _check(self, layer: int, jobs: list[tuple[int, int]]) -> None:
        """Raises: ReadError for other bytes than were packed, NumericError for NaN."""
        bank, checks = self._banks[layer], self.checks
        if checks.checksums is not None:
            for expert, slot in jobs:
                if checksum(bank.views[slot]) != checks.checksums[layer][expert]:
                    raise changed_expert(self.files, layer, expert)
        if checks.find_bad is not None:
            found = bank.find_bad(checks.find_bad, [slot for _, slot in jobs])
            if found is not None:
                position, part = found
                raise bad_expert(self.files, layer, jobs[position][0], part)

    @property
    def copies(self) -> bool:
        """Whether some reads need a buffer, because they are not aligned."""
        return not all(
            bank.is_aligned(run, offset, self._blocks[file])
            for bank, runs in zip(self._banks, self.files.runs, strict=True)
            for run in runs
            for file, offset in run.places
        )

    def fill(self) -> None:
        """Read every expert of every layer: makes a store with E slots resident."""
        n_experts = self.files.n_experts
        for layer in range(self.n_layers):
            for first in range(0, n_experts, self.capacity):
                last = min(first + self.capacity, n_experts)
                self.request(layer, range(first, last)).wait()
        by_number = {expert: expert for expert in range(n_experts)}
        self.is_resident = all(cache.slots == by_number for cache in self._caches)
        self.counters = Counters()

    def _end_reads(self) -> None:
        """Wait until no thread reads any more."""
        for pool in self._pools.values():
            pool.shutdown()
        self._pools = {}

    def close(self) -> None:
        """Stop the threads and close the files. The store cannot be used afterwards."""
        self.is_closed = True
        self._end_reads()
        while self._fds:
            os.close(self._fds.pop())
