"""Cuts of the routing budget: what they keep, weigh and count, on every engine."""

import csv
import json

import numpy as np
import pytest
from comparing import assert_close, in_steps
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_tiny

from flashmoe_ref import layers
from flashmoe_ref.calibrate import calibrate_output_scale
from flashmoe_ref.engine import load
from flashmoe_ref.errors import ConfigError
from flashmoe_ref.predictors import make_predictor, predict, quality
from flashmoe_ref.routing_cut import NONE, RoutingCut, drop_none, make_cut
from flashmoe_ref.simulator import decode_requests, prompt_requests
from flashmoe_ref.streaming import Counters
from flashmoe_ref.trace import Trace, record
from flashmoe_ref.trace_exchange import write_csv
from flashmoe_ref.trace_format import first_fault

N_LAYERS, K = 4, 5
SCALE = np.array([0.5, 0.75, 1.25, 2.0], np.float32)
CUTS = {
    "as routed": {"k": 2, "kept": "as-routed"},
    "adaptive": {"mass": 0.7},
    "adaptive as routed": {"k": 4, "mass": 0.6, "kept": "as-routed"},
    "scaled": {"k": 3, "output_scale": SCALE},
    "all": {"k": 4, "mass": 0.8, "kept": "as-routed", "output_scale": SCALE},
}
IDS = np.random.default_rng(5).integers(0, 96, 40).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Twelve experts of which five answer."""
    sizes = {"num_experts": 12, "num_experts_per_tok": K}
    return write_tiny(tmp_path_factory.mktemp("m"), **sizes)


# --- by hand --------------------------------------------------------------------------

EXPERTS = np.array([[7, 2, 9, 4]])
WEIGHTS = np.array([[0.5, 0.25, 0.15, 0.1]], np.float32)


@pytest.mark.parametrize(
    ("options", "experts", "weights"),
    [
        ({"k": 2}, [7, 2], [2 / 3, 1 / 3]),
        ({"k": 2, "kept": "as-routed"}, [7, 2], [0.5, 0.25]),
        ({"k": 4, "kept": "as-routed"}, [7, 2, 9, 4], [0.5, 0.25, 0.15, 0.1]),
        ({"k": 4, "mass": 0.5}, [7, NONE, NONE, NONE], [1, 0, 0, 0]),
        ({"k": 4, "mass": 0.51}, [7, 2, NONE, NONE], [2 / 3, 1 / 3, 0, 0]),
        ({"k": 4, "mass": 0.8}, [7, 2, 9, NONE], [5 / 9, 5 / 18, 1 / 6, 0]),
        ({"k": 4, "mass": 1.0}, [7, 2, 9, 4], [0.5, 0.25, 0.15, 0.1]),
        ({"k": 1, "mass": 0.9}, [7], [1]),
        ({"k": 2, "scale": np.array([1, 3])}, [7, 2], [2, 1]),
        (
            {"k": 3, "mass": 0.7, "kept": "as-routed", "scale": np.array([1, 2])},
            *([7, 2, NONE], [1, 0.5, 0]),
        ),
    ],
)
def test_what_is_kept_and_what_it_weighs(options, experts, weights):
    counters = Counters()
    cut = RoutingCut(trained_k=4, **options)
    got = cut.apply(1, EXPERTS, WEIGHTS, counters)
    assert got[0].tolist() == [experts]
    np.testing.assert_allclose(got[1], [weights], rtol=1e-6)
    picks, shares = drop_none(got[0][0], got[1][0])
    assert picks == [e for e in experts if e != NONE] and len(shares) == len(picks)
    assert (counters.routed, counters.picked) == (1, len(picks))
    assert WEIGHTS[0].tolist() == pytest.approx([0.5, 0.25, 0.15, 0.1])  # untouched


@given(st.integers(1, 6), st.floats(0.01, 1), st.integers(0, 2**32 - 1))
def test_mass_keeps_the_fewest_that_hold_it(k, mass, seed):
    logits = 3 * np.random.default_rng(seed).standard_normal((5, 20), np.float32)
    trained = layers.route_topk(logits, 6)
    experts, weights = RoutingCut(k, 6, "as-routed", mass).apply(0, *trained)
    for row, token in enumerate(weights):
        n = int((experts[row] != NONE).sum())
        assert 1 <= n <= k
        assert experts[row, :n].tolist() == trained[0][row, :n].tolist()
        assert token[n:].tolist() == [0] * (k - n)
        total = trained[1][row, :n].sum()
        assert total >= mass - 1e-6 or n == k
        assert total - trained[1][row, n - 1] <= mass + 1e-6  # one fewer would not do


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kept": "all"}, "kept='all' is not one of renormalized, as-routed"),
        ({"mass": 0}, "mass=0 is outside"),
        ({"mass": 1.01}, "mass=1.01 is outside"),
        ({"mass": float("nan")}, "mass=nan"),
        ({"output_scale": [1, 1]}, "output_scale: .* 4 layers"),
        ({"output_scale": [1, 1, 0, 1]}, "positive factor"),
        ({"output_scale": [1, 1, float("nan"), 1]}, "positive factor"),
    ],
)
def test_what_cannot_be_meant_is_refused(tiny, options, words):
    with pytest.raises(ConfigError, match=words) as error:
        load(tiny, engine="numpy", **options)
    assert "\n" not in str(error.value)


# --- on every engine ------------------------------------------------------------------


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_is_exact_on_every_engine(tiny, engine, name):
    """Streamed equals resident to the bit; a prompt equals its tokens one by one."""
    cut, sizes = CUTS[name], (13, 1, 1, 1, 17, 1, 1, 5)
    with (
        load(tiny, experts="resident", **cut, **engine) as whole,
        load(tiny, slots=6, **cut, **engine) as streamed,
        load(tiny, engine="numpy", compiled=False, **cut) as plain,
    ):
        streamed.store.inline_bytes = 0
        expected = in_steps(whole, IDS, sizes)
        np.testing.assert_array_equal(in_steps(streamed, IDS, sizes), expected)
        assert_close(expected, in_steps(plain, IDS, [1] * len(IDS)), name, 5e-4)
        assert streamed.report().mean_k == whole.report().mean_k
        assert (streamed.report().mean_k < cut.get("k", K)) == ("mass" in cut)


def test_cuts_that_change_nothing_are_the_plain_engine(tiny, engine):
    with load(tiny, **engine) as plain:
        expected = in_steps(plain, IDS, (30, *[1] * 10))
    for same in ({"k": K, "kept": "as-routed"}, {"mass": 1.0}):
        with load(tiny, **same, **engine) as model:
            got = in_steps(model, IDS, (30, *[1] * 10))
            assert_close(got, expected, str(same), 5e-4 * ("mass" in same))
    ones = {"k": 3, "output_scale": np.ones(N_LAYERS)}
    with load(tiny, k=3, **engine) as plain, load(tiny, **ones, **engine) as model:
        assert_close(model.logits(IDS), plain.logits(IDS), "scale 1", 5e-4)


def test_the_shared_expert_is_not_scaled(tiny):
    """With a routed output of next to nothing, only the shared expert is left."""
    with load(tiny, engine="numpy", compiled=False, output_scale=[1e-30] * 4) as model:
        h = np.random.default_rng(0).standard_normal((3, 64), np.float32)
        shared = layers.shared_expert(h, model.engine.layers[0], model.engine.linear)
        np.testing.assert_allclose(model.engine.moe(0, h), shared, rtol=1e-6)


def test_adaptive_k_reads_fewer_bytes_and_says_so(tiny):
    def run(**options):
        with load(tiny, engine="numpy", **options) as model:
            state = model.new_state()
            for token in IDS:
                model.decode(token, state)
            return model.report()

    whole, adaptive = run(), run(mass=0.6)
    assert whole.mean_k == K and 1 < adaptive.mean_k < K
    assert adaptive.bytes_read / whole.bytes_read == pytest.approx(adaptive.mean_k / K)
    assert "kept renormalized, mass 0.6" in str(adaptive)
    assert f"\nkept    {adaptive.mean_k:.2f} experts a token and layer" in str(adaptive)
    assert "kept" not in str(whole) and "average" not in str(whole)
    scaled = run(k=2, kept="as-routed", output_scale=SCALE)
    assert "k 2, trained k 5, kept as-routed, output scale 0.500 to 2.000" in str(
        scaled
    )


def test_a_prompt_reads_no_expert_that_all_of_its_tokens_dropped(tiny, engine):
    with load(tiny, mass=0.5, experts="resident", **engine) as model:
        asked, request = [], model.store.request
        model.store.request = lambda i, experts: (
            asked.append(experts) or request(i, experts)
        )
        with record(model) as trace:
            model.logits(IDS[:6])
    assert len(asked) == N_LAYERS
    for layer, experts in enumerate(asked):
        picks = trace.picks[:, layer]
        assert list(experts) == np.unique(picks[picks >= 0]).tolist()


def test_reads_ahead_go_with_adaptive_k(tiny, engine):
    options = {"mass": 0.6, "slots": 8, "prefetch": "co-occurrence:3"}
    with (
        load(tiny, mass=0.6, experts="resident", **engine) as whole,
        load(tiny, **options, **engine) as model,
    ):
        sizes = (10, *[1] * 30)
        expected = in_steps(whole, IDS, sizes)
        np.testing.assert_array_equal(in_steps(model, IDS, sizes), expected)
        assert model.report().prefetch_hits > 0


# --- traces ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adaptive_trace(tiny):
    """A prompt of ten tokens, then thirty one by one, and the model's report."""
    with load(tiny, engine="numpy", compiled=False, slots=6, mass=0.7) as model:
        with record(model) as trace:
            in_steps(model, IDS, (10, *[1] * 30))
        return trace, model.report()


