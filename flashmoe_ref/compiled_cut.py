"""The compiled engine with a routing cut: adaptive K, other weights, output scales.

Only the steps between router and experts differ from `compiled_model.py`, which knows
nothing of cuts. **But:** in a prompt, an expert that adaptive K drops is computed for
nothing, with weight 0; it is not read. *Taught in notebooks/10.*
"""

import numpy as np

from . import kernels, recording, steps
from .compiled_model import CompiledModel
from .numpy_model import State
from .routing_cut import NONE, drop_none


class CutModel(CompiledModel):
    """`CompiledModel` for a cut that `route_topk` alone cannot do: set `cut`."""

    def layer(self, layer: int, x: np.ndarray, state: State) -> np.ndarray:
        """One block: mix over time, then over experts. Shapes: x (T, D) -> (T, D)."""
        if len(x) > 1:
            return super().layer(layer, x, state)
        x, own, store = x[0].copy(), self.steps[layer], self.store
        self.mix_step(layer, x, state)
        h, *picked = steps.route_step(
            x, *own["route"], self.cut.trained_k, self.config.rms_norm_eps
        )
        picked = (row[None] for row in picked)
        experts, weights = self.cut.apply(layer, *picked, store.counters)
        store.recorder.routed(experts, weights)
        picks, shares = drop_none(experts[0], weights[0])
        ticket = store.request(layer, picks)
        if store.predictor is not None:
            self.prefetch(layer, picks, h[None])
        steps.shared_expert_step(x, h, *own["shared"])
        store.recorder.lap(recording.SHARED)
        slots = np.array(ticket.wait())
        kernels.experts_step(self.banks[layer], slots, shares, h, x)
        return x[None]

    def experts_of_prompt(
        self, layer: int, h: np.ndarray, experts: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """Weighted experts of T tokens, each read at most once.

        Shapes: h (T, D), experts and weights (T, K) -> (T, D).
        """
        # Each token's best expert in place of a dropped one: read anyway, weight 0.
        experts = np.where(experts == NONE, experts[:, :1], experts)
        return super().experts_of_prompt(layer, h, experts, weights)
