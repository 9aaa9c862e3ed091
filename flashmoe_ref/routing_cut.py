"""Fewer experts a token than trained: who is dropped, what the kept ones weigh.

The router's trained top K hold weights that sum to 1. A cut keeps the first k of them,
or (adaptive K) only as many as hold a given share of the weight. The kept weights are
made to sum to 1 again, as flash-moe does, or left as they are; either can be scaled by
a factor for each layer, see `calibrate.py`. The shared expert is outside of all this:
every token uses it, with a weight of its own.
Source: measured on the reduced model, lesson 10: renormalising alone is the worst of
these for answers in JSON below 6 experts; at equal bytes, adaptive K beats no fixed K.
**But:** a cut only drops; which experts are best is the router's word.
*Taught in notebooks/10.*
"""

from dataclasses import dataclass

import numpy as np

from .errors import ConfigError
from .ranges import is_number
from .streaming import Counters

KEPT = ("renormalized", "as-routed")
NONE = -1  # stands where an expert was dropped; its weight is 0


@dataclass(frozen=True)
class RoutingCut:
    """The settings of a cut, checked.

    Raises: ConfigError for what cannot be meant.
    """

    k: int  # at most so many experts a token
    trained_k: int
    kept: str = "renormalized"  # or "as-routed": sums to less than 1
    mass: float | None = None  # keep the fewest whose weights sum to this much
    scale: np.ndarray | None = None  # (L,): factor of the routed experts' output

    def __post_init__(self) -> None:
        if not isinstance(self.kept, str) or self.kept not in KEPT:
            raise ConfigError(f"kept={self.kept!r} is not one of {', '.join(KEPT)}")
        if self.mass is not None and not (is_number(self.mass) and 0 < self.mass <= 1):
            raise ConfigError(
                f"mass={self.mass} is outside 0..1: it is the share of the router's "
                f"weight that the kept experts must hold, for example 0.8"
            )

    @property
    def is_plain(self) -> bool:
        """Whether `route_topk` with a smaller k does the same."""
        whole = self.kept == "renormalized" or self.k == self.trained_k
        return whole and self.mass is None and self.scale is None

    def apply(
        self,
        layer: int,
        experts: np.ndarray,
        weights: np.ndarray,
        counters: Counters | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cut the trained top K of some tokens, and count what is left of them.

        Shapes: experts, weights (T, K trained), best first -> both (T, k). Where mass
        drops more, experts end with NONE and weights with 0; the best one always stays.
        """
        experts, weights = experts[:, : self.k], weights[:, : self.k]
        if self.mass is not None:
            # an expert stays while those before it hold less than the threshold
            before = np.cumsum(weights, axis=1)[:, :-1]  # (T, k - 1)
            dropped = np.zeros(experts.shape, bool)
            dropped[:, 1:] = before >= np.float32(self.mass)
            experts = np.where(dropped, NONE, experts)
            weights = np.where(dropped, np.float32(0), weights)
        if self.kept == "renormalized":
            weights = weights / weights.sum(axis=1, keepdims=True)
        if self.scale is not None:
            weights = weights * self.scale[layer]
        if counters is not None:
            counters.routed += len(experts)
            counters.picked += int(np.count_nonzero(experts != NONE))
        return experts, weights

    def in_words(self) -> dict[str, object]:
        """What a report says of it, beside k and trained k; nothing at trained K."""
        words: dict[str, object] = {}
        if self.k < self.trained_k or self.mass is not None:
            words["kept"] = self.kept
        if self.mass is not None:
            words["mass"] = self.mass
        if self.scale is not None:
            low, high = self.scale.min(), self.scale.max()
            words["output scale"] = f"{low:.3f} to {high:.3f}"
        return words


def make_cut(
    k: int,
    trained_k: int,
    n_layers: int,
    kept: str,
    mass: float | None,
    scale: np.ndarray | None,
) -> RoutingCut:
    """From the options of `load`. Raises: ConfigError."""
    if scale is not None:
        wanted = (
            f"output_scale: give a positive factor for each of the {n_layers} layers, "
            f"as calibrate.calibrate_output_scale measures them"
        )
        try:
            scale = np.asarray(scale, np.float32)
        except (ValueError, TypeError, OverflowError):
            raise ConfigError(wanted) from None
        good = scale.shape == (n_layers,) and np.isfinite(scale).all()
        if not good or (scale <= 0).any():
            raise ConfigError(wanted)
    return RoutingCut(k, trained_k, kept, mass, scale)


def drop_none(experts: np.ndarray, weights: np.ndarray) -> tuple[list, np.ndarray]:
    """One token's experts as a list, without the dropped. Shapes: both (k,)."""
    picks = [expert for expert in experts.tolist() if expert != NONE]
    return picks, weights[: len(picks)]
