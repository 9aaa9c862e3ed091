"""How much louder do fewer experts speak? A factor for each layer, from a text.

Renormalised weights sum to 1 however few are left, and few outputs cancel each other
less than many: their sum is longer than the trained one. `calibrate_output_scale`
measures by how much, on a text, and `load(output_scale=...)` takes it back. It looks at
the routed experts alone; the shared expert is outside of the factor, there and here.
**But:** one factor a layer, the same for all tokens. *Taught in notebooks/10.*
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from .engine import Model
from .errors import ConfigError
from .routing_cut import RoutingCut

FITS = ("norm", "error")
WINDOW = 512  # tokens at a time, each from a fresh state


def calibrate_output_scale(
    model: Model,
    ids: Sequence[int],
    k: int,
    kept: str = "renormalized",
    fit: str = "norm",
) -> np.ndarray:
    """Factors that give the output of k experts the size of the trained number's.

    Both are computed from the same hidden states, those of the model as trained: load
    it without k. Its counters also count what is read for this.
    Shapes: ids (T,) -> (L,) float32.
    fit:    "norm", the ratio of the root mean squares of both outputs; or "error", the
            factor that leaves the least squared difference between them.
    Raises: ConfigError for a model with a cut of its own, for k, or fewer than 2 ids.
    Source: flash-moe renormalises without such a factor. On the reduced model at K=4 it
            takes JSON answers from 0.024 nats a token to 0.012 and leaves prose as it
            is (by 0.009 +- 0.021); at K=2, from 0.32 to 0.055. Lesson 10.
    """
    trained_k = model.checkpoint.config.num_experts_per_tok
    if model.config.num_experts_per_tok < trained_k or model.engine.cut is not None:
        raise ConfigError("to calibrate, load the model as trained: without k and mass")
    if not 1 <= k <= trained_k or len(ids) < 2 or fit not in FITS:
        raise ConfigError(
            f"k={k}, {len(ids)} ids, fit={fit!r}: k must be in 1..{trained_k}, ids at "
            f"least 2, and fit one of {', '.join(FITS)}"
        )
    cut = RoutingCut(k, trained_k, kept)
    sums = np.zeros((3, model.config.num_hidden_layers))
    with _both_outputs(model.engine, cut, sums):
        for part in np.array_split(np.asarray(ids), -(-len(ids) // WINDOW)):
            model.engine.forward(part.tolist(), model.new_state())
    whole, fewer, product = sums
    ratio = np.sqrt(whole / fewer) if fit == "norm" else product / fewer
    return ratio.astype(np.float32)


@contextmanager
def _both_outputs(engine: object, cut: RoutingCut, sums: np.ndarray) -> Iterator[None]:
    """Compute each prompt layer twice; add up squares (L,) of both, and the product."""
    as_trained = engine.experts_of_prompt

    def twice(
        layer: int, h: object, experts: np.ndarray, weights: np.ndarray
    ) -> object:
        fewer = as_trained(layer, h, *cut.apply(layer, experts, weights))
        a = _as_numpy(fewer).ravel()
        output = as_trained(layer, h, experts, weights)
        b = _as_numpy(output).ravel()
        sums[:, layer] += np.dot(b, b), np.dot(a, a), np.dot(a, b)
        return output

    engine.experts_of_prompt = twice
    try:
        yield
    finally:
        del engine.experts_of_prompt


def _as_numpy(y: object) -> np.ndarray:
    """Outputs (T, D) of either engine, in float32."""
    if isinstance(y, np.ndarray):
        return y
    import mlx.core as mx

    return np.array(y.astype(mx.float32))
