"""Views of caches equal what caches do, replays read what the simulator says."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_ref import cache_views, plots, widgets
from flashmoe_ref.cache_views import HIT, MISS, NOTHING
from flashmoe_ref.errors import ConfigError, ReadError
from flashmoe_ref.memory_limit import why_not
from flashmoe_ref.policies import LruSlots
from flashmoe_ref.replay import HOWS, replay, replay_limited, write_records
from flashmoe_ref.simulator import decode_requests, simulate
from flashmoe_ref.trace import Trace
from flashmoe_ref.trace_format import STEP

REASON = why_not()
needs_groups = pytest.mark.skipif(REASON is not None, reason=str(REASON))
RECORD = 4096


@pytest.fixture(autouse=True)
def drawn_without_a_screen() -> Iterator[None]:
    plots.plt.switch_backend("agg")
    yield
    plots.plt.close("all")


def random_picks(t: int, n_layers: int, k: int, e: int, seed: int = 0) -> np.ndarray:
    """Picks with some favourites."""
    rng = np.random.default_rng(seed)
    score = rng.random((t, n_layers, e)) * np.linspace(1, 2, e)
    return np.argsort(-score, axis=2)[..., :k].astype(np.int32)


def trace_of(picks: np.ndarray, e: int) -> Trace:
    return Trace(picks, e, np.array([(1, i) for i in range(len(picks))], STEP))


# --- the raster -----------------------------------------------------------------------


def test_a_raster_by_hand() -> None:
    picks = np.array([[[0, 1]], [[1, 2]], [[0, 3]], [[3, 0]]])  # one layer, two slots
    view = cache_views.raster(trace_of(picks, 5), 0, slots=2, n_tokens=4)
    assert view.cells.tolist() == [
        [MISS, MISS, NOTHING, NOTHING, NOTHING],
        [NOTHING, HIT, MISS, NOTHING, NOTHING],
        [MISS, NOTHING, NOTHING, MISS, NOTHING],
        [HIT, NOTHING, NOTHING, HIT, NOTHING],
    ]
    assert view.hit_rate == 3 / 8
    said = cache_views.say_raster(view)
    assert said == "layer 0, tokens 0 to 3: 4 of 5 experts, 38% hits with 2 slots (LRU)"


def test_a_raster_of_later_tokens_keeps_what_came_before() -> None:
    trace = trace_of(random_picks(60, 3, 2, 12), 12)
    whole = cache_views.raster(trace, 1, slots=5, n_tokens=60)
    part = cache_views.raster(trace, 1, slots=5, first=40, n_tokens=20)
    assert np.array_equal(part.cells, whole.cells[40:])
    assert part.first == 40


def test_a_raster_is_drawn_with_a_mark_for_each_access() -> None:
    trace = trace_of(random_picks(30, 2, 3, 12), 12)
    view = cache_views.raster(trace, 1, slots=4, first=10, n_tokens=20)
    ax = cache_views.draw_raster(view, "stories")
    hits, misses = (points.get_offsets() for points in ax.collections)
    assert len(hits) == np.sum(view.cells == HIT)
    assert len(misses) == np.sum(view.cells == MISS)
    assert hits[:, 0].min() >= 10 and misses[:, 0].max() < 30
    assert ax.get_title("left") == f"stories, layer 1: {view.hit_rate:.0%} hits"


# --- hit rate against budget ----------------------------------------------------------


def test_hit_rates_are_the_simulator_s() -> None:
    requests = decode_requests(random_picks(50, 4, 2, 16), 16)
    for shared, factor in ((False, 1), (True, 4)):
        rates = cache_views.hit_rates(requests, (3, 8), shared=shared)
        assert list(rates) == list(cache_views.POLICIES)
        for policy, found in rates.items():
            want = [
                simulate(requests, policy, n * factor, shared).hit_rate for n in (3, 8)
            ]
            assert found.tolist() == want
            assert (found <= rates["belady"] + (policy == "static")).all()


def test_a_setting_says_what_it_has() -> None:
    requests = decode_requests(random_picks(80, 3, 2, 16), 16)
    assert cache_views.budgets(requests) == [2, 8, 16]
    view = cache_views.setting(requests, "clock", 6)
    outcome = simulate(requests, "clock", 6)
    assert view.by_layer.mean() == pytest.approx(outcome.hit_rate)
    assert view.reads == pytest.approx(outcome.misses / 80)
    assert list(view.curves) == ["clock", "belady"]
    said = cache_views.say_setting(view)
    assert said == (
        f"CLOCK, K=2, 6 of 16 slots a layer: {outcome.hit_rate:.1%} hits, "
        f"{outcome.misses / 80:.1f} of 6 experts read a token"
    )
    left, right = cache_views.draw_setting(view)
    assert len(right.patches) == 3
    assert left.lines[0].get_ydata().tolist() == (100 * view.curves["clock"]).tolist()


def test_the_explorer_follows_its_controls() -> None:
    by_k = {k: decode_requests(random_picks(40, 2, k, 16, seed=k), 16) for k in (2, 4)}
    explorer = widgets.hit_rate_explorer(by_k, slots=8)
    assert bytes(explorer.picture.value).startswith(b"\x89PNG")
    before = explorer.picture.value
    for name, value in (("policy", "lfu"), ("slots", 12), ("K", 2)):
        explorer.controls[name].value = value
    want = cache_views.say_setting(cache_views.setting(by_k[2], "lfu", 12))
    assert explorer.text.value == want
    assert explorer.picture.value != before
    assert explorer.controls["slots"].min == 4  # fits every K


# --- two caches, one behind the other -------------------------------------------------


def two_caches(picks: np.ndarray, e: int, slots: int, budget: int, n_warm: int):
    """The same by hand, with records of one page: copies and disk reads a token."""
    caches = [LruSlots(slots) for _ in range(picks.shape[1])]
    pages: dict[tuple[int, int], bool] = {}  # in the order of the clock
    copies = disk = 0
    for token, layers in enumerate(picks.tolist()):
        for layer, keys in enumerate(layers):
            missing = caches[layer].assign(keys)[1] if slots else keys
            for key in missing:
                copies += token >= n_warm
                if (layer, key) in pages:
                    pages[layer, key] = True
                    continue
                disk += token >= n_warm
                if len(pages) == max(budget - slots * len(caches), 1):
                    while pages[next(iter(pages))]:  # a second chance: to the end
                        first = next(iter(pages))
                        pages[first] = not pages.pop(first)
                    pages.pop(next(iter(pages)))
                pages[layer, key] = False
    n = len(picks) - n_warm
    return copies / n, disk / n


@given(st.integers(0, 5), st.integers(0, 30), st.integers(0, 5), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_slots_before_a_page_cache(slots, extra, n_warm, seed) -> None:
    slots = slots and slots + 2
    picks = random_picks(12, 2, 3, 10, seed)
    budget = 2 * slots + extra
    got = cache_views.stacked(picks, 10, RECORD, slots, budget, n_warm)
    want = two_caches(picks, 10, slots, budget, n_warm)
    assert (got.copies, got.disk_records) == pytest.approx(want)


# --- replays --------------------------------------------------------------------------


def test_records_are_written_whole(tmp_path: Path) -> None:
    path = write_records(tmp_path / "records", 100, RECORD)
    data = path.read_bytes()
    assert len(data) == 100 * RECORD
    assert len({data[i * RECORD :][:RECORD] for i in range(100)}) == 100


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("slots", [0, 4])
def test_a_replay_reads_what_a_cache_misses(tmp_path, monkeypatch, how, slots) -> None:
    picks = random_picks(20, 2, 3, 10)
    path = write_records(tmp_path / "records", 20, RECORD)
    data, seen = path.read_bytes(), []

    def note(fd: int, views: list[memoryview], offset: int) -> None:
        os.preadv(fd, views, offset)
        seen.append((bytes(views[0]), offset))

    monkeypatch.setattr("flashmoe_ref.replay.read_exactly", note)
    try:
        found = replay(path, picks, RECORD, slots, how, n_warm=5)
    except ConfigError:
        pytest.skip("no direct reads here")
    hits = np.zeros(20 * 2 * 3, bool)
    requests = decode_requests(picks, 10)
    if slots:
        hits = simulate(requests, "lru", slots).hits
    assert [at // RECORD for _, at in seen] == requests.keys[~hits].tolist()
    assert all(got == data[at : at + RECORD] for got, at in seen)
    assert found.copies == np.sum(~hits[5 * 6 :]) / 15
    assert found.seconds > 0


def test_a_replay_in_an_unknown_way(tmp_path: Path) -> None:
    path = write_records(tmp_path / "records", 4, RECORD)
    with pytest.raises(ValueError, match="telepathy"):
        replay(path, random_picks(2, 1, 2, 4), RECORD, 2, "telepathy")


@needs_groups
def test_a_replay_under_a_limit(tmp_path: Path) -> None:
    record, picks = 1 << 16, random_picks(20, 2, 4, 300)
    path = write_records(tmp_path / "records", 600, record)
    arguments = (path, picks, record)
    found = replay_limited(*arguments, 8, "no read-ahead", 5, 80e6)
    alone = replay(*arguments, 8, "no read-ahead", 5)
    assert found.copies == alone.copies
    assert 0 < found.peak_bytes <= 80e6
    assert found.disk_records <= found.copies + 1  # some are in the page cache
    assert replay_limited(*arguments, 300, "no read-ahead", 5, 20e6) is None
    assert not list(tmp_path.glob("*.npy"))
    with pytest.raises(ReadError, match="the replay failed"):
        replay_limited(*arguments, 2, "no read-ahead", 5, 80e6)  # fewer slots than K
