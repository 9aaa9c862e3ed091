"""Matrix times vector: packed weights a second, of every width, and what bounds them.

Large matrices come from memory, one after the other out of more than any cache holds;
small ones, of the reduced model's size, stay in cache. In each round every contender
runs once; medians over rounds, so that what else the machine does falls on all.
"""

import statistics
import time
from collections.abc import Callable

import ml_dtypes
import mlx.core as mx
import numba
import numpy as np

from flashmoe_ref.kernels import multiply_parallel, multiply_serial, prepare
from flashmoe_ref.quantize import BITS, QuantizedMatrix, dequantize

GROUP, ROUNDS = 64, 9
FROM_MEMORY = (4096, 4096, 160_000_000)  # rows, columns, bytes in all
IN_CACHE = (1024, 256, 1)


def random_matrix(rows: int, columns: int, bits: int) -> QuantizedMatrix:
    """Random words, with scales and biases as of ordinary weights."""
    rng = np.random.default_rng(bits)
    words = rng.integers(0, 1 << 32, (rows, columns * bits // 32), np.uint32)
    scales = rng.uniform(0.01, 0.02, (rows, columns // GROUP)).astype(
        ml_dtypes.bfloat16
    )
    return QuantizedMatrix(words, scales, -scales * scales.dtype.type(2), bits, GROUP)


def to_mx(matrix: QuantizedMatrix) -> tuple[mx.array, ...]:
    """The same matrix as MLX arrays."""
    halves = (matrix.scales, matrix.biases)
    views = (mx.array(h.view(np.uint16)).view(mx.bfloat16) for h in halves)
    return mx.array(matrix.weight), *views


def seconds(run: Callable[[], object], n_calls: int) -> float:
    """Time a call, averaged over n_calls in a row."""
    start = time.perf_counter()
    for _ in range(n_calls):
        run()
    return (time.perf_counter() - start) / n_calls


def medians(runs: dict[str, Callable[[], object]], n_calls: int) -> dict[str, float]:
    """Median seconds a call of each contender, rounds interleaved."""
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(seconds(run, n_calls))
    return {name: statistics.median(t) for name, t in times.items()}


def contenders(matrices: list[QuantizedMatrix]) -> dict[str, Callable[[], object]]:
    """Each call multiplies all matrices once."""
    rows, columns = matrices[0].shape
    x = np.random.default_rng(0).standard_normal(columns).astype(np.float32)
    out, x_mx, bits = np.empty(rows, np.float32), mx.array(x)[None], matrices[0].bits
    prepared, in_mx = list(map(prepare, matrices)), list(map(to_mx, matrices))

    def each(kernel: Callable) -> Callable[[], None]:
        return lambda: [kernel(matrix, x, out) for matrix in prepared]

    def by_mlx() -> None:
        for weight, scales, biases in in_mx:
            mx.eval(
                mx.quantized_matmul(
                    x_mx, weight, scales, biases, group_size=GROUP, bits=bits
                )
            )

    return {
        "one": each(multiply_serial),
        "all": each(multiply_parallel),
        "mlx": by_mlx,
        "decode": lambda: dequantize(matrices[0]) @ x,
    }


def read_rates() -> tuple[float, float]:
    """GB/s at which float32 is read from memory: by one thread, by all."""
    ones = np.ones((10_000, 4096), np.float32)  # 164 MB
    x, out = np.ones(4096, np.float32), np.empty(10_000, np.float32)
    runs = {
        "one": lambda: multiply_serial((ones,), x, out),
        "all": lambda: multiply_parallel((ones,), x, out),
    }
    times = medians(runs, 1)
    return tuple(ones.nbytes / times[name] / 1e9 for name in runs)


def table(
    rows: int, columns: int, n_bytes: int, n_calls: int, read_gb_s: float
) -> None:
    """One line a width: GB/s of packed weights, and ratios."""
    print(
        "bits   1 thread   all threads   of memory rate   x mlx 1t   x mlx   x decoding"
    )
    for bits in BITS:
        first = random_matrix(rows, columns, bits)
        others = range(1, max(1, n_bytes // first.n_bytes))
        matrices = [first, *(random_matrix(rows, columns, bits) for _ in others)]
        total = sum(matrix.n_bytes for matrix in matrices)
        t = medians(contenders(matrices), n_calls)
        one, every = (total / t[name] / 1e9 for name in ("one", "all"))
        print(
            f"{bits:4} {one:6.1f} GB/s {every:8.1f} GB/s {every / read_gb_s:14.0%} "
            f"{t['mlx'] / t['one']:12.1f} {t['mlx'] / t['all']:7.1f} "
            f"{t['decode'] * len(matrices) / t['one']:10.1f}"
        )


def main() -> None:
    """Print the tables."""
    mx.set_default_device(mx.cpu)
    one, every = read_rates()
    print(
        f"memory read rate: {one:.1f} GB/s by one thread, {every:.1f} GB/s by "
        f"{numba.get_num_threads()}; groups of {GROUP}, bf16 scales and biases"
    )
    rows, columns, n_bytes = FROM_MEMORY
    print(f"\n{rows} x {columns}, from memory")
    table(rows, columns, n_bytes, 1, every)
    rows, columns, n_bytes = IN_CACHE
    print(f"\n{rows} x {columns}, in cache (one thread is what decode uses here)")
    table(rows, columns, n_bytes, 50, every)


if __name__ == "__main__":
    main()
