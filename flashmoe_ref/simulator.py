"""What a cache would have done: hits of any policy and size, from recorded picks.

The hits are exactly those of the live cache of `streaming.py`, access by access, since
both follow the classes of `policies.py`; compiled, they take well under a microsecond
an access. **But:** hits and bytes, no times. *Taught in notebooks/08 and 09.*
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import simulator_kernels as kernels
from .experts import ExpertFiles
from .policies import HALF_LIFE, POLICIES, PageCache, make_slots, most_frequent

PAGE_BYTES = 4096
CODES = {
    "lru": kernels.LRU,
    "fifo": kernels.FIFO,
    "lfu": kernels.LFU,
    "clock": kernels.CLOCK,
    "belady": kernels.BELADY,
}


@dataclass(frozen=True)
class Requests:
    """What layers ask a store for, in order: R requests of N experts in all.

    Request r needs experts[starts[r] : starts[r + 1]] of layer layers[r], distinct
    ones, all at once. Where ahead[r], it is a prefetch, which no layer has asked for.
    """

    layers: np.ndarray  # (R,) int
    starts: np.ndarray  # (R + 1,) int
    experts: np.ndarray  # (N,) int
    ahead: np.ndarray  # (R,) bool
    n_experts: int  # of a layer

    def __post_init__(self) -> None:
        experts, n_experts = self.experts, self.n_experts
        if experts.size and not 0 <= experts.min() <= experts.max() < n_experts:
            raise ValueError(f"expert ids must be in 0..{n_experts - 1}")
        if kernels.names_twice(experts, self.starts, n_experts):
            raise ValueError("a request names an expert twice")

    @property
    def n_layers(self) -> int:
        """Layers, counting from 0 to the last that occurs."""
        return int(self.layers.max(initial=-1)) + 1

    @property
    def keys(self) -> np.ndarray:
        """A number for each access that tells layers apart. Shapes: (N,)."""
        layer = np.repeat(self.layers, np.diff(self.starts))
        return layer * self.n_experts + self.experts

    @property
    def is_ahead(self) -> np.ndarray:
        """Which accesses are prefetches. Shapes: (N,) bool."""
        return np.repeat(self.ahead, np.diff(self.starts))

    def counts(self) -> np.ndarray:
        """How often each expert was asked for. Shapes: -> (L, E) int."""
        n_keys = self.n_layers * self.n_experts
        counts = np.bincount(self.keys[~self.is_ahead], minlength=n_keys)
        return counts.reshape(self.n_layers, self.n_experts)


def decode_requests(
    picks: np.ndarray, n_experts: int, predicted: np.ndarray | None = None
) -> Requests:
    """Tokens one by one: a request for each layer of each token.

    Shapes: picks (T, L, K), with -1 where adaptive K dropped one; predicted (T, L, P)
    with -1 for none: what is prefetched for a layer, just before it asks.
    """
    t, n_layers, _ = picks.shape
    if predicted is None:
        predicted = np.empty((t, n_layers, 0), int)
    both = np.concatenate([predicted, picks], axis=2)  # (T, L, P + K)
    n_ahead = np.sum(predicted >= 0, axis=2).ravel()
    n_picked = np.sum(picks >= 0, axis=2).ravel()
    sizes = np.stack([n_ahead, n_picked], axis=1).ravel()
    layers = np.repeat(np.tile(np.arange(n_layers), t), 2)
    ahead = np.tile([True, False], t * n_layers)
    used = sizes > 0
    starts = np.concatenate([[0], np.cumsum(sizes[used])])
    return Requests(
        layers[used], starts, both[both >= 0].astype(int), ahead[used], n_experts
    )


def prompt_requests(
    picks: np.ndarray, n_experts: int, chunk: int, capacity: int
) -> Requests:
    """A prompt in chunks: each expert once a chunk and layer, in ascending order.

    Shapes: picks (T, L, K). capacity: experts that a layer's slots hold at a time; more
    come in waves, each a request of its own.
    """
    t, n_layers, _ = picks.shape
    is_chosen = np.zeros((-(-t // chunk), n_layers, n_experts), bool)
    tokens, layers, ranks = np.nonzero(picks >= 0)
    is_chosen[tokens // chunk, layers, picks[tokens, layers, ranks]] = True
    return access_requests(*np.nonzero(is_chosen), n_experts, capacity)


def access_requests(
    steps: np.ndarray,
    layers: np.ndarray,
    experts: np.ndarray,
    n_experts: int,
    capacity: int | None = None,
) -> Requests:
    """From rows of a table: neighbours of the same step and layer are one request.

    Shapes: all (N,), in the order of the run, as `Trace.accesses` has them. capacity:
    experts that a layer's slots hold at a time; more come in waves.
    """
    steps, layers = np.asarray(steps), np.asarray(layers)
    new = np.ones(len(steps), bool)
    new[1:] = (np.diff(steps) != 0) | (np.diff(layers) != 0)
    if capacity is not None:
        place = np.arange(len(steps))  # in its group
        place = place - np.maximum.accumulate(np.where(new, place, 0))
        new |= place % capacity == 0
    starts = np.append(np.flatnonzero(new), len(steps))
    ahead = np.zeros(len(starts) - 1, bool)
    return Requests(layers[new], starts, np.asarray(experts, int), ahead, n_experts)


def join(*parts: Requests) -> Requests:
    """Several runs, one after the other."""
    offsets = np.cumsum([0, *(len(part.experts) for part in parts)])
    starts = [p.starts[:-1] + at for p, at in zip(parts, offsets[:-1], strict=True)]
    return Requests(
        np.concatenate([part.layers for part in parts]),
        np.concatenate([*starts, offsets[-1:]]),
        np.concatenate([part.experts for part in parts]),
        np.concatenate([part.ahead for part in parts]),
        max(part.n_experts for part in parts),
    )


# --- a run ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of each access. Shapes: codes (N,) uint8: MISS, HIT or PREFETCHED."""

    requests: Requests
    codes: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """Which accesses found their expert in a slot, prefetches left out."""
        return self.codes[~self.requests.is_ahead] > 0

    @property
    def hit_rate(self) -> float:
        """Share of hits; 1 if nothing was requested."""
        return float(self.hits.mean()) if self.hits.size else 1.0

    @property
    def misses(self) -> int:
        """Experts read because a layer stood still for them."""
        return int(np.sum(~self.hits))

    @property
    def prefetched(self) -> int:
        """Experts read ahead."""
        return int(np.sum(self.codes[self.requests.is_ahead] == kernels.MISS))

    @property
    def prefetch_hits(self) -> int:
        """Of those, how many were used before they were evicted."""
        codes = self.codes[~self.requests.is_ahead]
        return int(np.sum(codes == kernels.PREFETCHED))


