"""Which experts the next layer may need, guessed while this layer computes.

A predictor is told each layer's picks in the order of decoding, and names experts for
the layer that comes next (after the last layer: the first, of the next token), best
first. `quality` says what a guess was worth: how much of what was needed it named, and
how many bytes nobody wanted. **But:** decoding only; a wrong guess costs time, never
exactness. *Taught in notebooks/09.*
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import ConfigError


def best(scores: np.ndarray, n: int) -> list[int]:
    """The n experts of highest score, best first; among equals the lower id.

    Shapes: scores (E,). Experts without a positive score are left out.
    """
    order = np.argsort(-scores, kind="stable")[:n]
    return order[scores[order] > 0].tolist()


class Predictor(ABC):
    """What all have in common. n: experts to name for a layer, at most."""

    looks_ahead = False  # whether it wants the scores of the next layer's router

    def __init__(self, n_layers: int, n_experts: int, n: int) -> None:
        self.n_layers, self.n_experts, self.n = n_layers, n_experts, n

    @abstractmethod
    def after(
        self, layer: int, picks: Sequence[int], scores: np.ndarray | None = None
    ) -> list[int]:
        """A layer has picked: name experts for the next.

        Shapes: picks (K,), best first; scores (E,): see `NumpyModel.scores_ahead`.
        """

    def learn(self, picks: np.ndarray) -> None:
        """Take in a recorded run. Shapes: picks (T, L, K)."""
        for token in picks:
            for layer, experts in enumerate(token):
                self.after(layer, [e for e in experts if e >= 0])


class LastToken(Predictor):
    """What the next layer picked for the token before."""

    def __init__(self, n_layers: int, n_experts: int, n: int) -> None:
        super().__init__(n_layers, n_experts, n)
        self.last: list[list[int]] = [[] for _ in range(n_layers)]

    def after(
        self, layer: int, picks: Sequence[int], scores: np.ndarray | None = None
    ) -> list[int]:
        """A layer has picked: name experts for the next."""
        self.last[layer] = list(picks)
        return self.last[(layer + 1) % self.n_layers][: self.n]


class Frequency(Predictor):
    """What the next layer has picked most often so far."""

    def __init__(self, n_layers: int, n_experts: int, n: int) -> None:
        super().__init__(n_layers, n_experts, n)
        self.counts = np.zeros((n_layers, n_experts), np.int64)

    def after(
        self, layer: int, picks: Sequence[int], scores: np.ndarray | None = None
    ) -> list[int]:
        """A layer has picked: name experts for the next."""
        self.counts[layer, picks] += 1
        return best(self.counts[(layer + 1) % self.n_layers], self.n)


class CoOccurrence(Predictor):
    """What the next layer picked when this one picked the same experts.

    An expert's score is the sum, over this layer's picks i, of how often it came after
    i, as a share of i's picks.
    """

    def __init__(self, n_layers: int, n_experts: int, n: int) -> None:
        super().__init__(n_layers, n_experts, n)
        shape = (n_layers, n_experts, n_experts)
        self.came_after = np.zeros(shape, np.float32)  # [layer, i, expert of the next]
        self.counts = np.zeros((n_layers, n_experts), np.float32)
        self.before: np.ndarray | None = None  # picks of the layer before

    def after(
        self, layer: int, picks: Sequence[int], scores: np.ndarray | None = None
    ) -> list[int]:
        """A layer has picked: name experts for the next."""
        picks = np.asarray(picks)
        if self.before is not None:
            self.came_after[layer - 1, self.before[:, None], picks] += 1
        self.before = picks
        self.counts[layer, picks] += 1
        shares = self.came_after[layer, picks] / self.counts[layer, picks, None]
        return best(shares.sum(axis=0), self.n)


class LookAhead(Predictor):
    """What the next layer's router says of this layer's hidden state.

    The hidden state changes little from layer to layer, since each adds to it. There is
    no guess for the first layer: the next token's state does not exist yet.
    """

    looks_ahead = True

    def after(
        self, layer: int, picks: Sequence[int], scores: np.ndarray | None = None
    ) -> list[int]:
        """A layer has picked: name experts for the next."""
        if scores is None:
            return []
        return np.argsort(-scores, kind="stable")[: self.n].tolist()


PREDICTORS = {
    "last-token": LastToken,
    "frequency": Frequency,
    "co-occurrence": CoOccurrence,
    "look-ahead": LookAhead,
}


def make_predictor(
    wanted: str, n_layers: int, n_experts: int, k: int, profile: np.ndarray | None
) -> Predictor:
    """From a name, or a name and a number of experts: "look-ahead:6".

    k: how many experts where no number is given. profile: picks (T, L, K) of another
    run, for the predictors that learn; they go on learning.
    Raises: ConfigError for an unknown name or an impossible number.
    """
    name, _, number = f"{wanted}".partition(":")
    if not isinstance(wanted, str) or name not in PREDICTORS:
        raise ConfigError(f"prefetch={wanted!r} is not one of {', '.join(PREDICTORS)}")
    n = int(number) if number.isdecimal() else 0 if number else k
    if not 1 <= n <= n_experts:
        raise ConfigError(
            f"prefetch={wanted!r}: the number of experts must be in 1..{n_experts}"
        )
    predictor = PREDICTORS[name](n_layers, n_experts, n)
    if profile is not None:
        predictor.learn(profile)
    return predictor


# --- on recorded runs -----------------------------------------------------------------


def predict(
    predictor: Predictor, picks: np.ndarray, scores: np.ndarray | None = None
) -> np.ndarray:
    """What a predictor would have named for each layer of each token.

    Shapes: picks (T, L, K), scores (T, L, E) of `scores_ahead` -> (T, L, n), -1 where
    there are fewer; what is said of a layer was known before it picked.
    """
    t, n_layers, _ = picks.shape
    predicted = np.full((t * n_layers + 1, predictor.n), -1)
    for i in range(t * n_layers):
        token, layer = divmod(i, n_layers)
        has_scores = scores is not None and layer + 1 < n_layers
        ahead = scores[token, layer + 1] if has_scores else None
        picked = [e for e in picks[token, layer].tolist() if e >= 0]
        named = predictor.after(layer, picked, ahead)
        predicted[i + 1, : len(named)] = named
    return predicted[:-1].reshape(t, n_layers, predictor.n)


def scores_ahead(engine: object, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Run a NumpyModel over a text: each layer's picks, and what was foreseen of them.

    Shapes: -> picks (T, L, K), best first, and scores (T, L, E): the router of layer l
    on the hidden state of layer l - 1; scores[:, 0] are zeros.
    """
    c, state = engine.config, engine.new_state()
    n_layers = c.num_hidden_layers
    x = engine.embed(np.asarray(ids))
    picks, scores = [], [np.zeros((len(ids), c.num_experts), np.float32)]
    for layer in range(n_layers):
        x, h = engine.before_experts(layer, x, state)
        logits = engine.linear(h, engine.layers[layer]["gate"])
        picks.append(engine.route(layer, logits.copy())[0])
        if layer + 1 < n_layers:
            scores.append(engine.scores_ahead(layer, h))
        x = x + engine.moe(layer, h)
    return np.stack(picks, axis=1), np.stack(scores, axis=1)


