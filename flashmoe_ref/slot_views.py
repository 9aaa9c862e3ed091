"""Slots while a token passes, and where its time goes: data, figures, lines of text.

A trace has no slots. They follow from what was asked for: the same requests, given to
the same policy, end in the same slots, and the recorded hits prove it. Times of reads
and layers are the recorded ones. **But:** slots of each layer, without prefetch.
*Used in notebooks/07; `widgets.py` adds the slider.*
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from . import plots, recording
from .caching import Caching
from .errors import ConfigError, TraceError
from .policies import Slots
from .simulator import access_requests
from .trace import Trace

NONE = -1  # in place of an expert: the slot is empty
STATES = ("empty", "kept", "found", "evicted", "being read", "read")
EMPTY, KEPT, FOUND, EVICTED, BEING_READ, READ = range(len(STATES))
# by state: ground, hatch, colour of the number; readable without colours, too
LOOKS = (
    ("white", "", "black"),
    ("#E6E6E6", "", "black"),
    (plots.GREEN, "", "black"),
    ("white", "xx", "black"),
    ("white", "///", "black"),
    (plots.BLUE, "", "white"),
)
HATCH_COLOURS = {EVICTED: plots.VERMILLION, BEING_READ: plots.BLUE}


@dataclass(frozen=True)
class Frame:
    """The slots of all layers at one moment of a token."""

    time_s: float  # since the token began
    layer: int  # at work
    event: str  # what it has just done
    held: np.ndarray  # (L, slots) int: the expert in each slot, or NONE
    states: np.ndarray  # (L, slots) int: index into STATES


def bank_frames(trace: Trace, caching: Caching, step: int) -> list[Frame]:
    """What happens in the slots while one token is decoded, event by event.

    caching: `model.store.caching` of the model that was recorded, from its first token.
    Raises: ConfigError for other settings than slots of each layer, or a step of
            several tokens; TraceError where hits or times were not recorded, or do not
            belong to these settings.
    """
    _check_shown(trace, caching, step)
    shape = trace.k, trace.n_layers, trace.n_experts
    caches, n_slots = caching.make_caches(*shape), caching.slots
    held = np.stack([_held(cache, n_slots) for cache in caches])  # what is pinned
    states, frames, found = _idle(held), [], []
    for at, layer, experts in _requests(trace, caching.capacity(*shape), step):
        slots, missing = caches[layer].assign(experts)
        found += [expert not in missing for expert in experts]
        after = _held(caches[layer], n_slots)
        if at == step:
            new = [caches[layer].slot_of(expert) for expert in missing]
            moment = _Moment(trace, step, layer)
            frames += _frames_of_layer(moment, held, states, slots, new, after)
        else:
            states[layer] = _idle(after)
        held[layer] = after
    if not np.array_equal(found, trace.need("hits")[: len(found)]):
        raise TraceError(
            "the recorded hits do not follow from these settings: give those of the "
            "model that was recorded, and record from its first token on"
        )
    return frames


def _check_shown(trace: Trace, caching: Caching, step: int) -> None:
    """Raises: ConfigError for what this view does not show."""
    if caching.slots is None or caching.predictor is not None:
        raise ConfigError("this view shows slots of each layer, without prefetch")
    if not trace.is_decode[step]:
        raise ConfigError(f"step {step} is part of a prompt; choose one of a token")


class _Moment:
    """When a layer of a step did what; seconds since the step began."""

    def __init__(self, trace: Trace, step: int, layer: int) -> None:
        spans, reads = trace.need("spans"), trace.need("reads")
        spans = spans[spans["step"] == step]
        reads = reads[(reads["step"] == step) & (reads["layer"] == layer)]
        begun_s = spans["start_s"].min()
        mine = spans[spans["layer"] == layer]
        request = mine[mine["kind"] == recording.REQUEST]
        self.layer = layer
        self.asked_s = request["start_s"].min() - begun_s
        self.computed_s = mine["end_s"].max() - begun_s
        order = np.argsort(reads["end_s"], kind="stable")
        self.begun_s = reads["start_s"].min(initial=np.inf) - begun_s
        self.reads = [(reads["expert"][i], reads["end_s"][i] - begun_s) for i in order]


def _requests(
    trace: Trace, capacity: int, last_step: int
) -> Iterator[tuple[int, int, list[int]]]:
    """Step, layer and experts of what the store was asked for, up to a step."""
    rows = trace.accesses()
    rows = rows[rows[:, 0] <= last_step]
    asked = access_requests(*rows.T, trace.n_experts, capacity)
    for r, layer in enumerate(asked.layers):
        first, last = asked.starts[r], asked.starts[r + 1]
        yield int(rows[first, 0]), int(layer), asked.experts[first:last].tolist()


def _held(cache: Slots, n_slots: int) -> np.ndarray:
    """Shapes: -> (slots,) the expert in each slot, or NONE."""
    held = np.full(n_slots, NONE)
    for expert, slot in [*cache.slots.items(), *cache.pinned.items()]:
        held[slot] = expert
    return held


def _idle(held: np.ndarray) -> np.ndarray:
    return np.where(held == NONE, EMPTY, KEPT)


def _frames_of_layer(
    moment: _Moment,
    held: np.ndarray,
    states: np.ndarray,
    slots: Sequence[int],
    new: Sequence[int],
    after: np.ndarray,
) -> Iterator[Frame]:
    """Look up, read, compute. Leaves in states how the layer ended.

    Shapes: held and states (L, slots) before, slots (K,), new those that are read into,
            after (slots,) what the layer holds then.
    """
    layer, held = moment.layer, held.copy()

    def frame(time_s: float, event: str) -> Frame:
        return Frame(float(time_s), layer, event, held.copy(), states.copy())

    states[layer, list(slots)] = FOUND
    states[layer, list(new)] = np.where(held[layer, list(new)] == NONE, EMPTY, EVICTED)
    yield frame(moment.asked_s, "looks up")
    if new:
        held[layer] = after
        states[layer, list(new)] = BEING_READ
        yield frame(moment.begun_s, "reads")
    for expert, end_s in moment.reads:
        states[layer, after == expert] = READ
        yield frame(end_s, "reads")
    yield frame(moment.computed_s, "has computed")


def say_frame(frame: Frame) -> str:
    """The layer at work, in words."""
    counts = np.bincount(frame.states[frame.layer], minlength=len(STATES))
    words = (f"{n} {name}" for name, n in zip(STATES, counts, strict=True) if n)
    return (
        f"{1e3 * frame.time_s:.2f} ms, layer {frame.layer} {frame.event}: "
        f"{', '.join(words)}"
    )


def draw_frame(frame: Frame, ax: Axes | None = None) -> Axes:
    """Draw all slots, with their experts' numbers; the layer at work is framed."""
    ax = plots.figure(height=4.9)[1] if ax is None else ax
    n_layers, n_slots = frame.held.shape
    for (layer, slot), state in np.ndenumerate(frame.states):
        _draw_slot(ax, layer, slot, state, frame.held[layer, slot])
    corner = (-0.6, frame.layer - 0.5)
    ax.add_patch(Rectangle(corner, n_slots + 0.2, 1, fill=False, lw=2.5))
    ax.set_xlim(-0.7, n_slots - 0.3)
    ax.set_ylim(n_layers - 0.4, -0.6)
    ax.set_xticks(range(n_slots))
    ax.set_yticks(range(n_layers))
    ax.grid(False)
    ax.set_xlabel("slot (the number in it: the expert)")
    ax.set_ylabel("layer")
    ax.set_title(say_frame(frame), fontsize=13)
    _legend_of_states(ax)
    return ax


