"""Every form of figure that the lessons draw, in one style.

Okabe-Ito's colours that stand out on white, each with its own marker and dashes; type
that is read from the back of a room; a white ground, so that a dark theme cannot hide
it; a title that says what was found; units on the axes. A form takes data and texts,
draws, and returns the Axes, on which a notebook may add a line of its own.
**But:** knows nothing of models. Nothing in the package imports this file.
*Used in all notebooks.*
"""

import io
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# Contrast with white: blue 5.2, vermillion 3.9, green 3.4, purple 3.1, black 21.
BLUE, VERMILLION, GREEN, PURPLE, BLACK = COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#000000",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # 5 and 7 have no common divisor: 35
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
HATCHES = ("", "//", "..", "xx", "\\\\")
SIZE_IN = {1: (8.0, 4.5), 2: (11.0, 4.5), 3: (13.0, 4.5)}  # by columns
TITLE_CHARS_PER_INCH = 8.5  # of type of TITLE_PT
TITLE_PT, LABEL_PT, TICK_PT = 15, 13, 12
STYLE = {
    "figure.dpi": 90,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "font.size": TICK_PT,
    "axes.titlesize": TITLE_PT,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": LABEL_PT,
    "xtick.labelsize": TICK_PT,
    "ytick.labelsize": TICK_PT,
    "legend.fontsize": TICK_PT,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "text.color": "black",
    "axes.labelcolor": "black",
    "xtick.color": "black",
    "ytick.color": "black",
}


def figure(
    n_cols: int = 1, n_rows: int = 1, height: float | None = None
) -> tuple[Figure, Axes | np.ndarray]:
    """Make an empty figure in the style, which also holds for what follows by hand.

    Units:   height in inches of the whole figure; by default 4.5 a row.
    Returns: Figure and Axes, or an array of Axes (n_rows, n_cols) without axes of
             length 1.
    """
    plt.rcParams.update(STYLE)
    width, row_height = SIZE_IN[min(n_cols, 3)]
    size = (width, height or row_height * n_rows)
    return plt.subplots(n_rows, n_cols, figsize=size, layout="constrained")


def png(drawn: Axes | np.ndarray) -> bytes:
    """Make a PNG of a figure, given its Axes, and close it: for an Image widget."""
    fig = np.ravel(drawn)[0].figure
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", bbox_inches="tight")
    plt.close(fig)
    return buffer.getvalue()


# --- forms ----------------------------------------------------------------------------


