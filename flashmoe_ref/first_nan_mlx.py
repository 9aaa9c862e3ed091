"""`first_nan.steps` for the MLX engine: what each of its modules makes of some tokens.

The steps and their names are those of `first_nan.py`, computed with the functions of
`mlx_layers.py`. **But:** nothing is traced or put together, so it is slow, and a kernel
of the quick way that is wrong by itself is not found. *Taught in notebooks/04.*
"""

from collections.abc import Generator

import mlx.core as mx
import numpy as np

from . import mlx_layers as layers
from .mlx_model import MlxModel
from .mlx_weights import linear
from .numpy_model import State
from .routing_cut import NONE

Steps = Generator[tuple[str, np.ndarray], None, mx.array]


def steps(model: MlxModel, ids: np.ndarray, state: State) -> Steps:
    """What each module makes of the tokens, in the order of `MlxModel.forward`."""
    x = model.embed(ids)
    yield "embed_tokens", _numbers(x)
    for layer in range(model.config.num_hidden_layers):
        x = yield from _steps_of_layer(model, layer, x, state)
    h = layers.rms_norm(x, model.norm, model.config.rms_norm_eps)
    yield "the last norm", _numbers(h)
    for t in reversed(range(len(h))):  # one by one: a row of logits is large
        yield "lm_head", _numbers(linear(h[t : t + 1], model.lm_head))
    return h


def _numbers(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def _steps_of_layer(model: MlxModel, layer: int, x: mx.array, state: State) -> Steps:
    c, w, where = model.config, model.layers[layer], f"layer {layer}"
    h = layers.rms_norm(x, w["input_layernorm"], c.rms_norm_eps)
    yield f"{where}, norm (input_layernorm)", _numbers(h)
    x = model.mix(layer, x, state)
    module = "linear_attn" if c.is_linear(layer) else "self_attn"
    yield f"{where}, mixer ({module})", _numbers(x)
    h = layers.rms_norm(x, w["post_attention_layernorm"], c.rms_norm_eps)
    yield f"{where}, norm (post_attention_layernorm)", _numbers(h)
    scores = linear(h.astype(mx.float32), w["gate"])
    yield f"{where}, router (mlp.gate)", _numbers(scores)
    shared = layers.shared_expert(h, w)
    yield f"{where}, shared expert (mlp.shared_expert)", _numbers(shared)
    routed = yield from _steps_of_experts(model, layer, h, scores)
    x = x + (routed + shared)
    yield f"{where}, sum with the experts", _numbers(x)
    return x


def _steps_of_experts(
    model: MlxModel, layer: int, h: mx.array, scores: mx.array
) -> Steps:
    k = model.config.num_experts_per_tok if model.cut is None else model.cut.trained_k
    experts, weights = model.route(layer, *layers.route_topk(scores, k))
    y = np.zeros(h.shape, np.float32)
    for expert in np.unique(experts[experts != NONE]).tolist():
        (slot,) = model.store.request(layer, [expert]).wait()
        tokens, ranks = np.nonzero(experts == expert)
        x = h[mx.array(tokens)][:, None]
        index = mx.full((len(tokens),), slot, mx.uint32)
        part = _numbers(layers.expert_mlp(x, model.experts[layer], index))
        yield f"layer {layer}, expert {expert} (mlp.experts)", part
        y[tokens] += weights[tokens, ranks, None] * part
    return mx.array(y).astype(h.dtype)
