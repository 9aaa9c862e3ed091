"""Which expert goes when a slot is needed: replacement policies, each a short class.

These classes are the specification, and what the live cache of `streaming.py` uses;
`simulator.py` gives the same hits for a whole trace, compiled. A request is what one
layer call needs together (a token's K experts, or a wave of a prompt's): all of them
are in slots when the layer computes, so none may be evicted for another of the request.
**But:** experts are all of one size, and a policy sees nothing but requests.
*Taught in notebooks/08.*
"""

from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Hashable, Iterable, Sequence

import numpy as np

Key = Hashable  # an expert's number, or (layer, number) where layers share slots
HALF_LIFE = 128  # requests after which a use counts half, for LFU
RESCALE = 512  # doublings after which LFU's float64 scores are brought down again


class Slots(ABC):
    """Which expert is in which slot. A policy says how it hears of uses, and who goes.

    pinned: keys that have a slot of their own from the start and are never evicted.
    """

    def __init__(self, n_slots: int, pinned: Iterable[Key] = ()) -> None:
        self.pinned = {key: n_slots - 1 - i for i, key in enumerate(pinned)}
        self.n_slots = n_slots
        self.clear()

    def clear(self) -> None:
        """Forget all keys but the pinned, and free their slots."""
        self.slots: OrderedDict[Key, int] = OrderedDict()  # in order of arrival
        self.free = list(range(self.n_slots - len(self.pinned) - 1, -1, -1))

    def used(self, keys: Sequence[Key]) -> None:  # noqa: B027 (FIFO does not care)
        """Keys were requested and are in slots; in the order of the request."""

    def added(self, key: Key) -> None:  # noqa: B027 (FIFO does not care)
        """A key was given a slot."""

    @abstractmethod
    def victim(self, needed: Collection[Key]) -> Key:
        """The key in a slot, not among the needed ones, that has to go."""

    def assign(self, keys: Sequence[Key]) -> tuple[list[int], list[Key]]:
        """Give every key of a request a slot: distinct keys, at most n_slots.

        Returns the slots in the order of keys, and the keys to be read.
        """
        slots, missing = self.slots, []
        present = [key for key in keys if key in slots]
        self.used(present)  # first those that are here
        if len(present) < len(keys):
            pinned = self.pinned
            missing = [k for k in keys if k not in slots and k not in pinned]
            self._add(missing, keys)
        if self.pinned:
            return [self.slot_of(key) for key in keys], missing
        return [slots[key] for key in keys], missing

    def prefetch(
        self, keys: Sequence[Key], keep: Sequence[Key] = ()
    ) -> tuple[list[int], list[Key]]:
        """Slots for keys that may be requested soon; the same rules, but for one.

        A key that is here already does not count as used. `keep` are more keys that
        must stay. Returns the keys to be read, and their slots.
        """
        missing = [k for k in keys if k not in self.slots and k not in self.pinned]
        self._add(missing, [*keys, *keep])
        return missing, [self.slots[key] for key in missing]

    def _add(self, missing: Sequence[Key], needed: Collection[Key]) -> None:
        if len(missing) > len(self.free):
            needed = set(needed)
        for key in missing:
            free = self.free.pop() if self.free else None
            slot = self.slots.pop(self.victim(needed)) if free is None else free
            self.slots[key] = slot
            self.added(key)

    def slot_of(self, key: Key) -> int:
        """The slot that a key has. Raises: KeyError where it has none."""
        slot = self.slots.get(key)
        return self.pinned[key] if slot is None else slot

    def forget(self, keys: Iterable[Key]) -> None:
        """Free the slots of keys whose bytes cannot be trusted."""
        for key in keys:
            slot = self.slots.pop(key, None)
            if slot is not None:
                self.free.append(slot)


class FifoSlots(Slots):
    """First in, first out: uses do not count."""

    def victim(self, needed: Collection[Key]) -> Key:
        """The key that has been here longest."""
        return next(key for key in self.slots if key not in needed)


class LruSlots(Slots):
    """Least recently used goes first."""

    def used(self, keys: Sequence[Key]) -> None:
        """They move to the end of the row."""
        for key in keys:
            self.slots.move_to_end(key)

    def victim(self, needed: Collection[Key]) -> Key:
        """The key at the front of the row."""
        return next(key for key in self.slots if key not in needed)


class ClockSlots(Slots):
    """Second chance: a hand goes round the slots and spares once what was used.

    A slot's mark is set when its key is used again, and not by its arrival. Slots of
    needed keys are passed over and keep their mark.
    """

    def __init__(self, n_slots: int, pinned: Iterable[Key] = ()) -> None:
        super().__init__(n_slots, pinned)
        self.key_in: list[Key] = [None] * len(self.free)
        self.marked = [False] * len(self.free)
        self.hand = 0

    def used(self, keys: Sequence[Key]) -> None:
        """They get a second chance."""
        for key in keys:
            self.marked[self.slots[key]] = True

    def added(self, key: Key) -> None:
        """It has none yet."""
        slot = self.slots[key]
        self.key_in[slot], self.marked[slot] = key, False

    def victim(self, needed: Collection[Key]) -> Key:
        """The first key without a mark; marks on the way are taken away."""
        while True:
            slot = self.hand
            self.hand = (slot + 1) % len(self.key_in)
            if self.key_in[slot] in needed:
                continue
            if not self.marked[slot]:
                return self.key_in[slot]
            self.marked[slot] = False


