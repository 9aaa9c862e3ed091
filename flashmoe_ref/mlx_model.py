"""The whole model in MLX: `mlx_layers.py` assembled over streamed experts.

The functions have the names and the order of `numpy_model.py`; read the two side by
side. Activations are float32 on the CPU and bfloat16 on a GPU; weights stay as the file
has them. **But:** batch size one. *Taught in notebooks/04 and 07.*

How it maps to the reference:

*Laziness.* MLX computes when asked to. Where experts are streamed there is one wait a
layer: for the router's picks, since what to read depends on them. Everything before is
computed by then, so the experts of layer l are evaluated no later than the router of
layer l + 1. Where all are resident, Python need not know the picks: a token has one
wait, for its logits.

*Parts.* A layer's arrays go through three functions: `mix_step`, `route_step`,
`experts_step`. For a single token each is traced once and replayed by mx.compile: a
token is some dozens of small operations a layer, whose price is that of starting them.
NOTE: on the CPU MLX builds fused operations with the C++ compiler that it finds, about
a second each, and keeps them in the temporary folder: the first token on a machine
takes some seconds. Without a compiler the same runs unfused.

*Slots.* A slot is refilled only by a request to its bank, and a request follows a wait
that covers every use of the bank so far: the router's of the next layer for a bank that
all layers share, and of the next token for a layer's own. Inside a prompt, where one
layer makes several requests, each but the last wave of experts is waited for. A read
ahead may begin earlier, right after a layer's request: all of the layer before has been
computed by then, and it spares the slots of this request. So no graph that is still to
be evaluated refers to a slot that is overwritten.

*Bits.* On the CPU each row of a product is computed by itself, so the logits do not
depend on slots or waves. On a GPU MLX may choose a kernel by the number of rows, which
waves change: equality to the bit is tested on the CPU.

*Threads.* An MLX stream belongs to the thread that made it, and so does an array that
is not evaluated. Every array of a state is evaluated when forward() returns: any thread
may make the next call, but only one at a time. The store's threads only read bytes.
Each thread traces for itself: MLX keeps what it traced in a table of the thread, by the
function's address, and forgets in one table only when the function goes. In another's
it would answer for whatever function comes to lie there (mlx issue 3940).
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from . import gpu_kernels, recording
from . import mlx_layers as layers
from .checkpoint import Checkpoint
from .config import ModelConfig
from .guards import check_routing
from .mlx_layers import AttentionState, DeltaState
from .mlx_slots import bank_matrices, widened_bytes
from .mlx_weights import linear, to_matrix, to_stack, widen
from .numpy_model import NORMS, VECTORS, State, check_ids
from .routing_cut import NONE, RoutingCut, drop_none
from .streaming import ExpertStore

BLOCK_BYTES = 1 << 26  # rows and widened weights of a prompt's experts at a time
LAYERS_AHEAD = 4  # that Python builds before it lets MLX begin, where nothing waits
COPY_BYTES = 1 << 22  # converting less than this is cheaper than to sort out the slots

# name of a stack -> the matrices that the same input is multiplied by
STACKS = {
    "linear_attention": {
        "in_proj": [f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a")]
    },
    "full_attention": {
        "qkv_proj": [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    },
    "mlp": {
        "shared": [
            "mlp.shared_expert.gate_proj",
            "mlp.shared_expert.up_proj",
            "mlp.shared_expert_gate",
        ]
    },
}
MATRICES = {
    "linear_attention": {"out_proj": "linear_attn.out_proj"},
    "full_attention": {"o_proj": "self_attn.o_proj"},
    "mlp": {"gate": "mlp.gate", "shared_down_proj": "mlp.shared_expert.down_proj"},
}


def load_layer(checkpoint: Checkpoint, layer: int) -> dict:
    """Read a layer's dense weights, by the names that `mlx_layers.py` uses."""
    kind = checkpoint.config.layer_types[layer]
    stem = f"layers.{layer}"
    w = {}
    for name, parts in (STACKS[kind] | STACKS["mlp"]).items():
        w[name] = to_stack([checkpoint.module(f"{stem}.{p}") for p in parts])
    for name, module in (MATRICES[kind] | MATRICES["mlp"]).items():
        w[name] = to_matrix(checkpoint.module(f"{stem}.{module}"))
    for name in VECTORS[kind] + list(NORMS):
        w[name.rsplit(".", 1)[-1]] = mx.array(checkpoint.vector(f"{stem}.{name}"))
    if kind == "linear_attention":
        w["A"] = -mx.exp(w.pop("A_log"))
        conv1d = checkpoint.module(f"{stem}.linear_attn.conv1d")
        w["conv1d"] = mx.array(np.ascontiguousarray(conv1d.T))
    # What is lazy belongs to the loading thread, so nothing may stay lazy.
    mx.eval([getattr(value, "arrays", value) for value in w.values()])
    return w


