"""The probe against fio: same file, same record size and depth, cold and warm, one run.

Records of a file of random bytes are read in random order by four threads, each record
once when cold. Rounds alternate between the two, and each round's ratio is taken by
itself, so that what else the machine and its disk do falls on both.
"""

import json
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from flashmoe_ref.page_cache import evict
from flashmoe_ref.probe_disk import Span, measure, spans_of_files

SIZES, DEPTH, ROUNDS = (64 << 10, 1 << 20, 4 << 20), 4, 9
FILE_BYTES, WARM_S = 256 << 20, 1


def fio_gb_s(path: Path, mode: str, n_bytes: int) -> float:
    """Four threads, each its own quarter of the file in random order."""
    quarter = FILE_BYTES // DEPTH
    command = [
        "fio",
        "--name=records",
        f"--filename={path}",
        "--rw=randread",
        "--ioengine=psync",
        "--iomem=mmap",  # from a page's start, as ours; else copies are up to 3x slower
        f"--bs={n_bytes}",
        f"--numjobs={DEPTH}",
        "--thread",
        f"--size={quarter}",
        f"--offset_increment={quarter}",
        *(("--time_based", f"--runtime={WARM_S}") if mode == "warm" else ()),
        "--invalidate=0",  # we evict ourselves, and check that it worked
        "--randrepeat=0",
        "--group_reporting",
        "--output-format=json",
    ]
    result = subprocess.run(command, capture_output=True, check=True, text=True)
    report = json.loads(result.stdout[result.stdout.index("{") :])
    return report["jobs"][0]["read"]["bw_bytes"] / 1e9


def probe_gb_s(spans: list[Span], mode: str, n_bytes: int) -> float:
    """All of the file when cold, for a second when warm; fio does the same."""
    limit_s = {"cold": 60.0, "warm": WARM_S}[mode]
    return measure(spans, mode, n_bytes, DEPTH, limit_s).rate_gb_s


def rounds(path: Path, spans: list[Span], mode: str, n_bytes: int) -> list[tuple]:
    """Pairs of rates: the probe's and fio's. Which one is first alternates."""
    pairs = []
    for number in range(ROUNDS + 1):
        pair = {}
        for who in ("probe", "fio") if number % 2 else ("fio", "probe"):
            if mode == "cold":
                assert evict(spans[0].fd) == 0, "this file system drops nothing"
            if who == "fio":
                pair[who] = fio_gb_s(path, mode, n_bytes)
            else:
                pair[who] = probe_gb_s(spans, mode, n_bytes)
        pairs += [(pair["probe"], pair["fio"])] if number else []  # the first warms up
    return pairs


def main() -> None:
    """Print both rates and the median ratio, a line for each mode and size."""
    if not shutil.which("fio") or not hasattr(os, "posix_fadvise"):
        print("skipped: needs Linux and fio (apt-get install fio)")
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = Path(folder) / "records.bin"
        with open(path, "wb") as file:
            for _ in range(FILE_BYTES >> 22):
                file.write(os.urandom(1 << 22))
            os.fsync(file.fileno())
        with spans_of_files([path], FILE_BYTES) as spans:
            for mode in ("cold", "warm"):
                for n_bytes in SIZES:
                    report(mode, n_bytes, rounds(path, spans, mode, n_bytes))


def report(mode: str, n_bytes: int, pairs: list[tuple]) -> None:
    """One line."""
    ours, fios = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(us / fio for us, fio in pairs)
    print(
        f"{mode}, {n_bytes >> 10:5} KiB, {DEPTH} threads: {ours:6.3f} GB/s, fio "
        f"{fios:6.3f}   ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to "
        f"{ratios[-1]:.2f})   (bar: 0.9 to 1.1)"
    )


if __name__ == "__main__":
    main()
