"""Timing in turns: order of calls, medians, and refusals, with a clock of our own."""

import pytest

from flashmoe_ref import timing


def test_runs_take_turns_and_medians_count(monkeypatch):
    now, calls = [0.0], []
    seconds = {"a": iter([9, 1, 7, 2]), "b": iter([9, 4, 4, 6])}  # first: warming up
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def run(name):
        calls.append(name)
        now[0] += next(seconds[name])

    runs = {name: lambda name=name: run(name) for name in seconds}
    assert timing.time_in_turns(runs, rounds=3) == {"a": 2, "b": 4}
    assert calls == ["a", "b"] * 4


def test_refuses_no_rounds():
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        timing.time_in_turns({}, rounds=0)