def simulate(
    requests: Requests,
    policy: str,
    n_slots: int,
    shared: bool = False,
    pinned: np.ndarray | None = None,
    half_life: int | None = None,
    compiled: bool = True,
) -> Outcome:
    """Run a policy over requests from an empty cache.

    policy:    one of policies.POLICIES, or "static": the most frequent experts of these
               very requests are pinned, and as many slots as the largest request needs
               pass everything else through, first in, first out.
    n_slots:   of each layer, or with shared=True of all layers together.
    pinned:    (L, E) bool: experts that have slots of their own among the n_slots, and
               were read before the run: reading them is not among the misses.
    half_life: for LFU: requests of a cache after which a use counts half.
    compiled:  False uses the classes of policies.py, some hundred times slower.
    Raises: ValueError for an unknown policy, or slots that a request does not fit.
    """
    if policy == "static":
        n_pins = n_slots - int(np.diff(requests.starts).max(initial=0))
        policy, pinned = "fifo", most_frequent(requests.counts(), n_pins, shared)
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")
    if policy == "belady" and requests.ahead.any():
        raise ValueError("the optimum needs no prefetches: it knows what comes")
    if pinned is None:
        pinned = np.zeros((requests.n_layers, requests.n_experts), bool)
    run = _run_kernel if compiled else _run_class
    codes = np.zeros(len(requests.experts), np.uint8)
    for layer in [None] if shared else range(requests.n_layers):
        stream, mine = _stream(requests, layer)
        pins = pinned.ravel() if shared else pinned[layer]
        n_left = _slots_left(stream, n_slots, int(pins.sum()))
        life = half_life or HALF_LIFE * (requests.n_layers if shared else 1)
        codes[mine] = run(policy, *stream, pins, n_left, life)
    return Outcome(requests, codes)


