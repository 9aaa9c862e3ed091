"""What a cache does to a trace, as data, figures and lines of text.

A raster of who asked for which expert and whether it was there; hit rate against
budget; and two caches one behind the other, slots of our own in front of the system's
page cache. `draw_` makes the figure, `say_` the same in words. **But:** counts hits and
reads, not seconds. *Used in notebooks/08; `widgets.py` adds the sliders.*
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from . import plots
from .simulator import (
    PAGE_BYTES,
    Requests,
    access_requests,
    decode_requests,
    simulate,
    simulate_pages,
)
from .trace import Trace

POLICIES = ("lru", "lfu", "fifo", "clock", "static", "belady")
NAMES = {
    "lru": "LRU",
    "lfu": "LFU, ageing",
    "fifo": "FIFO",
    "clock": "CLOCK",
    "static": "static, by frequency",
    "belady": "Belady's optimum",
}
NOTHING, MISS, HIT = range(3)  # what a raster's cell says
BUDGETS = (8, 16, 24, 32, 48, 64, 96, 128, 256, 512)  # slots of a layer

# --- the raster -----------------------------------------------------------------------


@dataclass(frozen=True)
class Raster:
    """Which experts some tokens in a row asked one layer for, and what they found."""

    cells: np.ndarray  # (T, E) uint8: NOTHING, MISS or HIT
    layer: int
    first: int  # token of the trace
    policy: str
    slots: int  # of the layer

    @property
    def hit_rate(self) -> float:
        """Share of hits among what these tokens asked for."""
        return float(np.sum(self.cells == HIT) / np.sum(self.cells != NOTHING))


def raster(
    trace: Trace,
    layer: int,
    policy: str = "lru",
    slots: int = 32,
    first: int = 0,
    n_tokens: int = 80,
) -> Raster:
    """Run a layer's cache from the start of a trace, and look at some tokens."""
    stop = first + n_tokens
    picks = trace.picks[:stop, [layer]]  # (T, 1, K)
    outcome = simulate(decode_requests(picks, trace.n_experts), policy, slots)
    found = np.where(outcome.hits, HIT, MISS).reshape(picks.shape)[first:, 0]
    cells = np.zeros((len(found), trace.n_experts), np.uint8)
    np.put_along_axis(cells, picks[first:, 0], found.astype(np.uint8), axis=1)
    return Raster(cells, layer, first, policy, slots)


def say_raster(view: Raster) -> str:
    """Hits and different experts, in words."""
    n_tokens, n_experts = view.cells.shape
    n_used = int(np.sum((view.cells != NOTHING).any(axis=0)))
    return (
        f"layer {view.layer}, tokens {view.first} to {view.first + n_tokens - 1}: "
        f"{n_used} of {n_experts} experts, {view.hit_rate:.0%} hits with "
        f"{view.slots} slots ({NAMES[view.policy]})"
    )


def draw_raster(view: Raster, name: str = "", ax: Axes | None = None) -> Axes:
    """Draw tokens to the right, experts upwards; hits are bars, misses crosses."""
    ax = plots.figure()[1] if ax is None else ax
    for code, label, colour, mark in (
        (HIT, "hit", plots.BLUE, "s"),
        (MISS, "miss", plots.VERMILLION, "x"),
    ):
        tokens, experts = np.nonzero(view.cells == code)
        size = 9 if code == HIT else 15
        ax.scatter(
            tokens + view.first, experts, size, colour, marker=mark, label=label, lw=1.2
        )
    ax.set_ylim(-1, view.cells.shape[1])
    ax.grid(False)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), markerscale=2)
    what = f"{name}, layer {view.layer}: {view.hit_rate:.0%} hits"
    ax.set_title(what.removeprefix(", "))
    ax.set_xlabel("token")
    ax.set_ylabel("expert")
    return ax


# --- hit rate against budget ----------------------------------------------------------


def hit_rates(
    requests: Requests,
    slots: Sequence[int],
    policies: Sequence[str] = POLICIES,
    shared: bool = False,
) -> dict[str, np.ndarray]:
    """Hit rates of policies at budgets. Shapes: slots (S,) a layer -> name: (S,).

    With shared=True layers share as many slots as they would have together.
    """
    factor = requests.n_layers if shared else 1
    return {
        policy: np.array(
            [simulate(requests, policy, n * factor, shared).hit_rate for n in slots]
        )
        for policy in policies
    }


def draw_hit_rates(
    rates: Mapping[str, np.ndarray],
    slots: Sequence[int],
    title: str,
    ax: Axes | None = None,
) -> Axes:
    """Draw a line for each policy."""
    ax = plots.lines(
        {NAMES.get(name, name): (slots, 100 * r) for name, r in rates.items()},
        title=title,
        x="slots of each layer",
        y="hits (%)",
        log_x=True,
        ax=ax,
    )
    ax.set_ylim(0, 102)
    return ax