def test_a_trace_shows_how_many_were_read(adaptive_trace, tmp_path):
    trace, report = adaptive_trace
    assert trace.picks.shape == (40, N_LAYERS, K)
    assert 1 < trace.mean_k < K and trace.mean_k == report.mean_k
    assert f"{trace.mean_k:.2f} a token and layer on average" in str(trace)
    assert ((trace.picks == NONE) == (trace.weights == 0)).all()
    np.testing.assert_allclose(trace.weights.sum(axis=2), 1, atol=2e-3)
    assert len(trace.accesses()) == report.hits + report.misses == len(trace.hits)
    assert trace.accesses()[:, 2].min() >= 0
    trace.save(tmp_path / "run.npz")
    again = Trace.load(tmp_path / "run.npz")
    np.testing.assert_array_equal(again.picks, trace.picks)
    assert again.mean_k == trace.mean_k


def test_a_trace_with_dropped_experts_serves_simulator_and_predictors(adaptive_trace):
    trace, _ = adaptive_trace
    decoded = trace.picks[10:]
    n = int((decoded >= 0).sum())
    requests = decode_requests(decoded, trace.n_experts)
    assert len(requests.keys) == n and (np.diff(requests.starts) >= 1).all()
    chosen = prompt_requests(trace.picks[:10], trace.n_experts, 10, 12)
    wanted = [len(np.unique(p[p >= 0])) for p in trace.picks[:10].swapaxes(0, 1)]
    assert np.diff(chosen.starts).tolist() == wanted
    predictor = make_predictor("frequency", N_LAYERS, 12, 12, decoded)
    assert predictor.counts.sum() == n
    named = predict(make_predictor("frequency", N_LAYERS, 12, 12, None), decoded)
    assert 0.5 < quality(named, decoded, 1).recall <= 1