class MlxModel:
    """Qwen3.5-MoE in MLX: dense weights in memory, experts through a store.

    The store must have been made with `allocate`. n_syncs counts the times that
    Python waited for MLX.
    """

    cut: RoutingCut | None = None  # of the routing budget, where route_topk is not all

    def __init__(
        self, checkpoint: Checkpoint, store: ExpertStore, config: ModelConfig
    ) -> None:
        self.config = config
        self.store = store
        self.n_syncs = 0
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        self.dtype = mx.float32 if on_cpu else mx.bfloat16  # of activations
        self.periods = layers.rope_periods(config.rotary_dim, config.rope_theta)
        # The largest first: each is in memory twice while it is copied.
        self.embed_tokens = to_matrix(checkpoint.module("embed_tokens"))
        self.lm_head = (
            self.embed_tokens
            if config.tie_word_embeddings
            else to_matrix(checkpoint.module("lm_head"))
        )
        self.norm = mx.array(checkpoint.vector("norm"))
        mx.eval(self.periods, self.norm, self.embed_tokens.arrays, self.lm_head.arrays)
        n_layers = range(config.num_hidden_layers)
        self.layers = [load_layer(checkpoint, layer) for layer in n_layers]
        self.experts = [bank_matrices(store.bank(layer)) for layer in n_layers]
        self.widened_bytes = [widened_bytes(e, self.dtype) for e in self.experts]
        self.traced = threading.local()  # by part and layer, for each thread

    def new_state(self) -> State:
        """The state before the first token."""
        c = self.config
        delta = (c.linear_conv_kernel_dim, c.conv_dim, c.linear_num_value_heads)
        heads = (c.linear_value_head_dim, c.linear_key_head_dim)
        state = State(
            [
                DeltaState.empty(*delta, *heads, self.dtype)
                if c.is_linear(layer)
                else AttentionState.empty(c.num_key_value_heads, c.head_dim, self.dtype)
                for layer in range(c.num_hidden_layers)
            ]
        )
        mx.eval([layer.arrays for layer in state.layers])
        return state

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
        self.wait(logits, [layer.arrays for layer in state.layers])
        logits = np.array(logits, copy=False)
        recorder.end()
        return logits if all_logits else logits[0]

    def embed(self, ids: np.ndarray) -> mx.array:
        """Look tokens up. Shapes: ids (T,) -> (T, D)."""
        return widen(self.embed_tokens[mx.array(ids)], self.dtype)

    def layer(self, layer: int, x: mx.array, state: State) -> mx.array:
        """One block: mix over time, then over experts. Shapes: x (T, D) -> (T, D)."""
        h = layers.rms_norm(
            x, self.layers[layer]["input_layernorm"], self.config.rms_norm_eps
        )
        x = self.moe(layer, x + self.mix(layer, h, state))
        if layer % LAYERS_AHEAD == 0:
            mx.async_eval(x)  # MLX computes while Python builds the next layers' graph
        return x

    def mix(self, layer: int, h: mx.array, state: State) -> mx.array:
        """Gated DeltaNet or gated attention. Shapes: h (T, D) -> (T, D)."""
        w, own, eps = self.layers[layer], state.layers[layer], self.config.rms_norm_eps
        if self.config.is_linear(layer):
            y, own.conv, own.s = self.part("mix_step", layer, h, own.conv, own.s)
            return y
        return layers.gated_attention(h, w, own, self.periods, eps)

    def mix_step(
        self, layer: int, h: mx.array, conv: mx.array, s: mx.array
    ) -> tuple[mx.array, ...]:
        """Gated DeltaNet as arrays to arrays: h (T, D), conv, s -> y (T, D), new."""
        c, w, own = self.config, self.layers[layer], DeltaState(conv, s)
        heads = c.linear_num_key_heads
        y = layers.gated_delta_net(h, w, own, heads, c.rms_norm_eps)
        return y, own.conv, own.s

    def moe(self, layer: int, x: mx.array) -> mx.array:
        """Add routed experts and the shared one. Shapes: x (T, D) -> (T, D).

        MLX computes the shared expert while Python reads.
        """
        h, experts, weights, shared = self.part("route_step", layer, x)
        recorder, k = self.store.recorder, self.config.num_experts_per_tok
        is_known = self.store.is_resident and self.cut is None  # slot e holds expert e
        if is_known and recorder is recording.SILENT and len(x) == 1:
            self.store.counters.hits += k
            return self.part("experts_step", layer, x, h, shared, experts, weights)
        ahead = self.scores_ahead(layer, h) if self.looks_ahead(layer, h) else None
        mx.async_eval(experts, weights, ahead)
        mx.async_eval(shared)  # queued behind the picks, which do not wait for it
        recorder.lap(recording.MIX)
        self.wait(experts, weights, ahead)
        recorder.lap(recording.SYNC)
        chosen, shares = self.route(layer, experts, weights)
        recorder.routed(chosen, shares)
        if len(x) > 1:
            return x + (self.experts_of_prompt(layer, h, chosen, shares) + shared)
        wanted, shares = drop_none(chosen[0], shares[0])
        ticket = self.store.request(layer, wanted)
        if self.store.predictor is not None:
            scores = None if ahead is None else np.array(ahead, copy=False)[0]
            self.store.prefetch(layer, wanted, scores)
        if self.cut is not None:
            weights = mx.array(shares[None])
        slots = mx.array(ticket.wait(), mx.uint32)
        return self.part("experts_step", layer, x, h, shared, slots, weights)

    def route_step(self, layer: int, x: mx.array) -> tuple[mx.array, ...]:
        """Norm, router and shared expert of some tokens.

        Shapes: x (T, D) -> h (T, D), experts and weights (T, K), shared (T, D). K is
        the trained one where a cut drops some of them.
        """
        c, w = self.config, self.layers[layer]
        h = layers.rms_norm(x, w["post_attention_layernorm"], c.rms_norm_eps)
        k = c.num_experts_per_tok if self.cut is None else self.cut.trained_k
        router_logits = linear(h.astype(mx.float32), w["gate"])
        experts, weights = layers.route_topk(router_logits, k)
        return h, experts, weights, layers.shared_expert(h, w)

    def route(
        self, layer: int, experts: mx.array, weights: mx.array
    ) -> tuple[np.ndarray, np.ndarray]:
        """For Python: each token's experts and their weights. Shapes: all (T, K).

        Raises: RoutingError for scores that are no numbers.
        """
        chosen = np.array(experts, copy=False).astype(int)
        shares = np.array(weights, copy=False)
        check_routing(layer, shares)
        if self.cut is None:
            return chosen, shares
        return self.cut.apply(layer, chosen, shares, self.store.counters)

    def looks_ahead(self, layer: int, h: mx.array) -> bool:
        """Whether the store wants the next router's scores, which one token has."""
        predictor, has_next = self.store.predictor, layer + 1 < len(self.layers)
        wanted = predictor is not None and predictor.looks_ahead
        return wanted and has_next and len(h) == 1

    def scores_ahead(self, layer: int, h: mx.array) -> mx.array:
        """What the next layer's router says of this layer's hidden state.

        Shapes: h (T, D), as this layer's router sees it -> (T, E).
        """
        now, after = (
            self.layers[i]["post_attention_layernorm"] for i in (layer, layer + 1)
        )
        # h was scaled by this layer's norm; the next router expects its own
        ratio = mx.where(now == 0, 0, after / now)
        return linear(h.astype(mx.float32) * ratio, self.layers[layer + 1]["gate"])

    def experts_step(
        self,
        layer: int,
        x: mx.array,
        h: mx.array,
        shared: mx.array,
        slots: mx.array,
        weights: mx.array,
    ) -> mx.array:
        """Add the weighted sum of a token's experts, best first, and the shared one.

        Shapes: x, h and shared (1, D), slots K of them, weights (1, K) -> (1, D).
        """
        experts, index = self.experts[layer], slots.reshape(-1)
        if gpu_kernels.are_faster(experts):
            routed = gpu_kernels.expert_sum(h, experts, index, weights)
            return x + (routed.astype(h.dtype) + shared)
        n_slots = self.store.bank(layer).n_slots
        if self.widened_bytes[layer] > COPY_BYTES and n_slots > index.size:
            # MLX would widen the whole bank; a copy of the slots in use is cheaper.
            experts = {name: matrix[index] for name, matrix in experts.items()}
            index = mx.arange(index.size, dtype=mx.uint32)
        y = layers.expert_mlp(h[None], experts, index)  # (K, D)
        return x + ((weights @ y.astype(mx.float32)).astype(h.dtype) + shared)

    def experts_of_prompt(
        self, layer: int, h: mx.array, experts: np.ndarray, weights: np.ndarray
    ) -> mx.array:
        """The same for T tokens, expert by expert, so that each is read at most once.

        Shapes: h (T, D), experts and weights (T, K) -> (T, D). Each output goes to its
        token and rank and the sum comes last, best first: so it does not depend on the
        number of slots. This takes T * K * D values of memory.
        """
        (t, k), capacity = experts.shape, self.store.capacity
        outputs = mx.zeros((t * k, h.shape[1]), h.dtype)
        chosen = np.unique(experts[experts != NONE])
        for start in range(0, len(chosen), capacity):
            if start:  # the slots of the wave before are about to be refilled
                self.wait(outputs)
                self.store.recorder.lap(recording.SYNC)
            wave = chosen[start : start + capacity]
            slots = self.store.request(layer, wave.tolist()).wait()
            # one more than experts: NONE, the last one, is in no slot
            slot_of = np.full(self.config.num_experts + 1, -1)
            slot_of[wave] = slots
            outputs = self.wave(layer, h, slot_of[experts], outputs)
            self.store.recorder.lap(recording.EXPERTS)
        outputs = outputs.reshape(t, k, -1).astype(mx.float32)
        return (mx.array(weights)[:, None] @ outputs).squeeze(1).astype(h.dtype)

    def wave(
        self, layer: int, h: mx.array, slots: np.ndarray, outputs: mx.array
    ) -> mx.array:
        """Compute the experts that are in slots now, and put their outputs in place.

        Shapes: h (T, D), slots (T, K) with -1 for an expert that is not here, outputs
        (T * K, D) -> outputs. Rows go in the order of slots, some slots at a time.
        """
        k, slots = slots.shape[1], slots.ravel()
        places = np.argsort(slots, kind="stable")[np.sum(slots < 0) :]
        slots = slots[places]
        row_bytes = 3 * h.dtype.size * h.shape[1]  # input, output, what is between
        slot_bytes = self.widened_bytes[layer] // self.store.bank(layer).n_slots
        for rows in blocks(slots, row_bytes, slot_bytes):
            first, last = slots[rows.start], slots[rows.stop - 1] + 1
            # slices share memory with the bank
            experts = {p: m[first:last] for p, m in self.experts[layer].items()}
            x = h[mx.array(places[rows] // k)][:, None]  # (R, 1, D)
            index = mx.array((slots[rows] - first).astype(np.uint32))
            y = layers.expert_mlp(x, experts, index, is_sorted=True)
            outputs[mx.array(places[rows])] = y
        return outputs

    def logits(self, x: mx.array) -> mx.array:
        """Scores of the next token, float32. Shapes: x (T, D) -> (T, V)."""
        h = layers.rms_norm(x, self.norm, self.config.rms_norm_eps)
        return linear(h, self.lm_head).astype(mx.float32)

    def part(self, name: str, layer: int, *arrays: mx.array) -> mx.array | tuple:
        """Run a function of a layer's arrays: for one token as MLX traced it."""
        if len(arrays[0]) > 1:
            return getattr(self, name)(layer, *arrays)
        key, traced = f"{name} {layer}", vars(self.traced)  # this thread's
        if key not in traced:
            # by a proxy: in a circle of references, memory would outlive the model
            function = partial(getattr(MlxModel, name), weakref.proxy(self), layer)
            traced[key] = mx.compile(function)
        return traced[key](*arrays)

    def wait(self, *arrays: mx.array | list) -> None:
        """Let Python stand still until MLX has computed arrays."""
        self.n_syncs += 1
        mx.eval(*arrays)


def blocks(slots: np.ndarray, row_bytes: int, slot_bytes: int) -> Iterator[slice]:
    """Cut ascending slots into ranges of rows that take at most BLOCK_BYTES.

    A slot's rows stay together, so a block may be larger where it has one slot.
    """
    starts = np.flatnonzero(np.diff(slots, prepend=-1))  # first row of each slot
    begin = 0
    for start, stop in zip(starts, [*starts[1:], len(slots)], strict=True):
        n_slots = slots[start] - slots[begin] + 1
        too_large = (stop - begin) * row_bytes + n_slots * slot_bytes > BLOCK_BYTES
        if start > begin and too_large:
            yield slice(begin, start)
            begin = start
    yield slice(begin, len(slots))
