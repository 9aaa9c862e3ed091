"""What this machine can do: its disk, its memory, and each engine's multiplication.

Three rates bound a streaming engine: bytes of experts from the disk, bytes of weights
from memory, and packed weights through the quantized matrix-vector product. All are
measured as the engine works: positioned reads of whole records, weights too many for
any cache. **But:** an upper bound of nothing: NumPy's reading of memory may not reach
what the memory can do, and other programs take their part.
*Taught in notebooks/06 and 12.*
"""

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from .probe_disk import MODES, DiskProbe
from .quantize import QuantizedMatrix
from .writing import write_small

MEMORY_BYTES, QUICK_MEMORY_BYTES = 256 << 20, 64 << 20  # more than caches hold
ROUNDS, ROUNDS_S = 5, 1.5  # no further round once so many seconds have passed
SIDE, BITS, GROUP = 4096, 4, 64  # of a matrix: 9.4 MB
FORMAT = 1  # of the JSON


@dataclass(frozen=True)
class Hardware:
    """Rates in GB/s, of 10^9 bytes."""

    machine: str
    n_cores: int
    memory_gb_s: dict[str, float]  # by threads: "1 thread", "all 8 threads"
    matvec_gb_s: dict[str, float]  # packed 4-bit weights, by engine
    disk: DiskProbe | None
    notes: tuple[str, ...]  # why something was not measured

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_small(Path(path), self.as_dict())

    def as_dict(self) -> dict:
        """For JSON, with the number of its format."""
        return {"format": FORMAT} | json.loads(json.dumps(asdict(self)))


def probe_hardware(
    disk: DiskProbe | None = None,
    n_bytes: int = MEMORY_BYTES,
    step: Callable[[], object] = lambda: None,
) -> Hardware:
    """Measure memory and engines; the disk's probe is kept beside it."""
    memory = memory_read_rates(n_bytes)
    step()
    products, notes = matvec_rates(n_bytes)
    step()
    machine = f"{platform.system()} {platform.machine()}"
    return Hardware(machine, n_cores(), memory, products, disk, tuple(notes))


