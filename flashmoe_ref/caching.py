"""What a store keeps of the experts: how many, whose, and by which policy.

The settings, what of them cannot work, and the caches that follow. **But:** memory is
in `slots.py`, reading in `streaming.py`. *Taught in notebooks/08.*
"""

from dataclasses import dataclass

import numpy as np

from .errors import ConfigError
from .policies import HALF_LIFE, LIVE_POLICIES, Slots, make_slots
from .predictors import Predictor


@dataclass(frozen=True)
class Caching:
    """Settings of a store. Without slots and budget, nothing outlasts a layer."""

    slots: int | None = None  # of each layer
    budget: int | None = None  # slots that all layers share
    policy: str = "lru"  # who is evicted: a name of policies.LIVE_POLICIES
    pinned: np.ndarray | None = None  # (L, E) bool: read at the start, never evicted
    predictor: Predictor | None = None  # names experts to be read ahead

    @property
    def keeps(self) -> bool:
        """Whether experts outlast a layer."""
        return self.slots is not None or self.budget is not None

    @property
    def is_shared(self) -> bool:
        """Whether layers share slots that they keep."""
        return self.budget is not None

    def pins(self, n_layers: int, n_experts: int) -> np.ndarray:
        """The pinned experts. Shapes: -> (L, E) bool."""
        none = np.zeros((n_layers, n_experts), bool)
        return none if self.pinned is None else self.pinned

    def capacity(self, k: int, n_layers: int, n_experts: int) -> int:
        """Experts that a request may have; checks all settings.

        Raises: ConfigError for what cannot work.
        """
        n_all = n_layers * n_experts
        if self.slots is not None and not k <= self.slots <= n_experts:
            raise ConfigError(
                f"slots={self.slots} is outside {k}..{n_experts}: a layer needs a slot "
                f"for each of the {k} experts of a token, and has {n_experts} experts"
            )
        if self.budget is not None and not k <= self.budget <= n_all:
            raise ConfigError(
                f"budget={self.budget} is outside {k}..{n_all}: the layers together "
                f"need slots for the {k} experts of a token, and have {n_all} experts"
            )
        if self.slots is not None and self.budget is not None:
            raise ConfigError("give slots (of each layer) or budget (of all), not both")
        if self.policy not in LIVE_POLICIES:
            names = ", ".join(LIVE_POLICIES)
            raise ConfigError(f"policy={self.policy!r} is not one of {names}")
        pins, n_ahead = self.pins(n_layers, n_experts), 0
        if self.predictor is not None:
            n_ahead = self.predictor.n
            if n_layers == 1:
                raise ConfigError("prefetch needs a model of at least two layers")
        if not self.keeps:
            if n_ahead or pins.any() or self.policy != "lru":
                raise ConfigError(
                    "policy, pin and prefetch need slots that outlast a layer: give "
                    "slots or budget"
                )
            return k
        return self._room(k, n_ahead, pins)

    def _room(self, k: int, n_ahead: int, pins: np.ndarray) -> int:
        """Slots beside the pinned: a token's experts, and some read ahead, must fit."""
        if self.is_shared:
            room, needed = self.budget - int(pins.sum()), k + n_ahead
        else:
            room = self.slots - int(pins.sum(axis=1).max())
            needed = max(k, n_ahead)
        if room < needed:
            raise ConfigError(
                f"pinned experts leave {room} slots, but {needed} are needed for a "
                f"token's {k} experts and {n_ahead} read ahead; give more slots or "
                f"budget, or pin or prefetch fewer"
            )
        return room

    def make_caches(self, k: int, n_layers: int, n_experts: int) -> list[Slots]:
        """Each layer's cache; all are the same where slots are shared and kept."""
        pins = self.pins(n_layers, n_experts)
        if self.is_shared:
            keys, half_life = np.flatnonzero(pins).tolist(), HALF_LIFE * n_layers
            cache = make_slots(self.policy, self.budget, keys, half_life)
            return [cache] * n_layers
        n_slots = k if self.slots is None else self.slots
        rows = [np.flatnonzero(row).tolist() for row in pins]
        return [make_slots(self.policy, n_slots, row) for row in rows]
