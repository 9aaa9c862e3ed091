"""The cost model: by hand, monotone, fitted as it says, and right on held-out runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_ref import planner_fit
from flashmoe_ref.errors import ConfigError
from flashmoe_ref.machines import (
    CHIPS,
    machine,
    parse_quantity,
    this_machine,
    with_probe,
)
from flashmoe_ref.planner import (
    FITTED,
    PARTS,
    SPREAD,
    USABLE,
    Coefficients,
    Run,
    hit_rate,
    predict,
    prompt_seconds,
    run_of,
    sizes_of_preset,
    split_memory,
    token_seconds,
    tokens_per_second,
)
from flashmoe_ref.planner_fit import (
    fit,
    fit_hits,
    held_out,
    read_published,
    read_rows,
    scale_of_trace,
    sizes_of_published,
)
from flashmoe_ref.trace import Trace

BIG = "qwen3.5-397b-a17b"
TRACES = Path(__file__).parents[1] / "data" / "traces"
ROUND = Coefficients(0.5, 0.25, 1e-3, 0.5, 0.1, 0.01)
BY_HAND = Run(
    n_layers=10,
    picked_gb=1.0,
    routed_gb=100.0,
    read_gb=4.0,
    resident_gb=5.0,
    memory_gb=10.0,  # 8 usable, 3 left
    memory_gb_s=100.0,
    core_speed=2.0,
    disk_gb_s=4.0,
    disk_is_measured=False,
    on_gpu=True,
)


# --- by hand --------------------------------------------------------------------------


def test_a_token_by_hand():
    parts = token_seconds(BY_HAND, ROUND)
    hits = np.log1p((0.03 - 0.01) / 0.99 / 0.01) / np.log1p(100)  # 3 of 100 GB, K 1 %
    assert parts["other weights"] == pytest.approx(4 / 50)
    assert parts["experts computed"] == pytest.approx(1 / 50)
    assert parts["synchronisation"] == pytest.approx(10 * 1e-3 / 2)
    assert parts["disk"] == pytest.approx((1 - hits) * 1 / 2)
    assert parts["page cache"] == pytest.approx(hits * 1 / 10)
    assert parts["paging"] == 0
    assert tuple(parts) == PARTS
    assert tokens_per_second(BY_HAND, ROUND) == pytest.approx(1 / sum(parts.values()))


def test_slots_save_copies_and_the_cliff_costs():
    slots = token_seconds(replace(BY_HAND, slots_gb=np.inf), ROUND)
    assert slots["page cache"] == pytest.approx(0, abs=1e-12)
    assert slots["disk"] == pytest.approx(token_seconds(BY_HAND, ROUND)["disk"])
    too_many = replace(BY_HAND, slots_gb=4.0)  # one more than memory has
    assert split_memory(too_many).over_gb == pytest.approx(1.0)
    assert token_seconds(too_many, ROUND)["paging"] == pytest.approx(1 / (0.12 * 2))
    tiny = split_memory(replace(BY_HAND, memory_gb=5.0))  # weights alone do not fit
    assert tiny.over_gb == pytest.approx(5 - USABLE * 5) and tiny.page_cache_gb == 0


def test_a_probe_overrules_shares():
    probed = replace(BY_HAND, matvec_gb_s=8.0, copy_gb_s=2.0, disk_is_measured=True)
    parts = token_seconds(probed, ROUND)
    assert parts["other weights"] == pytest.approx(4 / 8)
    usual = token_seconds(BY_HAND, ROUND)
    assert parts["disk"] == pytest.approx(usual["disk"] / 2)
    assert parts["page cache"] == pytest.approx(usual["page cache"] * 5)


def test_a_card_s_copies_begin_in_the_host_s_memory():
    card = machine("rtx-4090-64")
    sizes = sizes_of_preset(BIG, 4)
    parts = token_seconds(run_of(sizes, card), ROUND)
    hits = predict(run_of(sizes, card), ROUND).hit_rate
    assert parts["page cache"] == pytest.approx(hits * 1.6987 / (0.1 * 83), rel=0.001)
    assert parts["other weights"] < 5.1 / (0.5 * 1008)


def test_a_processor_does_not_synchronise():
    assert token_seconds(replace(BY_HAND, on_gpu=False), ROUND)["synchronisation"] == 0


def test_sizes_of_the_397b():
    sizes = sizes_of_preset(BIG, 4)
    assert sizes.expert_bytes == 7_077_888
    assert sizes.bytes_per_token == 1_698_693_120
    assert sizes.dense_bytes - sizes.read_bytes == 572_129_280  # the embedding
    two = sizes_of_preset(BIG, 4, 2)
    assert two.expert_bytes == 3_932_160 and two.dense_bytes == sizes.dense_bytes
    with pytest.raises(ConfigError, match="k=11"):
        sizes.with_k(11)


def test_kimi_by_the_same_arithmetic():
    sizes = sizes_of_published("kimi-k2.5")
    assert sizes.expert_bytes == 24_772_608
    assert sizes.bytes_per_token / 1e9 == pytest.approx(11.9, abs=0.05)


# --- properties -----------------------------------------------------------------------

BETTER = ("memory_gb", "memory_gb_s", "core_speed", "disk_gb_s")


@given(
    name=st.sampled_from(BETTER),
    factor=st.floats(1.0, 8.0),
    memory=st.floats(4.0, 200.0),
    slots=st.sampled_from([0.0, 1.0, np.inf]),
)
def test_a_better_machine_is_never_slower(name, factor, memory, slots):
    run = replace(BY_HAND, memory_gb=memory, slots_gb=slots)
    better = replace(run, **{name: factor * getattr(run, name)})
    before, after = (tokens_per_second(r, FITTED) for r in (run, better))
    assert after >= before * (1 - 1e-9)


@given(fraction=st.floats(0, 1.2), more=st.floats(0, 1), k=st.floats(0.001, 0.2))
def test_hits_grow_from_nothing_to_all(fraction, more, k):
    low, high = (hit_rate(f, k, 0.01) for f in (fraction, fraction + more))
    assert 0 <= low <= high + 1e-12 <= 1 + 1e-9
    assert hit_rate(k, k, 0.01) == 0 and hit_rate(1.0, k, 0.01) == pytest.approx(1)


def test_arrays_give_what_single_runs_give():
    published = read_published()
    together = tokens_per_second(published.run, FITTED)
    for i in (0, 30, len(together) - 1):
        one = published.take(np.arange(len(together)) == i)
        assert tokens_per_second(one.run, FITTED)[0] == pytest.approx(together[i])


def test_a_prompt_reads_each_expert_once_a_chunk():
    sizes, place = sizes_of_preset(BIG), machine("a19-pro-12")
    run = run_of(sizes, place)
    one, two = (prompt_seconds(run, sizes, n, FITTED) for n in (512, 1024))
    assert two == pytest.approx(2 * one)
    per_token = sum(token_seconds(run, FITTED).values())
    assert one < 512 * per_token / 4  # far from token by token


# --- the fit --------------------------------------------------------------------------


def test_the_fit_finds_what_made_the_data():
    published = read_published()
    made = replace(published, tok_s=tokens_per_second(published.run, ROUND))
    found = fit(made, ROUND.hit_scale)
    assert tokens_per_second(made.run, found) == pytest.approx(made.tok_s, rel=0.15)


def test_one_absurd_row_changes_little():
    published, scale = read_published(), FITTED.hit_scale
    wrong = published.tok_s.copy()
    wrong[5] *= 100
    usual, bent = (fit(p, scale) for p in (published, replace(published, tok_s=wrong)))
    speeds = [tokens_per_second(published.run, c) for c in (usual, bent)]
    assert np.median(abs(speeds[1] / speeds[0] - 1)) < 0.05


def test_the_coefficients_are_those_of_the_fit():
    found = fit(read_published(), fit_hits())
    for name in planner_fit.NAMES:
        assert getattr(found, name) == pytest.approx(getattr(FITTED, name), rel=0.03)
    assert found.hit_scale == pytest.approx(FITTED.hit_scale, rel=0.03)


def test_errors_on_sources_that_were_held_out():
    found = held_out()
    assert len(found.errors) > 80 and len(set(found.published.sources)) > 20
    assert found.median_error() <= 0.25  # the bar; by class it is told, not held
    for kind, most in (("mac", 0.27), ("nvidia", 0.25), ("pc", 0.25), ("phone", 0.25)):
        assert found.median_error(kind) <= most, kind
    assert found.spread == pytest.approx(SPREAD, abs=0.02)
    ratio = found.published.tok_s / found.predicted
    inside = (ratio > SPREAD[0]) & (ratio < SPREAD[1])
    assert 0.75 < inside.mean() < 0.85


def test_a_source_is_predicted_without_its_rows(monkeypatch):
    seen, real = [], planner_fit.fit

    def watch(published, scale):
        seen.append(set(published.sources))
        return real(published, scale) if len(seen) == 1 else FITTED

    monkeypatch.setattr(planner_fit, "fit", watch)
    planner_fit.held_out.__wrapped__()
    everyone = set(read_published().sources)
    assert {frozenset(everyone - s) for s in seen} == {frozenset({s}) for s in everyone}


def test_a_trace_gives_its_own_hit_curve():
    local, spread = (Trace.load(TRACES / f"{n}_k10.npz") for n in ("stories", "tools"))
    scales = [scale_of_trace(t, 1500) for t in (local, spread)]
    assert scales[0] < scales[1]  # one story repeats its experts, many requests do not
    share, k = 0.5, 10 / 128
    assert 0.75 < hit_rate(share, k, scales[0]) < 0.95
    assert 0.5 < hit_rate(share, k, scales[1]) < 0.75


# --- the published rows ---------------------------------------------------------------


def test_published_rows_are_whole_and_say_where_they_are_from():
    rows = read_rows("published.csv")
    for row in rows:
        assert row["source"] and row["use"] and row["model"] and float(row["tok_s"]) > 0
        assert row["class"] in ("mac", "nvidia", "pc", "phone")
        assert row["verified"] in ("primary", "secondary", "doubtful")
        assert not row["chip"] or row["chip"] in CHIPS or row["use"] != "yes"
        assert bool(row["disk_gb_s"]) == bool(row["disk_how"])
    assert len(rows) > 150


def test_bits_and_speeds_of_flash_moe_are_not_mixed():
    rows = [r for r in read_rows("published.csv") if r["tok_s"] in ("4.36", "5.74")]
    assert {(r["bits"], r["k"], r["tok_s"]) for r in rows} == {
        ("4", "4", "4.36"),
        ("2", "4", "5.74"),
    }


# --- machines -------------------------------------------------------------------------


def test_machines_by_name():
    found = machine("M3-Max-48")
    assert (found.kind, found.memory_gb, found.memory_gb_s) == ("mac", 48, 400)
    assert machine("pc-64gb").computes_on == "cpu"
    for name in ("m3-max", "m3-max-0", "toaster-4", "48"):
        with pytest.raises(ConfigError):
            machine(name)


def test_quantities():
    assert parse_quantity("17.5GB/s", "GB/s") == parse_quantity("17.5", "GB/s") == 17.5
    assert parse_quantity("500 MB/s", "GB/s") == 0.5
    assert parse_quantity("1TB", "GB") == 1000
    for text in ("", "GB", "-1GB", "48GB/s", "nan", "0"):
        with pytest.raises(ConfigError):
            parse_quantity(text, "GB")


def test_this_machine_has_memory_and_room(tmp_path):
    found = this_machine(tmp_path)
    assert 0.5 < found.memory_gb < 20_000
    assert found.disk_free_gb > 0
    assert found.reclaimable_gb is None or found.reclaimable_gb > 0


def test_a_probe_s_figures_are_taken(tmp_path):
    rates = [
        {"mode": mode, "n_bytes": size, "depth": depth, "rate_gb_s": rate}
        for mode, size, depth, rate in (
            ("cold", 4 << 20, 1, 1.0),
            ("cold", 4 << 20, 4, 2.5),
            ("cold", 4 << 20, 32, 9.0),
            ("cold", 4096, 4, 0.1),
            ("warm", 4 << 20, 4, 8.0),
        )
    ]
    raw = {
        "memory_gb_s": {"1 thread": 5.0, "all 2 threads": 9.0},
        "matvec_gb_s": {"numpy, compiled, all 2 threads": 4.4, "mlx on the cpu": 0.7},
        "disk": {"rates": rates},
    }
    path = tmp_path / "probe.json"
    path.write_text(json.dumps(raw))
    found = with_probe(machine("pc-24"), path)
    assert (found.matvec_gb_s, found.memory_gb_s) == (4.4, 9.0)
    assert (found.disk_gb_s, found.disk_is_measured) == (
        2.5,
        True,
    )  # at depth 8 or less
    assert found.copy_gb_s == 8.0
    sizes = sizes_of_preset("qwen3.5-35b-a3b")
    assert predict(run_of(sizes, found)).tok_s < 4.4 / (sizes.read_bytes / 1e9)


@pytest.mark.parametrize(
    "change",
    [
        {"memory_gb_s": {"1 thread": "9"}},
        {"memory_gb_s": {"1 thread": float("nan")}},
        {"matvec_gb_s": {"numpy": [1]}},
        {"disk": {"rates": [{"mode": "cold", "n_bytes": 1, "depth": 1}]}},
        {"disk": {"rates": [{"mode": "cold", "n_bytes": 1, "depth": True}]}},
    ],
)
def test_a_probe_with_other_than_rates_is_refused(tmp_path, change):
    raw = {"memory_gb_s": {"1 thread": 9.0}, "matvec_gb_s": {}, "disk": None} | change
    (tmp_path / "probe.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"probe\.json: is no file of 'flashmoe pro"):
        with_probe(machine("pc-24"), tmp_path / "probe.json")


def test_quantities_beyond_all_machines_are_refused():
    with pytest.raises(ConfigError, match="more than 0 and below"):
        machine("pc-" + "9" * 400)
    with pytest.raises(ConfigError, match="no quantity"):
        parse_quantity("9" * 400 + "GB", "GB")


def test_hits_where_a_token_uses_all_experts():
    assert hit_rate(1.0, 1.0, 0.01) == pytest.approx(1)
    assert hit_rate(0.5, 1.0, 0.01) == 0


@pytest.mark.parametrize(
    ("column", "text"), [("tok_s", "nan"), ("tok_s", "0"), ("k", "ten"), ("chip", "?")]
)
def test_a_published_row_with_a_figure_that_is_none(tmp_path, column, text):
    for name in ("published.csv", "published_models.csv"):
        (tmp_path / name).write_text((planner_fit.DATA / name).read_text("utf-8"))
    rows = planner_fit.read_rows("published.csv", tmp_path)
    row = next(r for r in rows if r["use"] == "yes" and not r["memory_gb_s"]) | {
        column: text
    }
    lines = [",".join(row), ",".join(f'"{value}"' for value in row.values())]
    (tmp_path / "published.csv").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"published\.csv, row 1"):
        read_published(tmp_path)
