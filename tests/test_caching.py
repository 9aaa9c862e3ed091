"""Live caches: the gate for every option, and the simulator's hits access by access."""

import os
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_streaming import N_EXPERTS, K, run
from tiny import write_tiny

from flashmoe_ref import reading, streaming
from flashmoe_ref.caching import Caching
from flashmoe_ref.checkpoint import Checkpoint
from flashmoe_ref.engine import load
from flashmoe_ref.errors import ConfigError, ReadError
from flashmoe_ref.experts import experts_in_place
from flashmoe_ref.policies import LIVE_POLICIES
from flashmoe_ref.predictors import PREDICTORS, LastToken
from flashmoe_ref.simulator import access_requests, decode_requests, join, simulate
from flashmoe_ref.streaming import ExpertStore
from flashmoe_ref.trace import record

N_LAYERS = 4
PROFILE = np.argsort(np.random.default_rng(0).random((40, N_LAYERS, N_EXPERTS)))[
    ..., :K
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small checkpoint with packed experts beside its own."""
    from flashmoe_ref.pack import pack

    folder = write_tiny(tmp_path_factory.mktemp("m"), n_shards=2)
    pack(folder, progress=False)
    return folder


def careless(fd, views, offset):
    """A read that first puts rubbish into its slot, and lets other threads run.

    So whoever computes from a slot too early, or from one that is being refilled, gets
    wrong numbers.
    """
    for view in views:
        view[:] = b"\x5a" * len(view)
    time.sleep(1e-5)
    reading.read_exactly(fd, views, offset)


@st.composite
def cache_options(draw):
    """Arguments of load() for a cache that can work."""
    k = draw(st.integers(1, K))
    n_ahead = draw(st.sampled_from([0, 0, 1, K]))
    pin = draw(st.integers(0, 2))
    options = {"k": k, "policy": draw(st.sampled_from(list(LIVE_POLICIES)))}
    if draw(st.booleans()):
        least = pin + max(k, n_ahead)
        options["slots"] = draw(st.integers(least, N_EXPERTS))
    else:
        options["budget"] = draw(st.integers(pin + k + n_ahead, N_LAYERS * N_EXPERTS))
    if n_ahead:
        options["prefetch"] = f"{draw(st.sampled_from(list(PREDICTORS)))}:{n_ahead}"
    if pin or draw(st.booleans()):
        options |= {"pin": pin, "profile": PROFILE}
    return options


@settings(max_examples=25, deadline=None)
@given(
    options=cache_options(),
    source=st.sampled_from(["stream", "packed"]),
    threads=st.integers(1, 8),
    inline=st.sampled_from([0, 40_000, 1 << 20]),
    prompts=st.lists(
        st.lists(st.integers(0, 95), min_size=1, max_size=30), min_size=1, max_size=2
    ),
    chunk=st.integers(1, 30),
)
def test_every_cache_equals_resident_to_the_bit(
    engine, tiny, options, source, threads, inline, prompts, chunk
):
    with (
        pytest.MonkeyPatch.context() as patch,
        load(tiny, k=options["k"], experts="resident", **engine) as whole,
        load(tiny, experts=source, threads=threads, **options, **engine) as streamed,
    ):
        patch.setattr(streaming, "read_exactly", careless)
        streamed.store.inline_bytes = inline
        for prompt in prompts:  # the second meets what the first left behind
            expected = run(whole, prompt, 5, chunk)
            np.testing.assert_array_equal(run(streamed, prompt, 5, chunk), expected)


# --- the simulator against the live cache ---------------------------------------------


class Spy:
    """A predictor that notes what another one names."""

    def __init__(self, predictor):
        self.predictor, self.n = predictor, predictor.n
        self.looks_ahead, self.named = predictor.looks_ahead, []

    def after(self, layer, picks, scores=None):
        """As the other."""
        self.named.append(self.predictor.after(layer, picks, scores))
        return self.named[-1]


@settings(max_examples=40, deadline=None)
@given(
    options=cache_options(),
    prompt=st.lists(st.integers(0, 95), min_size=2, max_size=30),
    n_decode=st.integers(1, 25),
)
def test_the_simulator_has_the_hits_of_the_live_cache(tiny, options, prompt, n_decode):
    with load(tiny, engine="numpy", compiled=False, **options) as model:
        store = model.store
        if store.predictor is not None:
            store.predictor = Spy(store.predictor)
        with record(model) as trace:
            run(model, prompt, n_decode, chunk=len(prompt))
        named = store.predictor.named if store.predictor else []
    requests = join(
        access_requests(
            *trace.accesses()[trace.accesses()[:, 0] == 0].T,
            N_EXPERTS,
            store.capacity,
        ),
        decode_requests(
            trace.picks[len(prompt) :], N_EXPERTS, _by_layer(named, n_decode)
        ),
    )
    shared = "budget" in options
    n_slots = options["budget"] if shared else options["slots"]
    pinned = store.caching.pins(N_LAYERS, N_EXPERTS)
    got = simulate(requests, options["policy"], n_slots, shared, pinned)
    np.testing.assert_array_equal(got.hits, trace.hits)
    counters = store.counters
    assert (got.misses, got.hits.sum()) == (counters.misses, counters.hits)
    if named and named[-1]:  # the last was for a token that did not come
        return
    assert got.prefetched == counters.prefetched
    assert got.prefetch_hits == counters.prefetch_hits


def _by_layer(named, n_decode):
    """What was named after layer l is for layer l + 1. Shapes: -> (T, L, P)."""
    if not named:
        return None
    predicted = np.full((n_decode * N_LAYERS + 1, K), -1)
    for i, experts in enumerate(named):
        predicted[i + 1, : len(experts)] = experts
    return predicted[:-1].reshape(n_decode, N_LAYERS, K)


def test_pinned_experts_are_read_once_and_for_all(tiny):
    with load(tiny, engine="numpy", slots=5, pin=2, profile=PROFILE) as model:
        pinned = model.store.caching.pinned
        assert pinned.sum(axis=1).tolist() == [2] * N_LAYERS
        with record(model) as trace:
            run(model, [1, 2, 3], 20, 3)
        rows = trace.accesses()
        assert trace.hits[pinned[rows[:, 1], rows[:, 2]]].all()
        assert not trace.hits.all()


def test_a_shared_budget_is_the_memory_taken(tiny):
    with load(tiny, engine="numpy", budget=11) as model:
        assert model.store.n_bytes == 11 * model.store.files.formats[0].n_bytes
        assert "slots 11 for all layers" in str(model.report())


# --- reads ahead ----------------------------------------------------------------------


class Oracle(LastToken):
    """Names what it was told to."""

    def __init__(self, experts):
        super().__init__(N_LAYERS, N_EXPERTS, len(experts))
        self.experts = experts

    def after(self, layer, picks, scores=None):
        """Always the same."""
        return self.experts


def make_store(folder, experts=(1, 2, 3), slots=4, **options):
    """A store whose predictor always names these."""
    checkpoint = Checkpoint.open(folder)
    files = experts_in_place(checkpoint)
    caching = Caching(slots=slots, predictor=Oracle(list(experts)), **options)
    store = ExpertStore(files, checkpoint.config, caching=caching)
    store.inline_bytes = 0
    return store


def test_a_read_ahead_goes_on_while_the_layer_computes(tiny, monkeypatch):
    store = make_store(tiny)
    store.request(0, [5, 6, 7]).wait()
    may_read, real = threading.Event(), streaming.read_exactly

    def read(fd, views, offset):
        may_read.wait(10)
        real(fd, views, offset)

    monkeypatch.setattr(streaming, "read_exactly", read)
    store.prefetch(0, [5, 6, 7])  # returns although nothing can be read yet
    ticket = store.request(1, [3, 1, 2])
    assert (store.counters.hits, store.counters.prefetch_hits) == (3, 3)
    assert ticket._futures
    threading.Timer(0.05, may_read.set).start()
    assert len(set(ticket.wait())) == 3
    assert store.counters.wait_s >= 0.03
    assert store.counters.misses == 3  # of layer 0 only
    store.close()


def test_a_demanded_read_does_not_queue_behind_reads_ahead(tiny, monkeypatch):
    store = make_store(tiny, experts=[0, 1, 2, 3])
    may_read, real = threading.Event(), streaming.read_exactly

    def read(fd, views, offset):
        if threading.current_thread().name.startswith("flashmoe-ahead"):
            may_read.wait(10)
        real(fd, views, offset)

    monkeypatch.setattr(streaming, "read_exactly", read)
    store.prefetch(0, [5, 6, 7])
    store.request(2, [4, 5, 6]).wait()  # would hang for ten seconds
    assert not may_read.is_set()
    may_read.set()
    store.close()


def test_a_slot_is_refilled_only_when_its_read_ahead_is_over(tiny, monkeypatch):
    """Layer 1 needs others than were foreseen, in the very slots being read into."""
    real, order = streaming.read_exactly, []

    def read(fd, views, offset):
        ahead = threading.current_thread().name.startswith("flashmoe-ahead")
        if ahead:
            time.sleep(0.01)
        real(fd, views, offset)
        order.append(ahead)

    monkeypatch.setattr(streaming, "read_exactly", read)
    store = make_store(tiny, experts=[0, 1, 2, 3], slots=4)
    store.prefetch(0, [5, 6, 7])
    store.request(1, [5, 6, 7]).wait()
    n_runs = len(store.files.runs[0])
    assert order.index(False) >= 3 * n_runs - n_runs  # at least two of the victims done
    assert (store.counters.prefetched, store.counters.prefetch_hits) == (4, 0)
    store.close()


def test_two_reads_ahead_never_write_to_a_slot_at_once(tiny, monkeypatch):
    """The second guess takes the slots of the first, which is still being read."""
    real, may_read = streaming.read_exactly, threading.Event()

    def read(fd, views, offset):
        may_read.wait(10)
        real(fd, views, offset)

    monkeypatch.setattr(streaming, "read_exactly", read)
    store = make_store(tiny, experts=[0, 1, 2, 3], slots=4)
    store.prefetch(0, [5, 6, 7])
    store.predictor.experts = [4, 5, 6, 7]
    threading.Timer(0.1, may_read.set).start()
    store.prefetch(0, [5, 6, 7])
    assert may_read.is_set()  # it has waited for the reads into its slots
    store.request(1, [4, 5, 6, 7]).wait()
    expected = make_store(tiny, slots=8)
    slots = expected.request(1, [4, 5, 6, 7]).wait()
    ours, theirs = store.bank(1), expected.bank(1)
    for got, want in zip(store.request(1, [4, 5, 6, 7]).wait(), slots, strict=True):
        assert ours.views[got] == theirs.views[want]
    store.close()
    expected.close()


def test_threads_only_read_bytes(tiny):
    """Whatever runs in a reading thread belongs to reading, and no engine."""
    mx = pytest.importorskip("mlx.core")
    device, seen = mx.default_device(), set()

    def note(frame, event, argument):
        if threading.current_thread().name.startswith("flashmoe-"):
            seen.add(frame.f_globals.get("__name__"))
            if event == "c_call":
                seen.add(argument.__module__)

    mx.set_default_device(mx.cpu)
    threading.setprofile(note)
    try:
        options = {"slots": 4, "prefetch": "look-ahead", "experts": "stream"}
        with load(tiny, engine="mlx", **options) as model:
            model.store.inline_bytes = 0
            run(model, [1, 2, 3], 10, 3)
            assert model.store.counters.prefetched > 10
    finally:
        threading.setprofile(None)
        mx.set_default_device(device)
    assert "flashmoe_ref.streaming" in seen
    ours = {name for name in seen if name and name.startswith(("flashmoe", "mlx"))}
    allowed = ("streaming", "reading", "recording", "experts", "slots")
    allowed += ("arrivals", "guards", "guard_kernels")
    assert ours <= {f"flashmoe_ref.{name}" for name in allowed}


def test_an_error_in_a_read_ahead_counts_only_if_it_is_needed(tiny, monkeypatch):
    real, broken = streaming.read_exactly, threading.Event()

    def read(fd, views, offset):
        if broken.is_set():
            raise OSError("the disk is gone")
        real(fd, views, offset)

    monkeypatch.setattr(streaming, "read_exactly", read)
    store = make_store(tiny)
    broken.set()
    store.prefetch(0, [5, 6, 7])
    streaming.wait(list(store._ahead[1].values()))
    broken.clear()
    store.request(2, [1, 2, 3]).wait()  # nobody needed what failed
    with pytest.raises(ReadError, match="layer 1 failed"):
        store.request(1, [1, 2, 4]).wait()
    ticket = store.request(1, [1, 2, 4])  # what may be wrong was forgotten
    slots = ticket.wait()
    view = store.bank(1).views[slots[0]][0]
    run_, fd = store.files.runs[1][0], store._fds
    file, offset = run_.places[1]
    assert bytes(view) == os.pread(fd[file], len(view), offset)
    store.close()


def test_a_request_that_nobody_waited_for_is_not_trusted(tiny, monkeypatch):
    real, may_read = streaming.read_exactly, threading.Event()

    def read(fd, views, offset):
        may_read.wait(10)
        real(fd, views, offset)

    monkeypatch.setattr(streaming, "read_exactly", read)
    store = make_store(tiny)
    store.request(0, [1, 2, 3])  # interrupted here: no wait()
    threading.Timer(0.05, may_read.set).start()
    ticket = store.request(0, [1, 2, 3])
    assert store.counters.misses == 6
    ticket.wait()
    store.close()


def test_reads_ahead_are_reported(tiny):
    options = {"slots": 4, "prefetch": "look-ahead:3", "policy": "fifo"}
    with load(tiny, engine="numpy", compiled=False, **options) as model:
        run(model, [1, 2, 3], 20, 3)
        report = model.report()
    assert 0 < report.prefetch_hits <= report.prefetched
    assert report.bytes_read == (report.misses + report.prefetched) * (
        model.store.files.formats[0].n_bytes
    )
    assert "policy fifo, prefetch look-ahead:3" in str(report)
    assert f"{report.prefetched} read, {report.prefetch_hits} of them used" in str(
        report
    )


# --- settings that cannot work --------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": K - 1}, r"budget=2 is outside 3\.\.32"),
        ({"budget": 33}, r"outside 3\.\.32"),
        ({"budget": 9, "slots": 4}, "not both"),
        ({"slots": 4, "policy": "mru"}, "policy='mru' is not one of lru, lfu"),
        ({"policy": "lfu"}, "give slots or budget"),
        ({"prefetch": "last-token"}, "give slots or budget"),
        ({"slots": 4, "prefetch": "magic"}, "look-ahead"),
        ({"slots": 4, "prefetch": "look-ahead:9"}, r"1\.\.8"),
        ({"slots": 4, "prefetch": "look-ahead:x"}, r"1\.\.8"),
        ({"slots": 4, "prefetch": "look-ahead:4", "k": 2, "pin": 1}, "profile"),
        ({"slots": 4, "pin": 2, "profile": PROFILE}, "leave 2 slots, but 3"),
        ({"budget": 5, "prefetch": "last-token"}, "but 6 are needed"),
        ({"slots": 4, "pin": -1, "profile": PROFILE}, "pin=-1"),
        ({"slots": 5, "pin": 1, "profile": PROFILE[:, :3]}, "4 layers with 8"),
        ({"slots": 5, "pin": 1, "profile": PROFILE + 1}, "4 layers with 8"),
        ({"experts": "resident", "policy": "lfu"}, "no meaning"),
        ({"experts": "resident", "budget": 9}, "no meaning"),
    ],
)
def test_settings_that_cannot_work_are_refused(tiny, options, words):
    with pytest.raises(ConfigError, match=words):
        load(tiny, engine="numpy", **options)


def test_a_budget_is_shared_out_among_sizes_of_experts():
    """Seven slots for three layers of one size and one of another, and so on."""
    kinds = [0, 1, 0, 0]
    assert Caching(budget=8).shares(kinds) == {0: 6, 1: 2}
    assert Caching(budget=10).shares(kinds) == {0: 8, 1: 2}
    assert Caching(budget=11).shares(kinds) == {0: 9, 1: 2}
    pins = np.zeros((4, 8), bool)
    pins[1, :3] = pins[2, 5] = True
    caching = Caching(budget=24, pinned=pins)
    assert caching.capacity(3, 4, 8, kinds) == 3  # of 6 slots of kind 1
    caches = caching.make_caches(3, 4, 8, kinds)
    assert caches[0] is caches[2] is caches[3] is not caches[1]
    assert list(caches[1].pinned) == [8, 9, 10] and list(caches[0].pinned) == [21]
    with pytest.raises(ConfigError, match="2 sizes of experts share the budget"):
        Caching(budget=11).capacity(3, 4, 8, kinds)


def test_a_trace_is_a_profile(tiny, tmp_path):
    with load(tiny, engine="numpy", compiled=False) as model:
        with record(model) as trace:
            run(model, [1, 2, 3], 10, 3)
        trace.save(tmp_path / "run.npz")
    options = {"slots": 6, "pin": 2, "prefetch": "co-occurrence"}
    profiles = (tmp_path / "run.npz", str(tmp_path / "run.npz"), trace.picks)
    masks = []
    for profile in profiles:
        with load(tiny, engine="numpy", profile=profile, **options) as model:
            masks.append(model.store.caching.pinned)
    for layer, row in enumerate(masks[0]):
        counts = np.bincount(trace.picks[:, layer].ravel(), minlength=N_EXPERTS)
        assert counts[row].min() >= counts[~row].max()
    np.testing.assert_array_equal(masks[0], masks[1])
    np.testing.assert_array_equal(masks[0], masks[2])


# --- past the page cache --------------------------------------------------------------


@pytest.fixture
def has_direct(tiny):
    """Skips where the file system has no way past its cache."""
    try:
        fd, _ = reading.open_file(next(tiny.glob("*.safetensors")), True)
    except ConfigError:
        pytest.skip("no O_DIRECT here")
    os.close(fd)


@pytest.mark.parametrize("source", ["stream", "packed"])
@pytest.mark.parametrize("slots", [None, 5])
def test_direct_reads_give_the_same_bits(engine, tiny, has_direct, source, slots):
    options = {"experts": source, "slots": slots, "bypass_page_cache": True}
    with (
        load(tiny, experts="resident", **engine) as whole,
        load(tiny, **options, **engine) as direct,
    ):
        expected = run(whole, [1, 2, 3, 4, 5], 6, 5)
        np.testing.assert_array_equal(run(direct, [1, 2, 3, 4, 5], 6, 5), expected)
        assert "page cache bypassed, with a copy" in str(direct.report())


def test_aligned_records_are_read_without_a_copy(tmp_path, has_direct, monkeypatch):
    """As of the 397B: every part of a record is a multiple of the block."""
    from flashmoe_ref.pack import pack

    if not hasattr(os, "O_DIRECT"):
        pytest.skip("elsewhere nothing needs to be aligned")
    shape = {"hidden_size": 512, "moe_intermediate_size": 512}
    folder = write_tiny(tmp_path / "m", **shape)
    pack(folder, progress=False)
    options = {"engine": "numpy", "compiled": False, "experts": "packed"}
    with load(folder, **options) as model:
        expected = model.logits([1, 2, 3])
    with load(folder, **options, bypass_page_cache=True) as model:
        assert not model.store.copies
        monkeypatch.setattr(streaming, "read_through_buffer", None)
        np.testing.assert_array_equal(model.logits([1, 2, 3]), expected)
        assert "page cache bypassed\n" in str(model.report())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=6),
    st.integers(0, 9000),
    st.sampled_from([512, 4096]),
)
def test_reads_through_a_buffer_are_exact(tmp_path_factory, sizes, offset, block):
    file = tmp_path_factory.mktemp("f") / "f"
    data = np.random.default_rng(0).bytes(10_000)
    file.write_bytes(data)
    fd = os.open(file, os.O_RDONLY)
    out = [bytearray(size) for size in sizes]
    wanted = data[offset : offset + sum(sizes)]
    views = [memoryview(part) for part in out]
    try:
        if len(wanted) < sum(sizes):
            with pytest.raises(OSError, match="ends too early"):
                reading.read_through_buffer(fd, views, offset, block)
        else:
            reading.read_through_buffer(fd, views, offset, block)
            assert b"".join(out) == wanted
    finally:
        os.close(fd)


def test_a_record_larger_than_the_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BOUNCE_BYTES", 4096)
    monkeypatch.setattr(reading, "_own", threading.local())
    file, data = tmp_path / "f", np.random.default_rng(0).bytes(40_000)
    file.write_bytes(data)
    fd, out = os.open(file, os.O_RDONLY), bytearray(30_000)
    views = [memoryview(out)[:10_000], memoryview(out)[10_000:]]
    reading.read_through_buffer(fd, views, 777, 512)
    os.close(fd)
    assert out == data[777:30_777]


def test_without_direct_reads_the_file_system_is_named(tmp_path, monkeypatch):
    file, real = tmp_path / "f", os.open
    file.write_bytes(b"x" * 9000)

    def refuse(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "O_DIRECT", 0x4000, raising=False)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=r"f is on offers no way"):
        reading.open_file(file, bypass_page_cache=True)


def test_macos_turns_caching_off_and_needs_no_alignment(tmp_path, monkeypatch):
    """A stand-in for macOS: no O_DIRECT, but F_NOCACHE."""
    file, calls = tmp_path / "f", []
    file.write_bytes(b"x" * 100)
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.setattr(reading.fcntl, "F_NOCACHE", 48, raising=False)
    monkeypatch.setattr(reading.fcntl, "fcntl", lambda *call: calls.append(call))
    fd, block = reading.open_file(file, bypass_page_cache=True)
    assert (calls, block) == ([(fd, 48, 1)], 1)
    os.close(fd)
    monkeypatch.delattr(reading.fcntl, "F_NOCACHE")
    with pytest.raises(ConfigError, match="leave this option out"):
        reading.open_file(file, bypass_page_cache=True)
