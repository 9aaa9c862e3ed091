"""The loops of `simulator.py`, compiled: the classes of `policies.py`, but fast.

Four policies differ only in what they rank keys by, so they share a heap with the
lowest first; an entry that is out of date stays in it until it comes up. The clock and
the page cache go round in arrays. **But:** one cache at a time; keys are numbers.
*Taught in notebooks/08.*

NOTE: kernels here call none outside this file, so Numba's own check of the file's date
is enough, and the file need not be among `compiled.KERNEL_FILES`.
"""

from heapq import heapify, heappop, heappush, heapreplace
from typing import NamedTuple

import numpy as np

from .compiled import compiled

LRU, FIFO, LFU, BELADY, CLOCK = range(5)
MISS, HIT, PREFETCHED = range(3)  # PREFETCHED: a hit, the first since a prefetch
RESCALE = 512  # doublings, as in policies.py


class State(NamedTuple):
    """A cache while it runs: by key unless said otherwise."""

    slot_of: np.ndarray  # -1 for a key that is not here
    fresh: np.ndarray  # bool: prefetched and not used since
    needed: np.ndarray  # the last request that needs it
    rank: np.ndarray  # (keys, 2): the lowest goes first
    score: np.ndarray  # LFU's
    time: np.ndarray  # (1,): uses so far
    heap: list  # (rank, rank, key), also entries that are out of date
    key_in: np.ndarray  # by slot
    marked: np.ndarray  # by slot, the clock's
    hand: np.ndarray  # (1,): the clock's


@compiled
def _new_state(n_keys, n_slots):
    heap = [(0.0, 0.0, 0)]
    heap.clear()  # now its type is known
    return State(
        np.full(n_keys, -1),
        np.zeros(n_keys, np.bool_),
        np.full(n_keys, -1),
        np.zeros((n_keys, 2)),
        np.zeros(n_keys),
        np.zeros(1),
        heap,
        np.zeros(n_slots, np.int64),
        np.zeros(n_slots, np.bool_),
        np.zeros(1, np.int64),
    )


@compiled
def names_twice(keys, starts, n_keys):
    """Whether a request names a key twice."""
    needed = np.full(n_keys, -1)
    for r in range(starts.size - 1):
        for key in keys[starts[r] : starts[r + 1]]:
            if needed[key] == r:
                return True
            needed[key] = r
    return False


@compiled
def next_requests(keys, starts, n_keys):
    """For each access, the number of the next request that needs its key, or inf."""
    coming, result = np.full(n_keys, np.inf), np.empty(keys.size)
    for r in range(starts.size - 2, -1, -1):
        for i in range(starts[r], starts[r + 1]):
            result[i] = coming[keys[i]]
            coming[keys[i]] = r
    return result


@compiled
def _is_current(s, entry):
    a, b, key = entry
    return s.slot_of[key] >= 0 and a == s.rank[key, 0] and b == s.rank[key, 1]


@compiled
def _rebuild(s):
    """Leave out of the heap what is out of date."""
    n = 0
    for entry in s.heap:
        if _is_current(s, entry):
            s.heap[n] = entry
            n += 1
    del s.heap[n:]
    heapify(s.heap)


@compiled
def _use(policy, s, key, arrived, worth, coming):
    """A key is used, or has arrived: its rank changes."""
    if policy == CLOCK:
        s.marked[s.slot_of[key]] = not arrived
        return
    if policy == FIFO and not arrived:
        return
    s.time[0] += 1
    if policy == LFU:
        s.score[key] += worth
        s.rank[key, 0], s.rank[key, 1] = s.score[key], s.time[0]
    elif policy == BELADY:
        s.rank[key, 0], s.rank[key, 1] = -coming, key
    else:
        s.rank[key, 0] = s.time[0]
    if arrived or policy == BELADY:  # elsewhere ranks only rise: that can wait
        heappush(s.heap, (s.rank[key, 0], s.rank[key, 1], key))


@compiled
def _pop_lowest(policy, s, now):
    """The key of lowest rank that is here and not needed now."""
    kept, n_kept = np.empty(64, np.int64), 0
    while True:
        entry = s.heap[0]
        key = entry[2]
        if not _is_current(s, entry):
            if policy == BELADY:
                heappop(s.heap)
            else:
                heapreplace(s.heap, (s.rank[key, 0], s.rank[key, 1], key))
            continue
        heappop(s.heap)
        if s.needed[key] != now:
            break
        if n_kept == kept.size:
            kept = np.append(kept, kept)
        kept[n_kept] = key
        n_kept += 1
    for other in kept[:n_kept]:
        heappush(s.heap, (s.rank[other, 0], s.rank[other, 1], other))
    return key