def _look(state: int) -> dict[str, str]:
    """How a slot of a state is filled."""
    ground, hatch, _ink = LOOKS[state]
    edge = HATCH_COLOURS.get(state, "#999999")
    return {"facecolor": ground, "hatch": hatch, "edgecolor": edge}


def _draw_slot(ax: Axes, layer: int, slot: int, state: int, expert: int) -> None:
    ax.add_patch(Rectangle((slot - 0.46, layer - 0.42), 0.92, 0.84, **_look(state)))
    if state != EMPTY:
        _ground, hatch, ink = LOOKS[state]
        # a hatch behind a number makes it hard to read
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2} if hatch else None
        centred = {"ha": "center", "va": "center", "fontsize": 11}
        ax.text(slot, layer, str(expert), color=ink, bbox=box, **centred)


def _legend_of_states(ax: Axes) -> None:
    entries = [Patch(label=name, **_look(i)) for i, name in enumerate(STATES)]
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15)}
    ax.legend(
        handles=entries,
        ncol=len(entries),
        handlelength=1.4,
        columnspacing=1.2,
        **below,
    )


# --- where the time goes --------------------------------------------------------------


def waterfall(trace: Trace) -> dict[str, float]:
    """Seconds of a usual decoded token by what the computing thread did, in order.

    The mean of the middle half of the tokens, ordered by what they took: so the kinds
    sum to a token, and the slowest do not count. Kinds without any time are left out.
    Raises: TraceError if no token was decoded, or without times.
    """
    if not trace.is_decode.any():
        raise TraceError("this trace has no decoded token")
    by_kind = {name: s[trace.is_decode] for name, s in trace.breakdown().items()}
    order = np.argsort(sum(by_kind.values()), kind="stable")
    middle = order[len(order) // 4 : len(order) - len(order) // 4]
    means = {name: float(seconds[middle].mean()) for name, seconds in by_kind.items()}
    return {name: mean for name, mean in means.items() if mean}


def say_waterfall(seconds: Mapping[str, float]) -> str:
    """A token's time in words, in the order of a layer."""
    total = sum(seconds.values())
    parts = (f"{name} {1e3 * s:.2f} ms" for name, s in seconds.items())
    return f"a token takes {1e3 * total:.2f} ms: {', '.join(parts)}"


def draw_waterfall(runs: Mapping[str, Mapping[str, float]]) -> Sequence[Axes]:
    """Draw each run's token from top to bottom, each part beginning where one ended.

    runs: name -> what `waterfall` returned. Returns Axes, one a run, on one scale.
    """
    _fig, axes = plots.figure(len(runs), height=4.2)
    axes = np.atleast_1d(axes)
    longest = 1e3 * max(sum(seconds.values()) for seconds in runs.values())
    for ax, (name, seconds) in zip(axes, runs.items(), strict=True):
        _draw_steps(ax, seconds)
        ax.set_xlim(0, 1.15 * longest)
        ms = 1e3 * sum(seconds.values())
        waits = 1e3 * seconds.get("wait", 0.0) / ms
        ax.set_title(f"{name}: {ms:.2f} ms a token, {waits:.0%} waiting")
        ax.set_xlabel("ms since the token began, layers added up")
    return axes


def _draw_steps(ax: Axes, seconds: Mapping[str, float]) -> None:
    """Bars from top to bottom; what waits for reads stands out."""
    begun = 0.0
    for row, (kind, s) in enumerate(seconds.items()):
        colour, hatch = (plots.BLUE, "") if kind != "wait" else (plots.VERMILLION, "//")
        ax.barh(row, 1e3 * s, left=begun, color=colour, hatch=hatch, ec="white")
        begun += 1e3 * s
        ax.annotate(
            f"{1e3 * s:.2f}",
            (begun, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    ax.set_yticks(range(len(seconds)), list(seconds))
    ax.invert_yaxis()
    ax.grid(False, axis="y")