def budgets(requests: Requests) -> list[int]:
    """Slots of a layer at which curves are drawn: from a request's size to all."""
    k, n_experts = int(np.diff(requests.starts).max()), requests.n_experts
    return [k, *(n for n in BUDGETS if k < n < n_experts), n_experts]


@dataclass(frozen=True)
class Setting:
    """One choice of policy, budget and K, beside curves over all budgets."""

    policy: str
    k: int
    slots: int
    n_experts: int
    by_layer: np.ndarray  # (L,) hit rates
    budgets: list[int]
    curves: dict[str, np.ndarray]  # by policy: hit rates at the budgets

    @property
    def reads(self) -> float:
        """Experts read for a token."""
        return float(self.k * np.sum(1 - self.by_layer))


def setting(
    requests: Requests,
    policy: str,
    slots: int,
    curves: Mapping[str, np.ndarray] | None = None,
) -> Setting:
    """Simulate one setting, per layer, on the requests of decoded tokens.

    curves: hit rates at `budgets(requests)`, by default of the policy and the optimum.
    """
    k, drawn = int(np.diff(requests.starts).max()), budgets(requests)
    hits = simulate(requests, policy, slots).hits
    by_layer = hits.reshape(-1, requests.n_layers, k).mean(axis=(0, 2))
    if curves is None:
        curves = hit_rates(requests, drawn, list(dict.fromkeys((policy, "belady"))))
    return Setting(policy, k, slots, requests.n_experts, by_layer, drawn, dict(curves))


def say_setting(view: Setting) -> str:
    """Hits and reads in words."""
    rate, n_layers = view.by_layer.mean(), len(view.by_layer)
    return (
        f"{NAMES[view.policy]}, K={view.k}, {view.slots} of {view.n_experts} slots a "
        f"layer: {rate:.1%} hits, {view.reads:.1f} of {view.k * n_layers} experts read "
        f"a token"
    )


def draw_setting(view: Setting) -> np.ndarray:
    """Draw the curve with its setting, and hits by layer. Returns both Axes."""
    _fig, (left, right) = plots.figure(2)
    name, rate = NAMES[view.policy], view.by_layer.mean()
    title = f"{name}, K={view.k}: {rate:.0%} hits with {view.slots} slots"
    draw_hit_rates(view.curves, view.budgets, title, left)
    plots.mark(left, x=view.slots, text=f"{view.slots} slots")
    percent = 100 * view.by_layer
    plots.bars(
        {str(layer): value for layer, value in enumerate(percent)},
        title=f"By layer: {percent.min():.0f} to {percent.max():.0f} %",
        x="layer",
        y="hits (%)",
        ax=right,
    )
    right.set_ylim(0, 112)
    return np.array([left, right])


# --- two caches, one behind the other -------------------------------------------------


@dataclass(frozen=True)
class Stacked:
    """What reaches each level, for one token, on average after the warm-up."""

    copies: float  # experts that our slots lack: read from the page cache or the disk
    disk_records: float  # of these, by bytes, what the page cache lacks too


def stacked(
    picks: np.ndarray,
    n_experts: int,
    record_bytes: int,
    slots: int,
    budget: int,
    n_warm: int = 0,
) -> Stacked:
    """Slots of our own before a page cache; together they have `budget` records.

    Shapes: picks (T, L, K). Records lie one after the other in one file. slots: of each
    layer, under LRU; 0 keeps nothing. What slots take, the page cache loses.
    """
    t, n_layers, k = picks.shape
    requests = decode_requests(picks, n_experts)
    token = np.repeat(np.arange(t), n_layers * k)
    missed = np.ones(len(token), bool)
    if slots:
        missed = ~simulate(requests, "lru", slots).hits
    keys, token = requests.keys[missed], token[missed]
    first = np.arange(n_layers * n_experts) * record_bytes
    spans = np.stack([first, first + record_bytes - 1], axis=1)[:, None] // PAGE_BYTES
    behind = access_requests(
        np.arange(len(keys)), keys // n_experts, keys % n_experts, n_experts
    )
    n_pages = (budget - n_layers * slots) * record_bytes // PAGE_BYTES
    pages = simulate_pages(behind, spans, max(n_pages, 1))
    counted, n = token >= n_warm, max(t - n_warm, 1)
    disk = pages[counted].sum() * PAGE_BYTES / record_bytes
    return Stacked(float(counted.sum() / n), float(disk / n))
