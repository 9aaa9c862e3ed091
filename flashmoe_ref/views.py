"""What the widgets show, without the widgets: data, one figure and one line of text.

Routing token by token, attention weights, the memory of a Gated DeltaNet, and a
quantized matrix. Each has a function that returns plain data, a `draw_` function for
the figure (which is all that GitHub and nbviewer show) and a `say_` function for the
same in words. **But:** reads the NumPy engine, compiled or not; MLX keeps its arrays.
*Used in notebooks/01 to 05; `widgets.py` adds the sliders.*
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from . import layers, plots
from .engine import Model
from .errors import ConfigError
from .numpy_model import NumpyModel, State
from .quantize import dequantize, quantize, unpack

MAX_COLUMNS = 10  # tokens side by side whose names can be read
MAX_LEVELS = 16  # lines in a histogram that can be told apart


def token_names(model: Model, ids: Sequence[int]) -> list[str]:
    """The text of each token, short and visible: ' sea' -> 'sea', a line end -> '⏎'."""
    texts = [model.tokenizer.decode([int(token)]) for token in ids]
    return [text.strip(" ").replace("\n", "⏎") or "␣" for text in texts]


def _engine(model: Model) -> NumpyModel:
    """A copy of the engine, whose attributes can be replaced; weights are shared."""
    if not isinstance(model.engine, NumpyModel):
        raise ConfigError("this view needs a model loaded with engine='numpy'")
    return copy(model.engine)


# --- routing --------------------------------------------------------------------------


@dataclass(frozen=True)
class Routing:
    """Which experts each token of a text was sent to, in every layer, best first."""

    tokens: list[str]
    experts: np.ndarray  # (L, T, K) int
    weights: np.ndarray  # (L, T, K), each row sums to 1

    @property
    def k(self) -> int:
        """Experts for a token."""
        return self.experts.shape[-1]


def routing(model: Model, ids: Sequence[int], k: int | None = None) -> Routing:
    """Run a text through a model and note the router's picks, with k experts a token.

    The picks of later layers depend on k too: what the first layers add has changed.
    Raises: ConfigError for fewer than 2 tokens, k above the trained one, or MLX.
    """
    engine, picks = _engine(model), []
    if len(ids) < 2:
        raise ConfigError(
            "routing needs at least 2 tokens: they go through as a prompt"
        )
    if k is not None:
        engine.config = engine.config.with_experts_per_token(k)

    def note(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        picks.append(layers.route_topk(logits, k))
        return picks[-1]

    engine.route_topk = note
    engine.forward(ids, engine.new_state())
    experts, weights = (np.stack(part) for part in zip(*picks, strict=True))
    return Routing(token_names(model, ids), experts, weights)


def say_routing(routing: Routing, layer: int, token: int) -> str:
    """One token's experts and weights in words."""
    pairs = zip(
        routing.experts[layer, token], routing.weights[layer, token], strict=True
    )
    picks = ", ".join(f"{expert} ({weight:.0%})" for expert, weight in pairs)
    name = routing.tokens[token]
    return f"layer {layer}, token {token} “{name}”, K={routing.k}: experts {picks}"


def draw_routing(routing: Routing, layer: int, token: int) -> np.ndarray:
    """Draw the picks around a token, and the token's own weights. Returns both Axes."""
    _fig, (left, right) = plots.figure(2)
    start = _window(token, len(routing.tokens))
    shown = slice(start, start + MAX_COLUMNS)
    plots.heatmap(
        routing.weights[layer, shown].T,
        title=f"Layer {layer}: the {routing.k} experts of each token",
        x="token",
        y="rank (0 is best)",
        value="weight",
        limits=(0, float(routing.weights[layer, shown].max())),
        columns=routing.tokens[shown],
        numbers=routing.experts[layer, shown].T if routing.k <= 10 else False,
        ax=left,
    )
    _frame_column(left, token - start)
    percent = 100 * routing.weights[layer, token]
    plots.bars(
        dict(zip(map(str, routing.experts[layer, token]), percent, strict=True)),
        title=f"“{routing.tokens[token]}”: the best has {percent.max():.0f} %",
        x="expert",
        y="weight (%)",
        ax=right,
    )
    right.set_ylim(0, 108)
    return np.array([left, right])


