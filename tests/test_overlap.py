"""The model of shared bandwidth: by hand, against a simulation, and its inequality."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_ref import overlap
from flashmoe_ref.overlap import (
    PUBLISHED,
    Ahead,
    Layer,
    best_speedup,
    contention_from,
    contention_of_slowdown,
    needed_recall,
    pays,
    speedup,
    time_ahead,
    time_overlapped,
)

TIMES = st.floats(0.01, 100)
SHARES = st.floats(0, 1)
LAYERS = st.builds(Layer, TIMES, TIMES)
PREDICTIONS = st.builds(Ahead, SHARES, st.floats(0, 3))


def step_by_step(layer: Layer, ahead: Ahead, contention: float, n: int = 4000) -> float:
    """Time by small steps: the disk reads ahead while there is something to read."""
    to_compute, to_read = layer.compute, ahead.share * layer.read
    step, now = (to_compute + to_read) / n, 0.0
    while to_compute > 0 or to_read > 0:
        rate = 1 - contention if to_read > 0 else 1.0
        to_compute -= rate * step
        to_read -= step
        now += step
    return now + (1 - ahead.recall) * layer.read


# --- by hand --------------------------------------------------------------------------


def test_no_prediction_is_serial() -> None:
    assert time_ahead(Layer(2, 3), Ahead(0, 0), 0.7) == Layer(2, 3).serial == 5


def test_a_perfect_predictor_hides_all_that_fits() -> None:
    assert time_ahead(Layer(2, 1), Ahead(1, 0)) == 2
    assert time_ahead(Layer(1, 3), Ahead(1, 0)) == 3  # the disk decides


def test_by_hand() -> None:
    # 4 of compute, 2 of reading; 3/4 named rightly, as much again for nothing
    ahead = Ahead(0.75, 0.75)
    assert ahead.share == 1.5 and ahead.precision == 0.5
    assert time_ahead(Layer(4, 2), ahead) == 4 + 0.5
    assert time_ahead(Layer(4, 2), ahead, 0.5) == 4 + 1.5 + 0.5  # nothing is won
    assert time_ahead(Layer(4, 2), ahead, 0.5, 0.25) == 6.25
    assert needed_recall(Layer(4, 2), 1.5, 0.5) == 0.75
    assert not pays(Layer(4, 2), ahead, 0.5) and pays(Layer(4, 2), ahead, 0.49)


def test_overlap_without_prediction() -> None:
    assert time_overlapped(Layer(4, 2), 0) == 6
    assert time_overlapped(Layer(4, 2), 1) == 5
    assert time_overlapped(Layer(4, 2), 3) == 4  # all reads are hidden
    assert time_overlapped(Layer(4, 2), 1, 0.5) == 5  # 1 takes 2, so all fits; 1 lost
    assert time_overlapped(Layer(4, 2), 3, 1.0) == 6


# --- properties -----------------------------------------------------------------------


@given(LAYERS, PREDICTIONS, st.floats(0, 0.95))
def test_equals_a_simulation_in_small_steps(
    layer: Layer, ahead: Ahead, contention: float
) -> None:
    got = time_ahead(layer, ahead, contention)
    want = step_by_step(layer, ahead, contention)
    # three steps too many at most, of a 4000th each
    assert abs(got - want) <= 3 * (layer.compute + ahead.share * layer.read) / 4000


@given(LAYERS, PREDICTIONS, SHARES, st.floats(0, 10))
def test_it_pays_exactly_where_it_is_faster(
    layer: Layer, ahead: Ahead, contention: float, overhead: float
) -> None:
    gain = layer.serial - time_ahead(layer, ahead, contention, overhead)
    if abs(gain) > 1e-9 * (layer.serial + overhead):
        assert pays(layer, ahead, contention, overhead) == (gain > 0)


@given(LAYERS, PREDICTIONS, SHARES)
def test_no_machine_gains_more_than_the_best(
    layer: Layer, ahead: Ahead, contention: float
) -> None:
    assert speedup(layer, ahead, contention) <= best_speedup(ahead, contention) + 1e-9


@given(PREDICTIONS.filter(lambda a: a.share > 1e-3), st.floats(0, 0.95))
def test_the_best_is_reached(ahead: Ahead, contention: float) -> None:
    ratios = np.geomspace(1e-3, 1e5, 4001)
    found = max(speedup(Layer(1.0, x), ahead, contention) for x in ratios)
    assert found == pytest.approx(best_speedup(ahead, contention), rel=0.01)


@given(LAYERS, PREDICTIONS.filter(lambda a: a.share > 0.01), SHARES)
def test_contention_is_found_again(
    layer: Layer, ahead: Ahead, contention: float
) -> None:
    read = ahead.share * layer.read
    if layer.compute + contention * read <= read * 1.001:
        return  # the disk decides: contention does not show
    measured = speedup(layer, ahead, contention)
    try:
        found = contention_from(layer, ahead, measured)
    except ValueError:  # an edge of 0..1, passed by rounding
        assert min(contention, 1 - contention) < 1e-6
        return
    assert abs(found - contention) < 1e-6 * layer.serial / read


def test_of_slowdown() -> None:
    assert contention_of_slowdown(1.0) == 0.0
    assert contention_of_slowdown(2.0) == 0.5  # a second beside reads does half
    assert contention_of_slowdown(0.9) == 0.0  # noise


# --- published figures ----------------------------------------------------------------


def test_both_published_outcomes() -> None:
    by = {p.who.split(",")[0]: p for p in PUBLISHED}
    loss, gain = by["flash-moe"], by["ds4"]
    found = [contention_from(p.layer, p.ahead, p.measured) for p in (loss, gain)]
    assert found == pytest.approx([0.646, 0.605], abs=0.001)
    for p, contention in zip((loss, gain), found, strict=True):
        got = speedup(p.layer, p.ahead, contention)
        assert got == pytest.approx(p.measured, abs=1e-9)
    # one contention for both Macs: the signs are the predictors'
    assert not pays(loss.layer, loss.ahead, 0.62) and pays(gain.layer, gain.ahead, 0.62)


def test_the_fork_s_gain_needs_more_than_its_hits() -> None:
    hits, hidden = PUBLISHED[1:3]
    with pytest.raises(ValueError, match="no contention gives"):
        contention_from(hits.layer, hits.ahead, hits.measured)
    assert best_speedup(hits.ahead) < 1.16  # on any machine
    assert speedup(hidden.layer, hidden.ahead) == pytest.approx(1.30, abs=0.005)


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Layer(0, 1),
        lambda: Ahead(1.1, 0),
        lambda: Ahead(0.5, -0.1),
        lambda: time_ahead(Layer(1, 1), Ahead(0, 0), 1.2),
        lambda: time_ahead(Layer(1, 1), Ahead(0, 0), 0, -1),
        lambda: time_overlapped(Layer(1, 1), 2),
        lambda: contention_of_slowdown(0),
        lambda: contention_from(Layer(1, 1), Ahead(0, 0), 1.0),
    ],
)
def test_impossible_figures(wrong: object) -> None:
    with pytest.raises(ValueError):
        wrong()


def test_arithmetic_only() -> None:
    names = {n for n in vars(overlap) if not n.startswith("_")}
    assert not names & {"np", "time", "load"}


def test_a_share_next_to_nothing_wins_nothing() -> None:
    assert best_speedup(Ahead(recall=5e-324, waste=0.0)) == 1.0  # once: not a number
