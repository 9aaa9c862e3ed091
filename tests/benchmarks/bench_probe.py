"""The probe against fio: same file, same record size and depth, cold and warm, one run.

Records of a file of random bytes are read in random order by four threads, each record
once when cold. Rounds alternate between the two, and each round's ratio is taken by
itself, so that what else the machine and its disk do falls on both.
"""

import statistics
import tempfile
from pathlib import Path

from flashmoe_ref.probe_disk import Span, measure, spans_of_files

from .fio import evict_file, fio_gb_s, why_not, write_random_file

SIZES, DEPTH, ROUNDS = (64 << 10, 1 << 20, 4 << 20), 4, 15
FILE_BYTES, WARM_S = 256 << 20, 1


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
                evict_file(path)
            if who == "fio":
                warm_s = WARM_S if mode == "warm" else None
                pair[who] = fio_gb_s(path, n_bytes, DEPTH, FILE_BYTES // DEPTH, warm_s)
            else:
                pair[who] = probe_gb_s(spans, mode, n_bytes)
        pairs += [(pair["probe"], pair["fio"])] if number else []  # the first warms up
    return pairs


def main() -> None:
    """Print both rates and the median ratio, a line for each mode and size."""
    if reason := why_not():
        print(f"skipped: {reason}")
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = Path(folder) / "records.bin"
        write_random_file(path, FILE_BYTES >> 22, 1 << 22)
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
