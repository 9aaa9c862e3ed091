"""What the cost model says, as pictures and lines of text.

Published runs against predictions, published hit curves against the fitted one, where a
token's time goes, and the doctor's answer as memory, disk, K and bits move.
**But:** speeds of decoding only. *Used in notebooks/12 and 13; `widgets.py` adds the
sliders.*
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from . import plots
from .machines import Machine
from .planner import FITTED, PARTS, Prediction, hit_rate, predict, run_of
from .planner_fit import HeldOut, read_rows, sizes_of_published

MEMORY_GB = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SHORT_NAMES = {
    "qwen3.5-397b-a17b": "Qwen3.5-397B",
    "qwen3-235b-a22b": "Qwen3-235B",
    "gemma-4-26b-a4b": "Gemma-4-26B",
    "glm-5.2-744b": "GLM-5.2-744B",
}


# --- published against predicted ------------------------------------------------------


def draw_published(found: HeldOut, ax: Axes | None = None) -> Axes:
    """Every published run against its prediction by a fit that never saw its source."""
    ax = plots.figure(height=5.6)[1] if ax is None else ax
    published, classes = found.published.tok_s, found.published.classes
    ends = np.array([0.2, 70.0])
    low, high = found.spread
    ax.fill_between(ends, ends * low, ends * high, color="#DDDDDD", label="4 of 5 runs")
    ax.plot(ends, ends, color=plots.BLACK, lw=1.4, label="equal")
    for number, kind in enumerate(("mac", "nvidia", "pc", "phone")):
        mine = classes == kind
        label = f"{kind}: {mine.sum()}, median {found.median_error(kind):.0%}"
        ax.plot(
            found.predicted[mine],
            published[mine],
            ls="",
            marker=plots.MARKERS[number],
            color=plots.COLOURS[number],
            label=label,
        )
    _log(ax, "predicted (tok/s)", "published (tok/s)")
    ax.legend(loc="upper left")
    ax.set_title(
        f"Held-out runs: half of them within {found.median_error():.0%} of the forecast"
    )
    return ax


def _log(ax: Axes, x: str, y: str) -> None:
    ax.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter("")


@dataclass(frozen=True)
class HitCurve:
    """One published curve. Shapes: (N,)."""

    name: str
    working_set: float  # of a token, as a share of all experts
    fraction: np.ndarray
    hits: np.ndarray


def hit_curves() -> list[HitCurve]:
    """The curves of data/published_hits.csv, one for each model and source."""
    rows = read_rows("published_hits.csv")
    curves = []
    for model, source in dict.fromkeys((r["model"], r["source"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["source"]) == (model, source)]
        k = int(mine[0]["k"])
        share = k / sizes_of_published(model).n_experts
        points = [[float(r[key]) for r in mine] for key in ("fraction", "hit_rate")]
        author = source.removesuffix("/flash-moe").removesuffix(" issue 2595")
        author = author.removeprefix("JustVugg/")
        name = f"{SHORT_NAMES[model]} K={k}, {author}"
        curves.append(HitCurve(name, share, *map(np.array, points)))
    return curves


def draw_hits(curves: Sequence[HitCurve], ax: Axes | None = None) -> Axes:
    """Published hit rates, and the fitted curve for K=10 of 512."""
    ax = plots.figure(height=5.0)[1] if ax is None else ax
    share = np.geomspace(0.005, 1, 200)
    fitted = hit_rate(share, 10 / 512, FITTED.hit_scale)
    ax.plot(share, fitted, color=plots.BLACK, lw=2.6, label="fitted, K=10 of 512")
    for number, curve in enumerate(curves):
        ax.plot(
            curve.fraction,
            curve.hits,
            ls="",
            marker=plots.MARKERS[number % len(plots.MARKERS)],
            color=plots.COLOURS[number % len(plots.COLOURS)],
            label=curve.name,
        )
    ax.set(xscale="log", xlabel="share of all experts in memory", ylabel="hit rate")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02))
    ax.figure.set_size_inches(11.0, 4.8)  # the names beside it are long
    ax.set_title("A tenth of the experts in memory answers about half of the requests")
    return ax


# --- where the time goes --------------------------------------------------------------


def draw_parts(
    predictions: Mapping[str, Prediction], title: str, ax: Axes | None = None
) -> Axes:
    """A bar for each prediction, cut into the parts of a token's time."""
    n = len(predictions)
    ax = plots.figure(height=1.9 + 0.55 * n)[1] if ax is None else ax
    at, left = np.arange(n)[::-1], np.zeros(n)
    for number, part in enumerate(PARTS):
        ms = np.array([1e3 * p.parts_s[part] for p in predictions.values()])
        if not ms.any():
            continue
        colour = plots.COLOURS[number % len(plots.COLOURS)]
        ax.barh(
            at,
            ms,
            left=left,
            color=colour if number < len(plots.COLOURS) else "#999999",
            hatch=plots.HATCHES[number % len(plots.HATCHES)],
            edgecolor="white",
            label=part,
        )
        left += ms
    for y, end, p in zip(at, left, predictions.values(), strict=True):
        ax.text(end, y, f"  {p.tok_s:.2g} tok/s", va="center", fontsize=plots.TICK_PT)
    ax.set_yticks(at, list(predictions))
    ax.set(xlabel="ms a token", xlim=(0, 1.35 * left.max()))
    ax.grid(False, axis="y")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02))
    ax.set_title(title)
    return ax


