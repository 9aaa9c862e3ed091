"""The ladder of LLM in a Flash as data, figures and lines of text, beside the paper's.

What a rung took, as the median over tokens; a waterfall of rungs; reads on the curve of
a disk's rate by size; window and threshold against bytes, recall and perplexity.
Figures of the paper: arXiv 2312.11514, tables 1 and 2. **But:** measures nothing but
what it is handed. *Taught in notebooks/11.*
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes

from . import plots
from .flash_model import FlashModel, TokenCost
from .probe_disk import DiskProbe
from .relu_model import ReluModel
from .sparsity import Predictor, Quality, quality

PAPER_MS = {  # table 2: OPT-6.7B in float16, M1 Max, reading alone, ms a token
    "naive": 2196.0,
    "hybrid": 1090.0,
    "predictor": 738.0,
    "windowing": 164.0,
    "bundling": 87.0,
}
PAPER_GB = {"naive": 13.4, "windowing": 0.2, "bundling": 0.2}  # the same table
PAPER_GB_S = {
    "naive": 6.10,
    "hybrid": 6.10,
    "predictor": 1.25,
    "windowing": 1.25,
    "bundling": 2.25,
}
PAPER_DRAM = {  # shares of OPT-6.7B, section 4
    "embedding": 0.03,
    "attention": 0.323,
    "predictor": 0.0125,
    "neurons": 0.155,
}


# --- the ladder -----------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A rung, measured: medians over tokens."""

    name: str
    reads: float
    n_bytes: float
    read_s: float
    memory_s: float
    compute_s: float

    @property
    def rate_gb_s(self) -> float:
        """Bytes a second while it read; 0 if it read nothing."""
        return self.n_bytes / self.read_s / 1e9 if self.read_s else 0.0

    @property
    def read_bytes(self) -> float:
        """Bytes of one read, on average."""
        return self.n_bytes / self.reads if self.reads else 0.0

    @property
    def total_s(self) -> float:
        """Of a token."""
        return self.read_s + self.memory_s + self.compute_s


Run = tuple[list[TokenCost], np.ndarray]  # costs by token, and logits (T, V)


def run_in_turns(
    flashes: Mapping[str, FlashModel], ids: Sequence[int], evict: bool = False
) -> dict[str, Run]:
    """Decode a text by several rungs, each token by all in turn, and close them.

    Whatever else the machine does meanwhile slows all of them alike.
    evict: drop the files from the system's cache before each token of each rung, not
           only at the start.
    """
    steps: dict[str, list] = {name: [] for name in flashes}
    try:
        for flash in flashes.values():
            flash.evict()  # what was written just now
        for token in ids:
            for name, flash in flashes.items():
                if evict:
                    flash.evict()
                steps[name].append(flash.step(token))
    finally:
        for flash in flashes.values():
            flash.close()
    return {
        name: ([cost for _, cost in run], np.array([logits for logits, _ in run]))
        for name, run in steps.items()
    }


def median_step(name: str, costs: Sequence[TokenCost], skip: int = 0) -> Step:
    """Medians over the tokens after the first `skip`, which fill the window."""
    names = ("reads", "bytes_read", "read_s", "memory_s", "compute_s")
    found = [[getattr(cost, n) for n in names] for cost in costs[skip:]]
    return Step(name, *np.median(found, axis=0).tolist())


def say_step(step: Step) -> str:
    """A line of the table."""
    return (
        f"{step.name:10}{step.n_bytes / 1e6:8.2f} MB{step.reads:7.0f} reads"
        f"{step.rate_gb_s:8.3f} GB/s{step.read_s * 1e3:8.1f} ms reading"
        f"{step.memory_s * 1e3:7.2f} ms memory{step.compute_s * 1e3:7.2f} ms computing"
    )


def draw_waterfall(
    steps: Sequence[Step], title: str, paper: Mapping[str, float] = PAPER_MS
) -> np.ndarray:
    """Our rungs' milliseconds, by what they went to; beside them the paper's."""
    _, (ours, theirs) = plots.figure(2, height=5.0)
    names = [step.name for step in steps]
    parts = {
        "reading": [1e3 * step.read_s for step in steps],
        "memory": [1e3 * step.memory_s for step in steps],
        "computing": [1e3 * step.compute_s for step in steps],
    }
    totals = np.sum(list(parts.values()), axis=0)
    left = np.zeros(len(steps))
    for number, (part, values) in enumerate(parts.items()):
        colour, hatch = plots.COLOURS[number], plots.HATCHES[number]
        style = {"color": colour, "hatch": hatch, "edgecolor": "white"}
        ours.barh(names, values, left=left, label=part, **style)
        left = left + values
    _connect(ours, totals)
    theirs.barh(list(paper), list(paper.values()), color=plots.BLUE, edgecolor="white")
    _connect(theirs, np.array(list(paper.values())))
    ours.legend(loc="lower right")
    titles = (title, "The paper: OPT-6.7B, reading only")
    for ax, text in zip((ours, theirs), titles, strict=True):
        ax.invert_yaxis()
        ax.grid(False, axis="y")
        ax.margins(x=0.16)
        ax.set_title(fill(text, 38))
        ax.set_xlabel("ms a token")
    return np.array([ours, theirs])


