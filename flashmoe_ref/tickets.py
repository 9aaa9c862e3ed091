"""What a request for experts promises its caller, and what a store counts of it.

**But:** no reads here; `streaming.py` makes the tickets. *Taught in notebooks/07.*
"""

import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from .policies import Slots
from .recording import SILENT, WAIT, Silent


@dataclass
class Counters:
    """What a store did. Times in seconds, summed over threads for read_s."""

    hits: int = 0  # experts found in a slot, or on their way into one
    misses: int = 0  # experts read because they were needed
    prefetched: int = 0  # experts read ahead
    prefetch_hits: int = 0  # of those, used before they were evicted
    routed: int = 0  # tokens times layers whose routing was cut: see routing_cut.py
    picked: int = 0  # experts that these kept
    reads: int = 0  # positioned reads issued
    bytes_read: int = 0
    read_s: float = 0.0  # spent inside reads, all threads together
    wait_s: float = 0.0  # the computing thread stood still for reads


@dataclass
class Ticket:
    """A request under way. Call wait() before computing from the slots."""

    slots: list[int]
    _keys: list[int] = field(default_factory=list)  # that are still being read
    _futures: list[Future] = field(default_factory=list)
    _cache: Slots | None = None
    _counters: Counters | None = None
    _recorder: Silent = SILENT

    def wait(self) -> list[int]:
        """Block until all experts are in their slots; returns the slots.

        Raises: ReadError; then the slots of this request are forgotten.
        """
        if not self._futures:
            return self.slots
        start = time.perf_counter()
        wait(self._futures)  # all of them: none may still write after an error
        self._counters.wait_s += time.perf_counter() - start
        self._recorder.lap(WAIT)
        try:
            for future in self._futures:
                future.result()
        except Exception:
            self._cache.forget(self._keys)
            self._futures = []
            raise
        self._futures = []  # NOTE: an interrupt leaves them for the next request
        return self.slots