# --- the doctor -----------------------------------------------------------------------


@dataclass(frozen=True)
class DoctorView:
    """A model on a machine, and on the same machine with other amounts of memory."""

    model: str
    machine: Machine
    k: int
    bits: int
    found: Prediction
    memory_gb: np.ndarray  # (N,)
    tok_s: np.ndarray  # (N,)
    least_gb: float  # weights and state that must be in memory


def doctor_view(
    memory_gb: float, disk_gb_s: float, k: int, bits: int, model: str, machine: Machine
) -> DoctorView:
    """Predict for a memory, a disk (as measured), K and bits."""
    sizes = sizes_of_published(model, k, bits)
    place = replace(
        machine, memory_gb=memory_gb, disk_gb_s=disk_gb_s, disk_is_measured=True
    )
    speeds = [
        predict(run_of(sizes, replace(place, memory_gb=memory))).tok_s
        for memory in MEMORY_GB
    ]
    least = (sizes.dense_bytes + sizes.state_bytes) / 1e9
    found = predict(run_of(sizes, place))
    memory = np.array(MEMORY_GB, float)
    return DoctorView(model, place, k, bits, found, memory, np.array(speeds), least)


def say_doctor(view: DoctorView) -> str:
    """The answer in one line."""
    p, place = view.found, view.machine
    start = (
        f"{place.memory_gb:g} GB, disk {place.disk_gb_s:g} GB/s, K={view.k}, "
        f"{view.bits} bits: "
    )
    if p.parts_s["paging"]:
        start += "memory does not hold what must stay there. "
    return start + (
        f"{p.tok_s:.2g} tok/s, likely {p.low:.2g} to {p.high:.2g}; {p.hit_rate:.0%} of "
        f"the experts are found in memory; most time goes to: {p.dominates}"
    )


def draw_doctor(view: DoctorView) -> np.ndarray:
    """Left, where a token's time goes; right, speed against memory. Both Axes."""
    _fig, (left, right) = plots.figure(2, height=4.2)
    ms = {name: 1e3 * s for name, s in view.found.parts_s.items() if s}
    at = np.arange(len(ms))[::-1]
    drawn = left.barh(at, list(ms.values()), color=plots.BLUE)
    left.bar_label(drawn, [f"{value:,.0f}" for value in ms.values()], padding=3)
    left.set_yticks(at, list(ms))
    left.set(xlabel="ms a token", xlim=(0, 1.2 * max(ms.values())))
    left.grid(False, axis="y")
    left.set_title(f"{view.found.dominates} comes first")
    low, high = (end / view.found.tok_s for end in (view.found.low, view.found.high))
    right.fill_between(
        view.memory_gb, view.tok_s * low, view.tok_s * high, color="#DDDDDD"
    )
    right.plot(view.memory_gb, view.tok_s, color=plots.BLUE, marker="o")
    right.plot(view.machine.memory_gb, view.found.tok_s, "s", ms=12, color="#D55E00")
    right.set(xscale="log", xlabel="memory (GB)", ylabel="tok/s", ylim=(0, None))
    ticks = MEMORY_GB[::2]
    right.set_xticks(ticks, [f"{tick}" for tick in ticks])
    right.minorticks_off()
    right.set_title(f"{view.found.tok_s:.2g} tok/s here; grey holds 4 of 5 runs")
    return np.array([left, right])
