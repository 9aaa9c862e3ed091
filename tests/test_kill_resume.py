"""A writer killed at any point, then run again, leaves what an unbroken run leaves."""

import functools
import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import write_tiny

from flashmoe_ref import writing
from flashmoe_ref.convert import convert
from flashmoe_ref.pack import pack
from flashmoe_ref.requantize import requantize

N_KILLS = int(os.environ.get("FLASHMOE_KILLS", "15"))  # for each writer
SEED = 4

# Its child processes start in milliseconds, and MLX is never loaded in them.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["flashmoe_ref.requantize", "flashmoe_ref.pack"])

WRITERS: dict[str, Callable[[Path, Path], Path]] = {
    "convert": functools.partial(convert, shard_bytes=40_000, progress=False),
    "requantize": functools.partial(
        requantize, bits=2, shard_bytes=40_000, progress=False
    ),
    "pack": functools.partial(pack, progress=False),
}


def make_source(name: str, folder: Path) -> Path:
    layout = "hf" if name == "convert" else "mlx"
    small = {"num_hidden_layers": 2, "full_attention_interval": 2, "num_experts": 4}
    source = write_tiny(folder, layout=layout, group_size=32, n_shards=2, **small)
    (source / "tokenizer.json").write_text("{}")
    return source


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def count_events(step: Callable[[], None]) -> None:
    """Call `step` before everything that changes the disk, and in mid-write."""

    def before(owner: object, name: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            step()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    for name in ("replace", "fsync", "open", "rmdir", "unlink"):
        before(os, name)
    before(Path, "unlink")
    before(Path, "mkdir")
    write = writing.PartsFile.write

    def torn_write(self, name, data):
        half = bytes(memoryview(data).cast("B")) if isinstance(data, bytes) else None
        if half is None:
            half = data.tobytes()
        self._file.seek(self._at[name])
        self._file.write(half[: len(half) // 2])
        self._file.flush()
        step()
        return write(self, name, data)

    writing.PartsFile.write = torn_write


def run_killed(name: str, source: Path, target: Path, kill_at: int) -> None:
    """In a child process: run a writer, dying of SIGKILL at its n-th event."""
    left = kill_at

    def step() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    count_events(step)
    WRITERS[name](source, target)


def run_counted(name: str, source: Path, target: Path, events) -> None:
    def step() -> None:
        events.value += 1

    count_events(step)
    WRITERS[name](source, target)


def in_child(function: Callable, *args) -> int:
    child = context.Process(target=function, args=args)
    child.start()
    child.join(60)
    return child.exitcode


@pytest.fixture(scope="module", params=WRITERS)
def case(request, tmp_path_factory) -> tuple[str, Path, dict[str, str], int]:
    """A writer's name, its source, what an unbroken run leaves, and its events."""
    folder = tmp_path_factory.mktemp(request.param)
    source = make_source(request.param, folder / "source")
    events = context.Value("i", 0)
    assert in_child(run_counted, request.param, source, folder / "out", events) == 0
    unbroken = digests(folder / "out")
    assert WRITERS[request.param](source, folder / "again") and unbroken
    assert digests(folder / "again") == unbroken  # the same bytes on every run
    return request.param, source, unbroken, events.value


def assert_nothing_half_written(target: Path, unbroken: dict[str, str]) -> None:
    """Whatever has its final name already has its final bytes."""
    for name, digest in digests(target).items():
        temporary = name.endswith(writing.PARTIAL_SUFFIX) or name == writing.LOCK_NAME
        assert temporary or digest == unbroken[name], name


def test_killed_at_any_event(case, tmp_path):
    name, source, unbroken, n_events = case
    assert n_events > 40
    chosen = random.Random(SEED).sample(range(2, n_events), N_KILLS - 2)
    for kill_at in [1, *sorted(chosen), n_events]:
        target = tmp_path / f"killed-{kill_at}"
        exitcode = in_child(run_killed, name, source, target, kill_at)
        assert exitcode == -signal.SIGKILL, kill_at
        assert_nothing_half_written(target, unbroken)
        WRITERS[name](source, target)
        assert digests(target) == unbroken, f"killed at event {kill_at} of {n_events}"


def test_killed_again_and_again(case, tmp_path):
    """Each run gets a little further; in the end all is there."""
    name, source, unbroken, n_events = case
    target, steps = tmp_path / "out", random.Random(SEED)
    for _ in range(8):
        kill_at = steps.randrange(1, n_events // 3)
        if in_child(run_killed, name, source, target, kill_at) == 0:
            break
        assert_nothing_half_written(target, unbroken)
    WRITERS[name](source, target)
    assert digests(target) == unbroken


def test_killed_at_any_time(case, tmp_path):
    name, source, unbroken, _ = case
    delays = random.Random(SEED)
    for i in range(3):
        target = tmp_path / str(i)
        child = context.Process(target=run_killed, args=(name, source, target, -1))
        child.start()
        time.sleep(delays.uniform(0, 0.15))
        child.kill()
        child.join()
        WRITERS[name](source, target)
        assert digests(target) == unbroken


def test_finished_files_are_not_written_again(case, tmp_path):
    name, source, unbroken, n_events = case
    target = tmp_path / "out"
    in_child(run_killed, name, source, target, n_events - 12)
    big = [
        path
        for path in target.iterdir()
        if path.suffix in (".bin", ".safetensors") and not path.name.startswith(".")
    ]
    times = {path: path.stat().st_mtime_ns for path in big}
    assert times
    WRITERS[name](source, target)
    assert times == {path: path.stat().st_mtime_ns for path in big}
    assert digests(target) == unbroken