def test_a_table_has_no_rows_of_dropped_experts(adaptive_trace, tmp_path):
    trace, _ = adaptive_trace
    write_csv(trace, tmp_path / "picks.csv")
    with open(tmp_path / "picks.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (trace.picks >= 0).sum()
    assert min(int(row["expert"]) for row in rows) >= 0


def test_a_trace_is_a_profile_all_the_same(tiny, adaptive_trace):
    trace, _ = adaptive_trace
    options = {"slots": 8, "pin": 2, "profile": trace.picks}
    with load(tiny, engine="numpy", compiled=False, **options) as model:
        for layer, pinned in enumerate(model.store.caching.pinned):
            picks = trace.picks[:, layer]
            counts = np.bincount(picks[picks >= 0], minlength=12)
            assert counts[pinned].min() >= counts[~pinned].max()


@pytest.mark.parametrize(
    ("row", "words"),
    [([NONE, 1, 2], "expert -1"), ([1, NONE, 2], "follows"), ([1, -2, 0], "expert -2")],
)
def test_dropped_experts_in_the_wrong_place_are_a_fault(row, words):
    from flashmoe_ref.trace_format import STEP

    arrays = {"picks": np.array([[row]]), "steps": np.array([(1, 0)], STEP)}
    assert words in first_fault(arrays, 4)
    arrays["picks"] = np.array([[[1, NONE, NONE]]])
    assert first_fault(arrays, 4) is None


# --- output scales --------------------------------------------------------------------


def test_scale_of_the_trained_k_is_one(tiny, engine):
    with load(tiny, **engine) as model:
        for fit in ("norm", "error"):
            scale = calibrate_output_scale(model, IDS, K, fit=fit)
            np.testing.assert_allclose(scale, np.ones(N_LAYERS), rtol=1e-5)


def test_scale_against_outputs_computed_one_by_one(tiny, engine):
    """The definition, from the plain engine's own experts."""
    with load(tiny, engine="numpy", compiled=False, experts="resident") as model:
        runner, state = model.engine, model.new_state()
        x, wanted = runner.embed(np.asarray(IDS)), []
        for layer in range(N_LAYERS):
            x, h = runner.before_experts(layer, x, state)
            logits = runner.linear(h, runner.layers[layer]["gate"])
            five, two = layers.route_topk(logits, K), layers.route_topk(logits, 2)
            whole, fewer = (
                runner.experts_of_prompt(layer, h, *picked) for picked in (five, two)
            )
            wanted.append(np.linalg.norm(whole) / np.linalg.norm(fewer))
            x = x + runner.moe(layer, h)
    with load(tiny, **engine) as model:
        scale = calibrate_output_scale(model, IDS, 2)
        assert "experts_of_prompt" not in vars(model.engine)  # all is as before
    assert scale.dtype == np.float32
    np.testing.assert_allclose(scale, wanted, rtol=1e-4)


def test_fit_by_error_leaves_less_of_it(tiny):
    """The least-squares factor is the other one times the cosine of the outputs."""
    with load(tiny, engine="numpy", compiled=False) as model:
        norm, error = (
            calibrate_output_scale(model, IDS, 2, fit=fit) for fit in ("norm", "error")
        )
    assert (error < norm).all() and (error > norm / 4).all()


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"k": 2}, (IDS, 2)),
        ({"mass": 0.5}, (IDS, 2)),
        ({}, (IDS, 0)),
        ({}, (IDS, K + 1)),
        ({}, (IDS[:1], 2)),
    ],
)
def test_calibrating_what_is_cut_already_is_refused(tiny, options, arguments):
    with (
        load(tiny, engine="numpy", compiled=False, **options) as model,
        pytest.raises(ConfigError, match=r"to calibrate|must be in 1\.\.5"),
    ):
        calibrate_output_scale(model, *arguments)


