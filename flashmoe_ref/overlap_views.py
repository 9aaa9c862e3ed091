"""Timelines of a recorded run: what computes, what reads, and what the reads were for.

A row for the computing thread, cut into spans, and one for each thread that read. A
read is needed (a layer asked for it), or was read ahead and used, or read ahead for
nothing. Data, `draw_` for figures and `say_` for words, as in `views.py`.
**But:** a read that was begun ahead but came too late counts as read ahead too.
*Used in notebooks/09; `widgets.py` adds the sliders.*
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from . import plots
from .recording import KINDS
from .trace import Trace

NEEDED, USED, WASTED = "needed", "ahead, used", "ahead, for nothing"
READ_LOOK = {  # colour, hatch
    NEEDED: (plots.VERMILLION, ""),
    USED: (plots.GREEN, "//"),
    WASTED: (plots.PURPLE, "xx"),
}
GROUPS = {  # kinds of spans that are drawn alike: colour, hatch
    "compute": ("embed", "mix", "shared", "experts", "head"),
    "find, predict, hand over": ("request",),
    "stand still for MLX": ("sync",),
    "stand still for reads": ("wait",),
}
GROUP_LOOK = {
    "compute": (plots.BLUE, ""),
    "find, predict, hand over": ("#BBBBBB", ""),
    "stand still for MLX": ("#777777", ".."),
    "stand still for reads": ("white", "////"),
}
GROUP_OF = {kind: name for name, kinds in GROUPS.items() for kind in kinds}


@dataclass(frozen=True)
class Read:
    """One expert's read."""

    thread: int  # 0: the computing one
    layer: int
    expert: int
    start_ms: float
    end_ms: float
    what: str  # NEEDED, USED or WASTED


@dataclass(frozen=True)
class Timeline:
    """One decoded token, or some layers of it. Times in ms since its first span."""

    spans: list[tuple[str, int, float, float]]  # kind, layer, start, end
    reads: list[Read]

    @property
    def ms(self) -> float:
        """From the start of the first span to the end of the last."""
        return self.spans[-1][3]

    @property
    def waited_ms(self) -> float:
        """The computing thread stood still for reads, or read itself."""
        return sum(end - start for kind, _, start, end in self.spans if kind == "wait")

    def count(self, what: str) -> int:
        """Reads of a kind."""
        return sum(read.what == what for read in self.reads)


def timeline(
    trace: Trace, token: int, layers: tuple[int, int] | None = None
) -> Timeline:
    """The token-th decoded token of a trace; of its layers first to last, if given.

    Reads are those that began meanwhile. Raises: TraceError where times were not
    recorded; ValueError if there is no such token or layer.
    """
    spans, reads = trace.need("spans"), trace.need("reads")
    decoded = np.flatnonzero(trace.is_decode)
    if not 0 <= token < len(decoded):
        raise ValueError(f"token {token} is not among {len(decoded)} decoded ones")
    mine = spans[spans["step"] == decoded[token]]
    if layers is not None:
        mine = mine[(mine["layer"] >= layers[0]) & (mine["layer"] <= layers[1])]
    if not len(mine):
        raise ValueError(f"layers={layers} are not among {trace.n_layers} layers")
    start, end = mine["start_s"][0], mine["end_s"][-1]
    begun = reads[(reads["start_s"] >= start) & (reads["start_s"] < end)]
    what = _what_for(trace, begun)

    def ms(seconds: float) -> float:
        return 1e3 * float(seconds - start)

    return Timeline(
        [
            (KINDS[s["kind"]], int(s["layer"]), ms(s["start_s"]), ms(s["end_s"]))
            for s in mine
        ],
        [
            Read(
                *(int(r[name]) for name in ("thread", "layer", "expert")),
                *(ms(r[name]) for name in ("start_s", "end_s")),
                kind,
            )
            for r, kind in zip(begun, what, strict=True)
        ],
    )


