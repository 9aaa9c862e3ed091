"""The NumPy model with its hot path compiled by Numba: the fastest engine on a CPU.

A token goes through four compiled calls a layer (`steps.py`), a prompt through compiled
matrix products (`prompt_kernels.py`); all else is inherited from the specification,
against which it is tested. **But:** compiling takes some seconds, once a machine.
*Taught in notebooks/05.*
"""

import sys
from collections.abc import Iterator
from functools import cache

import numpy as np
from tqdm import tqdm

from . import kernels, layers, prompt_kernels, recording, steps
from .checkpoint import Checkpoint
from .compiled import announce_compiling
from .config import ModelConfig
from .guards import check_routing
from .kernels import prepare
from .numpy_model import PROJECTIONS, Matrix, NumpyModel, State
from .quantize import QuantizedMatrix
from .streaming import ExpertStore

PRODUCT_BYTES = 1 << 25  # rows that experts of a prompt produce before they are added

DELTA_NET = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
DELTA_VECTORS = ("conv1d", "A_log", "dt_bias", "norm")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SHARED = ("shared_gate_proj", "shared_up_proj", "shared_down_proj")


@cache  # one note a process, however many models it loads
def announce() -> None:
    """Say so on standard error if kernels have to be compiled."""
    announce_compiling(lambda note: tqdm.write(note, file=sys.stderr))


class CompiledModel(NumpyModel):
    """`NumpyModel` with the same results up to rounding, compiled."""

    def __init__(
        self, checkpoint: Checkpoint, store: ExpertStore, config: ModelConfig
    ) -> None:
        announce()
        super().__init__(checkpoint, store, config)
        n_layers = range(config.num_hidden_layers)
        self.steps = [self._prepare_layer(layer) for layer in n_layers]
        self.banks = [
            tuple(prepare(store.bank(layer).matrix(name)) for name in PROJECTIONS)
            for layer in n_layers
        ]
        self.head = prepare(self.lm_head)
        self.frequencies = layers.rope_frequencies(config.rotary_dim, config.rope_theta)

    def _prepare_layer(self, layer: int) -> dict[str, tuple]:
        """A layer's weights as the steps take them, in the order of their arguments."""
        w, is_linear = self.layers[layer], self.config.is_linear(layer)
        mix = [prepare(w[name]) for name in (DELTA_NET if is_linear else ATTENTION)]
        names = DELTA_VECTORS if is_linear else ("q_norm", "k_norm")
        shared = (*SHARED, "shared_expert_gate")
        return {
            "mix": (w["input_layernorm"], *mix, *(w[name] for name in names)),
            "route": (w["post_attention_layernorm"], prepare(w["gate"])),
            "shared": tuple(prepare(w[name]) for name in shared),
        }

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Look tokens up. Shapes: ids (T,) -> (T, D)."""
        rows = self.embed_tokens[ids]
        if isinstance(rows, QuantizedMatrix):
            return kernels.dequantize_f32(rows)
        return super().embed(ids)

    def layer(self, layer: int, x: np.ndarray, state: State) -> np.ndarray:
        """One block: mix over time, then over experts. Shapes: x (T, D) -> (T, D)."""
        if len(x) > 1:
            return super().layer(layer, x, state)
        x, own = x[0].copy(), self.steps[layer]
        self.mix_step(layer, x, state)
        h, picks, weights = self.route_step(layer, x)
        ticket = self.store.request(layer, picks)
        if self.store.predictor is not None:
            self.prefetch(layer, picks, h[None])
        steps.shared_expert_step(x, h, *own["shared"])
        self.store.recorder.lap(recording.SHARED)
        slots = np.array(ticket.wait())
        kernels.experts_step(self.banks[layer], slots, weights, h, x)
        return x[None]

    def route_step(
        self, layer: int, x: np.ndarray
    ) -> tuple[np.ndarray, list[int], np.ndarray]:
        """What the experts of one token get, who they are, and their weights (K,)."""
        c, route = self.config, self.steps[layer]["route"]
        h, experts, weights = steps.route_step(
            x, *route, c.num_experts_per_tok, c.rms_norm_eps
        )
        check_routing(layer, weights)
        self.store.recorder.routed(experts, weights)
        return h, experts.tolist(), weights

    def mix_step(self, layer: int, x: np.ndarray, state: State) -> None:
        """Add a layer's Gated DeltaNet or attention to one token, x (D,), in place."""
        c, own, weights = self.config, state.layers[layer], self.steps[layer]["mix"]
        if c.is_linear(layer):
            steps.delta_net_step(
                x, *weights, own.conv, own.s, c.linear_num_key_heads, c.rms_norm_eps
            )
            return
        own.reserve(own.n + 1)
        steps.attention_step(
            x, *weights, own.k, own.v, own.n, self.frequencies, c.rms_norm_eps
        )
        own.n += 1

    def experts_of_prompt(
        self, layer: int, h: np.ndarray, experts: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """Weighted experts of T tokens, each read at most once.

        Shapes: h (T, D), experts and weights (T, K) -> (T, D). Sums in ascending order
        of expert ids, whatever the number of slots.
        """
        y = np.zeros_like(h)
        order = np.argsort(experts, axis=None, kind="stable")  # (T K,) by expert
        tokens, shares = order // experts.shape[1], weights.ravel()[order]
        chosen, starts = np.unique(experts.ravel()[order], return_index=True)
        starts = np.append(starts, len(order))
        for first, last in self._waves(starts, h.shape[1]):
            slots = self.store.request(layer, chosen[first:last].tolist()).wait()
            rows = slice(starts[first], starts[last])
            prompt_kernels.experts_of_prompt(
                self.banks[layer],
                np.array(slots),
                starts[first : last + 1] - starts[first],
                tokens[rows],
                shares[rows],
                h,
                y,
            )
            self.store.recorder.lap(recording.EXPERTS)
        return y

    def _waves(self, starts: np.ndarray, d: int) -> Iterator[tuple[int, int]]:
        """Ranges of experts that fit the slots and, by their rows, PRODUCT_BYTES."""
        most_rows, n = PRODUCT_BYTES // (4 * d), len(starts) - 1
        first = 0
        while first < n:
            last = first + 1
            while (
                last < min(n, first + self.store.capacity)
                and starts[last + 1] - starts[first] <= most_rows
            ):
                last += 1
            yield first, last
            first = last

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Scores of the next token. Shapes: x (T, D) -> (T, V)."""
        if len(x) > 1:
            return super().logits(x)
        eps = self.config.rms_norm_eps
        return steps.logits_step(x[0], self.norm, self.head, eps)[None]

    @staticmethod
    def linear(x: np.ndarray, w: Matrix) -> np.ndarray:
        """How this engine applies a weight matrix. Shapes: x (T, in) -> (T, out)."""
        if len(x) == 1:
            return kernels.matvec(w, x[0])[None]
        return prompt_kernels.matmul(w, x)

    route_topk = staticmethod(prompt_kernels.route_topk)
    attend = staticmethod(prompt_kernels.attend)
    delta_rule = staticmethod(prompt_kernels.delta_rule)
