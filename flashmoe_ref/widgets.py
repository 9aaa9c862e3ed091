"""Explorers with sliders: the views of `views.py`, redrawn when a slider moves.

An explorer is a box of controls, a picture and a line of text. It needs a running
kernel; a notebook shows the view of the default state above it, for readers without.
    explorer = router_explorer(lambda k: routing(model, ids, k), k_max=10)
    explorer.controls["K"].value = 4     # as if a slider were moved
    explorer.text.value                  # what it then says
**But:** uses neither `interact` nor `Output`, which leak into the tests of notebooks.
*Used in notebooks/01 to 09.*
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from html import escape

import numpy as np
from ipywidgets import (
    HTML,
    Dropdown,
    Image,
    IntSlider,
    Layout,
    Play,
    SelectionSlider,
    VBox,
    Widget,
    jslink,
)
from matplotlib.axes import Axes

from . import cache_views, plots
from .cache_views import Setting, draw_setting, say_setting
from .errors import ConfigError, FlashMoeError
from .flash_views import Tradeoffs, draw_tradeoff, say_tradeoff
from .hardware import in_kib
from .overlap_views import Timeline, draw_timelines, say_timeline, timeline
from .probe_disk import DiskProbe
from .probe_views import draw_bandwidth, modes_of, say_bandwidth
from .quantize import BITS, GROUP_SIZES, RULES
from .ranges import is_whole
from .simulator import Requests
from .slot_views import Frame, draw_frame, say_frame
from .trace import Trace
from .views import (
    Routing,
    draw_attention,
    draw_quantized,
    draw_routing,
    draw_state,
    quantized_view,
    say_attention,
    say_quantized,
    say_routing,
    say_state,
)

Drawn = Axes | np.ndarray


class Explorer(VBox):
    """Controls by name, a picture (PNG) and a text (HTML) that follow them."""

    def __init__(
        self,
        controls: dict[str, Widget],
        draw: Callable[..., Drawn],
        say: Callable[..., str],
    ) -> None:
        self.controls = controls
        # in its own size: a box stretches what it holds
        layout = Layout(align_self="flex-start", max_width="100%")
        self.picture = Image(format="png", layout=layout)
        self.text = HTML()
        self._draw, self._say = draw, say
        for control in controls.values():
            control.observe(self._update, "value")
        self._update()
        super().__init__([*controls.values(), self.text, self.picture])

    def _update(self, _change: object = None) -> None:
        values = [control.value for control in self.controls.values()]
        try:
            self.text.value = escape(self._say(*values))
            self.picture.value = plots.png(self._draw(*values))
        except FlashMoeError as error:  # a callback's exceptions are shown nowhere
            self.text.value = escape(f"{error}")


def one_of(name: str, value: object, options: Iterable) -> object:
    """The value of a control at the start. Raises: ConfigError if it has no such."""
    options = list(options)
    if value not in options:
        known = ", ".join(str(option) for option in options)
        raise ConfigError(f"{name}={value!r} is not one of {known}")
    return value


def _slider(name: str, low: int, high: int, value: int) -> IntSlider:
    """Raises: ConfigError for a value out of range, which a slider would move."""
    if not is_whole(value, low, high):
        raise ConfigError(f"{name}={value!r} is outside {low}..{high}")
    # Not continuous: each value draws a figure, and drawing takes longer than moving.
    return IntSlider(
        value, min=low, max=high, description=name, continuous_update=False
    )


def router_explorer(
    routing_for: Callable[[int], Routing], k_max: int, k: int | None = None
) -> Explorer:
    """Token by token: which experts, with which weights, as K moves.

    routing_for(k) runs the text with k experts a token; each k is run once. It starts
    with k (k_max by default), layer 0, token 0.
    """
    runs = cache(routing_for)
    first = runs(k or k_max)
    n_layers, n_tokens = first.experts.shape[:2]
    controls = {
        "K": _slider("K", 1, k_max, k or k_max),
        "layer": _slider("layer", 0, n_layers - 1, 0),
        "token": _slider("token", 0, n_tokens - 1, 0),
    }
    return Explorer(
        controls,
        lambda k, layer, token: draw_routing(runs(k), layer, token),
        lambda k, layer, token: say_routing(runs(k), layer, token),
    )


def attention_viewer(weights: np.ndarray, tokens: Sequence[str]) -> Explorer:
    """Which earlier tokens each token looks at, head by head.

    Shapes: weights (H, T, T), as from `views.attention_of_layer` or
    `views.attention_weights`. Starts with head 0 and the last token.
    """
    n_heads, n_tokens, _ = weights.shape
    controls = {
        "head": _slider("head", 0, n_heads - 1, 0),
        "token": _slider("token", 0, n_tokens - 1, n_tokens - 1),
    }
    return Explorer(
        controls,
        lambda head, token: draw_attention(weights, tokens, head, token),
        lambda head, token: say_attention(weights, tokens, head, token),
    )


def state_viewer(states: np.ndarray, tokens: Sequence[str]) -> Explorer:
    """The memory of a Gated DeltaNet after each token of a text, head by head.

    Shapes: states (T, H, Dv, Dk), as from `views.delta_states`. Starts with head 0 and
    the first token.
    """
    n_tokens, n_heads = states.shape[:2]
    controls = {
        "head": _slider("head", 0, n_heads - 1, 0),
        "token": _slider("token", 0, n_tokens - 1, 0),
    }
    return Explorer(
        controls,
        lambda head, token: draw_state(states, tokens, head, token),
        lambda head, token: say_state(states, tokens, head, token),
    )


def quantization_explorer(
    w: np.ndarray, bits: int = 4, group_size: int = 64, rule: str = "mlx"
) -> Explorer:
    """Bits, group size and rule against a group's histogram and the matrix's error.

    Shapes: w (out, in) float32; in is a multiple of 128.
    """
    view = cache(lambda *choice: quantized_view(w, *choice))
    controls = {
        "bits": SelectionSlider(
            options=BITS, value=one_of("bits", bits, BITS), description="bits"
        ),
        "group": SelectionSlider(
            options=GROUP_SIZES,
            value=one_of("group_size", group_size, GROUP_SIZES),
            description="group",
        ),
        "rule": Dropdown(
            options=list(RULES), value=one_of("rule", rule, RULES), description="rule"
        ),
    }
    return Explorer(
        controls,
        lambda *choice: draw_quantized(view(*choice)),
        lambda *choice: say_quantized(view(*choice)),
    )


def bandwidth_surface(probe: DiskProbe) -> Explorer:
    """Mode and size of a record against GB/s by depth; cold and the largest first."""
    modes, sizes = modes_of(probe), probe.surface("")[0]
    controls = {
        "mode": Dropdown(options=modes, value=modes[0], description="mode"),
        "record": SelectionSlider(
            options=[(in_kib(size), size) for size in sizes],
            value=sizes[-1],
            description="record",
        ),
    }
    return Explorer(
        controls,
        lambda mode, n_bytes: draw_bandwidth(probe, mode, n_bytes),
        lambda mode, n_bytes: say_bandwidth(probe, mode, n_bytes),
    )


def timeline_viewer(
    traces: Mapping[str, Trace], layers: tuple[int, int] | None = None
) -> Explorer:
    """One decoded token's timeline, in one mode of running: {"serial": trace}.

    layers: first and last to be shown (all by default). Starts with the first mode and
    token 0; there are as many tokens as the shortest trace decoded.
    """
    n_tokens = min(int(trace.is_decode.sum()) for trace in traces.values())

    def found(token: int, mode: str) -> Timeline:
        return timeline(traces[mode], token, layers)

    controls = {
        "token": _slider("token", 0, n_tokens - 1, 0),
        "mode": Dropdown(options=list(traces), description="mode"),
    }
    return Explorer(
        controls,
        lambda token, mode: draw_timelines({mode: found(token, mode)}),
        lambda token, mode: say_timeline(mode, found(token, mode)),
    )


def slot_bank_explorer(frames: Sequence[Frame]) -> Explorer:
    """One token in the slots of all layers: press play, or step with the slider.

    frames: from `slot_views.bank_frames`. Starts with the first.
    """
    slider = _slider("frame", 0, len(frames) - 1, 0)
    explorer = Explorer(
        {"frame": slider},
        lambda at: draw_frame(frames[at]),
        lambda at: say_frame(frames[at]),
    )
    # slower than a figure is drawn, or the pictures would lag behind
    play = Play(max=len(frames) - 1, interval=1000)
    jslink((play, "value"), (slider, "value"))
    explorer.children = (play, *explorer.children)
    return explorer


def hit_rate_explorer(
    requests: Mapping[int, Requests], policy: str = "lru", slots: int = 32
) -> Explorer:
    """Policy, slots of a layer and K against hit rate, with Belady's optimum beside it.

    requests: of decoded tokens, by K. It starts with the largest K.
    """
    largest = max(requests)
    n_experts = requests[largest].n_experts

    @cache
    def curve(policy: str, k: int) -> np.ndarray:
        drawn = cache_views.budgets(requests[k])
        return cache_views.hit_rates(requests[k], drawn, [policy])[policy]

    @cache
    def view(policy: str, slots: int, k: int) -> Setting:
        curves = {name: curve(name, k) for name in (policy, "belady")}
        return cache_views.setting(requests[k], policy, slots, curves)

    names = cache_views.NAMES
    controls = {
        "policy": Dropdown(
            options=[(names[name], name) for name in cache_views.POLICIES],
            value=one_of("policy", policy, cache_views.POLICIES),
            description="policy",
        ),
        "slots": _slider("slots", largest, n_experts, slots),
        "K": SelectionSlider(options=sorted(requests), value=largest, description="K"),
    }
    return Explorer(
        controls,
        lambda *choice: draw_setting(view(*choice)),
        lambda *choice: say_setting(view(*choice)),
    )


def flash_explorer(found: Tradeoffs, window: int, threshold: float) -> Explorer:
    """Window and threshold against bytes, recall and perplexity, for one text.

    found: from `flash_views.tradeoffs`; window and threshold are among its settings.
    """
    controls = {
        "window": SelectionSlider(
            options=found.windows,
            value=one_of("window", window, found.windows),
            description="window",
        ),
        "threshold": SelectionSlider(
            options=found.thresholds,
            value=one_of("threshold", threshold, found.thresholds),
            description="threshold",
        ),
    }
    return Explorer(
        controls,
        lambda *choice: draw_tradeoff(found, *choice),
        lambda *choice: say_tradeoff(found, *choice),
    )
