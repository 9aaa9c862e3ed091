"""Files that stall, vanish or change while a model has them open or is loaded."""

import errno
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tally
from faults import Failing, inject
from test_read_faults import assert_slots_hold_what_they_should, run, stored
from tiny import write_tiny

from flashmoe_ref import headers, reading, streaming
from flashmoe_ref.engine import load
from flashmoe_ref.errors import CheckpointError, ConfigError, FlashMoeError, ReadError
from flashmoe_ref.mapped import load_mapped
from flashmoe_ref.pack import pack

OPTIONS = {"engine": "numpy", "compiled": False}
SMALL = {"num_hidden_layers": 2, "full_attention_interval": 2}
STALL_S = 0.3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint of its own for each test, with packed experts."""
    folder = write_tiny(tmp_path / "m", n_shards=2, **SMALL)
    pack(folder, progress=False)
    return folder


@pytest.fixture
def expected(folder: Path) -> np.ndarray:
    with load(folder, experts="resident", **OPTIONS) as whole:
        return run(whole)


# --- a disk that stalls ---------------------------------------------------------------


@pytest.fixture
def stalling(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Once set, the next read takes long, and gives what it should."""
    real, stall, lock = os.preadv, threading.Event(), threading.Lock()

    def preadv(fd, views, offset):
        with lock:
            waits = stall.is_set()
            stall.clear()
        if waits:
            time.sleep(STALL_S)
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return stall


@pytest.mark.parametrize("inline", [0, 1 << 30])
def test_a_run_goes_on_after_a_stall(folder, expected, stalling, inline):
    with load(folder, experts="packed", slots=4, **OPTIONS) as model:
        model.store.inline_bytes = inline
        stalling.set()
        np.testing.assert_array_equal(run(model), expected)
        assert model.store.counters.wait_s > 0.9 * STALL_S
    tally.count("stalls")


@pytest.mark.parametrize("caching", [{}, {"slots": 4}, {"slots": 8}])
def test_a_stalled_read_can_be_interrupted(folder, expected, stalling, caching):
    """At once; and what is still on its way goes into no slot that is used."""
    with load(folder, experts="packed", **caching, **OPTIONS) as model:
        store = model.store
        store.inline_bytes = 0
        stalling.set()
        ticket = store.request(0, [2, 5, 1])
        threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGINT]).start()
        start = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            ticket.wait()
        assert time.perf_counter() - start < 0.8 * STALL_S
        for experts in ([7, 0, 3], [2, 5, 1]):
            for expert, slot in zip(
                experts, store.request(0, experts).wait(), strict=True
            ):
                held = b"".join(map(bytes, store.bank(0).views[slot]))
                assert held == stored(store, 0, expert)
        time.sleep(max(0, start + STALL_S + 0.1 - time.perf_counter()))
        np.testing.assert_array_equal(run(model), expected)
        assert_slots_hold_what_they_should(model)
    tally.count("stalls")


def test_closing_waits_for_one_read_and_not_for_all(folder, stalling, monkeypatch):
    model = load(folder, experts="packed", threads=1, slots=8, **OPTIONS)
    model.store.inline_bytes = 0
    n_reads, read = 0, streaming.read_exactly

    def slowly(fd, views, offset):
        nonlocal n_reads
        n_reads += 1
        time.sleep(0.1)
        read(fd, views, offset)

    monkeypatch.setattr(streaming, "read_exactly", slowly)
    ticket = model.store.request(0, range(8))
    time.sleep(0.02)
    model.close()
    assert n_reads == 1
    with pytest.raises(ReadError, match="this model is closed: load it again"):
        ticket.wait()
    with pytest.raises(ReadError, match="is closed"):
        model.logits([1, 2, 3])
    tally.count("stalls")


# --- files that change while they are open --------------------------------------------


def write_again(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-200:] = bytes(200)
    with open(file, "r+b") as opened:
        opened.write(data)


def replace(file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(bytes(file.stat().st_size))
    os.replace(other, file)


CHANGES = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "longer": lambda file: os.truncate(file, file.stat().st_size + 1),
    "written to": write_again,
}


