"""Where NaN or infinity begins on a token's way through the model: layer and module.

Looked for only after logits, or a router's scores, came out as no numbers, so it costs
nothing before. The tokens are computed once more, step by step, on a copy of the state;
the first step whose result is not finite is to blame: what went into it was.
**But:** the state is the one after the failure, so what an earlier token left in it
shows where the state is used. *Taught in notebooks/04.*
"""

from collections.abc import Callable, Generator, Sequence

import numpy as np

from . import layers
from .numpy_model import NumpyModel, State
from .recording import SILENT
from .routing_cut import NONE
from .streaming import Counters

Steps = Generator[tuple[str, np.ndarray], None, np.ndarray]


def first_nan(
    model: object, ids: Sequence[int], state: State, steps: Callable[..., Steps]
) -> str | None:
    """The module whose result is the first that is not finite; None: all are.

    ids are tokens whose logits were no numbers, state what they left behind. steps are
    those of the engine: of this file, or of `first_nan_mlx.py`.
    Raises: ReadError, NumericError from reading experts again.
    """
    store = model.store
    kept = store.recorder, store.counters
    store.recorder, store.counters = SILENT, Counters()
    try:
        with np.errstate(all="ignore"):  # NumPy's warnings would only repeat it
            for place, values in steps(model, np.asarray(ids), state.snapshot()):
                if not np.isfinite(values).all():
                    return place
        return None
    finally:
        store.recorder, store.counters = kept


def steps(model: NumpyModel, ids: np.ndarray, state: State) -> Steps:
    """What each module makes of the tokens, in the order of `NumpyModel.forward`."""
    x = model.embed(ids)
    yield "embed_tokens", x
    for layer in range(model.config.num_hidden_layers):
        x = yield from _steps_of_layer(model, layer, x, state)
    h = layers.rms_norm(x, model.norm, model.config.rms_norm_eps)
    yield "the last norm", h
    for row in h[::-1]:  # one by one: a row of logits is large
        yield "lm_head", model.linear(row[None], model.lm_head)
    return h


def _steps_of_layer(
    model: NumpyModel, layer: int, x: np.ndarray, state: State
) -> Steps:
    c, w, where = model.config, model.layers[layer], f"layer {layer}"
    h = layers.rms_norm(x, w["input_layernorm"], c.rms_norm_eps)
    yield f"{where}, norm (input_layernorm)", h
    mixed = model.mix(layer, h, state)
    module = "linear_attn" if c.is_linear(layer) else "self_attn"
    yield f"{where}, mixer ({module})", mixed
    x = x + mixed
    yield f"{where}, sum with the mixer", x
    h = layers.rms_norm(x, w["post_attention_layernorm"], c.rms_norm_eps)
    yield f"{where}, norm (post_attention_layernorm)", h
    scores = model.linear(h, w["gate"])
    yield f"{where}, router (mlp.gate)", scores
    shared = layers.shared_expert(h, w, model.linear)
    yield f"{where}, shared expert (mlp.shared_expert)", shared
    routed = yield from _steps_of_experts(model, layer, h, scores)
    x = x + routed + shared
    yield f"{where}, sum with the experts", x
    return x


def _steps_of_experts(
    model: NumpyModel, layer: int, h: np.ndarray, scores: np.ndarray
) -> Steps:
    experts, weights = model.route(layer, scores)
    bank, y = model.store.bank(layer), np.zeros_like(h)
    for expert in np.unique(experts[experts != NONE]).tolist():
        (slot,) = model.store.request(layer, [expert]).wait()
        tokens, ranks = np.nonzero(experts == expert)
        part = model.expert(bank, slot, h[tokens])
        yield f"layer {layer}, expert {expert} (mlp.experts)", part
        y[tokens] += weights[tokens, ranks, None] * part
    return y