def n_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_read_rates(n_bytes: int = MEMORY_BYTES) -> dict[str, float]:
    """GB/s of reading memory, by one thread and by all: the best of some rounds.

    Finds the largest of many numbers, the cheapest thing to do with each of them.
    """
    values = np.ones(n_bytes // 4, np.float32)
    rates = {}
    for n_threads in dict.fromkeys((1, n_cores())):
        parts = np.array_split(values, n_threads)
        with ThreadPoolExecutor(n_threads) as pool:
            seconds = _best(lambda: list(pool.map(np.max, parts)))  # noqa: B023
        name = "1 thread" if n_threads == 1 else f"all {n_threads} threads"
        rates[name] = values.nbytes / seconds / 1e9
    return rates


def matvec_rates(
    n_bytes: int = MEMORY_BYTES, engines: Sequence[str] = ("numpy", "mlx")
) -> tuple[dict[str, float], list[str]]:
    """GB/s of packed 4-bit weights that go through matrix x vector, by engine.

    Returns: rates, and a sentence for every engine that is not there.
    """
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 32, (SIDE, SIDE * BITS // 32), np.uint32)
    scales = rng.uniform(0.01, 0.02, (SIDE, SIDE // GROUP)).astype(ml_dtypes.bfloat16)
    first = QuantizedMatrix(words, scales, -scales, BITS, GROUP)
    n_matrices = max(1, n_bytes // first.n_bytes)
    matrices = [first, *(_copy(first) for _ in range(n_matrices - 1))]
    x = rng.standard_normal(SIDE).astype(np.float32)
    rates, notes = {}, []
    measures = {"numpy": (_numba_rates, "numba"), "mlx": (_mlx_rates, "mlx")}
    for measure, package in (measures[engine] for engine in engines):
        try:
            rates |= measure(matrices, x)
        except ImportError:
            notes.append(f"{package} is not installed: its engine was not measured")
    return rates, notes


def _copy(matrix: QuantizedMatrix) -> QuantizedMatrix:
    parts = (matrix.weight.copy(), matrix.scales.copy(), matrix.biases.copy())
    return QuantizedMatrix(*parts, matrix.bits, matrix.group_size)


def _numba_rates(matrices: list[QuantizedMatrix], x: np.ndarray) -> dict[str, float]:
    from .kernels import multiply_parallel, multiply_serial, prepare

    prepared, out = [prepare(matrix) for matrix in matrices], np.empty(SIDE, np.float32)
    n_bytes = sum(matrix.n_bytes for matrix in matrices)

    def rate(kernel: Callable) -> float:
        return n_bytes / _best(lambda: [kernel(m, x, out) for m in prepared]) / 1e9

    return {
        "numpy, compiled, 1 thread": rate(multiply_serial),
        f"numpy, compiled, all {n_cores()} threads": rate(multiply_parallel),
    }


def _mlx_rates(matrices: list[QuantizedMatrix], x: np.ndarray) -> dict[str, float]:
    import mlx.core as mx

    def halves(array: np.ndarray) -> mx.array:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)

    parts = [(mx.array(m.weight), halves(m.scales), halves(m.biases)) for m in matrices]
    x_mx, widths = mx.array(x)[None], {"group_size": GROUP, "bits": BITS}

    def multiply() -> None:
        mx.eval([mx.quantized_matmul(x_mx, *part, **widths) for part in parts])

    n_bytes = sum(matrix.n_bytes for matrix in matrices)
    device = mx.default_device().type.name
    return {f"mlx on the {device}": n_bytes / _best(multiply) / 1e9}


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    run()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        if sum(times) > ROUNDS_S:
            break
    return min(times)


# --- for people -----------------------------------------------------------------------


def readable(found: Hardware) -> str:
    """Tables of what was measured, with units."""
    lines = [f"{found.machine}, {found.n_cores} cores. GB/s are 10^9 bytes a second."]
    if found.disk is not None:
        lines += _disk_lines(found.disk)
    lines += ["", "memory, reading"]
    lines += [f"  {name:34}{r:8.2f} GB/s" for name, r in found.memory_gb_s.items()]
    lines += ["", "4-bit weights through matrix x vector, from memory"]
    lines += [f"  {name:34}{r:8.2f} GB/s" for name, r in found.matvec_gb_s.items()]
    return "\n".join([*lines, *(f"  note: {note}" for note in found.notes)])


MEANING = {
    "warm": "warm: out of the page cache",
    "cold": "cold: through the page cache, none of it cached",
    "direct": "direct: past the page cache",
}


def _disk_lines(disk: DiskProbe) -> list[str]:
    lines = ["", f"disk: records from {disk.n_bytes / 1e6:,.0f} MB of {disk.what}"]
    for mode in MODES:
        sizes, depths, rates = disk.surface(mode)
        if not any(rate.mode == mode for rate in disk.rates):
            continue
        lines += ["", f"  {MEANING[mode]}; GB/s with so many threads"]
        lines.append("  record    " + "".join(f"{depth:>9}" for depth in depths))
        for size, row in zip(sizes, rates, strict=True):
            cells = ("" if np.isnan(rate) else f"{rate:.3f}" for rate in row)
            lines.append(
                f"  {in_kib(size):10}" + "".join(f"{cell:>9}" for cell in cells)
            )
    lines += [""] if disk.notes else []
    return lines + [f"  note: {note}" for note in disk.notes]


def in_kib(n_bytes: int) -> str:
    """A record's size, in powers of two: 64 KiB."""
    if n_bytes >= 1 << 20 and n_bytes % (1 << 20) == 0:
        return f"{n_bytes >> 20} MiB"
    return f"{n_bytes / 1024:g} KiB"
