"""A writer killed at any point, then run again, leaves what an unbroken run leaves."""

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tally
from fake_hub import serving
from killing import context, in_child, run_counted, run_killed, start_server
from writers import UNFINISHED, WRITERS, digests, make_source

from flashmoe_ref.sweep import read_table

N_KILLS = int(os.environ.get("FLASHMOE_KILLS", "100"))  # at events, for each writer
N_TIMED = 8  # more, at any time
SEED = 4


@dataclass(frozen=True)
class Case:
    """A writer, its source, what an unbroken run leaves, and its events."""

    name: str
    source: Path | str
    unbroken: dict[str, str]
    n_events: int
    seconds: float  # of an unbroken run

    def run(self, target: Path) -> None:
        """In this process, to the end."""
        WRITERS[self.name](self.source, target)

    def run_killed(self, target: Path, kill_at: int) -> int:
        """In a child that dies of SIGKILL at its n-th event; returns its exit code."""
        return in_child(run_killed, self.name, self.source, target, kill_at)


@pytest.fixture(scope="module", params=WRITERS)
def case(request, memory) -> Iterator[Case]:
    start_server()
    name, folder = request.param, memory / request.param
    source = make_source(name, folder / "source")
    with serving(source) as server:
        source = server.url if name == "fetch" else source
        events = context.Value("i", 0)
        assert in_child(run_counted, name, source, folder / "out", events) == 0
        start = time.perf_counter()
        WRITERS[name](source, folder / "again")
        seconds, unbroken = time.perf_counter() - start, digests(folder / "again")
        assert digests(folder / "out") == unbroken  # the same bytes on every run
        assert unbroken or name == "rehearse"
        yield Case(name, source, unbroken, events.value, seconds)
    shutil.rmtree(folder)


@pytest.fixture
def tmp_path(memory: Path) -> Iterator[Path]:
    """In memory, too."""
    yield memory / "killed"
    shutil.rmtree(memory / "killed", ignore_errors=True)


def assert_nothing_half_written(case: Case, target: Path) -> None:
    """Whatever has its final name already has its final bytes."""
    for name, digest in digests(target).items():
        if name.endswith(UNFINISHED) or ".work/" in name:
            continue
        if case.name == "sweep":  # its files grow by whole rows and lines
            assert_rows_are_whole(target / name)
        else:
            assert digest == case.unbroken[name], name


def assert_rows_are_whole(file: Path) -> None:
    if file.suffix == ".csv":
        assert all(row["model_sha256"] and row["machine"] for row in read_table(file))


def chosen_events(case: Case) -> list[int]:
    """Each once, or as many as wanted out of more; the first and the last always."""
    every = range(1, case.n_events + 1)
    if len(every) <= N_KILLS:
        return [*every]
    inner = random.Random(SEED).sample(every[1:-1], N_KILLS - 2)
    return [1, *sorted(inner), case.n_events]


def test_killed_at_any_event(case, tmp_path):
    chosen = chosen_events(case)
    assert len(chosen) >= min(N_KILLS, 15)
    for kill_at in chosen:
        target = tmp_path / f"{kill_at}"
        exitcode = case.run_killed(target, kill_at)
        # what a server sends comes in more pieces or fewer, so the last may be missing
        may_end = case.name == "fetch" and kill_at > 0.8 * case.n_events
        assert exitcode == -signal.SIGKILL or may_end, kill_at
        assert_nothing_half_written(case, target)
        case.run(target)
        where = f"killed at event {kill_at} of {case.n_events}"
        assert digests(target) == case.unbroken, where
        shutil.rmtree(target)
        tally.count(f"kills of {case.name}", exitcode == -signal.SIGKILL)


def test_killed_again_and_again(case, tmp_path):
    """Each run gets a little further; in the end all is there."""
    target, steps = tmp_path / "out", random.Random(SEED)
    for _ in range(8):
        kill_at = steps.randrange(1, max(2, case.n_events // 3))
        if case.run_killed(target, kill_at) == 0:
            break
        assert_nothing_half_written(case, target)
        tally.count(f"kills of {case.name}")
    case.run(target)
    assert digests(target) == case.unbroken


def test_killed_at_any_time(case, tmp_path):
    """Also where nothing is written. More of them where there are few events."""
    delays, n_killed = random.Random(SEED), 0
    wanted = max(N_TIMED, N_KILLS - case.n_events)
    for i in range(3 * wanted):  # some end before they are killed
        target = tmp_path / str(i)
        args = (case.name, case.source, target, 0)
        child = context.Process(target=run_killed, args=args)
        child.start()
        time.sleep(delays.uniform(0, 0.01 + case.seconds))
        child.kill()
        child.join()
        assert_nothing_half_written(case, target)
        case.run(target)
        assert digests(target) == case.unbroken
        n_killed += child.exitcode == -signal.SIGKILL
        if n_killed == wanted:
            break
    tally.count(f"kills of {case.name}", n_killed)


@pytest.mark.parametrize("case", ["convert", "requantize", "pack"], indirect=True)
def test_finished_files_are_not_written_again(case, tmp_path):
    target = tmp_path / "out"
    case.run_killed(target, case.n_events - 12)
    big = [
        path
        for path in target.iterdir()
        if path.suffix in (".bin", ".safetensors") and not path.name.startswith(".")
    ]
    times = {path: path.stat().st_mtime_ns for path in big}
    assert times
    case.run(target)
    assert times == {path: path.stat().st_mtime_ns for path in big}
    assert digests(target) == case.unbroken
