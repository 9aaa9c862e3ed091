"""Which neurons of a ReLU layer are needed: a predictor of it, and a window of tokens.

Before a layer's neurons are computed, a low-rank predictor names those that will not be
zero; those that the last k tokens wanted are still in memory, the rest must be read.
Follows arXiv 2312.11514, sections 3.1 and 3.2. **But:** reads nothing; running with the
neurons on disk is in `flash_model.py`. *Taught in notebooks/11.*
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import ConfigError
from .headers import read_header
from .layers import rms_norm
from .relu_model import FeedForward, ReluModel, mean_nats, read_rounded

INPUTS = ("previous", "attention")  # what a predictor looks at
EPS = 1e-6  # of the norm before a predictor
NO_FRIEND = -1  # of a neuron that was never active


# --- who will be active ---------------------------------------------------------------


class Predictor:
    """sigmoid(x A B + b) > threshold, layer by layer; x is normed to mean square 1.

    sees: "previous": the output of the layer before, known while this layer's attention
          runs; "attention": the stream after this layer's attention.
    rank: the first so many columns of A and rows of B (8, 16, 32 or 64).
    """

    def __init__(
        self,
        a: Sequence[np.ndarray],
        b: Sequence[np.ndarray],
        bias: Sequence[np.ndarray],
        sees: str,
        threshold: float = 0.5,
    ) -> None:
        if sees not in INPUTS or not 0 < threshold < 1:
            raise ConfigError(f"sees={sees!r}, threshold={threshold}: see Predictor")
        self.a, self.b, self.bias = list(a), list(b), list(bias)
        self.sees, self.threshold = sees, threshold

    @classmethod
    def load(
        cls, folder: str | Path, sees: str, rank: int, threshold: float = 0.5
    ) -> "Predictor":
        """Read predictors.safetensors; A is stored turned around, column by column."""
        infos = read_header(Path(folder) / "predictors.safetensors")
        n_layers = sum(name.startswith(f"{sees}.") for name in infos) // 5
        parts: dict[str, list[np.ndarray]] = {"a": [], "b": [], "bias": []}
        for layer in range(n_layers):
            for part, found in parts.items():
                values = read_rounded(infos, f"{sees}.{layer}.{part}")
                found.append(values if part == "bias" else values[:rank].copy())
        a = [values.T.copy() for values in parts["a"]]
        return cls(a, parts["b"], parts["bias"], sees, threshold)

    def at(self, threshold: float) -> "Predictor":
        """The same with another threshold."""
        return Predictor(self.a, self.b, self.bias, self.sees, threshold)

    def scores(self, layer: int, x: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Logits of being active. Shapes: x and after (T, D) -> (T, F)."""
        seen = x if self.sees == "previous" else after
        ones = np.ones(seen.shape[-1], np.float32)
        seen = rms_norm(seen, ones, EPS)
        return seen @ self.a[layer] @ self.b[layer] + self.bias[layer]

    def choose(self, layer: int, x: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Who is expected to be active. Shapes: (T, D) -> (T, F) bool."""
        least = np.log(self.threshold / (1 - self.threshold))  # as a logit
        return self.scores(layer, x, after) > least

    @property
    def n_bytes(self) -> int:
        """Of all layers, float32."""
        return sum(v.nbytes for v in (*self.a, *self.b, *self.bias))


class Window:
    """Which neurons of a layer the last k tokens wanted.

    After `advance` the resident ones are those of the last k tokens, this one among
    them; with k = 0 nothing is kept: every token's neurons are loaded afresh.
    """

    def __init__(self, k: int, n_neurons: int) -> None:
        if k < 0:
            raise ConfigError(f"a window of {k} tokens; it must be 0 or more")
        self.k, self._wanted = k, deque()
        self._count = np.zeros(n_neurons, np.int64)  # tokens of the window that want it

    @property
    def resident(self) -> np.ndarray:
        """Ids, ascending."""
        return np.flatnonzero(self._count)

    def advance(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take a token's neurons in. Returns those to load, and those to evict first.

        Shapes: wanted (F,) bool -> two arrays of ids, ascending.
        """
        count = self._count
        before = count > 0
        if self._wanted and len(self._wanted) >= max(self.k, 1):
            count -= self._wanted.popleft()
        self._wanted.append(wanted.copy())
        count += wanted
        after = count > 0
        if self.k == 0:
            return np.flatnonzero(wanted), np.flatnonzero(before)
        return np.flatnonzero(after & ~before), np.flatnonzero(before & ~after)


def loads(chosen: np.ndarray, k: int) -> np.ndarray:
    """What a window of k tokens has to read, counted from masks, without reading.

    Shapes: chosen (..., T, F) bool -> (..., T) int; the first token finds nothing.
    """
    return (chosen & ~_recent(chosen, range(1, k + 1))).sum(axis=-1)


def kept(chosen: np.ndarray, k: int) -> np.ndarray:
    """Who is resident while each token is computed. Shapes: (..., T, F), the same."""
    return _recent(chosen, range(max(k, 1)))


def _recent(chosen: np.ndarray, ages: range) -> np.ndarray:
    """Who was chosen so many tokens ago, for any of the ages."""
    found = np.zeros_like(chosen)
    for age in ages:
        end = max(chosen.shape[-2] - age, 0)
        found[..., age:, :] |= chosen[..., :end, :]
    return found


def masked(
    model: ReluModel, predictor: Predictor, k: int = 0
) -> tuple[FeedForward, list]:
    """All tokens of a text at once, as if only resident neurons were there.

    Returns: a feed_forward for `ReluModel.forward`, and a list that it fills: for each
    layer who was chosen and who was really active, both (T, F) bool.
    """
    log: list[tuple[np.ndarray, np.ndarray]] = []

    def feed_forward(
        layer: int, x: np.ndarray, after: np.ndarray, h: np.ndarray
    ) -> np.ndarray:
        w, chosen = model.layers[layer], predictor.choose(layer, x, after)
        values = np.maximum(h @ w.up.T, 0)
        log.append((chosen, values > 0))
        return (values * kept(chosen, k)) @ w.down

    return feed_forward, log


# --- how good a predictor is ----------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """A predictor and a window on one text; shares by layer have shape (L,)."""

    recall: np.ndarray  # of the active neurons, the share that was predicted
    precision: np.ndarray  # of the predicted, the share that was active
    over: np.ndarray  # predicted neurons for each active one
    in_memory: np.ndarray  # of the active neurons, the share that was resident
    loads: float  # neurons read for a token, all layers, once the window is full
    nats: float  # of the text, with only resident neurons computed

    @property
    def perplexity(self) -> float:
        """1 is certainty, V is guessing."""
        return float(np.exp(self.nats))


def quality(
    model: ReluModel, predictor: Predictor, ids: Sequence[int], k: int = 0
) -> Quality:
    """Run a text with resident neurons only, and count."""
    feed_forward, log = masked(model, predictor, k)
    nats = mean_nats(model.forward(ids, model.new_state(), feed_forward), ids)
    chosen, active = (np.array(masks) for masks in zip(*log, strict=True))
    both, there = chosen & active, kept(chosen, k) & active
    n_chosen, n_active = (np.maximum(m.sum((1, 2)), 1) for m in (chosen, active))
    return Quality(
        recall=both.sum((1, 2)) / n_active,
        precision=both.sum((1, 2)) / n_chosen,
        over=n_chosen / n_active,
        in_memory=there.sum((1, 2)) / n_active,
        loads=float(loads(chosen, k)[:, k:].sum(0).mean()),
        nats=nats,
    )


# --- neurons that are active together -------------------------------------------------


def closest_friends(active: np.ndarray) -> np.ndarray:
    """For each neuron the other one that was active with it most often.

    Shapes: active (T, F) bool -> (F,) ids; NO_FRIEND for those that were never active.
    """
    together = active.T.astype(np.float32) @ active.astype(np.float32)  # (F, F) counts
    np.fill_diagonal(together, -1)
    friends = together.argmax(axis=1)
    return np.where(active.any(axis=0), friends, NO_FRIEND)


@dataclass(frozen=True)
class FriendLoads:
    """Reads of neurons stored with their closest friend, summed over tokens."""

    reads: int  # each brings a neuron and its friend
    useful: int  # friends that were wanted and not yet there
    there: int  # friends that were in memory already
    unwanted: int  # friends that nobody asked for
    most: int  # times that the most popular friend was read, all tokens together


def load_with_friends(active: np.ndarray, friends: np.ndarray, k: int) -> FriendLoads:
    """Replay a window of k tokens over bundles of two. Shapes: active (T, F) bool."""
    missing = active & ~_recent(active, range(1, k + 1))
    before = kept(active, k)
    brought = np.zeros(len(friends), np.int64)
    reads = useful = there = unwanted = 0
    for t in range(len(active)):
        present = before[t - 1].copy() if t and k else np.zeros(len(friends), bool)
        for neuron in np.flatnonzero(missing[t]):
            if present[neuron]:  # it came along with another one
                continue
            friend = friends[neuron]
            reads, present[neuron] = reads + 1, True
            if friend == NO_FRIEND:
                continue
            brought[friend] += 1
            there += present[friend]
            useful += not present[friend] and active[t, friend]
            unwanted += not present[friend] and not active[t, friend]
            present[friend] = True
    sums = (reads, int(useful), int(there), int(unwanted), int(brought.max()))
    return FriendLoads(*sums)
