"""The compiled engine with a routing cut: adaptive K, other weights, output scales.

Only the steps between router and experts differ from `compiled_model.py`, which knows
nothing of cuts. **But:** in a prompt, an expert that adaptive K drops is computed for
nothing, with weight 0; it is not read. *Taught in notebooks/10.*
"""

import numpy as np

from . import steps
from .compiled_model import CompiledModel
from .guards import check_routing
from .routing_cut import NONE, drop_none


class CutModel(CompiledModel):
    """`CompiledModel` for a cut that `route_topk` alone cannot do: set `cut`."""

    def route_step(
        self, layer: int, x: np.ndarray
    ) -> tuple[np.ndarray, list[int], np.ndarray]:
        """What the experts of one token get, who is kept, and their weights."""
        route, store = self.steps[layer]["route"], self.store
        h, *picked = steps.route_step(
            x, *route, self.cut.trained_k, self.config.rms_norm_eps
        )
        check_routing(layer, picked[1])
        picked = (row[None] for row in picked)
        experts, weights = self.cut.apply(layer, *picked, store.counters)
        store.recorder.routed(experts, weights)
        return h, *drop_none(experts[0], weights[0])

    def experts_of_prompt(
        self, layer: int, h: np.ndarray, experts: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """Weighted experts of T tokens, each read at most once.

        Shapes: h (T, D), experts and weights (T, K) -> (T, D).
        """
        # Each token's best expert in place of a dropped one: read anyway, weight 0.
        experts = np.where(experts == NONE, experts[:, :1], experts)
        return super().experts_of_prompt(layer, h, experts, weights)