class Stream(NamedTuple):
    """What one cache sees: arguments of `simulator_kernels.run`, explained there."""

    keys: np.ndarray
    starts: np.ndarray
    ahead: np.ndarray
    keep: bool


def _stream(requests: Requests, layer: int | None) -> tuple[Stream, np.ndarray | slice]:
    """The requests of a layer, or of all; and which accesses they are."""
    if layer is None:
        stream = Stream(requests.keys, requests.starts, requests.ahead, True)
        return stream, slice(None)
    rows, sizes = requests.layers == layer, np.diff(requests.starts)
    mine = np.repeat(rows, sizes)
    starts = np.concatenate([[0], np.cumsum(sizes[rows])])
    return Stream(requests.experts[mine], starts, requests.ahead[rows], False), mine


def _slots_left(stream: Stream, n_slots: int, n_pinned: int) -> int:
    """Slots beside the pinned. Raises: ValueError where a request would not fit."""
    sizes, ahead = np.diff(stream.starts), stream.ahead
    if stream.keep:  # beside a prefetch, the request before it stays
        last = np.maximum.accumulate(np.where(ahead, 0, np.arange(1, len(sizes) + 1)))
        sizes = sizes + np.where(ahead, np.append(0, np.diff(stream.starts))[last], 0)
    needed = int(sizes.max(initial=1))
    if n_slots - n_pinned < needed:
        raise ValueError(
            f"{n_slots} slots, {n_pinned} of them pinned, cannot hold {needed} experts "
            f"that are needed at a time"
        )
    return n_slots - n_pinned


def _run_kernel(policy, keys, starts, ahead, keep, pins, n_slots, half_life):
    return kernels.run(
        CODES[policy], keys, starts, ahead, keep, pins, n_slots, half_life
    )


def _run_class(policy, keys, starts, ahead, keep, pins, n_slots, half_life):
    """The same with a class of policies.py."""
    groups = [g.tolist() for g in np.split(keys, starts[1:-1])] if len(ahead) else []
    pinned = np.flatnonzero(pins).tolist()
    n_all = n_slots + len(pinned)
    slots = make_slots(policy, n_all, pinned, half_life, groups)
    codes, fresh, last = [], set(), []
    for group, is_ahead in zip(groups, ahead, strict=True):
        if is_ahead:
            missing, _ = slots.prefetch(group, last if keep else ())
            fresh |= set(missing)
        else:
            _, missing = slots.assign(group)
            fresh -= set(missing)
            last = group
        for key in group:
            was_fresh = not is_ahead and key in fresh
            codes.append(kernels.MISS if key in missing else kernels.HIT + was_fresh)
            if was_fresh:
                fresh.remove(key)
    return np.array(codes, np.uint8)


# --- the page cache -------------------------------------------------------------------


def page_spans(files: ExpertFiles, page_bytes: int = PAGE_BYTES) -> np.ndarray:
    """On which pages each expert's record lies, piece by piece.

    Pages are numbered through all files. Shapes: -> (L * E, pieces, 2) int: first and
    last page.
    """
    sizes = [-(-path.stat().st_size // page_bytes) for path in files.files]
    first_page = np.concatenate([[0], np.cumsum(sizes)])
    spans = []
    for runs in files.runs:
        for expert in range(files.n_experts):
            pieces = [(*run.places[expert], run.n_bytes) for run in runs]
            spans.append(
                [
                    (
                        first_page[file] + offset // page_bytes,
                        first_page[file] + (offset + n_bytes - 1) // page_bytes,
                    )
                    for file, offset, n_bytes in pieces
                ]
            )
    return np.array(spans)


def simulate_pages(
    requests: Requests, spans: np.ndarray, n_pages: int, compiled: bool = True
) -> np.ndarray:
    """A page cache of n_pages under the same requests, from empty.

    Shapes: spans as of `page_spans` -> (N,) int: pages read from disk for each access.
    0 is a hit, as many as the record has is a miss, between them it was partly there.
    """
    if n_pages < 1:
        raise ValueError(f"n_pages={n_pages}: a cache needs at least one page")
    keys = requests.keys
    if compiled:
        return kernels.page_clock(keys, spans, n_pages)
    cache = PageCache(n_pages)
    pages = [[p for a, b in record for p in range(a, b + 1)] for record in spans]
    return np.array([cache.read(pages[key]) for key in keys], int)