class LfuSlots(Slots):
    """Least frequently used goes first, among equals the least recently used.

    Uses are remembered beyond eviction, and age: one counts half after `half_life`
    requests. Instead of halving all scores then, what a use adds is doubled, which
    gives the same order.
    """

    def __init__(
        self, n_slots: int, pinned: Iterable[Key] = (), half_life: int = HALF_LIFE
    ) -> None:
        super().__init__(n_slots, pinned)
        self.half_life = half_life
        self.n_requests = 0
        self.score: dict[Key, float] = defaultdict(float)
        self.worth = 1.0  # of a use now
        self.n_uses = 0
        self.key_in: list[Key] = [None] * len(self.free)
        self.score_in = np.zeros(len(self.free))  # by slot
        self.last_use = np.zeros(len(self.free), np.int64)

    def assign(self, keys: Sequence[Key]) -> tuple[list[int], list[Key]]:
        """As every policy; counts requests, which is the time that ages."""
        result = super().assign(keys)
        self.n_requests += 1
        if self.n_requests % self.half_life == 0:
            self._double_worth()
        return result

    def _double_worth(self) -> None:
        self.worth *= 2
        if self.worth == 2.0**RESCALE:  # far from overflow; nothing is rounded
            self.worth = 1.0
            self.score_in *= 2.0**-RESCALE
            for key in self.score:
                self.score[key] *= 2.0**-RESCALE

    def used(self, keys: Sequence[Key]) -> None:
        """Their scores grow."""
        for key in keys:
            slot = self.slots[key]
            self.score[key] += self.worth
            self.score_in[slot] = self.score[key]
            self.n_uses += 1
            self.last_use[slot] = self.n_uses

    def added(self, key: Key) -> None:
        """That is a use, too; what it had before its eviction is not lost."""
        self.key_in[self.slots[key]] = key
        self.used([key])

    def victim(self, needed: Collection[Key]) -> Key:
        """The key of least score."""
        score = self.score_in.copy()
        score[[self.slots[key] for key in needed if key in self.slots]] = np.inf
        least = np.flatnonzero(score == score.min())
        return self.key_in[least[np.argmin(self.last_use[least])]]


class BeladySlots(Slots):
    """The optimum, which knows the future: what is needed again last goes first.

    requests: all that will be assigned, in order. Among keys never needed again the
    lowest goes. No policy has fewer misses, since every request must be in slots.
    Source: L. Belady, IBM Systems Journal 5 (1966).
    """

    def __init__(
        self,
        n_slots: int,
        pinned: Iterable[Key] = (),
        requests: Iterable[Sequence[Key]] = (),
    ) -> None:
        super().__init__(n_slots, pinned)
        self.coming: dict[Key, deque[float]] = defaultdict(deque)
        for time, keys in enumerate(requests):
            for key in keys:
                self.coming[key].append(time)

    def used(self, keys: Sequence[Key]) -> None:
        """Their next uses are now other ones."""
        for key in keys:
            self.coming[key].popleft()

    def added(self, key: Key) -> None:
        """This is its first use that was to come."""
        self.used([key])

    def next_use(self, key: Key) -> float:
        """Number of the request that needs a key next."""
        return self.coming[key][0] if self.coming[key] else np.inf

    def victim(self, needed: Collection[Key]) -> Key:
        """The key whose next use is farthest away."""
        others = sorted(key for key in self.slots if key not in needed)
        return max(others, key=self.next_use)  # the first of the farthest


LIVE_POLICIES = {
    "lru": LruSlots,
    "lfu": LfuSlots,
    "fifo": FifoSlots,
    "clock": ClockSlots,
}
POLICIES = LIVE_POLICIES | {"belady": BeladySlots}


def make_slots(
    policy: str,
    n_slots: int,
    pinned: Iterable[Key] = (),
    half_life: int = HALF_LIFE,
    requests: Iterable[Sequence[Key]] = (),
) -> Slots:
    """Slots under a policy, by its name. requests: all that will come, for "belady"."""
    if policy == "lfu":
        return LfuSlots(n_slots, pinned, half_life)
    if policy == "belady":
        return BeladySlots(n_slots, pinned, requests)
    return POLICIES[policy](n_slots, pinned)


def most_frequent(counts: np.ndarray, n: int, shared: bool = False) -> np.ndarray:
    """The n most requested experts of each layer, or with shared=True of the model.

    Shapes: counts (L, E) -> (L, E) bool. Among equals the lower layer and id.
    """
    rows = counts.reshape(1, -1) if shared else counts
    best = np.argsort(-rows, axis=1, kind="stable")[:, : max(n, 0)]
    result = np.zeros(rows.shape, bool)
    np.put_along_axis(result, best, True, axis=1)
    return result.reshape(counts.shape)


class PageCache:
    """Second chance by pages, much as an operating system caches a file.

    A record's pages are touched in ascending order, each a use of its own: the system
    knows nothing of requests, so a record may evict itself. Records that share a page
    load it once. A record can be partly here.
    **But:** real systems read ahead, and keep two lists instead of a clock.
    """

    def __init__(self, n_pages: int) -> None:
        self.clock = ClockSlots(n_pages)

    def read(self, pages: Iterable[int]) -> int:
        """Touch a record's pages, in order. Returns how many came from disk."""
        return sum(len(self.clock.assign([page])[1]) for page in pages)
