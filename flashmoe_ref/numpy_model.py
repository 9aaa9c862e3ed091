"""The whole model in float32 NumPy: `layers.py` assembled over streamed experts.

Follows `Qwen3_5MoeForCausalLM` of Hugging Face transformers, batch size one. Weights
stay as the file has them and are widened to float32 where they are used. `mlx_model.py`
has the same functions in the same order. **But:** float32 only, no sampling here.
*Taught in notebooks/04.*
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import layers, recording
from .checkpoint import Checkpoint
from .config import ModelConfig
from .errors import ConfigError
from .guards import check_routing
from .layers import AttentionState, DeltaState
from .quantize import QuantizedMatrix, dequantize
from .routing_cut import NONE, RoutingCut, drop_none
from .streaming import ExpertStore, SlotBank

Matrix = np.ndarray | QuantizedMatrix
BLOCK_VALUES = (
    1 << 22
)  # values widened to float32 at a time: 16 MB, whatever the matrix

MATRICES = {
    "linear_attention": [
        f"linear_attn.{name}"
        for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
    ],
    "full_attention": [
        f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    ],
    "mlp": ["mlp.gate", "mlp.shared_expert_gate"],
}
VECTORS = {
    "linear_attention": [
        f"linear_attn.{name}" for name in ("A_log", "dt_bias", "norm")
    ],
    "full_attention": ["self_attn.q_norm", "self_attn.k_norm"],
}
NORMS = ("input_layernorm", "post_attention_layernorm")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def load_layer(checkpoint: Checkpoint, layer: int) -> dict[str, Matrix]:
    """Read a layer's dense weights, by the names that `layers.py` uses."""
    kind = checkpoint.config.layer_types[layer]
    stem = f"layers.{layer}"
    w = {}
    for name in MATRICES[kind] + MATRICES["mlp"]:
        w[name.rsplit(".", 1)[-1]] = checkpoint.module(f"{stem}.{name}")
    for name in VECTORS[kind]:
        w[name.rsplit(".", 1)[-1]] = checkpoint.vector(f"{stem}.{name}")
    for name in NORMS:
        w[name] = checkpoint.vector(f"{stem}.{name}")
    for name in PROJECTIONS:
        module = checkpoint.module(f"{stem}.mlp.shared_expert.{name}")
        w[f"shared_{name}"] = module
    if kind == "linear_attention":
        w["conv1d"] = checkpoint.module(f"{stem}.linear_attn.conv1d")
    return w


def widen(w: Matrix) -> np.ndarray:
    """The float32 values of a stored matrix."""
    if isinstance(w, QuantizedMatrix):
        return dequantize(w)
    return w.astype(np.float32, copy=False)