@dataclass(frozen=True)
class Quality:
    """What predictions were worth, over all layers and tokens."""

    recall: float  # share of the picks that were named
    precision: float  # share of the named that were picked; 1 if none was named
    wasted_bytes: float  # a token, read for nothing if all that is named is read
    recall_by_layer: np.ndarray  # (L,)


def quality(
    predicted: np.ndarray, picks: np.ndarray, record_bytes: int, n: int | None = None
) -> Quality:
    """Compare predictions with what was picked, of the first n named.

    Shapes: predicted (T, L, P), picks (T, L, K). record_bytes: of an expert.
    """
    named = predicted[..., :n]
    is_right = (named[..., None] == picks[..., None, :]).any(axis=3) & (named >= 0)
    n_right, n_named = int(is_right.sum()), int(np.sum(named >= 0))
    n_picked = np.sum(picks >= 0, axis=(0, 2))  # (L,); -1 stands for dropped ones
    return Quality(
        recall=n_right / n_picked.sum() if n_picked.any() else 1.0,
        precision=n_right / n_named if n_named else 1.0,
        wasted_bytes=(n_named - n_right) * record_bytes / max(len(picks), 1),
        recall_by_layer=is_right.sum(axis=(0, 2)) / np.maximum(n_picked, 1),
    )