def lines(
    series: Mapping[str, tuple[Sequence, Sequence]],
    *,
    title: str = "",
    x: str = "",
    y: str = "",
    log_x: bool = False,
    log_y: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw one line for each name: {"name": (xs, ys)}, up to 35 that can be told apart.

    The legend stands beside the data, in the order of the lines' ends. Drawn on axes
    that have lines already, the new ones take the next colours.
    Raises: ValueError if xs and ys of a name differ in length.
    """
    ax = _axes(ax)
    first = len(_named(ax))
    for number, (name, (xs, ys)) in enumerate(series.items(), first):
        xs, ys = np.asarray(xs), np.asarray(ys)
        if xs.shape != ys.shape:
            raise ValueError(f"{name}: {len(xs)} x values, but {len(ys)} y values")
        step = max(1, len(xs) // 10) if len(xs) > 24 else 1  # few markers on long lines
        ax.plot(
            xs,
            ys,
            label=name,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle=DASHES[number % len(DASHES)],
            markevery=(number * step // 4 % step, step),
        )
    every_x = np.concatenate([[], *(line.get_xdata() for line in _named(ax))])
    _scale(ax.xaxis, log_x, np.unique(every_x))
    _scale(ax.yaxis, log_y)
    if len(_named(ax)) > 1:
        _legend(ax, sorted(_named(ax), key=_height_of_end, reverse=True))
    return _texts(ax, title, x, y)


def bars(
    values: Mapping[str, float] | Mapping[str, Mapping[str, float]],
    *,
    title: str = "",
    x: str = "",
    y: str = "",
    log_y: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw bars with their values: {"name": value} or {"group": {"name": value}}.

    In groups, each name has one colour and hatch throughout.
    """
    ax = _axes(ax)
    grouped = isinstance(next(iter(values.values())), Mapping)
    groups = values if grouped else {key: {"": v} for key, v in values.items()}
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        at = [i for i, group in enumerate(groups.values()) if name in group]
        heights = [group[name] for group in groups.values() if name in group]
        drawn = ax.bar(
            np.array(at) + (number - (len(names) - 1) / 2) * width,
            heights,
            width=width * 0.94,
            color=COLOURS[number % len(COLOURS)],
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="white",
            label=name,
        )
        room_in = width * _width_in(ax) * 0.7 / len(groups)
        labels, turn = _bar_labels(heights, room_in)
        ax.bar_label(drawn, labels, padding=2, fontsize=TICK_PT, rotation=turn)
    ax.grid(False, axis="x")
    chars = int(_width_in(ax) * 8 / len(groups))
    ax.set_xticks(range(len(groups)), [_wrap(group, chars) for group in groups])
    _scale(ax.yaxis, log_y)
    ax.margins(y=0.12)
    if grouped:
        _legend(ax, ax.containers)
    return _texts(ax, title, x, y)


def histogram(
    values: np.ndarray,
    *,
    title: str = "",
    x: str = "",
    y: str = "count",
    bins: int | Sequence = 40,
    levels: Sequence | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Count values in bins; levels, such as those of a quantization, are lines."""
    ax = _axes(ax)
    ax.hist(np.ravel(values), bins=bins, color=BLUE, label="values")
    for number, level in enumerate(() if levels is None else levels):
        label = "levels" if number == 0 else "_more"
        ax.axvline(level, color=VERMILLION, lw=1.6, ls="--", label=label)
    if levels is not None:
        _legend(ax, ax.get_legend_handles_labels()[0])
    _scale(ax.xaxis, False)
    _scale(ax.yaxis, False)
    return _texts(ax, title, x, y)


def heatmap(
    matrix: np.ndarray,
    *,
    title: str = "",
    x: str = "",
    y: str = "",
    value: str = "",
    limits: tuple[float, float] | None = None,
    diverging: bool = False,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    numbers: bool | np.ndarray = False,
    ax: Axes | None = None,
) -> Axes:
    """Show a matrix as colours, first row on top, with a labelled colour bar.

    limits are the values of the darkest and the brightest colour (by default the
    extremes; with diverging, symmetric around 0). rows and columns name the entries;
    numbers writes the values into the cells, or those of another matrix.
    Raises: ValueError if the matrix has not two axes.
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2:
        raise ValueError(f"a heat map needs a matrix, got shape {matrix.shape}")
    ax = _axes(ax)
    if limits is None and diverging:
        extreme = float(np.nanmax(np.abs(matrix))) or 1.0
        limits = (-extreme, extreme)
    low, high = limits or (None, None)
    colours = "RdBu_r" if diverging else "cividis"
    image = ax.imshow(matrix, cmap=colours, vmin=low, vmax=high, aspect="auto")
    image.set_interpolation("nearest")
    ax.grid(False)
    _name_cells(ax, rows, columns)
    bar = ax.figure.colorbar(image, ax=ax, label=value, pad=0.02)
    bar.outline.set_visible(False)
    if numbers is not False:
        _write_cells(ax, image, matrix, matrix if numbers is True else numbers)
    return _texts(ax, title, x, y)


def mark(
    ax: Axes, x: float | None = None, y: float | None = None, text: str = ""
) -> Axes:
    """Draw a dotted line across the axes at x, or at y, with its text beside it.

    The text stands where it covers least of the lines that are there already.
    """
    if x is not None:
        ax.axvline(x, color=BLACK, lw=1.5, ls=":")
        ends = ((1, "top"), (0, "bottom"), (0.5, "center"))
        spots = [(x, at, ha, va) for at, va in ends for ha in ("left", "right")]
        _write_beside(ax, text, ("data", "axes fraction"), spots)
    if y is not None:
        ax.axhline(y, color=BLACK, lw=1.5, ls=":")
        ends = ((0, "left"), (1, "right"), (0.5, "center"))
        spots = [(at, y, ha, va) for at, ha in ends for va in ("bottom", "top")]
        _write_beside(ax, text, ("axes fraction", "data"), spots)
    return ax


def short(value: float) -> str:
    """Write a number with three digits, or all before the point: 0.123, 12.3, 1,234."""
    if value == 0 or 1e-4 <= abs(value) < 99.95:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) < 1e9 and abs(value) >= 1 else f"{value:.2e}"


# --- parts ----------------------------------------------------------------------------


def _axes(ax: Axes | None) -> Axes:
    return figure()[1] if ax is None else ax


def _named(ax: Axes) -> list:
    """Lines that a legend would name; matplotlib's and mark's own begin with _."""
    return [line for line in ax.lines if not line.get_label().startswith("_")]


def _height_of_end(line: plt.Line2D) -> float:
    """The last y value of a line; nan sorts lowest."""
    ys = np.asarray(line.get_ydata(), float)
    return float(ys[-1]) if len(ys) and np.isfinite(ys[-1]) else -np.inf


def _bar_labels(heights: Sequence[float], room_in: float) -> tuple[list[str], int]:
    """Texts for bars as wide as room_in inches: with fewer digits, or turned by 90."""
    for labels in ([short(h) for h in heights], [f"{h:.2g}" for h in heights]):
        if max(map(len, labels)) * 0.6 * TICK_PT / 72 <= room_in:
            return labels, 0
    return [short(h) for h in heights], 90


def _legend(ax: Axes, entries: Sequence) -> None:
    ax.legend(handles=entries, loc="upper left", bbox_to_anchor=(1.0, 1.02))


def _write_beside(
    ax: Axes, text: str, coords: tuple[str, str], spots: list[tuple]
) -> None:
    """Write a text at the spot (x, y, ha, va) where it covers least of the lines."""
    ax.figure.draw_without_rendering()  # settles where everything is
    drawn = np.concatenate([np.zeros((0, 2)), *map(_on_screen, _named(ax))])
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
    away = {"left": 6, "bottom": 4, "center": 0, "right": -6, "top": -4}  # points
    tried = []
    for order, (x, y, ha, va) in enumerate(spots):
        label = ax.annotate(
            text,
            (x, y),
            xycoords=coords,
            xytext=(away[ha], away[va]),
            textcoords="offset points",
            ha=ha,
            va=va,
            bbox=box,
            parse_math=False,
        )
        extent, inside = label.get_window_extent(), ax.get_window_extent()
        covered = extent.padded(6).count_contains(drawn)
        sticks_out = extent.x0 < inside.x0 or extent.x1 > inside.x1
        tried.append((covered + 5 * sticks_out, order, label))
    for _cost, _order, label in sorted(tried)[1:]:
        label.remove()


def _on_screen(line: plt.Line2D, n: int = 500) -> np.ndarray:
    """Points (n, 2) along a line, in pixels."""
    points = line.get_transform().transform(line.get_xydata())
    points = points[np.isfinite(points).all(axis=1)]
    at = np.linspace(0, max(len(points) - 1, 0), n if len(points) else 0)
    steps = np.arange(len(points))
    return np.stack([np.interp(at, steps, axis) for axis in points.T], axis=1)


def _width_in(ax: Axes) -> float:
    """About the width of these axes, in inches."""
    grid = ax.get_subplotspec()
    return ax.figure.get_figwidth() / (grid.get_gridspec().ncols if grid else 1)


def _wrap(text: str, chars: int) -> str:
    keep = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(str(text), max(6, chars), **keep)


def _texts(ax: Axes, title: str, x: str, y: str) -> Axes:
    title = _wrap(title, int(TITLE_CHARS_PER_INCH * _width_in(ax)))
    ax.set_title(title, parse_math=False)  # tokens in it are no formulas
    ax.set(xlabel=x, ylabel=y)
    return ax


def _tick(value: float, _position: int) -> str:
    if value == 0 or 1e-4 <= abs(value) < 1e7:
        return f"{value:,.10g}"
    exponent = int(np.floor(np.log10(abs(value)) + 1e-9))
    factor = value / 10**exponent
    return (f"{factor:.3g}·" if abs(factor - 1) > 1e-6 else "") + f"$10^{{{exponent}}}$"


def _scale(axis: plt.Axes, log: bool, values: np.ndarray | None = None) -> None:
    """Plain numbers on ticks; values are what the axis shows, sorted, where known.

    On a logarithmic axis ticks stand at the values if they are few; where all values
    are whole, so are the ticks.
    """
    own = np.array([]) if values is None else values
    if log:
        getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
        low, high = sorted(axis.get_view_interval())
        subs = (1, 2, 5) if high / low < 300 else (1,)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_minor_formatter(NullFormatter())
        if 1 < len(own) <= 10 and (own[1:] / own[:-1] >= 1.5).all():
            axis.set_ticks(own, minor=False)
            axis.set_ticks([], minor=True)
    elif own.size and (own == np.round(own)).all():
        axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=2))
    axis.set_major_formatter(FuncFormatter(_tick))


def _name_cells(
    ax: Axes, rows: Sequence[str] | None, columns: Sequence[str] | None
) -> None:
    """Put names, or whole numbers, at a heat map's rows and columns."""
    for axis, names in ((ax.xaxis, columns), (ax.yaxis, rows)):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        if names is not None:
            wide = max(map(len, names)) * len(names) > 7 * _width_in(ax)
            turn = 90 if wide and axis is ax.xaxis else 0
            axis.set_ticks(range(len(names)), names, rotation=turn, parse_math=False)


def _write_cells(
    ax: Axes, image: plt.Axes, matrix: np.ndarray, numbers: np.ndarray
) -> None:
    """Write values in black on light cells, in white on dark ones."""
    rgb = image.cmap(image.norm(matrix))[..., :3]
    light = rgb @ np.array([0.299, 0.587, 0.114]) > 0.5
    for (row, column), number in np.ndenumerate(np.asarray(numbers)):
        colour = "black" if light[row, column] else "white"
        text = str(number) if isinstance(number, np.integer) else f"{number:.2g}"
        ax.text(column, row, text, ha="center", va="center", color=colour)
