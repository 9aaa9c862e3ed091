"""What lesson 11 draws and says is what was measured."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashmoe_ref import flash_views, plots, widgets
from flashmoe_ref.flash_model import FlashModel, Rung, TokenCost
from flashmoe_ref.flash_views import Step, Tradeoffs
from flashmoe_ref.neuron_store import write_neurons
from flashmoe_ref.probe_disk import DiskProbe, DiskRate
from flashmoe_ref.relu_model import ReluConfig, ReluModel, active_neurons, mean_nats
from flashmoe_ref.sparsity import (
    NO_FRIEND,
    Predictor,
    closest_friends,
    load_with_friends,
    loads,
    quality,
)

CONFIG = ReluConfig(16, 40, 2, 2, 50, 1e4, 1e-6)
IDS = np.random.default_rng(0).integers(0, 50, 60).tolist()
STEP = Step("pool", 100.0, 2e5, 0.010, 0.001, 0.002)


@pytest.fixture(autouse=True)
def drawn_without_a_screen() -> Iterator[None]:
    plots.plt.switch_backend("agg")
    yield
    plots.plt.close("all")


@pytest.fixture(scope="module")
def model() -> ReluModel:
    return ReluModel.random(CONFIG)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    rng = np.random.default_rng(1)
    shapes = ((16, 4), (4, 40), (40,))
    parts = ([draw(rng, s) for _ in range(2)] for s in shapes)
    return Predictor(*parts, "attention")


def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (rng.standard_normal(shape) / 2).astype(np.float32)


# --- data -----------------------------------------------------------------------------


def test_quality_at_the_extremes(model: ReluModel, predictor: Predictor) -> None:
    everyone = quality(model, predictor.at(1e-12), IDS)
    dense = mean_nats(model.forward(IDS, model.new_state()), IDS)
    assert everyone.nats == pytest.approx(dense, abs=1e-5)
    assert (everyone.recall == 1).all() and (everyone.in_memory == 1).all()
    assert everyone.loads == 2 * 40
    share = active_neurons(model, IDS).mean((1, 2))
    np.testing.assert_allclose(everyone.precision, share)
    np.testing.assert_allclose(everyone.over, 1 / share)
    assert everyone.perplexity == pytest.approx(np.exp(dense), rel=1e-5)
    nobody = quality(model, predictor.at(1 - 1e-12), IDS, 3)
    assert (nobody.recall == 0).all() and nobody.loads == 0 and nobody.nats > 0


def test_a_window_keeps_what_the_predictor_misses(
    model: ReluModel, predictor: Predictor
) -> None:
    short, long = (quality(model, predictor, IDS, k) for k in (0, 6))
    assert (short.in_memory == short.recall).all()
    assert long.in_memory.mean() > long.recall.mean() and long.loads < short.loads


def test_friends_by_hand() -> None:
    active = np.zeros((4, 5), bool)
    active[[0, 1, 2], 0] = active[[0, 1], 1] = active[2, 2] = active[3, 3] = True
    assert closest_friends(active).tolist() == [1, 0, 0, 0, NO_FRIEND]
    active[0, 4] = active[3, 0] = True  # neuron 0 is everybody's friend
    friends = closest_friends(active)
    assert friends.tolist() == [1, 0, 0, 0, 0]
    found = load_with_friends(active, friends, 0)
    # tokens want 014, 01, 02, 03: 0 brings 1, except where 4, 2, 3 are read as well
    assert (found.reads, found.useful, found.there) == (7, 2, 3)
    assert found.unwanted == 2 and found.most == 4
    kept = load_with_friends(active, friends, 4)  # 0 stays: each later friend is there
    assert (kept.reads, kept.useful, kept.there, kept.unwanted) == (4, 1, 3, 0)


def test_without_friends_nothing_changes(model: ReluModel) -> None:
    active = active_neurons(model, IDS)[0]
    found = load_with_friends(active, np.full(40, NO_FRIEND), 2)
    assert found.reads == loads(active, 2).sum() and found.most == 0


@pytest.mark.parametrize("k", [0, 1, 3])
def test_every_friend_is_counted_once(k: int) -> None:
    active = np.random.default_rng(2).random((30, 12)) < 0.3
    friends = closest_friends(active)
    found = load_with_friends(active, friends, k)
    assert found.useful + found.there + found.unwanted == found.reads
    assert found.reads + found.useful >= loads(active, k).sum()
    assert found.useful and found.there and found.unwanted


def test_a_rung_is_run_and_its_median_taken(model: ReluModel, tmp_path: Path) -> None:
    write_neurons(model, tmp_path, bundled=False)
    names = ("a", "b")
    rungs = {n: FlashModel(model, tmp_path, Rung(n, resident=0.9)) for n in names}
    runs = flash_views.run_in_turns(rungs, IDS[:5], evict=True)
    for costs, logits in runs.values():
        assert logits.shape == (5, 50) and len({cost.bytes_read for cost in costs}) == 1
    np.testing.assert_array_equal(runs["a"][1], runs["b"][1])
    costs = [TokenCost(n, 10 * n, n / 10, 0.0, 1.0, 0) for n in (100, 1, 2, 3)]
    step = flash_views.median_step("x", costs, skip=1)
    assert (step.reads, step.n_bytes, step.read_s) == (2, 20, 0.2)
    assert step.total_s == 1.2 and step.read_bytes == 10
    assert step.rate_gb_s == pytest.approx(1e-7)
    assert Step("none", 0, 0, 0, 0, 1).rate_gb_s == 0


# --- figures and words ----------------------------------------------------------------


def test_waterfall_shows_every_rung(model: ReluModel) -> None:
    steps = [Step("naive", 50, 5e7, 0.05, 0, 0.01), STEP]
    ours, theirs = flash_views.draw_waterfall(steps, "title")
    widths = [bar.get_width() for bar in ours.patches]
    assert widths == pytest.approx([50, 10, 0, 1, 10, 2])
    assert [text.get_text() for text in ours.texts] == ["60", "13"]
    assert [text.get_text() for text in theirs.texts][-1] == "87"
    said = flash_views.say_step(STEP)
    assert "0.20 MB" in said and "100 reads" in said and "0.020 GB/s" in said


def test_rungs_stand_on_the_disk_curve() -> None:
    rates = [
        DiskRate("cold", size, depth, size * depth / 1e6, 1.0, 9)
        for size in (4096, 65536)
        for depth in (1, 4)
    ]
    probe = DiskProbe("a file", 1 << 20, tuple(rates), ())
    ax = flash_views.draw_chunks(probe, "cold", [STEP], "title")
    star = next(line for line in ax.lines if line.get_marker() == "*")
    assert star.get_xydata().tolist() == [[2000 / 1024, 0.02]]
    assert [text.get_text() for text in ax.texts] == ["pool"]


def test_widget_follows_its_sliders(model: ReluModel, predictor: Predictor) -> None:
    found = flash_views.tradeoffs(model, predictor, IDS, (0, 2), (0.3, 0.5), 42.0)
    explorer = widgets.flash_explorer(found, 2, 0.5)
    said = explorer.text.value
    assert said.startswith("window 2, threshold 0.5:") and "dense 42.0" in said
    explorer.controls["window"].value = 0
    q = quality(model, predictor.at(0.5), IDS, 0)
    assert f"{q.loads * CONFIG.neuron_bytes / 1e6:.2f} MB" in explorer.text.value
    assert f"{q.in_memory.mean():.0%} of" in explorer.text.value
    assert found.mb[found.at(2, 0.3)] < found.mb[found.at(0, 0.3)]
    assert isinstance(found, Tradeoffs) and explorer.picture.value[:4] == b"\x89PNG"