def _window(token: int, n: int) -> int:
    """First of the MAX_COLUMNS tokens that are shown around a token."""
    return max(0, min(token - MAX_COLUMNS // 2, n - MAX_COLUMNS))


def _frame_column(ax: Axes, column: int) -> None:
    for x in (column - 0.5, column + 0.5):
        ax.axvline(x, color=plots.VERMILLION, lw=3)


# --- attention ------------------------------------------------------------------------


def attention_weights(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """How much each of the newest T tokens takes from each of all n; rows sum to 1.

    Shapes: q (T, H, Dh), k (n, Hkv, Dh) -> (H, T, n). Times the values, the result of
    `layers.attend`.
    """
    t, n_heads, dh = q.shape
    keys = np.repeat(k, n_heads // k.shape[1], axis=1)  # (n, H, Dh)
    scores = q.transpose(1, 0, 2) @ keys.transpose(1, 2, 0) * q.dtype.type(dh**-0.5)
    n = len(k)
    scores[:, np.arange(n) > np.arange(n - t, n)[:, None]] = -np.inf
    return layers.softmax(scores)


def attention_of_layer(model: Model, ids: Sequence[int], layer: int) -> np.ndarray:
    """A layer's attention weights on a text. Shapes: ids (T,) -> (H, T, T).

    Raises: ConfigError if the layer is a Gated DeltaNet.
    """
    engine = _engine(model)
    c = engine.config
    if c.is_linear(layer):
        full = [i for i in range(c.num_hidden_layers) if not c.is_linear(i)]
        raise ConfigError(f"layer {layer} is a Gated DeltaNet; attention is in {full}")
    x, state = _run_to(engine, ids, layer)
    w = engine.layers[layer]
    h = layers.rms_norm(x, w["input_layernorm"], c.rms_norm_eps)
    rows = engine.linear(h, w["q_proj"]).reshape(len(ids), -1, 2 * c.head_dim)
    q = layers.rms_norm(rows[..., : c.head_dim], w["q_norm"], c.rms_norm_eps)
    cos, sin = layers.rope_angles(np.arange(len(ids)), c.rotary_dim, c.rope_theta)
    engine.mix(layer, h, state)  # fills the cache with the keys
    return attention_weights(
        layers.rotate(q, cos, sin), state.layers[layer].k[: len(ids)]
    )


def _run_to(
    engine: NumpyModel, ids: Sequence[int], layer: int
) -> tuple[np.ndarray, State]:
    """What enters a layer, (T, D), and the state of the layers before it."""
    state, x = engine.new_state(), engine.embed(np.asarray(ids))
    for before in range(layer):
        x = engine.layer(before, x, state)
    return x, state


def say_attention(
    weights: np.ndarray, tokens: Sequence[str], head: int, query: int
) -> str:
    """Where one token looks most, in words."""
    row = weights[head, query]
    best = np.argsort(-row, kind="stable")[:3]
    places = ", ".join(f"{row[i]:.0%} at {i} “{tokens[i]}”" for i in best if row[i] > 0)
    return f"head {head}, token {query} “{tokens[query]}” looks {places}"


def draw_attention(
    weights: np.ndarray, tokens: Sequence[str], head: int, query: int
) -> Axes:
    """Draw a head's weights, (T, n) of (H, T, n), with one query's row framed."""
    row = weights[head, query]
    best = int(row.argmax())
    names = list(tokens) if len(tokens) <= 2 * MAX_COLUMNS else None
    ax = plots.heatmap(
        weights[head],
        title=f"Head {head}: “{tokens[query]}” looks most at “{tokens[best]}” "
        f"({row[best]:.0%})",
        x="looked at (key)",
        y="looking (query)",
        value="attention weight",
        limits=(0, 1),
        rows=names,
        columns=names,
    )
    for y in (query - 0.5, query + 0.5):
        ax.axhline(y, color=plots.VERMILLION, lw=2.5)
    return ax


# --- the memory of a Gated DeltaNet ---------------------------------------------------


def delta_states(model: Model, ids: Sequence[int], layer: int) -> np.ndarray:
    """A layer's memory after each token. Shapes: ids (T,) -> (T, Hv, Dv, Dk).

    Raises: ConfigError if the layer is attention.
    """
    engine = _engine(model)
    if not engine.config.is_linear(layer):
        raise ConfigError(f"layer {layer} is attention; it has a cache, not a memory")
    state, seen = engine.new_state(), []
    for token in ids:
        engine.forward([int(token)], state)
        seen.append(state.layers[layer].s.copy())
    return np.stack(seen)


def say_state(states: np.ndarray, tokens: Sequence[str], head: int, token: int) -> str:
    """How large a head's memory is, and how much of it the token changed, in words."""
    now, before = states[token, head], states[max(token - 1, 0), head]
    size, change = np.linalg.norm(now), np.linalg.norm(now - before)
    if token == 0:
        change = size  # it was empty
    return (
        f"head {head}, after token {token} “{tokens[token]}”: "
        f"size {size:.3g}, changed by {change:.3g}"
    )


def draw_state(
    states: np.ndarray, tokens: Sequence[str], head: int, token: int
) -> np.ndarray:
    """Draw a head's memory after a token, and its size over the text. Both Axes."""
    _fig, (left, right) = plots.figure(2)
    # one range for all tokens; the few largest values would leave the rest pale
    extreme = float(np.quantile(np.abs(states[:, head]), 0.995)) or 1.0
    plots.heatmap(
        states[token, head],
        title=f"Head {head}: the memory after “{tokens[token]}”",
        x="key dimension",
        y="value dimension",
        value="state",
        limits=(-extreme, extreme),
        diverging=True,
        ax=left,
    )
    sizes = np.linalg.norm(states[:, head], axis=(-2, -1))
    plots.lines(
        {"size": (np.arange(len(sizes)), sizes)},
        title=f"{states[0, 0].size:,} numbers, however long the text",
        x="token",
        y="size of the state (norm)",
        ax=right,
    )
    plots.mark(right, x=token, text=f"“{tokens[token]}”")
    right.set_ylim(bottom=0)
    return np.array([left, right])


# --- quantization ---------------------------------------------------------------------


@dataclass(frozen=True)
class Quantized:
    """What a choice of bits, group size and rule does to a matrix."""

    bits: int
    group_size: int
    rule: str
    group: np.ndarray  # (group_size,): the weights of the first group
    levels: np.ndarray  # (2**bits,): the values that this group can take
    used: int  # how many of them it does take
    errors: np.ndarray  # of all weights, flat
    bits_per_weight: float  # with scales and biases

    relative_error: float  # root mean square of errors / of weights


def quantized_view(
    w: np.ndarray, bits: int, group_size: int, rule: str = "mlx"
) -> Quantized:
    """Quantize a matrix and compare. Shapes: w (out, in) float32."""
    w = np.asarray(w, np.float32)
    packed = quantize(w, bits, group_size, rule)
    errors = (dequantize(packed) - w).ravel()
    levels = np.arange(2**bits) * packed.scales[0, 0] + packed.biases[0, 0]
    words = unpack(packed.weight[0], bits)[:group_size]
    return Quantized(
        bits,
        group_size,
        rule,
        w[0, :group_size],
        levels,
        len(np.unique(words)),
        errors,
        bits + 2 * 16 / group_size,  # a scale and a bias of 16 bits for each group
        float(np.sqrt(np.mean(errors**2) / np.mean(w**2))),
    )


def say_quantized(view: Quantized) -> str:
    """Cost and error in words."""
    return (
        f"{view.bits} bits, groups of {view.group_size}, rule {view.rule}: "
        f"{view.bits_per_weight:.3g} bits a weight, error {view.relative_error:.2%} "
        f"of the weights; the first group uses {view.used} of {len(view.levels)} levels"
    )


def draw_quantized(view: Quantized) -> np.ndarray:
    """Draw the first group with its levels, and all errors. Returns both Axes."""
    _fig, (left, right) = plots.figure(2)
    few = len(view.levels) <= MAX_LEVELS
    plots.histogram(
        view.group,
        title=f"{view.bits} bits give a group {len(view.levels)} levels"
        + ("" if few else " (too many to draw)"),
        x="weight, first group",
        bins=24,
        levels=view.levels if few else None,
        ax=left,
    )
    plots.histogram(
        view.errors,
        title=f"The error is {view.relative_error:.2%} of the weights",
        x="decoded minus true weight",
        bins=60,
        ax=right,
    )
    return np.array([left, right])
