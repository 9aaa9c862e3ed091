"""What engines and store tell while a run is recorded, kept as cheaply as possible.

An engine announces each step (one forward call), its layers and what the router picked;
the store says which experts it had and times its reads. Time on the computing thread is
cut into spans by laps: `lap(kind)` ends the span that the lap before began. **But:**
raw lists only; `trace.py` makes arrays and figures of them. *Taught in notebooks/07.*

A recorder looks and never touches, so results are the same to the bit. The store holds
SILENT while nobody records: its methods do nothing.
"""

from collections.abc import Sequence
from threading import get_ident
from time import perf_counter

import numpy as np

# What the computing thread did, in the order of a layer.
KINDS = (
    "embed",  # look up the tokens
    "mix",  # attention or Gated DeltaNet, and the router
    "sync",  # Python stands still for MLX: the router's logits, a wave of a prompt
    "request",  # find slots, hand reads over
    "wait",  # stand still for reads, or read
    "shared",  # the shared expert, while threads read
    "experts",  # routed experts; for a prompt also the shared one
    "head",  # logits
)
EMBED, MIX, SYNC, REQUEST, WAIT, SHARED, EXPERTS, HEAD = range(len(KINDS))
BEGIN = len(KINDS)  # the lap that begins a step; it ends no span
NO_LAYER = -1


class Silent:
    """A recorder that keeps nothing."""

    times = False

    def begin(self, ids: Sequence[int], position: int) -> None:
        """A step begins: these tokens, after `position` earlier ones of the text."""

    def layer(self, layer: int) -> None:
        """Layer `layer` begins; NO_LAYER: the last one has ended."""

    def routed(self, experts: np.ndarray, weights: np.ndarray) -> None:
        """The router's picks in this layer. Shapes: both (T, K), or (K,) of a token."""

    def requested(self, experts: Sequence[int], missing: Sequence[int]) -> None:
        """The store was asked for experts; missing ones will be read."""

    def lap(self, kind: int) -> None:
        """The computing thread has just done this, since the lap before."""

    def read(
        self,
        layer: int,
        jobs: Sequence[tuple[int, int]],
        start_s: float,
        ends_s: Sequence[float],
    ) -> None:
        """This thread has read experts into slots, one after the other."""

    def end(self) -> None:
        """The step is complete."""


SILENT = Silent()


class Recorder(Silent):
    """Keeps what it is told: 12 bytes a pick, and with times some 50 bytes a read.

    A decoded token of the reduced model takes two to three milliseconds, and its 8
    layers make 50 calls here: so each appends, and `trace.py` sorts it out later.
    """

    def __init__(self, n_layers: int, k: int, times: bool = True) -> None:
        self.times = times
        self.ids: list[int] = []
        self.steps: list[tuple[int, int]] = []  # tokens, tokens before them
        self.shape = (n_layers, k)
        self.picks = bytearray()  # int64, by step, layer, token, rank
        self.weights = bytearray()  # float32, the same
        self.hits = bytearray()  # 1 or 0 for each expert that the store was asked for
        self.laps: list[tuple[int, int, float]] = []  # kind, layer, seconds
        self.reads: list[tuple] = []  # layer, thread, jobs, start, ends
        self.thread = get_ident()  # the computing one
        self._layer = NO_LAYER
        self._lists = (self.ids, self.steps, self.picks, self.weights, self.hits)
        self._lists += (self.laps,)
        self._whole = [0] * len(self._lists)  # lengths after the last whole step
        self._is_open = False

    def begin(self, ids: Sequence[int], position: int) -> None:
        """Start a step, and forget one that did not end."""
        self.drop_unfinished()
        self._is_open = True
        self.ids.extend(ids)
        self.steps.append((len(ids), position))
        self._layer = NO_LAYER
        self.lap(BEGIN)

    def layer(self, layer: int) -> None:
        """End the layer before, or the embedding."""
        self.lap(EMBED if self._layer == NO_LAYER else EXPERTS)
        self._layer = layer

    def routed(self, experts: np.ndarray, weights: np.ndarray) -> None:
        """Copy the picks."""
        if self._is_open and self._layer != NO_LAYER:
            self.picks += np.asarray(experts, np.int64).tobytes()
            self.weights += np.asarray(weights, np.float32).tobytes()
            self.lap(MIX)

    def requested(self, experts: Sequence[int], missing: Sequence[int]) -> None:
        """Note for each expert whether it was there."""
        if self._is_open:
            n_before, n = len(self.hits), len(experts)
            if len(missing) == n:
                self.hits += bytes(n)
                return
            self.hits += b"\1" * n
            for expert in missing:
                self.hits[n_before + experts.index(expert)] = 0

    def lap(self, kind: int) -> None:
        """Look at the clock."""
        if self.times and self._is_open:
            self.laps.append((kind, self._layer, perf_counter()))

    def read(
        self,
        layer: int,
        jobs: Sequence[tuple[int, int]],
        start_s: float,
        ends_s: Sequence[float],
    ) -> None:
        """Keep the times; several threads call this at once."""
        if self.times:
            self.reads.append((layer, get_ident(), jobs, start_s, ends_s))

    def end(self) -> None:
        """Keep the step."""
        self.lap(HEAD)
        self._is_open = False
        self._whole = [len(kept) for kept in self._lists]

    def drop_unfinished(self) -> None:
        """Forget a step that an error ended; its reads did happen and stay."""
        if self._is_open:
            for kept, length in zip(self._lists, self._whole, strict=True):
                del kept[length:]
            self._is_open = False

    def by_token(self, kept: bytearray, dtype: type) -> np.ndarray:
        """The picks or the weights of whole steps. Shapes: -> (T, L, K)."""
        n_layers, k = self.shape
        values = np.frombuffer(bytes(kept), dtype)
        out = np.empty((len(self.ids), n_layers, k), dtype)
        first = 0
        for n, _ in self.steps:
            step = values[first * n_layers * k : (first + n) * n_layers * k]
            out[first : first + n] = step.reshape(n_layers, n, k).swapaxes(0, 1)
            first += n
        return out
