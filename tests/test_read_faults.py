"""A disk that fails, lies or stalls: a clear error, and never another expert's bytes.

Each test holds one model open through many faults, one after the other: what a fault
leaves behind must not reach the next text. The measure is always the same: the logits
of resident experts to the bit, and slots that hold what the cache says they hold.
"""

import errno
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tally
from tiny import write_tiny

from flashmoe_ref import policies, streaming
from flashmoe_ref.engine import Model, load
from flashmoe_ref.errors import ReadError
from flashmoe_ref.pack import pack

PROMPT, DECODED = [3, 50, 7, 81, 20, 9], [33, 4, 90, 61]
CACHINGS = {
    "page cache": {},
    "slots": {"slots": 4},
    "budget": {"budget": 12, "policy": "clock"},
    "read ahead": {"budget": 17, "prefetch": "look-ahead:2"},
    "last token": {"slots": 6, "prefetch": "last-token", "policy": "lfu"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with packed experts beside its own."""
    folder = write_tiny(tmp_path_factory.mktemp("m"), n_shards=2)
    pack(folder, progress=False)
    return folder


def run(model: Model) -> np.ndarray:
    """A prompt and some decoded tokens: all logits, (T, V)."""
    state = model.new_state()
    rows = [model.prefill(PROMPT, state, all_logits=True)]
    rows += [model.decode(token, state)[None] for token in DECODED]
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def expected(engine: dict, folder: Path) -> np.ndarray:
    with load(folder, experts="resident", **engine) as whole:
        return run(whole)


def assert_slots_hold_what_they_should(model: Model) -> None:
    """Every expert that a cache names is in its slot, byte by byte."""
    store = model.store
    store._end_reads()
    for layer, cache in enumerate(store._caches):
        if not store.caching.keeps:
            break
        late = {slot for slot, f in store._ahead[layer].items() if f.exception()}
        for key, slot in cache.slots.items():
            expert = key - store._first_key[layer]
            if not 0 <= expert < store.files.n_experts or slot in late:
                continue  # of another layer; or it will be told when it is asked for
            held = b"".join(map(bytes, store.bank(layer).views[slot]))
            assert held == stored(store, layer, expert), (layer, expert, slot)


def stored(store: streaming.ExpertStore, layer: int, expert: int) -> bytes:
    """An expert's bytes, read the plain way."""
    found = b""
    for run_ in store.files.runs[layer]:
        file, offset = run_.places[expert]
        with open(store.files.files[file], "rb") as opened:
            opened.seek(offset)
            found += opened.read(run_.n_bytes)
    return found


def assert_recovers(model: Model, expected: np.ndarray) -> None:
    assert_slots_hold_what_they_should(model)
    np.testing.assert_array_equal(run(model), expected)
    assert_slots_hold_what_they_should(model)


# --- one read goes wrong --------------------------------------------------------------

CODES = (errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ENOMEM)


def raises(code: int) -> Callable:
    def fault(real, fd, views, offset):
        raise OSError(code, os.strerror(code))

    return fault


def gives_nothing(real, fd, views, offset):
    return 0


def gives_half(real, fd, views, offset):
    return real(fd, [views[0][: -(-len(views[0]) // 2)]], offset)


def gives_one_byte(real, fd, views, offset):
    return real(fd, [views[0][:1]], offset)


FAULTS = {**{os.strerror(c): raises(c) for c in CODES}, "ends too early": gives_nothing}
HARMLESS = (gives_half, gives_one_byte)


@contextmanager
def at_read(at: int, fault: Callable) -> Iterator[None]:
    """Let the reads number `at` and after it, up to 3, go wrong, in whatever thread."""
    real, counted, lock = os.preadv, 0, threading.Lock()

    def preadv(fd, views, offset):
        nonlocal counted
        with lock:
            counted += 1
            wrong = at <= counted < at + 3
        return fault(real, fd, views, offset) if wrong else real(fd, views, offset)

    os.preadv = preadv
    try:
        yield
    finally:
        os.preadv = real


GRID = [
    ("compiled", source, caching, inline)
    for source, inline in (("stream", 0), ("packed", 0), ("packed", 1 << 30))
    for caching in CACHINGS
]
GRID += [("mlx", "stream", "slots", 0), ("mlx", "packed", "read ahead", 0)]
GRID += [("numpy", "packed", "page cache", 1 << 30)]


@pytest.mark.parametrize(
    ("engine", "source", "caching", "inline"), GRID, indirect=["engine"]
)
def test_a_read_that_fails_is_told_and_leaves_nothing(
    engine, folder, expected, source, caching, inline
):
    rng, n_told = random.Random(f"{source} {caching} {inline}"), 0
    with load(folder, experts=source, **CACHINGS[caching], **engine) as model:
        model.store.inline_bytes = inline
        run(model)
        n_reads = model.store.counters.reads
        for words, fault in FAULTS.items():
            at = rng.randrange(1, max(2, n_reads // 2))
            try:
                with at_read(at, fault):
                    found = run(model)
            except ReadError as error:
                n_told += 1
                assert words in str(error) and "\n" not in str(error)
                name = "layer_" if source == "packed" else "model-0000"
                assert name in str(error) and "reading expert" in str(error)
            else:  # an expert read ahead in vain, or caches had nothing to read
                np.testing.assert_array_equal(found, expected)
            assert_recovers(model, expected)
            tally.count("faults while reading experts")
        for fault in HARMLESS:
            with at_read(rng.randrange(1, n_reads), fault):
                np.testing.assert_array_equal(run(model), expected)
            assert_recovers(model, expected)
            tally.count("faults while reading experts")
    assert n_told >= 3, "hardly any fault reached a request"


# --- an interrupt at any point --------------------------------------------------------

WATCHED = {module.__file__ for module in (streaming, policies)}
Place = tuple[object, int]  # code, instruction


@contextmanager
def traced(at_instruction: Callable[[Place], None]) -> Iterator[None]:
    """Call a function before every instruction of this thread in the store's files."""

    def within(frame, event, _):
        frame.f_trace_opcodes = True
        if event == "opcode":
            at_instruction((frame.f_code, frame.f_lasti))
        return within

    def enter(frame, event, _):
        return within(frame, event, _) if frame.f_code.co_filename in WATCHED else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("engine", ["compiled"], indirect=True)
@pytest.mark.parametrize("caching", ["page cache", "slots", "read ahead"])
def test_an_interrupt_between_any_two_instructions(engine, folder, expected, caching):
    """As Ctrl-C does, which comes where it likes."""
    with load(folder, experts="packed", **CACHINGS[caching], **engine) as model:
        model.store.inline_bytes = 0
        seen: dict[Place, int] = {}
        with traced(lambda place: seen.update({place: seen.get(place, 0) + 1})):
            run(model)
        rng, n_interrupted = random.Random(caching), 0
        for place in rng.sample([*seen], min(len(seen), 110)):
            skipped = rng.randrange(min(seen[place], 6))

            def interrupt(now: Place, place: Place = place) -> None:
                nonlocal skipped
                skipped -= now == place
                if skipped < 0:
                    skipped = 1 << 30
                    raise KeyboardInterrupt

            try:
                with traced(interrupt):
                    run(model)
            except KeyboardInterrupt:
                n_interrupted += 1
                np.testing.assert_array_equal(run(model), expected)
                assert_slots_hold_what_they_should(model)
        tally.count("interrupts inside the expert store", n_interrupted)
        assert n_interrupted > 80
