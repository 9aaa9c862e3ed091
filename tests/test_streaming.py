"""The gate: streamed experts give the same logits as resident ones, to the bit."""

import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny

from flashmoe_ref.caching import Caching
from flashmoe_ref.checkpoint import Checkpoint
from flashmoe_ref.engine import load
from flashmoe_ref.errors import ConfigError, ReadError
from flashmoe_ref.experts import experts_in_place
from flashmoe_ref.pack import pack
from flashmoe_ref.policies import LruSlots
from flashmoe_ref.reading import read_exactly
from flashmoe_ref.requantize import requantize
from flashmoe_ref.streaming import ExpertStore

N_EXPERTS, K = 8, 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small checkpoint with packed experts beside its own."""
    folder = write_tiny(tmp_path_factory.mktemp("m"), n_shards=2)
    pack(folder, progress=False)
    return folder


def run(model, prompt, n_decode, chunk):
    """Prefill in chunks, then decode: all logits, (T, V)."""
    state = model.new_state()
    rows = [
        model.engine.forward(prompt[i : i + chunk], state, all_logits=True)
        for i in range(0, len(prompt), chunk)
    ]
    for i in range(n_decode):
        token = int(np.argmax(rows[-1][-1]))
        rows.append(model.decode((token + i) % 90, state)[None])
    return np.concatenate(rows)


@settings(max_examples=25, deadline=None)
@given(
    source=st.sampled_from(["stream", "packed"]),
    slots=st.sampled_from([None, *range(K, N_EXPERTS + 1)]),
    threads=st.integers(1, 8),
    k=st.integers(1, K),
    prompt=st.lists(st.integers(0, 95), min_size=1, max_size=40),
    chunk=st.integers(1, 40),
)
def test_streamed_equals_resident_to_the_bit(
    engine, tiny, source, slots, threads, k, prompt, chunk
):
    options = {"experts": source, "slots": slots, "threads": threads, "k": k}
    with (
        load(tiny, k=k, experts="resident", **engine) as whole,
        load(tiny, **options, **engine) as streamed,
    ):
        streamed.store.inline_bytes = 0  # let the threads read, small as this is
        expected = run(whole, prompt, 6, chunk)
        np.testing.assert_array_equal(run(streamed, prompt, 6, chunk), expected)
        if slots is not None and slots < N_EXPERTS and len(prompt) > 20:
            assert streamed.store.counters.misses > slots  # eviction did happen


@pytest.fixture(scope="module")
def mixed(tiny, tmp_path_factory):
    """Layer 1 with 4 bits, the others with 2 and a down projection of 3."""
    folder = tmp_path_factory.mktemp("mixed") / "m"
    requantize(tiny, folder, 2, down_bits=3, layer_bits={1: 4}, progress=False)
    pack(folder, progress=False)
    return folder


@pytest.mark.parametrize("source", ["stream", "packed"])
@pytest.mark.parametrize(
    "caching",
    [{}, {"slots": 4}, {"budget": 12}, {"budget": 16, "prefetch": "look-ahead:1"}],
)
def test_layers_of_several_formats_stream_to_the_bit(engine, mixed, source, caching):
    prompt = np.random.default_rng(3).integers(0, 96, 30).tolist()
    with (
        load(mixed, experts="resident", **engine) as whole,
        load(mixed, experts=source, **caching, **engine) as streamed,
    ):
        streamed.store.inline_bytes = 0
        expected = run(whole, prompt, 8, 17)
        np.testing.assert_array_equal(run(streamed, prompt, 8, 17), expected)
        report = streamed.report()
        assert report.mode["bits"] == [2, 3, 4]
        sizes = [fmt.n_bytes for fmt in streamed.store.files.formats]
        assert sizes[0] == sizes[2] == sizes[3] < sizes[1]
        assert min(sizes) < report.bytes_read / (report.misses + report.prefetched)
        slots = caching.get("slots", 0) * 4 or caching.get("budget") or 2 * K
        assert streamed.store.n_bytes < slots * max(sizes)


def test_packed_needs_one_read_an_expert_and_in_place_nine(tiny):
    for source, n_reads in (("packed", 1), ("stream", 9)):
        with load(tiny, engine="numpy", experts=source) as model:
            model.logits([1, 2, 3])
            counters = model.store.counters
            assert counters.reads == n_reads * counters.misses
            fmt = model.store.files.formats[0]
            assert counters.bytes_read == counters.misses * fmt.n_bytes


def test_prefill_reads_an_expert_once_a_chunk(tiny):
    ids = list(np.random.default_rng(0).integers(0, 96, 60))
    with load(tiny, engine="numpy", slots=K) as model:
        model.engine.forward(ids, model.new_state())
        n_layers = model.config.num_hidden_layers
        assert model.store.counters.misses <= n_layers * N_EXPERTS


def test_resident_reads_nothing_after_loading(tiny, engine):
    with load(tiny, experts="resident", **engine) as model:
        model.logits([1, 2, 3])
        assert model.store.counters.reads == 0
        assert model.report().hit_rate == 1


def test_memory_is_what_the_slots_promise(tiny):
    with load(tiny, engine="numpy", slots=4) as model:
        per_expert = model.store.files.formats[0].n_bytes
        assert model.store.n_bytes == 4 * 4 * per_expert
    with load(tiny, engine="numpy") as model:  # no cache: K slots for all layers
        assert model.store.n_bytes == K * per_expert


@pytest.mark.parametrize("slots", [0, K - 1, N_EXPERTS + 1, -1])
def test_slots_out_of_range_are_refused(tiny, slots):
    with pytest.raises(ConfigError, match=rf"slots={slots} is outside 3\.\.8"):
        load(tiny, slots=slots)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"threads": 0}, "threads=0"),
        ({"k": 0}, r"1\.\.3"),
        ({"k": K + 1}, r"1\.\.3"),
        ({"engine": "torch"}, "numpy"),
        ({"experts": "ram"}, "resident"),
        ({"experts": "resident", "slots": 4}, "no meaning"),
    ],
)
def test_bad_options_are_refused(tiny, options, word):
    with pytest.raises(ConfigError, match=word):
        load(tiny, **options)


# --- the cache ------------------------------------------------------------------------


@given(st.integers(1, 6), st.lists(st.sets(st.integers(0, 9), min_size=1), max_size=40))
def test_lru_against_a_list(n_slots, requests):
    """The plainest model of LRU: a list in order of use."""
    lru, by_use = LruSlots(n_slots), []
    for wanted in requests:
        wanted = sorted(wanted)[:n_slots]
        slots, missing = lru.assign(wanted)
        assert missing == [e for e in wanted if e not in by_use]
        hits = [e for e in wanted if e in by_use]
        by_use = [e for e in by_use if e not in hits] + hits + missing
        by_use = by_use[-n_slots:]
        assert set(lru.slots) == set(by_use)
        assert len(set(lru.slots.values())) == len(lru.slots)  # no slot twice
        assert slots == [lru.slots[e] for e in wanted]


# --- faults ---------------------------------------------------------------------------


@pytest.mark.parametrize("n_inline", [0, 1 << 30])
def test_short_reads_are_continued(tiny, monkeypatch, n_inline):
    real = os.preadv
    calls = []

    def short(fd, views, offset):
        """Never more than 100 bytes at a time."""
        calls.append(threading.get_ident())
        return real(fd, [views[0][:100]], offset)

    with load(tiny, engine="numpy", experts="resident") as whole:
        expected = whole.logits([1, 2, 3, 4])
    with load(tiny, engine="numpy", experts="packed") as model:
        model.store.inline_bytes = n_inline
        monkeypatch.setattr(os, "preadv", short)
        np.testing.assert_array_equal(model.logits([1, 2, 3, 4]), expected)
    assert (threading.get_ident() in calls) == (n_inline > 0)
    assert len(calls) > 1000


def test_read_exactly_over_several_views(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(bytes(range(100)))
    fd = os.open(file, os.O_RDONLY)
    out = bytearray(30)
    views = [memoryview(out)[:7], memoryview(out)[7:7], memoryview(out)[7:]]
    read_exactly(fd, views, 50)
    assert out == bytes(range(50, 80))
    with pytest.raises(OSError, match="ends too early"):
        read_exactly(fd, views, 90)
    os.close(fd)


def test_an_error_in_one_thread_is_raised_by_wait(tiny):
    checkpoint = Checkpoint.open(tiny)
    store = ExpertStore(
        experts_in_place(checkpoint), checkpoint.config, caching=Caching(slots=4)
    )
    store.inline_bytes = 0
    os.close(store._fds[0])
    store._fds[0] = os.open(os.devnull, os.O_RDONLY)  # reads nothing, ever
    ticket = store.request(0, [1, 2, 3])
    with pytest.raises(ReadError, match="layer 0"):
        ticket.wait()
    assert not store._caches[0].slots
    store.close()


def test_a_missing_packed_folder_says_what_to_do(tmp_path):
    folder = write_tiny(tmp_path / "m")
    with pytest.raises(ValueError, match="flashmoe pack"):
        load(folder, experts="packed")