@pytest.mark.parametrize("experts", ["stream", "packed"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_changed_between_two_runs(folder, experts, change):
    with load(folder, experts=experts, slots=4, **OPTIONS) as model:
        run(model)
        file = model.store.files.files[0]
        CHANGES[change](file)
        with pytest.raises(ReadError, match=rf"{file.name}: was changed while"):
            run(model)
    tally.count("files changed while open")


@pytest.mark.parametrize("experts", ["stream", "packed", "resident"])
@pytest.mark.parametrize("change", [replace, Path.unlink])
def test_a_file_that_was_replaced_is_not_seen(folder, expected, experts, change):
    with load(folder, experts=experts, **OPTIONS) as model:
        for file in model.store.files.files:
            change(file)
        for _ in range(2):
            np.testing.assert_array_equal(run(model), expected)
    tally.count("files changed while open")


def test_a_file_that_ends_while_a_token_is_decoded(folder, expected):
    with load(folder, experts="packed", **OPTIONS) as model:
        file = model.store.files.files[1]
        data, times = file.read_bytes(), file.stat()
        state = model.new_state()
        model.prefill([1, 2, 3], state)
        os.truncate(file, 100)
        with pytest.raises(ReadError, match=r"layer_01\.bin: reading expert \d"):
            model.decode(5, state)
        file.write_bytes(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(ConfigError, match="this state is unusable"):
            model.decode(5, state)  # one layer of two has already seen the token
        with pytest.raises(ConfigError, match="this state is unusable"):
            model.prefill([5], state)
        np.testing.assert_array_equal(run(model), expected)
    tally.count("files changed while open")


def test_a_snapshot_leads_back_to_a_whole_state(folder, monkeypatch):
    with load(folder, experts="packed", **OPTIONS) as model:
        state = model.new_state()
        model.prefill([1, 2, 3], state)
        snapshot, wanted = state.snapshot(), model.decode(5, state)
        state.restore(snapshot)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", lambda *_: 0)
            with pytest.raises(ReadError, match="ends too early"):
                model.decode(5, state)
        with pytest.raises(ConfigError, match="unusable"):
            model.decode(5, state.snapshot())  # no better than what it was taken of
        state.restore(snapshot)
        np.testing.assert_array_equal(model.decode(5, state), wanted)
        with pytest.raises(ConfigError, match="outside"):
            model.decode(10**6, state)  # refused before anything was done
        assert state.is_whole


def test_mapped_files_that_change_are_refused(folder, expected):
    with load_mapped(folder) as model:
        np.testing.assert_allclose(run(model), expected, atol=1e-4)
        for change in (write_again, replace, Path.unlink):
            change(folder / "model-00001-of-00002.safetensors")
            with pytest.raises(ReadError, match="was changed while it was mapped"):
                run(model)
            tally.count("files changed while open")


# --- while a model is loaded or converted ---------------------------------------------


@pytest.mark.parametrize("experts", ["stream", "packed"])
def test_any_look_at_a_file_may_fail(folder, experts, monkeypatch):
    """Every kind of call on every file: the first, the last, and one between."""

    def tries(at: int) -> tuple[Failing, list[str], Exception | None]:
        failing, names = Failing(at), []

        def step(kind: str, path: str) -> None:
            names.append(f"{kind} {path}")
            failing(kind, path)

        error = None
        with monkeypatch.context() as patch:
            inject(patch.setattr, folder, step)
            try:
                load(folder, experts=experts, **OPTIONS).close()
            except FlashMoeError as caught:
                error = caught
        return failing, names, error

    _, names, error = tries(0)
    assert error is None and len(names) > 100
    places: dict[str, list[int]] = {}
    for number, name in enumerate(names, 1):
        places.setdefault(name, []).append(number)
    chosen = {n for at in places.values() for n in (at[0], at[len(at) // 2], at[-1])}
    for at in sorted(chosen):
        failing, _, error = tries(at)
        assert error is not None, f"{failing.path}: nothing was said"
        assert failing.path in str(error) and "\n" not in str(error)
        assert os.strerror(errno.EIO) in str(error)
        tally.count("faults while opening a model")


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_past_the_page_cache_a_fault_is_not_taken_for_the_file_system(
    folder, monkeypatch, code
):
    """What O_DIRECT wants is found out by trying; only EINVAL means 'not so'."""
    file = folder / "packed_experts" / "layer_00.bin"

    def fails(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "O_DIRECT", os.O_CLOEXEC, raising=False)
    monkeypatch.setattr(os, "preadv", fails)
    kind, words = ConfigError, "no way to read past its cache"
    if code == errno.EIO:
        kind, words = ReadError, rf"{file.name}: cannot be read \(Input/output error"
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(kind, match=words):
        reading.open_file(file, bypass_page_cache=True)
    assert len(os.listdir("/proc/self/fd")) == before
    tally.count("faults while opening a model")


def test_a_file_that_is_replaced_while_a_model_is_loaded(folder, monkeypatch):
    """The header would be the old file's, the weights the new one's."""
    read_tensor, n = headers.read_tensor, 0

    def replaced_meanwhile(info, *args):
        nonlocal n
        n += 1
        if n == 5:
            shutil.copy2(info.file, info.file.with_suffix(".new"))
            os.replace(info.file.with_suffix(".new"), info.file)
        return read_tensor(info, *args)

    monkeypatch.setattr("flashmoe_ref.checkpoint.read_tensor", replaced_meanwhile)
    with pytest.raises(CheckpointError, match="was changed or replaced while it was"):
        load(folder, **OPTIONS)
    load(folder, **OPTIONS).close()
    tally.count("files changed while open")
