"""What a disk gives, by the size of reads and how many are under way: figure and words.

**But:** shows a `DiskProbe` that was measured, and measures nothing. *Used in
notebooks/06; `widgets.py` adds the controls.*
"""

import numpy as np

from . import plots
from .errors import ConfigError
from .hardware import MEANING, in_kib
from .probe_disk import MODES, DiskProbe


def modes_of(probe: DiskProbe) -> list[str]:
    """Those of which something was measured, cold first: that is what a disk gives.

    Raises: ConfigError if nothing was measured.
    """
    found = [m for m in MODES if any(rate.mode == m for rate in probe.rates)]
    if not found:
        raise ConfigError("this probe has measured nothing: see its notes")
    return sorted(found, key=("cold", "direct", "warm").index)


def rates_by_depth(probe: DiskProbe, mode: str, n_bytes: int) -> dict[int, float]:
    """GB/s by depth, of records of one size; depths that were measured only."""
    sizes, depths, rates = probe.surface(mode)
    row = rates[sizes.index(n_bytes)]
    return {d: float(r) for d, r in zip(depths, row, strict=True) if not np.isnan(r)}


def say_bandwidth(probe: DiskProbe, mode: str, n_bytes: int) -> str:
    """One size of record in words."""
    rates = rates_by_depth(probe, mode, n_bytes)
    if not rates:
        return f"{in_kib(n_bytes)} records, {mode}: not measured"
    pairs = ", ".join(f"{rate:.3f} GB/s at depth {d}" for d, rate in rates.items())
    return f"{in_kib(n_bytes)} records, {MEANING[mode]}: {pairs}"


def draw_bandwidth(probe: DiskProbe, mode: str, n_bytes: int) -> np.ndarray:
    """Draw a mode's surface, one size framed, and that size's bars. Both Axes."""
    _fig, (left, right) = plots.figure(2)
    sizes, depths, surface = probe.surface(mode)
    plots.heatmap(
        surface,
        title=f"{mode.capitalize()} reads of this disk",
        x="threads that read at once",
        y="bytes of a read",
        value="GB/s",
        rows=[in_kib(size) for size in sizes],
        columns=[str(depth) for depth in depths],
        numbers=len(depths) <= 6,
        ax=left,
    )
    row = sizes.index(n_bytes)
    for y in (row - 0.5, row + 0.5):
        left.axhline(y, color=plots.VERMILLION, lw=3)
    rates = rates_by_depth(probe, mode, n_bytes)
    best = max(rates, key=rates.get) if rates else None
    found = f"most with {best} at once" if rates else "not measured"
    plots.bars(
        {str(depth): rate for depth, rate in rates.items()} or {"": 0.0},
        title=f"{in_kib(n_bytes)}: {found}",
        x="threads that read at once",
        y="GB/s",
        ax=right,
    )
    return np.array([left, right])
