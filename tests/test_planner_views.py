"""Views of the cost model say what it says; the doctor's sliders move it."""

from collections.abc import Iterator

import numpy as np
import pytest

from flashmoe_ref import planner_views as views
from flashmoe_ref import plots
from flashmoe_ref.doctor_widgets import doctor_explorer
from flashmoe_ref.machines import machine
from flashmoe_ref.planner import (
    FITTED,
    disk_needed,
    predict,
    run_of,
    sizes_of_preset,
    tokens_per_second,
)
from flashmoe_ref.planner_fit import HeldOut, read_published

BIG = "qwen3.5-397b-a17b"


@pytest.fixture(autouse=True)
def drawn_without_a_screen() -> Iterator[None]:
    plots.plt.switch_backend("agg")
    yield
    plots.plt.close("all")


@pytest.fixture(scope="module")
def found() -> HeldOut:
    published = read_published()
    return HeldOut(published, tokens_per_second(published.run, FITTED), (0.5, 1.6))


def test_every_published_run_is_drawn(found: HeldOut) -> None:
    ax = views.draw_published(found)
    drawn = [line for line in ax.lines if line.get_linestyle() == "None"]
    assert sum(len(line.get_xdata()) for line in drawn) == len(found.errors)
    assert f"{found.median_error():.0%}" in ax.get_title("left")


def test_hit_curves_are_those_of_the_table() -> None:
    curves = views.hit_curves()
    big = next(c for c in curves if c.name == "Qwen3.5-397B K=10, boyle")
    assert big.working_set == 10 / 512
    assert big.hits[list(big.fraction).index(0.36)] == 0.828
    ax = views.draw_hits(curves)
    assert len(ax.lines) == len(curves) + 1


def test_bars_add_up_to_a_token() -> None:
    p = predict(run_of(sizes_of_preset(BIG, 4), machine("m3-max-48")))
    ax = views.draw_parts({"one": p, "two": p}, "Title")
    widths = [bar.get_width() for bars in ax.containers for bar in bars]
    assert sum(widths) == pytest.approx(2e3 / p.tok_s)
    assert f"{p.tok_s:.2g} tok/s" in ax.texts[0].get_text()


def test_the_view_is_the_prediction() -> None:
    view = views.doctor_view(48, 5.5, 4, 4, BIG, machine("m3-max-48"))
    direct = predict(run_of(sizes_of_preset(BIG, 4), machine("m3-max-48")))
    assert view.found == direct
    assert (np.diff(view.tok_s) > 0).all()
    assert view.tok_s[list(view.memory_gb).index(48)] == pytest.approx(direct.tok_s)
    words = views.say_doctor(view)
    assert f"{direct.tok_s:.2g} tok/s" in words and direct.dominates in words
    left, right = views.draw_doctor(view)
    assert direct.dominates in left.get_title("left") and right.lines


def test_too_little_memory_is_said() -> None:
    view = views.doctor_view(6, 5.5, 4, 4, BIG, machine("m3-max-48"))
    assert "does not hold" in views.say_doctor(view)


def test_sliders_move_the_prediction() -> None:
    explorer = doctor_explorer()
    assert "48 GB, disk 5.5 GB/s, K=4, 4 bits" in explorer.text.value
    picture = explorer.picture.value
    explorer.controls["K"].value = 10
    explorer.controls["disk"].value = 17.5
    assert "disk 17.5 GB/s, K=10" in explorer.text.value
    assert explorer.picture.value != picture
    explorer.controls["bits"].value = 2
    explorer.controls["memory"].value = 128
    view = views.doctor_view(128, 17.5, 10, 2, BIG, machine("m3-max-48"))
    assert f"{view.found.tok_s:.2g} tok/s" in explorer.text.value


def test_the_disk_that_is_needed_gives_the_speed() -> None:
    sizes = sizes_of_preset(BIG)
    run = run_of(sizes, machine("m5-max-128"))
    rate = disk_needed(run, FITTED, 6.0)
    there = run_of(sizes, views.replace(machine("m5-max-128"), disk_gb_s=rate))
    assert tokens_per_second(there, FITTED) == pytest.approx(6.0)
    assert disk_needed(run, FITTED, 50.0) == float("inf")
    assert disk_needed(run_of(sizes, machine("m1-4")), FITTED, 0.1) == float("inf")
    small = run_of(sizes_of_preset("qwen3.5-35b-a3b"), machine("m5-max-128"))
    assert disk_needed(small, FITTED, 5.0) == pytest.approx(0, abs=1e-9)
