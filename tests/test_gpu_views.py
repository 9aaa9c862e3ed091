"""Views of GPU results show the table's own numbers."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashmoe_ref import gpu_views as views
from flashmoe_ref import plots

TABLE = """\
gpu,k,bits,slots,slot_gb,page_cache,tok_s,launch_ms,sync_ms,wait_ms
H100,4,4,128,54.4,warm,8.0,60,25,40
H100,4,4,,2.1,warm,2.0,400,60,40
H100,10,4,128,54.4,cold,1.0,1,2,3
"""


@pytest.fixture(autouse=True)
def drawn_without_a_screen() -> Iterator[None]:
    plots.plt.switch_backend("agg")
    yield
    plots.plt.close("all")


@pytest.fixture
def rows(tmp_path: Path) -> list:
    (tmp_path / "gpu_rehearsal.csv").write_text(TABLE)
    return views.read_gpu("rehearsal", tmp_path)


def test_curves_are_the_table_s(rows: list) -> None:
    curves = views.speed_curves(rows)
    assert list(curves) == ["K=4, 4 bits, warm", "K=10, 4 bits, cold"]
    slot_gb, tok_s = curves["K=4, 4 bits, warm"]
    np.testing.assert_array_equal(slot_gb, [2.1, 54.4])  # rising
    np.testing.assert_array_equal(tok_s, [2.0, 8.0])
    ax = views.draw_speed(rows, "Title")
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [2.0, 8.0])


def test_bars_add_up_to_the_parts(rows: list) -> None:
    ax = views.draw_times(rows[:2], "Title")
    widths = [bar.get_width() for bars in ax.containers for bar in bars]
    assert sum(widths) == 60 + 25 + 40 + 400 + 60 + 40
    said = [text.get_text().strip() for text in ax.texts]
    assert said == ["8.00 tok/s", "2.00 tok/s"]


def test_words_numbers_empty_cells_and_missing_files(
    rows: list, tmp_path: Path
) -> None:
    assert np.isnan(rows[1]["slots"]) and rows[1]["gpu"] == "H100"
    with pytest.raises(OSError, match=r"gpu_none\.csv"):
        views.read_gpu("none", tmp_path)


def test_every_saved_table_can_be_shown() -> None:
    found = views.read_gpu("rehearsal")
    assert all(row[part] > 0 for row in found for part in views.PARTS)
    assert sum(len(x) for x, _ in views.speed_curves(found).values()) == len(found)
    for name in ("kernels", "reduced"):
        assert views.read_gpu(name)


def test_differences_are_bold_and_nothing_becomes_html() -> None:
    html = views.side_by_side("a < b\nsame", "a\nmore\nsame", ("<i>", "right"))
    assert "<b>a &lt; b</b><br><b></b><br>same</pre>" in html  # same beside same
    assert "<b>a</b><br><b>more</b><br>same</pre>" in html
    assert ">&lt;i&gt;</th>" in html and "<i>" not in html