def linear(x: np.ndarray, w: Matrix) -> np.ndarray:
    """Apply a stored weight matrix, widening some rows at a time.

    Shapes: x (T, in), w (out, in) -> (T, out) float32.
    """
    rows, columns = w.shape
    step = max(1, BLOCK_VALUES // columns)
    if rows <= step:
        return x @ widen(w).T
    out = np.empty((len(x), rows), np.float32)
    for start in range(0, rows, step):
        out[:, start : start + step] = x @ widen(w[start : start + step]).T
    return out


@dataclass
class State:
    """What the model remembers of a text: one entry a layer."""

    layers: list[AttentionState | DeltaState]
    n_tokens: int = 0
    is_whole: bool = True  # False from the begin of a step until its end

    @property
    def n_bytes(self) -> int:
        """Bytes of all layers' states."""
        return sum(layer.n_bytes for layer in self.layers)

    def snapshot(self) -> "State":
        """An independent copy: the only way back, since delta states cannot rewind."""
        layers = [layer.copy() for layer in self.layers]
        return State(layers, self.n_tokens, self.is_whole)

    def restore(self, snapshot: "State") -> None:
        """Return to a snapshot, which stays usable."""
        self.layers = [layer.copy() for layer in snapshot.layers]
        self.n_tokens, self.is_whole = snapshot.n_tokens, snapshot.is_whole


class NumpyModel:
    """Qwen3.5-MoE in float32: dense weights in memory, experts through a store."""

    cut: RoutingCut | None = None  # of the routing budget, where route_topk is not all

    def __init__(
        self, checkpoint: Checkpoint, store: ExpertStore, config: ModelConfig
    ) -> None:
        self.config = config
        self.store = store
        self.embed_tokens = checkpoint.module("embed_tokens")
        self.norm = checkpoint.vector("norm")
        self.lm_head = (
            self.embed_tokens
            if config.tie_word_embeddings
            else checkpoint.module("lm_head")
        )
        n_layers = range(config.num_hidden_layers)
        self.layers = [load_layer(checkpoint, layer) for layer in n_layers]

    def new_state(self) -> State:
        """The state before the first token."""
        c = self.config
        delta = (c.linear_conv_kernel_dim, c.conv_dim, c.linear_num_value_heads)
        heads = (c.linear_value_head_dim, c.linear_key_head_dim)
        return State(
            [
                DeltaState.empty(*delta, *heads)
                if c.is_linear(layer)
                else AttentionState.empty(c.num_key_value_heads, c.head_dim)
                for layer in range(c.num_hidden_layers)
            ]
        )

    def forward(
        self, ids: Sequence[int], state: State, all_logits: bool = False
    ) -> np.ndarray:
        """Process tokens, updating state; one token is a decode step, more a prefill.

        Returns float32 logits: (V,) of the last token, or (T, V) with all_logits.
        Raises: ConfigError for ids outside the vocabulary, none, or too many in all.
        """
        check_ids(ids, state.n_tokens, self.config)
        recorder = self.store.recorder
        recorder.begin(ids, state.n_tokens)
        x = self.embed(np.asarray(ids))
        for layer in range(self.config.num_hidden_layers):
            recorder.layer(layer)
            x = self.layer(layer, x, state)
        recorder.layer(recording.NO_LAYER)
        state.n_tokens += len(ids)
        logits = self.logits(x if all_logits else x[-1:])
        recorder.end()
        return logits if all_logits else logits[0]

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Look tokens up. Shapes: ids (T,) -> (T, D)."""
        return widen(self.embed_tokens[ids])

    def layer(self, layer: int, x: np.ndarray, state: State) -> np.ndarray:
        """One block: mix over time, then over experts. Shapes: x (T, D) -> (T, D)."""
        x, h = self.before_experts(layer, x, state)
        return x + self.moe(layer, h)

    def before_experts(
        self, layer: int, x: np.ndarray, state: State
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mix over time. Shapes: x (T, D) -> x (T, D), and what its router sees."""
        w, eps = self.layers[layer], self.config.rms_norm_eps
        h = layers.rms_norm(x, w["input_layernorm"], eps)
        x = x + self.mix(layer, h, state)
        return x, layers.rms_norm(x, w["post_attention_layernorm"], eps)

    def mix(self, layer: int, h: np.ndarray, state: State) -> np.ndarray:
        """Gated DeltaNet or gated attention. Shapes: h (T, D) -> (T, D)."""
        c, w, own = self.config, self.layers[layer], state.layers[layer]
        if c.is_linear(layer):
            heads = c.linear_num_key_heads
            return layers.gated_delta_net(
                h, w, own, heads, c.rms_norm_eps, self.linear, self.delta_rule
            )
        rope = (c.rotary_dim, c.rope_theta)
        return layers.gated_attention(
            h, w, own, *rope, c.rms_norm_eps, self.linear, self.attend
        )

    def moe(self, layer: int, h: np.ndarray) -> np.ndarray:
        """Routed experts plus the shared one. Shapes: h (T, D) -> (T, D).

        Reads are under way while the shared expert is computed.
        """
        w = self.layers[layer]
        router_logits = self.linear(h, w["gate"])
        experts, weights = self.route(layer, router_logits)
        self.store.recorder.routed(experts, weights)
        if len(h) > 1:
            return self.experts_of_prompt(layer, h, experts, weights) + (
                layers.shared_expert(h, w, self.linear)
            )
        picks, shares = drop_none(experts[0], weights[0])
        ticket = self.store.request(layer, picks)
        if self.store.predictor is not None:
            self.prefetch(layer, picks, h)
        shared = layers.shared_expert(h, w, self.linear)
        self.store.recorder.lap(recording.SHARED)
        return self.experts_of_token(layer, h, ticket.wait(), shares) + shared

    def route(
        self, layer: int, router_logits: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Each token's experts and their weights. Shapes: (T, E) -> both (T, K).

        Raises: RoutingError for scores that are no numbers.
        """
        cut = self.cut
        k = self.config.num_experts_per_tok if cut is None else cut.trained_k
        experts, weights = self.route_topk(router_logits, k)
        check_routing(layer, weights)
        if cut is None:
            return experts, weights
        return cut.apply(layer, experts, weights, self.store.counters)

    def prefetch(self, layer: int, picks: list[int], h: np.ndarray) -> None:
        """Let threads read what the next layer may need while this one computes.

        Shapes: h (1, D), as this layer's router sees it.
        """
        scores = None
        has_next = layer + 1 < self.config.num_hidden_layers
        if self.store.predictor.looks_ahead and has_next:
            scores = self.scores_ahead(layer, h)[0]
        self.store.prefetch(layer, picks, scores)

    def scores_ahead(self, layer: int, h: np.ndarray) -> np.ndarray:
        """What the next layer's router says of this layer's hidden state.

        Shapes: h (T, D), as this layer's router sees it -> (T, E).
        """
        now, after = (
            self.layers[i]["post_attention_layernorm"] for i in (layer, layer + 1)
        )
        # h was scaled by this layer's norm; the next router expects its own
        ratio = np.divide(after, now, out=np.zeros_like(after), where=now != 0)
        return self.linear(h * ratio, self.layers[layer + 1]["gate"])

    def experts_of_token(
        self, layer: int, h: np.ndarray, slots: list[int], weights: np.ndarray
    ) -> np.ndarray:
        """Weighted sum of K experts, best first. Shapes: h (1, D) -> (1, D)."""
        bank = self.store.bank(layer)
        y = np.zeros_like(h)
        for slot, weight in zip(slots, weights, strict=True):
            y += weight * self.expert(bank, slot, h)
        return y

    def experts_of_prompt(
        self, layer: int, h: np.ndarray, experts: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """The same for T tokens, expert by expert, so that each is read at most once.

        Shapes: h (T, D), experts and weights (T, K) -> (T, D). Sums in ascending order
        of expert ids, whatever the number of slots.
        """
        bank, y = self.store.bank(layer), np.zeros_like(h)
        chosen = np.unique(experts[experts != NONE])
        for start in range(0, len(chosen), self.store.capacity):
            wave = chosen[start : start + self.store.capacity]
            slots = self.store.request(layer, wave.tolist()).wait()
            for expert, slot in zip(wave, slots, strict=True):
                tokens, ranks = np.nonzero(experts == expert)
                share = weights[tokens, ranks, None]
                y[tokens] += share * self.expert(bank, slot, h[tokens])
            self.store.recorder.lap(recording.EXPERTS)
        return y

    def expert(self, bank: SlotBank, slot: int, x: np.ndarray) -> np.ndarray:
        """The expert in a slot. Shapes: x (T, D) -> (T, D)."""
        projections = (bank.matrix(name)[slot] for name in PROJECTIONS)
        return layers.expert_mlp(x, *projections, self.linear)

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Scores of the next token. Shapes: x (T, D) -> (T, V)."""
        h = layers.rms_norm(x, self.norm, self.config.rms_norm_eps)
        return self.linear(h, self.lm_head)

    # How this engine applies a weight matrix, routes, attends, and remembers.
    linear = staticmethod(linear)
    route_topk = staticmethod(layers.route_topk)
    attend = staticmethod(layers.attend)
    delta_rule = staticmethod(layers.delta_rule)


def check_ids(ids: Sequence[int], n_before: int, config: ModelConfig) -> None:
    """Refuse tokens that the model cannot process.

    Raises: ConfigError for no ids, ids outside the vocabulary, or a text too long.
    """
    try:
        ids = np.asarray(ids)
    except (ValueError, OverflowError):  # lists of several lengths, for example
        raise ConfigError("token ids must be a flat list of integers") from None
    if ids.size == 0:
        raise ConfigError("no token ids: give at least one")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ConfigError("token ids must be a flat list of integers")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        bad = ids[(ids < 0) | (ids >= config.vocab_size)][0]
        raise ConfigError(f"token id {bad} is outside 0..{config.vocab_size - 1}")
    if n_before + len(ids) > config.max_position_embeddings:
        raise ConfigError(
            f"{n_before + len(ids):,} tokens exceed the model's maximum of "
            f"{config.max_position_embeddings:,}; use a shorter prompt"
        )
