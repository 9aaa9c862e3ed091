"""Cold packed reads of 7 MB records against fio with the same size and depth.

Writes a file of 128 records as large as an expert of Qwen3.5-397B at 4 bits, evicts it
from the page cache, and reads each record once, in random order: with our store (ten
experts a request, as a layer asks for) and with fio (four threads).
"""

import random
import statistics
import tempfile
import time
from pathlib import Path

from flashmoe_ref.config import preset
from flashmoe_ref.experts import (
    KINDS,
    PROJECTIONS,
    ExpertFiles,
    ExpertFormat,
    Part,
    Run,
)
from flashmoe_ref.headers import DTYPES
from flashmoe_ref.streaming import ExpertStore

from .fio import evict_file, fio_gb_s, why_not, write_random_file

N_RECORDS, THREADS, ROUNDS = 128, 4, 5


def record_format() -> ExpertFormat:
    """An expert of the 397B: gate and up (1024, 4096), down (4096, 1024), 4 bits."""
    parts = []
    for projection in PROJECTIONS:
        rows, columns = (4096, 1024) if projection == "down_proj" else (1024, 4096)
        shapes = {"weight": (rows, columns // 8), "scales": (rows, columns // 64)}
        for kind in KINDS:
            shape = shapes.get(kind, shapes["scales"])
            dtype = DTYPES["U32" if kind == "weight" else "BF16"]
            n_bytes = shape[0] * shape[1] * dtype.itemsize
            parts.append(Part(f"{projection}.{kind}", shape, dtype, n_bytes))
    return ExpertFormat(tuple(parts), dict.fromkeys(PROJECTIONS, (4, 64)))


def ours_gb_s(path: Path, fmt: ExpertFormat) -> float:
    """Every record once, ten a request, through an expert store."""
    places = tuple((0, i * fmt.n_bytes) for i in range(N_RECORDS))
    runs = ((Run(0, len(fmt.parts), fmt.n_bytes, places),),)
    config = preset("qwen3.5-397b-a17b")
    files = ExpertFiles("packed", (path,), (fmt,), runs)
    store = ExpertStore(files, config, threads=THREADS)
    order = random.Random(time.time_ns()).sample(range(N_RECORDS), N_RECORDS)
    store.request(0, order[:10]).wait()  # touch the slots' memory once
    evict_file(path)
    start = time.perf_counter()
    for first in range(0, N_RECORDS, 10):
        store.request(0, order[first : first + 10]).wait()
    elapsed = time.perf_counter() - start
    store.close()
    return N_RECORDS * fmt.n_bytes / elapsed / 1e9


def main() -> None:
    """Print both rates and their ratio."""
    if reason := why_not():
        print(f"skipped: {reason}")
        return
    fmt = record_format()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = Path(folder) / "records.bin"
        write_random_file(path, N_RECORDS, fmt.n_bytes)
        ours, fios = [], []
        for _ in range(ROUNDS):  # alternate: the disk is shared and its speed drifts
            ours.append(ours_gb_s(path, fmt))
            evict_file(path)
            part_bytes = N_RECORDS // THREADS * fmt.n_bytes
            fios.append(fio_gb_s(path, fmt.n_bytes, THREADS, part_bytes))
    us, fio = statistics.median(ours), statistics.median(fios)
    print(
        f"cold, {fmt.n_bytes:,} bytes, {THREADS} threads: {us:.2f} GB/s, fio {fio:.2f}"
    )
    print(f"ratio {us / fio:.2f}   (bar: 0.9)   rounds {[f'{x:.2f}' for x in ours]}")