def test_make_cut_takes_lists_and_arrays():
    for scale in ([1, 2], (1.0, 2.0), np.array([1, 2])):
        cut = make_cut(2, 4, 2, "renormalized", None, scale)
        assert cut.scale.tolist() == [1, 2] and not cut.is_plain
    assert make_cut(2, 4, 2, "renormalized", None, None).is_plain
    assert make_cut(4, 4, 2, "as-routed", None, None).is_plain


# --- the command line -----------------------------------------------------------------


def test_command_line(tmp_path, capfd):
    from tiny import write_tokenizer

    from flashmoe_ref.cli import main

    model = write_tokenizer(write_tiny(tmp_path / "m", vocab_size=261))
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a fox.")
    base = ["generate", "Once", "--model", str(model), "--max-tokens", "3", "--json"]
    base += ["--engine", "numpy", "--no-compile"]

    def mode(*options):
        assert main([*base, *options]) == 0
        return json.loads(capfd.readouterr().err)

    report = mode("--mass", "0.6")
    assert report["mode"]["mass"] == 0.6 and 1 <= report["mean_k"] < 3
    assert mode("--k", "2", "--kept", "as-routed")["mode"]["kept"] == "as-routed"
    report = mode("--k", "2", "--calibrate", str(text))
    assert " to " in report["mode"]["output scale"] and report["mean_k"] == 2
    for bad in (["--calibrate", str(text)], ["--kept", "some"], ["--mass", "2"]):
        assert main([*base, *bad]) == 2
        assert capfd.readouterr().err.count("\n") == 1
    target = tmp_path / "new"
    widths = ["--bits", "2", "--down-bits", "3", "--router-bits", "6"]
    widths += ["--layer-bits", "0-1:4,3:5", "--no-progress"]
    assert main(["requantize", str(model), str(target), *widths]) == 0
    assert mode("--model", str(target))["mode"]["bits"] == [2, 3, 4, 5]
    for bad in ("4", "0-:4", "a:4", "1:4;2:4"):
        with pytest.raises(SystemExit):
            main(["requantize", str(model), "x", "--bits", "2", "--layer-bits", bad])
        assert capfd.readouterr().err.count("\n") == 1
