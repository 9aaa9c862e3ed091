"""The probe: what it calls cold is cold, sums are right, nothing is left behind."""

import fcntl
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from flashmoe_ref import hardware, page_cache, probe_disk
from flashmoe_ref.cli import main
from flashmoe_ref.errors import ConfigError, ReadError
from flashmoe_ref.page_cache import evict, resident_pages, resident_share
from flashmoe_ref.probe_disk import DiskProbe, DiskRate, Span, measure, own_file
from flashmoe_ref.probe_kernels import read_records

REDUCED = Path(__file__).parents[1] / "data" / "reduced"
KIB, MIB = 1 << 10, 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def disk() -> Path:
    """The repository's folder: the system's temporary one often lives in memory."""
    folder = Path(__file__).parents[1] / ".probe-test"
    folder.mkdir(exist_ok=True)
    yield folder
    assert not list(folder.iterdir())
    folder.rmdir()


@pytest.fixture
def spans(disk: Path) -> list[Span]:
    """Four MiB that can be evicted; where they cannot, the test is skipped."""
    with own_file(disk, 4 * MIB) as made:
        if evict(made[0].fd) != 0:
            pytest.skip("this file system does not drop a file from memory")
        yield made


# --- page_cache -----------------------------------------------------------------------


def test_pages_are_cached_by_reading_and_dropped_by_evicting(spans: list) -> None:
    fd = spans[0].fd
    assert not resident_pages(fd).any()
    os.pread(fd, 2 * PAGE, 5 * PAGE)
    assert np.flatnonzero(resident_pages(fd)).tolist() == [5, 6]
    assert np.flatnonzero(resident_pages(fd, 6 * PAGE, 3 * PAGE)).tolist() == [0]
    assert resident_share(fd, 5 * PAGE, 4 * PAGE) == 0.5
    assert evict(fd) == 0
    assert resident_share(fd) == 0


def test_all_cached_is_believed_only_of_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    with open(path, "rb") as file:
        file.read()
        assert resident_share(file.fileno()) == 1
        monkeypatch.setattr(os, "geteuid", lambda: os.stat(path).st_uid + 1)
        assert resident_share(file.fileno()) is None
        monkeypatch.setattr(page_cache, "_libc", lambda: None)
        assert resident_share(file.fileno()) is None
        assert resident_share(file.fileno(), PAGE) == 0  # an empty range