@compiled
def _next_unmarked(s, now):
    """The next key without a mark that is not needed now; moves the hand beyond it."""
    while True:
        slot = s.hand[0]
        s.hand[0] = (slot + 1) % s.key_in.size
        if s.needed[s.key_in[slot]] == now:
            continue
        if not s.marked[slot]:
            return s.key_in[slot]
        s.marked[slot] = False


@compiled
def _place(policy, s, key, n_here, now):
    """Give a key a slot: a free one, or another key's."""
    slot, is_clock = n_here, policy == CLOCK
    if n_here == s.key_in.size:
        gone = _next_unmarked(s, now) if is_clock else _pop_lowest(policy, s, now)
        slot = s.slot_of[gone]
        s.slot_of[gone] = -1
    s.slot_of[key], s.key_in[slot] = slot, key


@compiled
def _age(s, worth):
    """Let uses count twice from now on, and keep the scores small."""
    if worth * 2 < 2.0**RESCALE:
        return worth * 2
    s.score[:] *= 2.0**-RESCALE
    for n in range(len(s.heap)):
        key = s.heap[n][2]
        s.rank[key, 0] = s.score[key]
        s.heap[n] = (s.rank[key, 0], s.rank[key, 1], key)
    heapify(s.heap)
    return 1.0


@compiled
def run(policy, keys, starts, ahead, keep, pinned, n_slots, half_life):
    """One cache through its requests. Returns MISS, HIT or PREFETCHED by access.

    Shapes: keys (N,), request r needs keys[starts[r] : starts[r + 1]]; ahead (R,): it
    is a prefetch; pinned (keys,) bool, beside the n_slots. keep: a prefetch must not
    evict what the request before it needs. half_life: in requests, for LFU.
    """
    s, codes = _new_state(pinned.size, n_slots), np.zeros(keys.size, np.uint8)
    coming, last = next_requests(keys, starts, pinned.size), keys[:0]
    n_here, n_requests, worth = 0, 0, 1.0
    for r in range(ahead.size):
        first, stop = starts[r], starts[r + 1]
        s.needed[keys[first:stop]] = r
        if ahead[r] and keep:
            s.needed[last] = r
        for i in range(first, stop):  # first those that are here
            key = keys[i]
            codes[i] = pinned[key] or s.slot_of[key] >= 0
            if codes[i] and not pinned[key] and not ahead[r]:
                codes[i] += s.fresh[key]
                s.fresh[key] = False
                _use(policy, s, key, False, worth, coming[i])
        for i in range(first, stop):
            if codes[i] == MISS:
                _place(policy, s, keys[i], n_here, r)
                n_here = min(n_here + 1, n_slots)
                s.fresh[keys[i]] = ahead[r]
                _use(policy, s, keys[i], True, worth, coming[i])
        if not ahead[r]:
            last, n_requests = keys[first:stop], n_requests + 1
            if policy == LFU and n_requests % half_life == 0:
                worth = _age(s, worth)
        if len(s.heap) > 4 * n_slots + 1000:
            _rebuild(s)
    return codes


@compiled
def page_clock(keys, spans, n_pages):
    """`policies.PageCache`: pages read from disk for each access.

    Shapes: keys (N,); spans (keys, pieces, 2): a record's first and last page, piece by
    piece -> (N,) int64.
    """
    slot_of = np.full(spans.max() + 1, -1)
    page_in, marked = np.zeros(n_pages, np.int64), np.zeros(n_pages, np.bool_)
    n_here, hand, result = 0, 0, np.zeros(keys.size, np.int64)
    for i in range(keys.size):
        for first, last in spans[keys[i]]:
            for page in range(first, last + 1):
                if slot_of[page] >= 0:
                    marked[slot_of[page]] = True
                    continue
                result[i] += 1
                slot = n_here
                if n_here < n_pages:
                    n_here += 1
                else:
                    while marked[hand]:
                        marked[hand] = False
                        hand = (hand + 1) % n_pages
                    slot, hand = hand, (hand + 1) % n_pages
                    slot_of[page_in[slot]] = -1
                page_in[slot], slot_of[page] = page, slot
    return result