def _connect(ax: Axes, totals: np.ndarray) -> None:
    """Write each bar's end, and lead from it down to the next bar."""
    for i, total in enumerate(totals):
        ax.annotate(
            plots.short(total),
            (total, i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
        if i + 1 < len(totals):
            ax.plot([total, total], [i + 0.4, i + 1.4], color=plots.BLACK, lw=1, ls=":")


# --- the disk's curve -----------------------------------------------------------------


def draw_chunks(probe: DiskProbe, mode: str, steps: Sequence[Step], title: str) -> Axes:
    """GB/s by bytes of a read, a line for each depth; a star where each rung reads."""
    sizes, depths, rates = probe.surface(mode)
    series = {}
    for i, depth in enumerate(depths):
        there = np.isfinite(rates[:, i])
        name = f"probe, {depth} thread" + ("s" if depth > 1 else "")
        kib = np.array(sizes)[there] / 1024
        series[name] = (kib, rates[there, i])
    ax = plots.lines(
        series, title=title, x="KiB of a read", y="GB/s", log_x=True, log_y=True
    )
    placed: list[tuple[float, float]] = []
    low = min([step.read_bytes / 1024 for step in steps], default=4)
    for step in sorted(steps, key=lambda step: step.rate_gb_s):
        at = (step.read_bytes / 1024, step.rate_gb_s)
        ax.plot(*at, "*", color=plots.PURPLE, markersize=16, mec=plots.BLACK)
        close = [(x, y) for x, y in placed if 0.5 < x / at[0] < 2 and at[1] / y < 1.6]
        above = 9 if close else -9  # its text must not lie on a neighbour's
        outside = not 1.1 * low < at[0] < 300
        side = ("right", -11) if outside else ("left", 11)
        ax.annotate(
            step.name,
            at,
            xytext=(side[1], above),
            textcoords="offset points",
            ha=side[0],
        )
        placed.append(at)
    ax.set_xlim(left=low / 8)
    ax.set_xticks([1, 4, 16, 64, 256, 1024], minor=False)
    return ax


# --- window and threshold -------------------------------------------------------------


@dataclass(frozen=True)
class Tradeoffs:
    """A text at every window and threshold. Arrays (windows, thresholds)."""

    windows: tuple[int, ...]
    thresholds: tuple[float, ...]
    mb: np.ndarray  # read for a token, float32
    recall: np.ndarray  # share of active neurons that were in memory
    perplexity: np.ndarray
    dense: float  # perplexity with all neurons

    def at(self, window: int, threshold: float) -> tuple[int, int]:
        """Row and column of a setting."""
        return self.windows.index(window), self.thresholds.index(threshold)


def tradeoffs(
    model: ReluModel,
    predictor: Predictor,
    ids: Sequence[int],
    windows: Sequence[int],
    thresholds: Sequence[float],
    dense: float,
) -> Tradeoffs:
    """Run the text once for each setting."""
    found: list[list[Quality]] = [
        [quality(model, predictor.at(t), ids, k) for t in thresholds] for k in windows
    ]

    def table(value) -> np.ndarray:
        return np.array([[value(q) for q in row] for row in found])

    n_bytes = model.config.neuron_bytes
    return Tradeoffs(
        tuple(windows),
        tuple(thresholds),
        mb=table(lambda q: q.loads * n_bytes / 1e6),
        recall=table(lambda q: q.in_memory.mean()),
        perplexity=table(lambda q: q.perplexity),
        dense=dense,
    )


def say_tradeoff(found: Tradeoffs, window: int, threshold: float) -> str:
    """One setting in words."""
    at = found.at(window, threshold)
    return (
        f"window {window}, threshold {threshold}: {found.mb[at]:.2f} MB a token, "
        f"{found.recall[at]:.0%} of the active neurons in memory, perplexity "
        f"{found.perplexity[at]:.1f} (dense {found.dense:.1f})"
    )


def draw_tradeoff(found: Tradeoffs, window: int, threshold: float) -> np.ndarray:
    """Recall and perplexity against bytes; a line for each window, a ring at a choice.

    Along a line the threshold rises to the left; its values stand at the first line.
    """
    at = found.at(window, threshold)
    _, axes = plots.figure(2, height=4.6)
    tables = (100 * found.recall, found.perplexity)
    texts = (
        ("A window keeps more of what is needed", "active neurons in memory (%)"),
        ("What is missing costs perplexity", "perplexity"),
    )
    for ax, table, (title, y) in zip(axes, tables, texts, strict=True):
        for number, (k, row) in enumerate(zip(found.windows, table, strict=True)):
            colour, dashes = plots.COLOURS[number % 5], plots.DASHES[number % 5]
            style = {"color": colour, "ls": dashes, "marker": plots.MARKERS[number % 7]}
            ax.plot(found.mb[number], row, label=f"window {k}", **style)
        ring = {"ms": 17, "mfc": "none", "mec": plots.BLACK, "mew": 2}
        ax.plot(found.mb[at], table[at], "o", **ring)
        for place in zip(found.mb[0], table[0], found.thresholds, strict=True):
            ax.annotate(
                f"{place[2]}", place[:2], xytext=(6, 7), textcoords="offset points"
            )
        ax.set_title(fill(title, 42))
        ax.set_xlabel("MB read a token")
        ax.set_ylabel(y)
        ax.margins(x=0.1)
    axes[1].axhline(found.dense, color=plots.BLACK, lw=1.5, ls=":", label="dense")
    axes[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.02))
    return axes
