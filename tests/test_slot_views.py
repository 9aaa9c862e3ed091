"""Slots of a recorded token are those of the live store, and figures show them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import write_tiny

from flashmoe_ref import load, plots, slot_views, widgets
from flashmoe_ref.caching import Caching
from flashmoe_ref.errors import ConfigError, TraceError
from flashmoe_ref.policies import LIVE_POLICIES
from flashmoe_ref.recording import EXPERTS, HEAD, MIX, REQUEST, WAIT
from flashmoe_ref.slot_views import (
    BEING_READ,
    EMPTY,
    EVICTED,
    FOUND,
    KEPT,
    NONE,
    READ,
    bank_frames,
    say_frame,
)
from flashmoe_ref.trace import Trace, record
from flashmoe_ref.trace_format import READ as READ_ROW
from flashmoe_ref.trace_format import SPAN, STEP

RNG = np.random.default_rng(0)
THREE = Caching(slots=3)


@pytest.fixture(autouse=True)
def drawn_without_a_screen() -> Iterator[None]:
    plots.plt.switch_backend("agg")
    yield
    plots.plt.close("all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def by_hand() -> Trace:
    """One layer, three slots, tokens that want 0 and 1, then 2 and 0, then 3 and 2.

    Slots 0, 1 and 2 are filled in this order. The third token finds 2; 1 was used
    longest ago and goes, so 3 comes into slot 1.
    """
    spans, reads = [], []
    for step, new in enumerate(([0, 1], [2], [3])):
        at = 10.0 * step
        for kind, start, end in (
            (MIX, 0, 1),
            (REQUEST, 1, 2),
            (WAIT, 2, 5),
            (EXPERTS, 5, 7),
        ):
            spans.append((step, 0, kind, at + start, at + end))
        spans.append((step, -1, HEAD, at + 7, at + 8))
        for i, expert in enumerate(new):
            reads.append((step, 0, expert, 0, 100, at + 2 + i, at + 3 + i))
    return Trace(
        picks=np.array([[[0, 1]], [[2, 0]], [[3, 2]]], np.int32),
        n_experts=5,
        steps=np.array([(1, 0), (1, 1), (1, 2)], STEP),
        hits=np.array([0, 0, 0, 1, 0, 1], bool),
        spans=np.array(spans, SPAN),
        reads=np.array(reads, READ_ROW),
    )


# --- frames ---------------------------------------------------------------------------


def test_frames_by_hand() -> None:
    first = bank_frames(by_hand(), THREE, 0)
    assert [frame.event for frame in first] == [
        *("looks up", "reads", "reads", "reads", "has computed"),
    ]
    assert [frame.held.tolist() for frame in first] == [
        [[NONE, NONE, NONE]],
        *4 * [[[0, 1, NONE]]],
    ]
    assert [frame.states.tolist() for frame in first] == [
        [[EMPTY, EMPTY, EMPTY]],
        [[BEING_READ, BEING_READ, EMPTY]],
        [[READ, BEING_READ, EMPTY]],
        [[READ, READ, EMPTY]],
        [[READ, READ, EMPTY]],
    ]
    assert [frame.time_s for frame in first] == [1, 2, 3, 4, 7]


def test_an_eviction_by_hand() -> None:
    last = bank_frames(by_hand(), THREE, 2)
    assert [frame.held.tolist() for frame in last] == [
        [[0, 1, 2]],
        *3 * [[[0, 3, 2]]],
    ]
    assert [frame.states.tolist() for frame in last] == [
        [[KEPT, EVICTED, FOUND]],
        [[KEPT, BEING_READ, FOUND]],
        [[KEPT, READ, FOUND]],
        [[KEPT, READ, FOUND]],
    ]
    assert say_frame(last[0]) == (
        "1000.00 ms, layer 0 looks up: 1 kept, 1 found, 1 evicted"
    )
    assert say_frame(last[1]).endswith("reads: 1 kept, 1 found, 1 being read")


SETTINGS = st.fixed_dictionaries(
    {
        "slots": st.integers(3, 8),
        "policy": st.sampled_from(sorted(LIVE_POLICIES)),
        "pin": st.integers(0, 2),
        "threads": st.integers(1, 3),
    }
)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    options=SETTINGS,
    prompt=st.lists(st.integers(0, 95), max_size=12),
    ids=st.lists(st.integers(0, 95), min_size=1, max_size=8),
    inline=st.booleans(),
)
def test_frames_end_with_what_the_slots_hold(
    folder: Path, options: dict, prompt: list, ids: list, inline: bool
) -> None:
    """Oracle: the bytes in the bank, against those of the experts that frames name."""
    options["pin"] = min(options["pin"], options["slots"] - 3)
    profile = RNG.integers(0, 8, (5, 4, 3))
    with load(folder, engine="numpy", profile=profile, **options) as model:
        if not inline:
            model.store.inline_bytes = 0
        state = model.new_state()
        with record(model) as trace:
            if prompt:
                model.prefill(prompt, state)
            for token in ids:
                model.decode(token, state)
        frames = bank_frames(trace, model.store.caching, len(trace.steps) - 1)
        assert [frame.layer for frame in frames] == sorted(f.layer for f in frames)
        for layer, held in enumerate(frames[-1].held):
            live = model.store._caches[layer]
            assert set(held) - {NONE} == {*live.slots, *live.pinned}
            for slot, expert in enumerate(held):
                if expert != NONE:
                    assert _in_slot(model, layer, slot) == _on_disk(
                        model, layer, expert
                    )
        last = trace.accesses()[-4 * 3 :]
        states = frames[-1].states
        assert np.sum(states == FOUND) == trace.hits[-len(last) :].sum()
        assert np.sum(states == READ) == np.sum(~trace.hits[-len(last) :])
        assert not np.isin(states, (EVICTED, BEING_READ)).any()


def _in_slot(model: object, layer: int, slot: int) -> bytes:
    return b"".join(bytes(view) for view in model.store.bank(layer).views[slot])


def _on_disk(model: object, layer: int, expert: int) -> bytes:
    files, parts = model.store.files, []
    for run in files.runs[layer]:
        number, at = run.places[expert]
        parts.append(files.files[number].read_bytes()[at : at + run.n_bytes])
    return b"".join(parts)


def test_looking_changes_no_frame_before(folder: Path) -> None:
    """Frames are copies: the first still shows what was there at first."""
    with load(folder, engine="numpy", slots=3) as model:
        state = model.new_state()
        with record(model) as trace:
            for token in (5, 17, 44):
                model.decode(token, state)
        frames = bank_frames(trace, model.store.caching, 1)
        before = bank_frames(trace, model.store.caching, 0)[-1]
        assert np.array_equal(frames[0].held, before.held)
        assert frames[0].states.max() <= EVICTED
        # the layers below have not been touched yet
        assert (frames[0].states[1:] == KEPT).all()


def test_what_cannot_be_shown_is_refused() -> None:
    trace = by_hand()
    for caching in (Caching(budget=3), Caching()):
        with pytest.raises(ConfigError, match="slots of each layer"):
            bank_frames(trace, caching, 0)
    trace.hits[1] = True  # as if 1 had been in a slot before the recording began
    with pytest.raises(TraceError, match="do not follow from these settings"):
        bank_frames(trace, THREE, 2)
    trace.steps["n_tokens"][1] = 2
    with pytest.raises(ConfigError, match="step 1 is part of a prompt"):
        bank_frames(trace, THREE, 1)
    trace = by_hand()
    trace.spans = None
    with pytest.raises(TraceError, match="no spans"):
        bank_frames(trace, THREE, 0)


# --- where the time goes --------------------------------------------------------------


def test_a_waterfall_by_hand() -> None:
    seconds = slot_views.waterfall(by_hand())
    assert seconds == {"mix": 1, "request": 1, "wait": 3, "experts": 2, "head": 1}
    assert list(seconds) == ["mix", "request", "wait", "experts", "head"]
    said = slot_views.say_waterfall(seconds)
    assert said.startswith("a token takes 8000.00 ms: mix 1000.00 ms, request 1000.00")


def test_slow_tokens_do_not_count() -> None:
    trace = by_hand()
    kinds, factors = trace.spans["kind"], {0: 1, 1: 100, 2: 1}
    for step, factor in factors.items():
        rows = (trace.spans["step"] == step) & (kinds == WAIT)
        trace.spans["end_s"][rows] = trace.spans["start_s"][rows] + 3 * factor
    middle_of_four = np.repeat(trace.steps, [2, 1, 1])
    trace.steps = middle_of_four
    trace.spans["step"][trace.spans["step"] > 0] += 1
    # totals 8, 0, 305, 8 seconds: the middle half is 8 and 8
    assert slot_views.waterfall(trace)["wait"] == 3
    trace.steps["n_tokens"] = 2
    with pytest.raises(TraceError, match="no decoded token"):
        slot_views.waterfall(trace)


# --- figures and widget ---------------------------------------------------------------


def test_a_figure_shows_every_slot() -> None:
    frame = bank_frames(by_hand(), THREE, 2)[1]
    ax = slot_views.draw_frame(frame)
    assert [text.get_text() for text in ax.texts] == ["0", "3", "2"]
    assert ax.get_title(loc="left") == say_frame(frame)
    hatches = [patch.get_hatch() for patch in ax.patches[:3]]
    assert hatches == ["", "///", ""]
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == list(slot_views.STATES)
    empty = slot_views.draw_frame(bank_frames(by_hand(), THREE, 0)[0])
    assert not empty.texts


def test_bars_of_a_waterfall_follow_each_other() -> None:
    seconds = slot_views.waterfall(by_hand())
    axes = slot_views.draw_waterfall({"one": seconds, "two": {"mix": 0.5}})
    bars = axes[0].patches
    ends = [bar.get_x() + bar.get_width() for bar in bars]
    assert [bar.get_x() for bar in bars] == [0, *ends[:-1]]
    assert ends[-1] == pytest.approx(8000)
    assert axes[0].get_xlim() == axes[1].get_xlim()
    assert "38% waiting" in axes[0].get_title(loc="left")


def test_the_explorer_steps_through_a_token() -> None:
    frames = bank_frames(by_hand(), THREE, 2)
    explorer = widgets.slot_bank_explorer(frames)
    play = explorer.children[0]
    assert (play.min, play.max) == (0, len(frames) - 1)
    before = explorer.picture.value
    for at, frame in enumerate(frames):
        explorer.controls["frame"].value = at
        assert explorer.text.value == say_frame(frame)
    assert explorer.picture.value != before
    assert bytes(explorer.picture.value).startswith(b"\x89PNG")
    assert "PNG" not in repr(explorer)[:110]
    assert not plots.plt.get_fignums()
