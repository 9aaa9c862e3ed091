"""Timelines and disk surfaces show what was recorded, and their widgets follow."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny

from flashmoe_ref import load, plots, widgets
from flashmoe_ref.errors import ConfigError, TraceError
from flashmoe_ref.overlap_views import (
    NEEDED,
    USED,
    WASTED,
    draw_timelines,
    say_timeline,
    timeline,
)
from flashmoe_ref.probe_disk import DiskProbe, DiskRate
from flashmoe_ref.probe_views import (
    draw_bandwidth,
    modes_of,
    rates_by_depth,
    say_bandwidth,
)
from flashmoe_ref.recording import EXPERTS, HEAD, MIX, SHARED
from flashmoe_ref.recording import WAIT as WAITING
from flashmoe_ref.trace import Trace, record
from flashmoe_ref.trace_format import READ, SPAN, STEP


@pytest.fixture(autouse=True)
def drawn_without_a_screen() -> Iterator[None]:
    plots.plt.switch_backend("agg")
    yield
    plots.plt.close("all")


def by_hand() -> Trace:
    """A prompt of two tokens, then two tokens; two layers, four experts, K = 1."""
    spans = [
        (0, 0, MIX, 0.0, 1.0),
        (1, 0, MIX, 1.0, 1.002),
        (1, 0, WAITING, 1.002, 1.003),
        (1, 1, SHARED, 1.003, 1.005),
        (1, -1, HEAD, 1.005, 1.006),
        (2, 0, EXPERTS, 1.006, 1.008),
        (2, 1, EXPERTS, 1.008, 1.010),
    ]
    reads = [
        (1, 0, 1, 0, 100, 1.002, 1.003),  # needed at once
        (1, 1, 3, 1, 100, 1.0025, 1.004),  # ahead for layer 1, which picks it
        (1, 1, 0, 2, 100, 1.0026, 1.004),  # ahead for layer 1, which does not
        (1, 0, 2, 1, 100, 1.0045, 1.0055),  # ahead for the next token's layer 0
        (2, 0, 0, 1, 100, 1.0085, 1.009),  # for a token that never came
    ]
    return Trace(
        picks=np.array([[[0], [0]], [[0], [0]], [[1], [3]], [[2], [1]]], np.int32),
        n_experts=4,
        steps=np.array([(2, 0), (1, 2), (1, 3)], STEP),
        spans=np.array(spans, SPAN),
        reads=np.array(reads, READ),
    )


# --- timelines ------------------------------------------------------------------------


def test_a_timeline_by_hand() -> None:
    found = timeline(by_hand(), 0)
    assert [kind for kind, *_ in found.spans] == ["mix", "wait", "shared", "head"]
    assert found.ms == pytest.approx(6) and found.waited_ms == pytest.approx(1)
    assert [read.what for read in found.reads] == [NEEDED, USED, WASTED, USED]
    assert found.reads[1].thread == 1 and found.reads[1].expert == 3
    assert found.reads[0].start_ms == pytest.approx(2)
    assert say_timeline("prefetched", found) == (
        "prefetched: 6.00 ms, of which 1.00 ms stood still for reads; experts read: "
        "1 needed; 2 ahead, used; 1 ahead, for nothing"
    )
    assert [read.what for read in timeline(by_hand(), 1).reads] == [WASTED]


def test_some_layers_of_a_token() -> None:
    found = timeline(by_hand(), 0, (1, 1))
    assert found.ms == pytest.approx(2) and len(found.reads) == 1
    assert found.reads[0].start_ms == pytest.approx(1.5)


def test_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="token 2 is not among 2"):
        timeline(by_hand(), 2)
    with pytest.raises(ValueError, match="not among 2 layers"):
        timeline(by_hand(), 0, (5, 6))
    bare = by_hand()
    bare.spans = None
    with pytest.raises(TraceError, match="no spans"):
        timeline(bare, 0)


def test_a_drawing_has_a_row_for_each_thread() -> None:
    both = {"a": timeline(by_hand(), 0), "b": timeline(by_hand(), 1)}
    axes = draw_timelines(both, "One token")
    texts = [[tick.get_text() for tick in ax.get_yticklabels()] for ax in axes]
    assert texts == [["computing", "reader 1", "reader 2"], ["computing", "reader 1"]]
    limits = {ax.get_xlim() for ax in axes}
    assert len(limits) == 1  # one scale
    assert axes[0].get_title(loc="left") == "a: 6.00 ms"
    assert len(axes[0].figure.axes) == 2


def test_a_real_run(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    with load(folder, engine="numpy", slots=5, prefetch="frequency:2") as model:
        state = model.new_state()
        model.prefill([5, 6, 7], state)
        with record(model) as trace:
            for token in range(6):
                model.decode(token, state)
        counters = model.store.counters
    lines = [timeline(trace, token) for token in range(6)]
    kinds = {read.what for line in lines for read in line.reads}
    assert NEEDED in kinds and counters.prefetched > 0
    assert {USED, WASTED} & kinds
    assert all(line.waited_ms <= line.ms for line in lines)


def test_the_viewer_follows_its_controls() -> None:
    viewer = widgets.timeline_viewer({"serial": by_hand(), "ahead": by_hand()})
    assert viewer.text.value.startswith("serial: 6.00 ms")
    before = viewer.picture.value
    viewer.controls["token"].value = 1
    viewer.controls["mode"].value = "ahead"
    assert viewer.text.value.startswith("ahead: 4.00 ms")
    assert viewer.picture.value != before
    assert viewer.controls["token"].max == 1


# --- the disk's surface ---------------------------------------------------------------


def probe() -> DiskProbe:
    rates = [
        DiskRate("cold", 4096, 1, 0.1, 40.0, 9),
        DiskRate("cold", 4096, 4, 0.3, 50.0, 9),
        DiskRate("cold", 1 << 20, 1, 1.5, 700.0, 9),
        DiskRate("warm", 4096, 1, 2.0, 2.0, 9),
    ]
    return DiskProbe("a file", 1 << 27, tuple(rates), ())


def test_rates_of_a_record() -> None:
    assert modes_of(probe()) == ["cold", "warm"]
    assert rates_by_depth(probe(), "cold", 4096) == {1: 0.1, 4: 0.3}
    assert rates_by_depth(probe(), "cold", 1 << 20) == {1: 1.5}
    said = say_bandwidth(probe(), "cold", 4096)
    assert said.endswith(": 0.100 GB/s at depth 1, 0.300 GB/s at depth 4")
    assert (
        say_bandwidth(probe(), "warm", 1 << 20) == "1 MiB records, warm: not measured"
    )
    with pytest.raises(ConfigError, match="measured nothing"):
        modes_of(DiskProbe("a file", 1, (), ("note",)))


@pytest.mark.parametrize("size", [4096, 1 << 20])
@pytest.mark.parametrize("mode", ["cold", "warm"])
def test_every_surface_can_be_drawn(mode: str, size: int) -> None:
    left, right = draw_bandwidth(probe(), mode, size)
    measured = rates_by_depth(probe(), mode, size)
    assert right.get_title(loc="left").endswith(
        f"{max(measured, key=measured.get)} at once" if measured else "not measured"
    )
    assert len(left.images) == 1


def test_the_explorer_follows_its_controls() -> None:
    explorer = widgets.bandwidth_surface(probe())
    assert explorer.text.value.startswith("1 MiB records, cold")
    explorer.controls["record"].value = 4096
    explorer.controls["mode"].value = "warm"
    assert "2.000 GB/s at depth 1" in explorer.text.value
