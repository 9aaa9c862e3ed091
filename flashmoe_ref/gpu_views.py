"""What was measured on GPUs: speed against slots, and where a token's time goes.

Each row of data/results/gpu_rehearsal.csv is one rehearsal of the 397B's shape: its
settings, tokens a second beside the limit of its bytes, and milliseconds by part.
**But:** random weights and replayed routing, on one machine; `gpu.md` says which.
*Used in notebooks/13.*
"""

import csv
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from . import plots

RESULTS = Path(__file__).parents[1] / "data" / "results"  # in a clone
PARTS = {  # columns, and what they are
    "launch_ms": "starting kernels",
    "sync_ms": "waiting for the GPU",
    "wait_ms": "waiting for reads",
}
Row = Mapping[str, str | float]


def read_gpu(name: str, folder: str | Path = RESULTS) -> list[Row]:
    """Rows of gpu_NAME.csv; numbers as numbers, NaN where a cell is empty.

    Raises: OSError if there is no such file.
    """
    path = Path(folder) / f"gpu_{name}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {column: _number(cell) for column, cell in row.items()}
            for row in csv.DictReader(file)
        ]


def _number(cell: str) -> str | float:
    try:
        return float(cell or "nan")
    except ValueError:
        return cell


def setting(row: Row) -> str:
    """What runs share that differ in their slots: K=4, 4 bits, warm."""
    return f"K={row['k']:.0f}, {row['bits']:.0f} bits, {row['page_cache']}"


def speed_curves(rows: Sequence[Row]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """GB of slots and tokens a second, both (N,), by setting; slots rise."""
    curves = {}
    for name in dict.fromkeys(map(setting, rows)):
        mine = [(row["slot_gb"], row["tok_s"]) for row in rows if setting(row) == name]
        slot_gb, tok_s = np.array(sorted(mine)).T
        curves[name] = slot_gb, tok_s
    return curves


def draw_speed(rows: Sequence[Row], title: str, ax: Axes | None = None) -> Axes:
    """Tokens a second against GB of slots, a line for each setting."""
    x = "slots in the GPU's memory (GB)"
    curves = speed_curves(rows)
    ax = plots.lines(curves, title=title, x=x, y="tok/s", log_x=True, ax=ax)
    ax.set_ylim(0)
    return ax


def draw_times(rows: Sequence[Row], title: str, ax: Axes | None = None) -> Axes:
    """A bar for each run, cut into the parts of a token's time."""
    ax = plots.figure(height=1.9 + 0.5 * len(rows))[1] if ax is None else ax
    at, left = np.arange(len(rows))[::-1], np.zeros(len(rows))
    for number, (column, label) in enumerate(PARTS.items()):
        ms = np.array([row[column] for row in rows])
        ax.barh(
            at,
            ms,
            left=left,
            color=plots.COLOURS[number],
            hatch=plots.HATCHES[number],
            edgecolor="white",
            label=label,
        )
        left += ms
    for y, end, row in zip(at, left, rows, strict=True):
        ax.text(end, y, f"  {row['tok_s']:.2f} tok/s", va="center")
    names = [f"{setting(row)}, {row['slot_gb']:.3g} GB" for row in rows]
    ax.set_yticks(at, names)
    ax.set(xlabel="ms a token", xlim=(0, 1.3 * left.max()))
    ax.grid(False, axis="y")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02))
    ax.set_title(title)
    return ax


def side_by_side(left: str, right: str, names: tuple[str, str]) -> str:
    """Two texts as an HTML table; what differs is bold. Every character is shown."""
    lines = (text.strip("\n").splitlines() for text in (left, right))
    columns: list[list[str]] = [[], []]
    for is_equal, *blocks in _blocks(*lines):
        n = max(map(len, blocks))
        for column, block in zip(columns, blocks, strict=True):
            shown = [escape(line) for line in block] + [""] * (n - len(block))
            column += shown if is_equal else [f"<b>{line}</b>" for line in shown]
    style = "text-align: left; vertical-align: top"
    small = "font-size: 80%; line-height: 1.3"
    heads = "".join(f'<th style="{style}">{escape(name)}</th>' for name in names)
    bodies = "".join(
        f'<td style="{style}"><pre style="{small}">{"<br>".join(column)}</pre></td>'
        for column in columns
    )
    return f"<table><tr>{heads}</tr><tr>{bodies}</tr></table>"


def _blocks(a: list[str], b: list[str]) -> list[tuple[bool, list[str], list[str]]]:
    """Runs of lines that are equal, or are not, from both texts."""
    found = SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return [(tag == "equal", a[i:j], b[k:m]) for tag, i, j, k, m in found]
