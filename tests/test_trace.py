"""Traces: what is recorded is what happened, files are checked, others can be read."""

import json
import zipfile
from concurrent.futures import Future
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny

from flashmoe_ref import layers, recording, trace_exchange
from flashmoe_ref.engine import Model, load
from flashmoe_ref.errors import ConfigError, ReadError, TraceError
from flashmoe_ref.recording import KINDS, SILENT, Recorder
from flashmoe_ref.trace import Trace, record
from flashmoe_ref.trace_exchange import (
    chrome_events,
    read_csv,
    write_chrome,
    write_csv,
)
from flashmoe_ref.trace_format import READ, SPAN, STEP

N_LAYERS, N_EXPERTS, K, N_IDS = 4, 8, 3, 96
TRACES = Path(__file__).parents[1] / "data" / "traces"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, eight experts of which three answer."""
    return write_tiny(tmp_path_factory.mktemp("m"))


def run(model: Model, prompt: list[int], n_decode: int) -> np.ndarray:
    """All logits of a prompt and greedy decoding. Shapes: -> (T, V)."""
    state = model.new_state()
    rows = [model.prefill(prompt, state, all_logits=True)]
    for _ in range(n_decode):
        rows.append(model.decode(int(rows[-1][-1].argmax()), state)[None])
    return np.concatenate(rows)


def equal(a: Trace, b: Trace) -> bool:
    names = ("picks", "steps", "ids", "weights", "hits", "spans", "reads")
    return (a.n_experts, a.about) == (b.n_experts, b.about) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in names
    )


def by_hand() -> Trace:
    """Two layers, four experts, K = 2: a prompt of two tokens, then one token."""
    picks = [[[0, 1], [2, 3]], [[1, 2], [3, 2]], [[3, 0], [1, 2]]]
    spans = [(0, 0, 1, 0.0, 1.0), (0, 0, 4, 1.0, 1.5), (1, 1, 6, 2.0, 2.25)]
    reads = [(0, 0, 1, 1, 100, 1.0, 1.5), (0, 0, 2, 2, 100, 1.0, 1.25)]
    return Trace(
        picks=np.array(picks, np.int32),
        n_experts=4,
        steps=np.array([(2, 0), (1, 2)], STEP),
        ids=np.array([7, 8, 9], np.int32),
        weights=np.full((3, 2, 2), 0.5, np.float16),
        hits=np.array([0, 0, 0, 0, 1, 1, 1, 0, 0], bool),
        spans=np.array(spans, SPAN),
        reads=np.array(reads, READ),
        about={"model": "by hand"},
    )


# --- recording ------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(
    slots=st.sampled_from([None, K, 5, N_EXPERTS]),
    k=st.integers(1, K),
    threaded=st.booleans(),
    prompt=st.lists(st.integers(0, N_IDS - 1), min_size=1, max_size=12),
    times=st.booleans(),
)
def test_recording_changes_nothing_and_counts_everything(
    engine, tiny, slots, k, threaded, prompt, times
):
    with load(tiny, slots=slots, k=k, **engine) as model:
        if threaded:
            model.store.inline_bytes = 0
        expected = run(model, prompt, 4)
    with load(tiny, slots=slots, k=k, **engine) as model:
        if threaded:
            model.store.inline_bytes = 0
        with record(model, times) as trace:
            got = run(model, prompt, 4)
        counters, expert_bytes = model.store.counters, trace.about["expert_bytes"]
    np.testing.assert_array_equal(got, expected)
    assert trace.steps["n_tokens"].tolist() == [len(prompt), 1, 1, 1, 1]
    assert trace.steps["position"].tolist() == [0, *range(len(prompt), len(prompt) + 4)]
    assert trace.ids[: len(prompt)].tolist() == prompt
    np.testing.assert_allclose(trace.weights.sum(2, dtype=float), 1, atol=2e-3)
    assert (trace.hits.sum(), (~trace.hits).sum()) == (counters.hits, counters.misses)
    assert trace.hit_rate() == model.report().hit_rate
    if not times:
        assert trace.spans is None and trace.reads is None
        return
    assert trace.reads["n_bytes"].sum() == counters.bytes_read
    assert set(trace.reads["n_bytes"]) <= set(expert_bytes)
    missed = trace.accesses()[~trace.hits]
    read = np.stack([trace.reads[n] for n in ("step", "layer", "expert")], axis=1)
    assert sorted(map(tuple, read)) == sorted(map(tuple, missed))
    assert (0 in trace.reads["thread"]) != threaded or not len(trace.reads)


def test_picks_are_those_of_the_router(engine, tiny):
    prompt = list(range(20, 32))
    with load(tiny, **engine) as model, record(model) as trace:
        run(model, prompt, 3)
    seen = []
    with load(tiny, engine="numpy", compiled=False) as model:
        real = layers.route_topk
        model.engine.route_topk = lambda *args: seen.append(real(*args)) or seen[-1]
        state = model.new_state()
        for token in trace.ids:  # one by one, as the specification would decode them
            model.decode(int(token), state)
    experts = np.concatenate([e for e, _ in seen]).reshape(-1, N_LAYERS, K)
    weights = np.concatenate([w for _, w in seen]).reshape(-1, N_LAYERS, K)
    np.testing.assert_array_equal(trace.picks, experts)
    np.testing.assert_allclose(trace.weights, weights, atol=1e-3)  # float16


def test_spans_tile_each_step_and_agree_with_the_report(engine, tiny):
    with load(tiny, **engine) as model:
        model.store.inline_bytes = 0
        with record(model) as trace:
            run(model, [1, 2, 3], 5)
        report = model.report()
    for step in range(6):
        mine = trace.spans[trace.spans["step"] == step]
        np.testing.assert_array_equal(mine["start_s"][1:], mine["end_s"][:-1])
        assert mine["kind"][0] == recording.EMBED and mine["layer"][0] == -1
        assert mine["kind"][-1] == recording.HEAD
        assert set(mine["layer"]) == {-1, *range(N_LAYERS)}
    parts = trace.breakdown()
    total = sum(parts.values()).sum()
    assert 0 < total <= report.prefill_s + report.decode_s
    # a wait's span begins where the shared expert ends: just before the report's clock
    assert report.wait_s - 1e-6 <= parts["wait"].sum() < total
    assert trace.reading_s().sum() == pytest.approx(report.read_s, rel=1e-3)
    is_mlx = report.mode["engine"] == "mlx"
    assert (parts["sync"].sum() > 0) == is_mlx


def test_hits_of_waves_are_in_the_order_of_accesses(tiny):
    ids = np.random.default_rng(0).integers(0, N_IDS, 30).tolist()
    with load(tiny, engine="numpy", slots=K) as model, record(model) as trace:
        model.prefill(ids, model.new_state())
    assert len(trace.hits) == len(trace.accesses()) > N_LAYERS * K
    assert not trace.hits.any()  # waves of three from nothing, never one twice
    trace._check("here")


def test_an_unfinished_step_is_not_kept(tiny):
    with load(tiny, engine="numpy", compiled=False) as model:
        state, real = model.new_state(), model.engine.logits

        def fail(x):
            raise ReadError("the disk is gone")

        with pytest.raises(ReadError), record(model) as trace:
            model.prefill([1, 2], state)
            model.engine.logits = fail
            model.decode(3, state)
        assert trace.ids.tolist() == [1, 2]
        assert len(trace.hits) == len(trace.accesses())
        assert set(trace.spans["step"]) == {0}
        model.engine.logits, state = real, model.new_state()
        with record(model) as trace:  # the next one starts afresh
            with pytest.raises(ConfigError):
                model.decode(N_IDS, state)
            model.decode(4, state)
        assert trace.ids.tolist() == [4]


def test_off_is_off(tiny):
    with load(tiny, engine="numpy") as model:
        assert model.store.recorder is SILENT
        with record(model) as trace:
            with pytest.raises(ConfigError, match="already"), record(model):
                pass
            assert isinstance(model.store.recorder, Recorder)
            assert trace.n_tokens == 0
        assert model.store.recorder is SILENT
        assert trace.n_tokens == 0 and trace.hit_rate() == 1
        assert str(trace)


def test_what_is_done_between_steps_is_left_out(tiny):
    with load(tiny, engine="numpy", slots=K) as model, record(model) as trace:
        model.store.request(0, [1, 2, 3]).wait()
        model.prefill([1], model.new_state())
        model.store.request(1, [1, 2, 3]).wait()
    assert len(trace.hits) == len(trace.accesses()) == N_LAYERS * K
    assert set(trace.reads["step"]) == {0}


# --- views ----------------------------------------------------------------------------


def test_views_by_hand():
    trace = by_hand()
    assert trace.accesses().tolist() == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 0, 2],
        [0, 1, 2],
        [0, 1, 3],
        [1, 0, 3],
        [1, 0, 0],
        [1, 1, 1],
        [1, 1, 2],
    ]
    assert trace.accesses(1)[:, 2].tolist() == [2, 3, 1, 2]
    assert trace.hit_rate() == 3 / 9
    assert trace.hit_rate(0) == 2 / 5
    parts = trace.breakdown()
    assert tuple(parts) == KINDS
    assert parts["mix"].tolist() == [1, 0]
    assert parts["wait"].tolist() == [0.5, 0]
    assert parts["experts"].tolist() == [0, 0.25]
    assert trace.reading_s().tolist() == [0.75, 0]
    assert trace.is_decode.tolist() == [False, True]
    for figure in ("33.3% of 9", "250.000 ms", "experts 250.000", "2 of 4"):
        assert figure in str(trace)


def test_what_was_not_recorded_is_said():
    trace = by_hand()
    trace.hits = trace.spans = trace.reads = None
    for view in (trace.hit_rate, trace.breakdown, trace.reading_s):
        with pytest.raises(TraceError, match=r"record\(model\)"):
            view()
    with pytest.raises(TraceError, match="no spans"):
        list(chrome_events(trace))


# --- files ----------------------------------------------------------------------------


def test_a_file_gives_back_what_was_saved(tiny, tmp_path):
    options = {"engine": "numpy", "slots": 4}
    with load(tiny, **options) as model, record(model, text="numbers") as trace:
        run(model, [1, 2, 3], 5)
    file = tmp_path / "a trace"  # the name stays as it is
    trace.save(file)
    found = Trace.load(file)
    assert equal(found, trace) and found.picks.dtype == np.int32
    assert found.about["text"] == "numbers"
    assert found.about["mode"]["slots"] == 4
    assert str(tmp_path) not in json.dumps(found.about)
    trace.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("n_experts", "dtype"), [(256, "u1"), (257, "<u2")])
def test_picks_take_the_fewest_bytes(tmp_path, n_experts, dtype):
    picks = np.array([[[n_experts - 1, 0]]], np.int32)
    trace = Trace(picks, n_experts, np.array([(1, 0)], STEP))
    trace.save(tmp_path / "t.npz")
    assert np.load(tmp_path / "t.npz")["picks"].dtype == np.dtype(dtype)
    assert equal(Trace.load(tmp_path / "t.npz"), trace)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_trace_survives_its_file(tmp_path_factory, data):
    n_experts = data.draw(st.integers(1, 600))
    k = data.draw(st.integers(1, min(4, n_experts)))
    n_layers = data.draw(st.integers(1, 3))
    steps = data.draw(st.lists(st.integers(1, 4), max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    shape = (sum(steps), n_layers)
    picks = np.array([rng.permutation(n_experts)[:k] for _ in range(np.prod(shape))])
    rows = np.array([(n, i) for i, n in enumerate(steps)], STEP)
    trace = Trace(picks.reshape(*shape, k).astype(np.int32), n_experts, rows)
    trace.hits = rng.random(len(trace.accesses())) < 0.5
    file = tmp_path_factory.mktemp("t") / "t.npz"
    trace.save(file)
    assert equal(Trace.load(file), trace)


FAULTS = {
    "no version": ({"version": None}, "has no version"),
    "another version": ({"version": np.array(99)}, "version 99"),
    "no picks": ({"picks": None}, "'picks' is missing"),
    "no steps": ({"steps": None}, "'steps' is missing"),
    "no about": ({"about": None}, "'about' is missing"),
    "about is a list": ({"about": np.array("[1]")}, "not a JSON object"),
    "about is no JSON": ({"about": np.array("{")}, "not valid JSON"),
    "n_experts is a list": ({"n_experts": np.array([4])}, "not one integer"),
    "an expert too many": ({"n_experts": np.array(3)}, r"expert 3 is outside 0\.\.2"),
    "an expert twice": ({"picks": np.zeros((3, 2, 2), np.uint8)}, "twice"),
    "floats as picks": ({"picks": np.zeros((3, 2, 2))}, "expected integers"),
    "flat picks": ({"picks": np.zeros((3, 4), np.uint8)}, "expected integers"),
    "a token too few": ({"picks": by_hand().picks[:2]}, "3 tokens, but picks of 2"),
    "steps of another kind": ({"steps": np.array([2, 1])}, "steps are int64"),
    "a step of none": ({"steps": np.array([(3, 0), (0, 3)], STEP)}, "steps are of 3"),
    "ids too few": ({"ids": np.zeros(2, np.int32)}, r"ids are int32 \(2,\)"),
    "weights too few": ({"weights": np.zeros((3, 2, 1), np.float16)}, "weights are"),
    "hits too many": ({"hits": np.zeros(10, bool)}, r"hits are bool \(10,\)"),
    "spans of another kind": ({"spans": np.zeros(3)}, "spans are float64"),
    "a span's step": ({"spans": np.array([(2, 0, 0, 0, 1)], SPAN)}, "step outside"),
    "a span's kind": ({"spans": np.array([(1, 0, 8, 0, 1)], SPAN)}, "kind outside"),
    "a span's end": ({"spans": np.array([(1, 0, 0, 2, 1)], SPAN)}, "before they start"),
    "a read's layer": ({"reads": np.array([(0, 2, 0, 0, 0, 0, 1)], READ)}, "layer out"),
    "a read's expert": ({"reads": np.array([(0, 1, 4, 0, 0, 0, 1)], READ)}, "expert o"),
    "n_experts beyond all": ({"n_experts": np.array(2**40)}, "can be told"),
    "about is too deep": ({"about": np.array("[" * 100_000)}, "not valid JSON"),
    "about has no mode": (
        {"about": np.array('{"mode": 1}')},
        "with a mode",
    ),
    "a weight is none": ({"weights": np.full((3, 2, 2), np.nan, "f2")}, "no number"),
    "endless": ({"spans": np.array([(1, 0, 0, 0, np.inf)], SPAN)}, "before they start"),
    "pickles": ({"ids": np.array([{}], object)}, "damaged"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_file_is_refused_in_one_line(tmp_path, name):
    by_hand().save(tmp_path / "t.npz")
    changes, message = FAULTS[name]
    arrays = dict(np.load(tmp_path / "t.npz")) | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(TraceError, match=message) as caught:
        Trace.load(tmp_path / "t.npz")
    assert str(caught.value).startswith(f"{tmp_path / 't.npz'}: ")
    assert "\n" not in str(caught.value)


def test_what_is_no_trace_is_refused(tmp_path):
    file = tmp_path / "t.npz"
    with pytest.raises(TraceError, match="No such file"):
        Trace.load(file)
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(content)
        with pytest.raises(TraceError, match=r"no \.npz"):
            Trace.load(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(TraceError, match="version"):
        Trace.load(file)
    by_hand().save(file)
    whole = file.read_bytes()
    for n in range(2, len(whole), 97):
        file.write_bytes(whole[:n])
        with pytest.raises(TraceError, match="damaged"):
            Trace.load(file)


def test_no_memory_is_taken_for_what_an_array_only_claims(tmp_path):
    file = tmp_path / "t.npz"
    by_hand().save(file)
    arrays = dict(np.load(file))
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as out:
                np.lib.format.write_array(out, array)
        with archive.open("reads.npy", "w") as out:
            claim = {"descr": READ.descr, "fortran_order": False, "shape": (10**12,)}
            np.lib.format.write_array_header_1_0(out, claim)
    with pytest.raises(TraceError, match=r"reads\.npy claims more than it holds"):
        Trace.load(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("version.npy", bytes(200_000_000))
    with pytest.raises(TraceError, match="unpacks to more than a trace would"):
        Trace.load(file)


def test_flipped_bytes_are_found(tmp_path):
    """A zip has checksums: content never changes unnoticed."""
    file = tmp_path / "t.npz"
    by_hand().save(file)
    whole = file.read_bytes()
    for at in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        file.write_bytes(damaged)
        try:
            assert equal(Trace.load(file), by_hand())
        except TraceError as error:
            assert "\n" not in str(error)


def test_a_faulty_trace_is_not_saved(tmp_path):
    trace = by_hand()
    trace.hits = trace.hits[1:]
    with pytest.raises(TraceError, match="hits"):
        trace.save(tmp_path / "t.npz")
    assert not (tmp_path / "t.npz").exists()


def test_arrays_of_other_names_are_ignored(tmp_path):
    by_hand().save(tmp_path / "t.npz")
    np.savez(tmp_path / "t.npz", more=np.ones(3), **np.load(tmp_path / "t.npz"))
    assert equal(Trace.load(tmp_path / "t.npz"), by_hand())


def test_waiting_for_a_read_ahead_to_end_counts_as_waiting(tiny: Path) -> None:
    with load(tiny, engine="numpy", slots=5) as model:
        store, late = model.store, Future()
        store.recorder = recorder = Recorder(N_LAYERS, K)
        recorder.begin([1], 0)
        timer = Timer(0.05, late.set_result, [0.0])
        timer.start()
        store._let_end([late])
        timer.join()
        store._let_end([late])  # it is over: no span of nothing
    kinds, _, seconds = zip(*recorder.laps, strict=True)
    assert kinds == (recording.BEGIN, recording.REQUEST, recording.WAIT)
    assert seconds[2] - seconds[1] > 0.04 > seconds[1] - seconds[0]
    assert store.counters.wait_s > 0.04


# --- tables ---------------------------------------------------------------------------


def test_a_table_comes_back(tmp_path):
    trace = by_hand()
    write_csv(trace, tmp_path / "t.csv")
    text = (tmp_path / "t.csv").read_text()
    assert text.startswith("token,layer,expert,weight\n0,0,0,0.5\n0,0,1,0.5\n0,1,2,0.5")
    found = read_csv(tmp_path / "t.csv")
    np.testing.assert_array_equal(found.picks, trace.picks)
    np.testing.assert_array_equal(found.weights, trace.weights)
    assert found.n_experts == 4 and found.steps["n_tokens"].tolist() == [1, 1, 1]
    assert found.about == {"imported from": "t.csv", "layers": [0, 1]}


@pytest.mark.parametrize(
    "text",
    [
        "5,3,0\n5,3,2\n5,7,1\n5,7,0\n6,3,1\n6,3,0\n6,7,2\n6,7,1\n",
        "\ufefftoken,layer,expert\r\n5,3,0\r\n5,3,2\r\n5,7,1\r\n5,7,0\r\n"
        "6,3,1\r\n6,3,0\r\n6,7,2\r\n6,7,1\r\n\r\n",
        "Expert, Layer ,Token,note\n1,3,6,x\n0,3,6,x\n0,3,5,\n2,3,5,\n"
        "2,7,6,\n1,7,6,\n1,7,5,\n0,7,5,\n",
    ],
    ids=["plain", "windows", "other order"],
)
def test_tables_of_other_engines(tmp_path, text):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8", newline="")
    trace = read_csv(tmp_path / "t.csv", n_experts=9)
    assert trace.picks.tolist() == [[[0, 2], [1, 0]], [[1, 0], [2, 1]]]
    assert trace.about["layers"] == [3, 7] and trace.n_experts == 9
    assert trace.weights is None and trace.hits is None


HEAD = "token,layer,expert,weight\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        (HEAD, "no rows"),
        ("token,expert\n1,2\n", "line 1 names no column 'layer'"),
        (HEAD + "0,0,1,0.5\n0,0,x,0.5\n", "line 3: expert 'x' is not a whole number"),
        (HEAD + "0,0,1.5,0.5\n", "line 2: expert '1.5'"),
        (HEAD + "0,-1,1,0.5\n", "line 2: layer '-1'"),
        (HEAD + "0,0,99999,0.5\n", "line 2: expert '99999'"),
        (HEAD + "0,0,1,nan\n", "line 2: weight 'nan' is not within"),
        (HEAD + "0,0,1\n", "line 2 has 3 fields, too few for token, layer, expert, w"),
        ("0,1\n", "line 1 has 2 fields"),
        ("0,0,1\n0,0\n", "line 2 has 2 fields"),
        ("0,0,1,2\n", "line 1: weight '2'"),
        ("0,0,1\n0,0,4\n", r"line 2: expert 4 is outside 0\.\.3"),
        ("0,0,1\n0,0,2\n0,0,1\n", "line 3: token 0 has expert 1 of layer 0 already"),
        ("0,0,1\n0,0,2\n1,0,1\n", "line 3: token 1 has 1 experts in layer 0, the"),
        ("0,0,1\n0,1,1\n1,1,2\n2,0,2\n2,1,2\n", "line 3: token 1 ends without layer 0"),
        ("0,0,1\n\n\n0,0,1\n", "line 4: token 0 has expert 1"),
    ],
)
def test_a_fault_in_a_table_names_its_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(TraceError, match=message) as caught:
        read_csv(tmp_path / "t.csv", n_experts=4)
    assert str(caught.value).startswith(f"{tmp_path / 't.csv'}: ")


@pytest.mark.parametrize("header", ["", HEAD, "layer,x,expert,token\n", "\n\n" + HEAD])
def test_tables_are_read_alike_at_once_and_by_line(tmp_path, header):
    rng = np.random.default_rng(0)
    picks = rng.random((7, 3, 20)).argsort(axis=2)[..., :4]
    rows = np.append(np.indices(picks.shape).reshape(3, -1)[:2], [picks.ravel()], 0).T
    names = (header or HEAD).strip().split(",")
    order = [names.index(name) for name in ("token", "layer", "expert")]
    table = np.full((len(rows), len(names)), 0.25, object)
    table[:, order] = rows
    lines = [",".join(map(str, row)) for row in table]
    lines[5] = ",".join(f'"{field}"' for field in table[5])  # as spreadsheets do
    lines.insert(9, "")
    path = tmp_path / "t.csv"
    path.write_text(header + "\r\n".join(lines))
    at_once, by_line = trace_exchange._load(path), trace_exchange._parse(path, None)
    assert np.array_equal(at_once[0], rows) and np.array_equal(by_line[0], rows)
    assert (at_once[1] is None) == (by_line[1] is None) == ("weight" not in names)
    assert at_once[1] is None or np.array_equal(at_once[1], by_line[1])
    assert np.array_equal(read_csv(path).picks, picks)


def test_what_is_no_table_is_refused(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="not a CSV"):
        read_csv(tmp_path / "t.csv")
    with pytest.raises(TraceError, match="No such file"):
        read_csv(tmp_path / "none.csv")
    with pytest.raises(TraceError, match="give 1 to 32768"):  # saved, it would pickle
        read_csv(tmp_path / "t.csv", n_experts=10**30)


# --- timelines ------------------------------------------------------------------------


def test_a_timeline_by_hand(tmp_path):
    write_chrome(by_hand(), tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    events = content["traceEvents"]
    named = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert named == ["computing", "reader 1", "reader 2"]
    shown = [(e["name"], e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert shown == [
        ("step 0", 0, 0, 1.5e6),
        ("step 1", 0, 2e6, 0.25e6),
        ("mix", 0, 0, 1e6),
        ("wait", 0, 1e6, 0.5e6),
        ("experts", 0, 2e6, 0.25e6),
        ("expert 1", 1, 1e6, 0.5e6),
        ("expert 2", 2, 1e6, 0.25e6),
    ]
    assert content["otherData"] == {"model": "by hand"}


def test_events_of_a_thread_nest(tiny):
    """Perfetto draws events of one thread only if none ends inside another."""
    with load(tiny, engine="numpy") as model, record(model) as trace:
        run(model, [1, 2, 3], 3)
    events = [e for e in chrome_events(trace) if e["ph"] == "X" and e["tid"] == 0]
    assert {e["cat"] for e in events} == {"step", "compute", "read"}
    events.sort(key=lambda e: (e["ts"], -e["dur"]))
    open_ends: list[float] = []
    for event in events:
        start, end = event["ts"], event["ts"] + event["dur"]
        while open_ends and open_ends[-1] <= start + 0.002:  # rounded to nanoseconds
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1] + 0.002
        open_ends.append(end)