def _what_for(trace: Trace, reads: np.ndarray) -> list[str]:
    """NEEDED, USED or WASTED, for each of some reads.

    A read for another layer than the one that computes was read ahead: for the next
    layer, or for the first one of the next token.
    """
    spans = trace.spans
    at = np.searchsorted(spans["start_s"], reads["start_s"], "right") - 1
    first = np.cumsum(trace.steps["n_tokens"]) - trace.steps["n_tokens"]
    found = []
    for read, now in zip(reads, spans["layer"][at].tolist(), strict=True):
        layer, step = int(read["layer"]), int(read["step"])
        if now == layer:
            found.append(NEEDED)
            continue
        step += layer == 0  # the head, or the last layer, of the token before
        is_last = step == len(trace.steps)  # nobody knows what came next
        picks = () if is_last else trace.picks[first[step], layer]
        found.append(USED if read["expert"] in picks else WASTED)
    return found


def say_timeline(name: str, found: Timeline) -> str:
    """How long it took, what of it was waiting, and what was read."""
    counts = [f"{found.count(what)} {what}" for what in READ_LOOK]
    return (
        f"{name}: {found.ms:.2f} ms, of which {found.waited_ms:.2f} ms stood still "
        f"for reads; experts read: {'; '.join(counts)}"
    )


def draw_timelines(found: Mapping[str, Timeline], title: str = "") -> np.ndarray:
    """Draw timelines below each other on one scale. Returns their Axes."""
    rows = {name: _threads(line) for name, line in found.items()}
    heights = [1.3 + 0.5 * len(threads) for threads in rows.values()]
    fig, axes = plots.figure(1, len(found), 1.4 + sum(heights))
    fig.set_figwidth(plots.SIZE_IN[2][0])  # wide, for the many short spans
    axes = np.atleast_1d(axes)
    axes[0].get_gridspec().set_height_ratios(heights)
    longest = max(line.ms for line in found.values())
    for ax, (name, line) in zip(axes, found.items(), strict=True):
        _draw_timeline(ax, line, rows[name])
        ax.set_xlim(0, longest * 1.005)
        ax.set_title(f"{name}: {line.ms:.2f} ms", fontsize=plots.LABEL_PT)
    axes[-1].set_xlabel("time (ms)")
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=plots.TITLE_PT)
    _legend(fig)
    return axes


def _threads(found: Timeline) -> list[int]:
    """Threads that read, in the order of their numbers, the computing one left out."""
    return sorted({read.thread for read in found.reads if read.thread})


def _draw_timeline(ax: Axes, found: Timeline, threads: Sequence[int]) -> None:
    for kind, _, start, end in found.spans:
        colour, hatch = GROUP_LOOK[GROUP_OF[kind]]
        _bar(ax, 0, start, end, colour, hatch)
    for read in found.reads:
        colour, hatch = READ_LOOK[read.what]
        row = threads.index(read.thread) + 1 if read.thread else 0
        _bar(ax, row, read.start_ms, read.end_ms, colour, hatch, 0.4 if row else 0.25)
    layers = [layer for _, layer, _, _ in found.spans]
    for (_, layer, start, _), before in zip(found.spans[1:], layers[:-1], strict=True):
        if layer != before:
            ax.axvline(start, color=plots.BLACK, lw=1, ls=":")
    names = ["computing", *(f"reader {i + 1}" for i in range(len(threads)))]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(False)


def _bar(
    ax: Axes,
    row: int,
    start: float,
    end: float,
    colour: str,
    hatch: str,
    half: float = 0.4,
) -> None:
    ax.broken_barh(
        [(start, end - start)],
        (row - half, 2 * half),
        facecolor=colour,
        hatch=hatch,
        edgecolor="black" if colour == "white" else "white",
        linewidth=0.3,
    )


def _legend(fig: object) -> None:
    looks = GROUP_LOOK | {f"read: {what}": look for what, look in READ_LOOK.items()}
    patches = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="black", lw=0.3, label=name)
        for name, (colour, hatch) in looks.items()
    ]
    fig.legend(handles=patches, loc="outside lower left", ncols=4, frameon=False)
