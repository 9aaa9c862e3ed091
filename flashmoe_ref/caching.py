"""What a store keeps of the experts: how many, whose, and by which policy.

The settings, what of them cannot work, and the caches that follow. **But:** memory is
in `slots.py`, reading in `streaming.py`. *Taught in notebooks/08.*
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .config import ModelConfig
from .errors import ConfigError
from .policies import HALF_LIFE, LIVE_POLICIES, Slots, make_slots, most_frequent
from .predictors import Predictor, make_predictor
from .ranges import is_whole


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

    def shares(self, kinds: Sequence[int]) -> dict[int, int]:
        """The budget shared out: slots for each kind of layer, by its layers.

        A slot has one size. Layers whose experts are of another cannot use it, so each
        kind has slots of its own. Shapes: kinds (L,), the number of a layer's format.
        """
        counts = Counter(kinds)
        slots = {kind: self.budget * n // len(kinds) for kind, n in counts.items()}
        for kind in [*slots][: self.budget - sum(slots.values())]:
            slots[kind] += 1
        return slots

    def capacity(
        self, k: int, n_layers: int, n_experts: int, kinds: Sequence[int] | None = None
    ) -> int:
        """Experts that a request may have; checks all settings.

        kinds: (L,), the number of a layer's format; None: all have the same.
        Raises: ConfigError for what cannot work.
        """
        kinds = [0] * n_layers if kinds is None else kinds
        n_all = n_layers * n_experts
        if self.slots is not None and not is_whole(self.slots, k, n_experts):
            raise ConfigError(
                f"slots={self.slots} is outside {k}..{n_experts}: a layer needs a slot "
                f"for each of the {k} experts of a token, and has {n_experts} experts"
            )
        if self.budget is not None and not is_whole(self.budget, k, n_all):
            raise ConfigError(
                f"budget={self.budget} is outside {k}..{n_all}: the layers together "
                f"need slots for the {k} experts of a token, and have {n_all} experts"
            )
        if self.slots is not None and self.budget is not None:
            raise ConfigError("give slots (of each layer) or budget (of all), not both")
        if not isinstance(self.policy, str) or self.policy not in LIVE_POLICIES:
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
        return self._room(k, n_ahead, pins, np.asarray(kinds))

    def _room(self, k: int, n_ahead: int, pins: np.ndarray, kinds: np.ndarray) -> int:
        """Slots beside the pinned: a token's experts, and some read ahead, must fit."""
        if self.is_shared:
            shares, needed = self.shares(kinds.tolist()), k + n_ahead
            room = min(n - int(pins[kinds == kind].sum()) for kind, n in shares.items())
        else:
            room = self.slots - int(pins.sum(axis=1).max())
            needed = max(k, n_ahead)
        if room < needed:
            raise ConfigError(
                f"pinned experts leave {room} slots{self._why(kinds)}, but {needed} "
                f"are needed for a token's {k} experts and {n_ahead} read ahead; give "
                f"more slots or budget, or pin or prefetch fewer"
            )
        return room

    def _why(self, kinds: np.ndarray) -> str:
        n_kinds = len(set(kinds.tolist())) if self.is_shared else 1
        return f" where {n_kinds} sizes of experts share the budget" * (n_kinds > 1)

    def make_caches(
        self, k: int, n_layers: int, n_experts: int, kinds: Sequence[int] | None = None
    ) -> list[Slots]:
        """Each layer's cache; the same for layers of a kind where slots are shared."""
        pins = self.pins(n_layers, n_experts)
        if self.is_shared:
            kinds = np.zeros(n_layers, int) if kinds is None else np.asarray(kinds)
            caches = {}
            for kind, n_slots in self.shares(kinds.tolist()).items():
                mine = kinds == kind
                keys = np.flatnonzero(pins & mine[:, None]).tolist()
                half_life = HALF_LIFE * int(mine.sum())
                caches[kind] = make_slots(self.policy, n_slots, keys, half_life)
            return [caches[kind] for kind in kinds.tolist()]
        n_slots = k if self.slots is None else self.slots
        rows = [np.flatnonzero(row).tolist() for row in pins]
        return [make_slots(self.policy, n_slots, row) for row in rows]


def make_caching(
    config: ModelConfig,
    slots: int | None,
    budget: int | None,
    policy: str,
    pin: int,
    prefetch: str | None,
    profile: str | Path | np.ndarray | None,
) -> Caching:
    """The settings of a store, as load() names them.

    Raises: ConfigError, TraceError or OSError for the profile.
    """
    shape = config.num_hidden_layers, config.num_experts
    picks = None if profile is None else _read_profile(profile, *shape)
    pinned = predictor = None
    if not is_whole(pin, 0, 0):
        if not is_whole(pin, 1) or picks is None:
            raise ConfigError(
                f"pin={pin}: give a number of experts, and in profile= a recorded "
                f"trace that tells which are used most"
            )
        counts = np.zeros(shape, int)
        _, layers, _ = kept = np.nonzero(picks >= 0)
        np.add.at(counts, (layers, picks[kept]), 1)
        pinned = most_frequent(counts, pin, budget is not None)
    if prefetch is not None:
        k = config.num_experts_per_tok
        predictor = make_predictor(prefetch, *shape, k, picks)
    return Caching(slots, budget, policy, pinned, predictor)


def _read_profile(
    profile: str | Path | np.ndarray, n_layers: int, n_experts: int
) -> np.ndarray:
    """The picks (T, L, K) of another run. Raises: ConfigError, TraceError, OSError."""
    picks = profile
    if isinstance(profile, str | Path):
        from .trace_format import read_arrays

        picks = read_arrays(profile)[0]["picks"]
    picks = np.asarray(picks)
    fits = picks.ndim == 3 and picks.shape[1] == n_layers and picks.size > 0
    if not fits or picks.min() < -1 or picks.max() >= n_experts:
        raise ConfigError(
            f"profile: picks of shape {picks.shape} do not belong to a model of "
            f"{n_layers} layers with {n_experts} experts; record a trace with this one"
        )
    return picks.astype(int)
