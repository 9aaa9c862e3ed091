"""A full disk, or one that fails, at every write: an error that names the file, nothing
half written that looks whole, nothing lost that was there, and a second run completes.
"""

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tally
from fake_hub import serving
from faults import CHANGES, Failing, inject
from writers import UNFINISHED, WRITERS, digests, make_source, run_sweep

from flashmoe_ref import fetch, hub, measures, neuron_store, replay, sweep, writing
from flashmoe_ref.errors import ConfigError, FlashMoeError, PackError
from flashmoe_ref.measures import Tasks
from flashmoe_ref.settings import COLUMNS

# of each kind, for each writer; with 1000 every write has its fault
N_FAULTS = int(os.environ.get("FLASHMOE_FAULTS", "20"))
MINE = "notes of somebody else.txt"


NEED_A_FOLDER = ("rehearse", "traces", "sweep")


@pytest.fixture(scope="module", params=WRITERS)
def case(request, memory) -> Iterator[tuple[str, Path | str, dict[str, str]]]:
    """A writer, its source, and what a run without faults leaves."""
    name, folder = request.param, memory / request.param
    source = make_source(name, folder / "source")
    with serving(source) as server:
        source = server.url if name == "fetch" else source
        WRITERS[name](source, folder / "out")
        yield name, source, digests(folder / "out")


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is checked beforehand says that there is room: it is gone later."""
    plenty = shutil.disk_usage("/")._replace(free=1 << 50)
    for module in (writing, fetch, sweep):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: plenty)
    monkeypatch.setattr(hub, "N_RETRIES", 0)


def run_with_fault(name, source, target, failing, patch) -> FlashMoeError | None:
    """Run a writer; returns what it says. Anything but a FlashMoeError passes."""
    if name in NEED_A_FOLDER:
        target.mkdir()
    with patch.context() as patched:
        inject(patched.setattr, target, failing)
        try:
            WRITERS[name](source, target)
        except FlashMoeError as error:
            return error
    return None


def assert_survived(case, target: Path, error, failing: Failing, number: int) -> None:
    """One line that names the file, or one beside it; only whole files are there."""
    name, source, whole = case
    where = f"{name}: event {number}, {failing.path}"
    if error is not None:
        assert "\n" not in str(error), where
        file = Path(failing.path).name.removeprefix(".").removesuffix(".partial")
        known = (file, target.name, "flashmoe-rehearsal.work", "table.csv")
        assert any(word in str(error) for word in known), (where, str(error))
        assert os.strerror(failing.code) in str(error) or "disk is full" in str(error)
    for found, digest in digests(target).items():
        if not found.endswith(UNFINISHED) and ".work/" not in found and name != "sweep":
            assert digest == whole[found], f"{where}: {found} is not whole"
    WRITERS[name](source, target)
    assert digests(target) == whole, where


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_a_fault_at_any_write(case, memory, monkeypatch, code):
    """From then on where the disk is full, once where it is broken."""
    name, source, _ = case
    target, n_told = memory / "fault", 0
    shutil.rmtree(target, ignore_errors=True)
    counted = Failing(0, kinds=CHANGES)
    run_with_fault(name, source, target, counted, monkeypatch)
    shutil.rmtree(target)
    chosen = range(1, counted.n + 1)
    if counted.n > N_FAULTS:
        chosen = sorted(random.Random(f"{name} {code}").sample(chosen, N_FAULTS))
    for number in chosen:
        failing = Failing(number, code, CHANGES, code == errno.ENOSPC)
        error = run_with_fault(name, source, target, failing, monkeypatch)
        if failing.path is None:  # threads: this run had fewer events
            continue
        assert_survived(case, target, error, failing, number)
        tally.count(f"write faults of {name}")
        n_told += error is not None
        shutil.rmtree(target)
    assert n_told > len(chosen) // 2, "hardly a fault was told"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_to(case, memory, monkeypatch, code):
    """From the first change on, as in a read-only folder."""
    name, source, _ = case
    target = memory / "read-only"
    failing = Failing(1, code, CHANGES, forever=True)
    error = run_with_fault(name, source, target, failing, monkeypatch)
    assert error is not None and not digests(target)
    assert_survived(case, target, error, failing, 1)
    shutil.rmtree(target)
    tally.count(f"write faults of {name}")


@pytest.mark.parametrize("case", ["convert", "requantize", "pack"], indirect=True)
def test_a_source_that_cannot_be_read_is_named(case, memory, monkeypatch):
    """And is not taken for the target: it says 'read', not 'written'."""
    name, source, whole = case
    target, step = memory / "unread", 1
    looked = Failing(0)
    shutil.rmtree(memory / "counted", ignore_errors=True)
    with monkeypatch.context() as patch:
        inject(patch.setattr, source, looked)
        WRITERS[name](source, memory / "counted")
    for number in range(1, looked.n, max(1, looked.n // 25)):
        failing = Failing(number)
        with monkeypatch.context() as patch:
            inject(patch.setattr, source, failing)
            with pytest.raises(FlashMoeError) as caught:
                WRITERS[name](source, target)
        assert Path(failing.path).name in str(caught.value), (number, failing.path)
        assert "written" not in str(caught.value)
        WRITERS[name](source, target)
        assert digests(target) == whole
        shutil.rmtree(target)
        tally.count(f"read faults of {name}", step)
    shutil.rmtree(memory / "counted")


@pytest.mark.parametrize("case", ["convert", "pack"], indirect=True)
def test_a_source_that_is_replaced_meanwhile_makes_no_file(case, memory, monkeypatch):
    name, source, whole = case
    target, file = memory / "moved", sorted(source.glob("*.safetensors"))[0]
    write, n = writing.PartsFile.write, 0

    def replaced(self, *args):
        nonlocal n
        n += 1
        if n == 20:
            shutil.copy2(file, memory / "copy")
            shutil.copy2(file, memory / "original")
            os.replace(memory / "copy", file)
        return write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(writing.PartsFile, "write", replaced)
        with pytest.raises(FlashMoeError, match=rf"{file.name}: was changed or repl"):
            WRITERS[name](source, target)
    assert not [p for p in digests(target) if p.endswith((".bin", ".safetensors"))]
    WRITERS[name](source, target)
    assert digests(target) == whole
    shutil.rmtree(target)
    tally.count(f"read faults of {name}")


# --- nothing is lost that was there ---------------------------------------------------


def test_a_table_that_is_none_is_left_alone(memory):
    source = make_source("sweep", memory / "model")
    target = memory / "tables"
    target.mkdir()
    for content in (b"one line without an end", b"a,b\n1,2", b"", b"\xff\xfe\n", b"k"):
        (target / "table.csv").write_bytes(content)
        if content and not ",".join(COLUMNS).startswith(content.decode("latin-1")):
            with pytest.raises(ConfigError, match=r"table\.csv: "):
                run_sweep(source, target)
            assert (target / "table.csv").read_bytes() == content
        else:  # empty, or the begin of a header
            run_sweep(source, target)
        assert [path.name for path in target.glob("*.work")] == []
        (target / "table.failures.jsonl").unlink(missing_ok=True)


def test_failures_outlast_a_fault_when_they_are_sorted_out(memory, monkeypatch):
    """Those of a setting without a row go; the others must not go with them."""
    source, target = make_source("sweep", memory / "swept"), memory / "failures"
    run_sweep(source, target)
    table, kept = target / "table.csv", target / "table.failures.jsonl"
    whole = digests(target)
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-1]))
    before = kept.read_bytes()
    for number in range(1, 30):
        failing = Failing(number, errno.ENOSPC, CHANGES, forever=True)
        assert run_with_fault_in(source, target, failing, monkeypatch)
        for line in before.splitlines(keepends=True)[:-2]:  # of rows that are there
            assert line in kept.read_bytes()
    run_sweep(source, target)
    assert digests(target) == whole


def run_with_fault_in(source, target, failing, monkeypatch) -> bool:
    with monkeypatch.context() as patch:
        inject(patch.setattr, target, failing)
        try:
            run_sweep(source, target)
        except FlashMoeError:
            return True
    return False


def test_folders_of_others_stay(memory, tmp_path):
    source = make_source("pack", memory / "of-others")
    empty = memory / "empty"
    empty.mkdir()
    with pytest.raises(PackError, match="is the source itself"):
        writing_over(source)
    (memory / "theirs.work").mkdir()
    (memory / "theirs.work" / MINE).write_text("mine")
    with (
        pytest.raises(ConfigError, match="is in the way; move it, it is not ours"),
        writing.work_folder(memory / "theirs.work", "busy"),
    ):
        pass
    assert (memory / "theirs.work" / MINE).read_text() == "mine"
    with (
        pytest.raises(PackError, match="disk"),
        writing.open_target(empty, {"a": 1}, "record.json"),
    ):
        raise PackError("the disk")
    assert empty.is_dir()  # it was there before
    with (
        writing.work_folder(memory / "own.work", "busy"),
        pytest.raises(ConfigError, match="busy"),
        writing.work_folder(memory / "own.work", "busy"),
    ):
        pass
    assert not (memory / "own.work").exists()


def writing_over(source: Path) -> None:
    from flashmoe_ref.requantize import requantize

    requantize(source, source, 2, progress=False)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_small_writers_keep_the_old_file(memory, monkeypatch, code):
    values = np.arange(40_000, dtype=np.float32)
    writers: dict[str, Callable[[Path], object]] = {
        "neurons": lambda path: neuron_store.write_stored(path, values),
        "records": lambda path: replay.write_records(path, 5, 4096),
        "profile": lambda path: writing.write_small(path, {"a": 1}),
    }
    for name, write in writers.items():
        target = memory / "small"
        target.mkdir()
        (target / name).write_text("what was there")
        number = 1
        while True:
            failing = Failing(number, code, CHANGES)
            with monkeypatch.context() as patch:
                inject(patch.setattr, target, failing)
                try:
                    write(target / name)
                    break
                except PackError as error:
                    assert f"{name}: cannot be written" in str(error)
            assert (target / name).read_text() == "what was there"
            assert [path.name for path in target.iterdir()] == [name]
            tally.count(f"write faults of {name}")
            number += 1
        assert number > 3
        shutil.rmtree(target)


# --- a disk that is really full -------------------------------------------------------


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("left", [0, 4, 12, 40, 100])
def test_a_small_disk_gets_full(case, disk, left):
    """left: KB that are free."""
    name, source, whole = case
    ballast, target = disk / "ballast", disk / "target"
    if name in NEED_A_FOLDER:
        target.mkdir()
    ballast.write_bytes(bytes((1 << 20) - 4096 * (left // 4) - 4096 * 2))
    try:
        WRITERS[name](source, target)
    except FlashMoeError as error:
        text = str(error)
        assert "\n" not in text and str(disk) in text
        assert "No space left" in text or "disk is full" in text
    else:
        assert left >= 40 or name in ("sweep", "rehearse"), "that cannot have fitted"
    for found, digest in digests(target).items():
        if not found.endswith(UNFINISHED) and name != "sweep":
            assert digest == whole[found], f"{found} is not whole"
    ballast.unlink()
    WRITERS[name](source, target)
    assert digests(target) == whole
    shutil.rmtree(target)
    tally.count(f"write faults of {name}")


def test_a_full_disk_does_not_end_the_process(disk):
    """Through memory-mapped files it would, by SIGBUS, if nothing was reserved."""
    code = """if True:
        import sys
        from pathlib import Path
        import numpy as np
        from flashmoe_ref.errors import PackError
        from flashmoe_ref.writing import reserve
        file = Path(sys.argv[1])
        array = np.lib.format.open_memmap(file, "w+", np.float32, (700_000,))
        try:
            reserve(file, array.offset, array.nbytes)
            array[:] = 1
        except PackError as error:
            sys.exit(str(error))
    """
    file = disk / "baseline.npy"
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True
    )
    assert done.returncode == 1, done.returncode  # not -SIGBUS
    assert done.stderr.startswith(f"{file}: cannot be written (No space left")
    file.unlink()
    small = np.lib.format.open_memmap(file, "w+", np.float32, (1000,))
    writing.reserve(file, small.offset, small.nbytes)
    small[:] = 1
    file.unlink()
    tally.count("write faults of sweep")


def test_the_baseline_is_reserved(monkeypatch, memory):
    """The one file that is written through memory."""
    asked, ids = [], list(range(60))
    model = mock.MagicMock()
    model.__enter__.return_value.config.vocab_size = 10
    score = mock.Mock(nats=np.zeros(59))
    monkeypatch.setattr(measures, "reserve", lambda *args: asked.append(args))
    monkeypatch.setattr(measures, "load", lambda *_: model)
    monkeypatch.setattr(measures.evaluate, "read_text", lambda *_: (ids, 100))
    monkeypatch.setattr(measures.evaluate, "score_ids", lambda *_, **__: score)
    monkeypatch.setattr(measures, "continuations", lambda *_: [])
    tasks = Tasks((memory / "a", memory / "b"))
    kept = measures.make_baseline(memory, tasks, memory).log_probabilities
    assert [path.name for path, *_ in asked] == ["baseline_0.npy", "baseline_1.npy"]
    assert [n for _, _, n in asked] == [array.nbytes for array in kept]
