"""The forms of figures: they show the data they got, and can be read from far away."""

import ast
import io
from itertools import pairwise
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from nbclient import NotebookClient
from PIL import Image

from flashmoe_ref import plots

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def drawn_without_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = matplotlib.get_backend()
    plots.plt.switch_backend("agg")
    yield
    plots.plt.close("all")
    plots.plt.switch_backend(backend)


def _contrast_with_white(colour: str) -> float:
    """As WCAG 2 defines it, 1 to 21."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)


FORMS = ("lines", "bars", "histogram", "heatmap", "numbers")


def _draw(form: str) -> Axes:
    rng = np.random.default_rng(0)
    xs = np.arange(1, 11)
    words = "the old man looked at the sea and said that it was late".split()
    values = rng.normal(size=4000)
    draw = {
        "lines": lambda: plots.lines(
            {f"name {i}": (xs, xs ** (i / 3)) for i in range(5)},
            title="A finding that needs more than one line, as sentences often do",
            x="experts kept (K)",
            y="loss (nats)",
        ),
        "bars": lambda: plots.bars(
            {"4 bits": {"gate": 1234, "up": 12}, "a second, longer name": {"gate": 3}},
            title="Bars",
            y="time (ms)",
        ),
        "histogram": lambda: plots.histogram(
            values, levels=np.linspace(-3, 3, 16), x="w"
        ),
        "heatmap": lambda: plots.heatmap(
            rng.normal(size=(13, 13)),
            rows=words,
            columns=words,
            diverging=True,
            value="score",
        ),
        "numbers": lambda: plots.heatmap(
            rng.random((8, 8)), numbers=True, value="share"
        ),
    }
    return draw[form]()


# --- the style ------------------------------------------------------------------------


def test_colours_stand_out_on_white() -> None:
    contrasts = {colour: _contrast_with_white(colour) for colour in plots.COLOURS}
    assert min(contrasts.values()) >= 3, contrasts
    assert len(plots.COLOURS) == 5


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_readable(form: str) -> None:
    ax = _draw(form)
    fig = ax.figure
    fig.canvas.draw()
    assert tuple(fig.get_size_inches()) == (8.0, 4.5)
    texts = [t for t in fig.findobj(matplotlib.text.Text) if t.get_text()]
    assert texts and min(t.get_fontsize() for t in texts) >= 12
    picture = plots.png(ax)
    assert len(picture) <= 100_000
    pixels = np.asarray(Image.open(io.BytesIO(picture)))
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()  # opaque white corners


@pytest.mark.parametrize("form", ["lines", "bars", "histogram"])
def test_the_legend_covers_no_data(form: str) -> None:
    ax = _draw(form)
    ax.figure.canvas.draw()
    legend = ax.get_legend().get_window_extent()
    assert legend.x0 >= ax.get_window_extent().x1
    assert legend.x1 <= ax.figure.bbox.x1 + 1  # and is not cut off


@pytest.mark.parametrize("form", FORMS)
def test_names_of_ticks_do_not_overlap(form: str) -> None:
    ax = _draw(form)
    ax.figure.canvas.draw()
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        boxes = [t.get_window_extent() for t in labels if t.get_text()]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))


# --- the forms ------------------------------------------------------------------------


def test_lines_hold_the_data() -> None:
    ax = plots.lines({"a": ([1, 2], [3, 4]), "b": ([1, 2], [5, 1])}, x="K", y="s")
    got = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert got == {"a": [[1, 3], [2, 4]], "b": [[1, 5], [2, 1]]}
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["a", "b"]  # as the lines end, from the top
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("K", "s")
    with pytest.raises(ValueError, match="c: 2 x values, but 1 y values"):
        plots.lines({"c": ([1, 2], [3])})


def test_one_line_needs_no_legend() -> None:
    assert plots.lines({"only": ([1, 2], [3, 4])}).get_legend() is None


@given(st.integers(2, 35), st.integers(0, 34))
@settings(max_examples=20, deadline=None)
def test_each_line_looks_different(n: int, cut: int) -> None:
    named = {f"{i}": ([0, 1], [0, i]) for i in range(n)}
    first = dict(list(named.items())[: min(cut, n - 1)])
    _fig, ax = plots.figure()
    plots.lines(first, ax=ax)  # in two calls, as a notebook may
    plots.lines({k: v for k, v in named.items() if k not in first}, ax=ax)
    looks = {(line.get_color(), line.get_marker()) for line in ax.lines}
    plots.plt.close("all")
    assert len(looks) == n


def test_ticks_are_plain_numbers() -> None:
    ks = [1, 2, 4, 8, 16]
    ax = plots.lines({"a": (ks, [1e3 * k for k in ks])}, log_x=True, log_y=True)
    ax.figure.canvas.draw()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "4", "8", "16"]
    assert "10,000" in [t.get_text() for t in ax.get_yticklabels()]
    ax = plots.lines({"token": (range(16), range(16))})
    ax.figure.canvas.draw()
    assert not any("." in t.get_text() for t in ax.get_xticklabels())
    texts = [plots._tick(v, 0) for v in (0, 0.25, 1e6, 2e9, 1e-6)]
    assert texts == ["0", "0.25", "1,000,000", "2·$10^{9}$", "$10^{-6}$"]


def test_bars_hold_and_write_the_data() -> None:
    ax = plots.bars({"a": 0.04123, "b": -1234.0})
    assert [bar.get_height() for bar in ax.patches] == [0.04123, -1234.0]
    assert {"0.0412", "-1,234"} <= {text.get_text() for text in ax.texts}
    ax = plots.bars({"g": {"a": 1, "b": 2}, "h": {"b": 3}})
    colours = [bar.get_facecolor() for bar in ax.patches]
    assert colours[1] == colours[2] != colours[0]  # both bars of b
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_values_on_narrow_bars_do_not_overlap() -> None:
    ax = plots.bars({str(i): 22.123 / (i + 1) for i in range(12)})
    many = plots.bars({str(i): 1.2345 for i in range(30)})
    for axes, turn in ((ax, 0), (many, 90)):
        axes.figure.canvas.draw()
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))
        assert {text.get_rotation() for text in axes.texts} == {turn}


def test_histogram_counts_and_marks_levels() -> None:
    ax = plots.histogram(np.array([[0, 0, 1], [2, 2, 2]]), bins=3, levels=[0.5, 1.5])
    assert [bar.get_height() for bar in ax.patches] == [2, 1, 3]
    assert [line.get_xdata()[0] for line in ax.lines] == [0.5, 1.5]


def test_heatmap_shows_the_matrix() -> None:
    matrix = np.array([[0.0, -2.0], [1.0, 0.5]])
    ax = plots.heatmap(matrix, diverging=True, numbers=True, rows="ab", columns="cd")
    image = ax.images[0]
    assert np.array_equal(image.get_array(), matrix)
    assert image.get_clim() == (-2, 2)
    assert [text.get_text() for text in ax.texts] == ["0", "-2", "1", "0.5"]
    ax = plots.heatmap(matrix, numbers=np.array([[7, 8], [9, 10]]))
    assert [text.get_text() for text in ax.texts] == ["7", "8", "9", "10"]
    assert plots.heatmap(matrix, limits=(0, 9)).images[0].get_clim() == (0, 9)
    with pytest.raises(ValueError, match="needs a matrix"):
        plots.heatmap(np.zeros(3))


def test_mark_stands_at_its_place() -> None:
    ax = plots.lines({"a": ([0, 9], [0, 9])})
    plots.mark(ax, x=3, text="three")
    plots.mark(ax, y=5, text="five")
    assert ax.lines[1].get_xdata() == [3, 3]
    assert ax.lines[2].get_ydata() == [5, 5]
    assert [text.get_text() for text in ax.texts] == ["three", "five"]
    plots.lines({"b": ([0], [1])}, ax=ax)
    assert ax.lines[-1].get_color() == plots.COLOURS[1]  # marks do not count


def test_a_mark_s_text_covers_no_line_if_it_can() -> None:
    xs = np.linspace(0, 10, 50)
    low = plots.lines({"a": (xs, xs / 100), "b": (xs, 10 - xs)})  # a crowds the left
    plots.mark(low, y=0.2, text="along the first line")
    plots.mark(low, x=1, text="top is full")
    low.figure.canvas.draw()
    for text in low.texts:
        box = text.get_window_extent()
        for line in low.lines[:2]:
            assert not box.count_contains(
                line.get_transform().transform(line.get_xydata())
            ), text.get_text()
    assert len(low.texts) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.04123, "0.0412"), (12.345, "12.3"), (99.96, "100"), (1234, "1,234")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert plots.short(value) == text


# --- in a notebook --------------------------------------------------------------------


def test_a_cell_stores_one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_code_cell(
            "import matplotlib.pyplot as plt\nfrom flashmoe_ref import plots"
        ),
        nbformat.v4.new_code_cell(
            "_ = plots.lines({'a': ([1, 2], [3, 4])}, title='t')\nplt.show()"
        ),
    ]
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert not notebook.cells[0].outputs
    (output,) = notebook.cells[1].outputs
    assert output.data["text/plain"] == "<Figure size 720x405 with 1 Axes>"
    assert set(output.data) == {"text/plain", "image/png"}


def test_the_package_does_without_plots() -> None:
    """Only plots, views and widgets may import any of them."""
    drawing = ("plots", "views", "widgets", "matplotlib")
    for path in sorted((ROOT / "flashmoe_ref").glob("*.py")):
        if path.stem.endswith(drawing):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = {alias.name for alias in node.names}
                if isinstance(node, ast.ImportFrom):
                    names.add(node.module or "")
                assert not any(name.endswith(drawing) for name in names), path.name