class Libc:
    """Stands for the C library: pages are cached once read, dropped if msync works."""

    def __init__(self, n_pages: int, drops: bool) -> None:
        self.cached, self.drops = np.zeros(n_pages, bool), drops
        self.flags: list[int] = []

    def mincore(self, address: int, n_bytes: int, flags: int) -> int:
        import ctypes

        n = -(-n_bytes // PAGE)
        ctypes.memmove(flags, self.cached[:n].astype(np.uint8).tobytes(), n)
        return 0

    def msync(self, address: int, n_bytes: int, flags: int) -> None:
        self.flags.append(flags)
        if self.drops:
            self.cached[: -(-n_bytes // PAGE)] = False

    def read_exactly(self, fd: int, views: list, offset: int) -> None:
        n = sum(len(view) for view in views)
        pages = slice(offset // PAGE, (offset + n) // PAGE)
        assert not self.cached[pages].any(), "read a second time"
        self.cached[pages] = True
        time.sleep(1e-4)


@pytest.fixture
def read_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record is left to read_exactly, which a test can replace."""
    monkeypatch.setattr(probe_disk, "read_records", lambda *_: 0)


@pytest.fixture
def darwin(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What macOS lacks is taken away, what it has is put in; gives its fcntl calls."""
    calls = []
    for name in ("posix_fadvise", "O_DIRECT"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(fcntl, "F_NOCACHE", 48, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda *call: calls.append(call[1:]))
    return calls


@pytest.mark.usefixtures("read_in_python")
@pytest.mark.parametrize("drops", [True, False])
def test_a_mac_never_reads_a_record_twice(
    drops: bool, disk: Path, darwin: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = Libc(4 * MIB // PAGE, drops)
    monkeypatch.setattr(page_cache, "_libc", lambda: libc)
    monkeypatch.setattr(probe_disk, "read_exactly", libc.read_exactly)
    with own_file(disk, 4 * MIB) as spans:
        # written past the cache, opened past it once more, and no read-ahead
        assert darwin == [(48, 1), (48, 1), (45, 0)]
        n_reads = 0
        for _ in range(6):
            rate = measure(spans, "cold", 64 * KIB, 2, limit_s=0.002)
            n_reads += rate.n_reads if rate else 0
            direct = measure(spans, "direct", 64 * KIB, 2, limit_s=0.002)
            n_reads += direct.n_reads if direct else 0
        fresh = measure(spans, "cold", 2 * MIB, 2)
    assert set(libc.flags) <= {page_cache.MS_INVALIDATE}
    if drops:
        assert fresh.n_reads == 2
    else:  # only what was never read is left, then nothing
        assert n_reads <= 64 and fresh is None


# --- what is measured -----------------------------------------------------------------


@pytest.mark.usefixtures("read_in_python")
@pytest.mark.parametrize("mode", ["cold", "direct"])
def test_cold_records_are_uncached_and_read_once(
    spans: list, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "direct" and spans[0].direct_fd is None:
        pytest.skip("this file system has no direct reads")
    seen, lock = [], threading.Lock()
    read = probe_disk.read_exactly

    def watch(fd: int, views: list, offset: int) -> None:
        with lock:
            shares = [resident_share(spans[0].fd, offset, len(v)) for v in views]
            seen.append((offset, fd, *shares))
        read(fd, views, offset)

    monkeypatch.setattr(probe_disk, "read_exactly", watch)
    os.pread(spans[0].fd, MIB, MIB)
    rate = measure(spans, mode, 64 * KIB, 4, limit_s=10.0)
    fd = spans[0].fd if mode == "cold" else spans[0].direct_fd
    assert sorted(seen) == [(at * 64 * KIB, fd, 0.0) for at in range(64)]
    assert rate.n_reads == 64
    assert (rate.mode, rate.n_bytes, rate.depth) == (mode, 64 * KIB, 4)


def test_records_hold_the_files_bytes(spans: list) -> None:
    memory = memoryview(bytearray(4 * MIB))
    measure(spans, "cold", MIB, 4, limit_s=10.0, memory=memory)
    records = {os.pread(spans[0].fd, MIB, at * MIB) for at in range(4)}
    assert {bytes(memory[i * MIB : (i + 1) * MIB]) for i in range(4)} == records


@pytest.mark.usefixtures("read_in_python")
@pytest.mark.parametrize("depth", [1, 4])
def test_rates_of_a_disk_of_known_speed(
    spans: list, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read takes 10 ms: depth of them at once, no more and no fewer."""
    now, most, lock = [0], [0], threading.Lock()

    def read(fd: int, views: list, offset: int) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1

    monkeypatch.setattr(probe_disk, "read_exactly", read)
    rates = [measure(spans, "cold", 128 * KIB, depth, limit_s=0.08) for _ in range(3)]
    best = max(rates, key=lambda rate: rate.rate_gb_s)
    assert most[0] == depth
    ideal = depth * 128 * KIB / 0.01 / 1e9
    assert 0.6 * ideal < best.rate_gb_s <= ideal
    assert 10_000 <= best.read_us < 17_000
    assert best.n_reads <= 32


def test_too_few_records_are_not_measured(spans: list) -> None:
    assert measure(spans, "cold", 2 * MIB, 4) is None
    assert measure(spans, "warm", 8 * MIB, 1) is None


def test_warm_reads_repeat_and_come_from_memory(spans: list) -> None:
    rate = measure(spans, "warm", MIB, 2, limit_s=0.05)
    assert resident_share(spans[0].fd) == 1
    assert rate.n_reads > 4


def test_a_short_file_is_an_error(spans: list) -> None:
    span = spans[0]
    longer = Span(span.fd, None, 0, span.n_bytes + MIB)
    with pytest.raises(ReadError, match="shorter"):
        measure([longer], "warm", MIB, 5, limit_s=1.0)
    with pytest.raises(ReadError, match="ends too early"):
        two = memoryview(bytearray(2))
        probe_disk._read(np.array([span.fd]), np.array([span.n_bytes - 1]), two)


def test_the_kernel_stops_at_the_first_record_that_is_not_whole(spans: list) -> None:
    fd, end, memory = spans[0].fd, spans[0].n_bytes, np.zeros(PAGE, np.uint8)
    offsets = np.array([PAGE, 0, 3 * PAGE, end - 1, PAGE])
    fds = np.full(5, fd)
    assert read_records(fds, offsets, memory.ctypes.data, PAGE) == 3
    n_read = read_records(fds[:3], offsets[:3], memory.ctypes.data, PAGE)
    assert n_read == 3
    assert memory.tobytes() == os.pread(fd, PAGE, 3 * PAGE)
    fds[1] = -1
    assert read_records(fds, offsets, memory.ctypes.data, PAGE) == 1


# --- what cannot be measured ----------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "words"), [(1.0, "keeps 100% of the file"), (None, "does not tell")]
)
def test_a_file_that_stays_cached_has_no_cold_figures(
    share: float | None, words: str, spans: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_disk, "evict", lambda *args: share)
    found = probe_disk.probe_disk(spans, "a file", (64 * KIB,), (1, 2))
    assert {rate.mode for rate in found.rates} == {"warm"}
    assert [note.split(":")[0] for note in found.notes] == ["cold", "direct"]
    assert all(words in note for note in found.notes)


def test_a_memory_file_system_is_recognised() -> None:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no memory file system here")
    with own_file("/dev/shm", MIB) as spans:
        found = probe_disk.probe_disk(spans, "memory", (64 * KIB,), (1,))
    assert {rate.mode for rate in found.rates} == {"warm"}


def test_as_fast_as_memory_is_not_believed() -> None:
    def rate(mode: str, read_us: float) -> DiskRate:
        return DiskRate(mode, 4096, 1, 4096 / read_us / 1e3, read_us, 100)

    rates = (rate("warm", 2.0), rate("cold", 3.9), rate("direct", 4.1))
    found = probe_disk._plausible(DiskProbe("x", MIB, rates, ("before",)))
    assert [r.mode for r in found.rates] == ["warm", "direct"]
    assert found.notes[0] == "before" and found.notes[1].startswith("cold: as fast")


def test_what_does_not_fit_into_the_time_is_left_out(spans: list) -> None:
    steps = []
    sizes, depths = (64 * KIB, MIB), (1, 2)
    arguments = (spans, "x", sizes, depths, 0.0, lambda: steps.append(1))
    found = probe_disk.probe_disk(*arguments)
    assert not found.rates and len(steps) == 12
    assert all("time limit" in note for note in found.notes)
    assert found.surface("cold")[2].shape == (0, 0)


def test_surface() -> None:
    rates = (DiskRate("cold", 4096, 4, 0.5, 8.0, 9), DiskRate("warm", 8192, 1, 2, 4, 9))
    found = DiskProbe("x", MIB, rates, ())
    sizes, depths, values = found.surface("cold")
    assert (sizes, depths) == ([4096, 8192], [1, 4])
    np.testing.assert_array_equal(values, [[np.nan, 0.5], [np.nan, np.nan]])
    assert found.get("warm", 8192, 1) is rates[1] and found.get("warm", 1, 1) is None


# --- files ----------------------------------------------------------------------------


@pytest.mark.usefixtures("read_in_python")
@pytest.mark.parametrize("where", ["writing", "measuring"])
def test_nothing_is_left_after_an_interrupt(
    where: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        assert not list(disk.iterdir()), "a kill would leave the file"
        raise KeyboardInterrupt

    name = {"writing": "_fill", "measuring": "read_exactly"}[where]
    monkeypatch.setattr(probe_disk, name, interrupt)
    n_open = len(os.listdir("/dev/fd"))
    with pytest.raises(KeyboardInterrupt), own_file(disk, MIB) as spans:
        measure(spans, "warm", 64 * KIB, 1)
    assert len(os.listdir("/dev/fd")) == n_open


def test_places_that_cannot_be_written_to(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match="is no folder"), own_file(disk / "x", MIB):
        pass
    with pytest.raises(ConfigError, match="at least"), own_file(disk, 1000):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", no_room)
        with pytest.raises(ConfigError, match="No space"), own_file(disk, MIB):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(probe_disk.tempfile, "mkstemp", no_room)
        with pytest.raises(ConfigError, match="cannot be written"):
            own_file(disk, MIB).__enter__()
    usage = shutil.disk_usage(disk)._replace(free=200_000_000 + MIB - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="smaller"), own_file(disk, MIB):
        pass


def test_a_models_files_are_read_in_parts() -> None:
    paths = sorted(REDUCED.glob("*.safetensors"))
    before = [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    with probe_disk.spans_of_files(paths, 6 * MIB) as spans:
        assert len(spans) == 3
        assert sum(span.n_bytes for span in spans) <= 6 * MIB
        assert all(span.n_bytes % PAGE == 0 < span.n_bytes for span in spans)
        assert measure(spans, "warm", 64 * KIB, 4).n_reads > 4
    with probe_disk.spans_of_files(paths * 7, 21 * MIB) as spans:
        assert len(spans) <= probe_disk.MAX_SPANS
    assert before == [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    with pytest.raises(ReadError), probe_disk.spans_of_files(["nowhere"], MIB):
        pass
    with pytest.raises(ConfigError, match="no file"), probe_disk.spans_of_files([], 1):
        pass


# --- memory and engines ---------------------------------------------------------------


def test_memory_is_read_by_one_thread_and_by_all() -> None:
    rates = hardware.memory_read_rates(32 * MIB)
    names = {1: "1 thread"} | {n: f"all {n} threads" for n in [hardware.n_cores()]}
    assert set(rates) <= set(names.values()) | {"1 thread"}
    assert all(0.1 < rate < 10_000 for rate in rates.values())


def test_a_rate_is_bytes_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_best", lambda run: 0.5)
    assert hardware.memory_read_rates(1_000_000)["1 thread"] == pytest.approx(0.002)
    rates, _ = hardware.matvec_rates(1)
    one = 4096 * 4096 * 4.5 / 8 / 0.5 / 1e9  # 4 bits, and 32 a group of 64
    assert list(rates.values()) == pytest.approx([one] * len(rates))


def test_engines_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    rates, notes = hardware.matvec_rates(1)
    assert all(name.startswith("numpy") for name in rates) and len(rates) == 2
    assert notes == ["mlx is not installed: its engine was not measured"]


def test_json_and_table(tmp_path: Path) -> None:
    rates = (DiskRate("cold", 64 * KIB, 4, 0.5, 8.0, 9),)
    disk = DiskProbe("a file", 5_000_000, rates, ("cold: why",))
    found = hardware.Hardware("X", 2, {"1 thread": 7.0}, {"mlx": 0.7}, disk, ("no y",))
    found.save(tmp_path / "probe.json")
    read = json.loads((tmp_path / "probe.json").read_text())
    assert read["format"] == 1 and read["memory_gb_s"] == {"1 thread": 7.0}
    assert read["disk"]["rates"][0] == {
        "mode": "cold",
        "n_bytes": 65536,
        "depth": 4,
        "rate_gb_s": 0.5,
        "read_us": 8.0,
        "n_reads": 9,
    }
    text = hardware.readable(found)
    for words in ("5 MB of a file", "GB/s", "64 KiB", "0.500", "cold: why", "no y"):
        assert words in text
    assert "direct:" not in text
    assert [hardware.in_kib(n) for n in (4096, 1536, 3 << 20)] == [
        "4 KiB",
        "1.5 KiB",
        "3 MiB",
    ]


# --- the command ----------------------------------------------------------------------


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """As little as a command can measure."""
    monkeypatch.setattr(probe_disk, "CELL_S", dict.fromkeys(probe_disk.MODES, 0.01))
    monkeypatch.setattr(probe_disk, "QUICK_SIZES", (4 * KIB, 64 * KIB))
    monkeypatch.setattr(hardware, "QUICK_MEMORY_BYTES", MIB)
    monkeypatch.setattr(hardware, "ROUNDS", 1)


@pytest.mark.usefixtures("brief")
def test_command(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    saved = tmp_path / "probe.json"
    command = ["probe", "--quick", "--dir", str(disk), "--size", "17"]
    assert main([*command, "--json", str(saved), "--no-progress"]) == 0
    out = capsys.readouterr().out
    assert "17 MB of a file of its own" in out and "warm: out of the page cache" in out
    assert json.loads(saved.read_text())["disk"]["n_bytes"] == 17_000_000 // PAGE * PAGE


@pytest.mark.usefixtures("brief")
def test_command_on_a_model(capsys: pytest.CaptureFixture) -> None:
    assert main(["probe", "--quick", "--model", str(REDUCED), "--no-progress"]) == 0
    assert "files of" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["--dir", ".", "--model", "."],
        ["--size", "0"],
        ["--size", "nan"],
        ["--json", "nowhere/probe.json"],
        ["--dir", "nowhere"],
        ["--model", "nowhere"],
    ],
    ids=" ".join,
)
def test_options_that_cannot_be(
    options: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert main(["probe", "--quick", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("flashmoe: ") and error.count("\n") == 1
