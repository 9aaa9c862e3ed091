"""The experts of a token on a GPU: stock MLX against the kernels of gpu_kernels.py.

    python -m tests.benchmarks.bench_gpu_kernels TABLE.csv

Ten tokens' experts are chained and waited for once, as a layer's are in a token.
Medians; the error is against the same experts in float32.
"""

import csv
import datetime
import statistics
import sys
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from flashmoe_ref import gpu_kernels
from flashmoe_ref.mlx_layers import expert_mlp, silu
from flashmoe_ref.mlx_weights import Matrix, widen

SHAPES = {"qwen3.5-397b-a17b": (4096, 1024), "qwen3.5-35b-a3b": (2048, 512)}
N_SLOTS, CHAIN, ROUNDS = 64, 10, 40


def bank(n_rows: int, n_columns: int, bits: int) -> Matrix:
    """Random quantized matrices, one in each slot."""
    w = mx.random.normal((N_SLOTS, n_rows, n_columns)) * n_columns**-0.5
    arrays = mx.quantize(w.astype(mx.bfloat16), group_size=64, bits=bits)
    mx.eval(arrays)
    return Matrix(*arrays, bits=bits, group_size=64)


def exact(h: mx.array, experts: dict, slots: mx.array, weights: mx.array) -> mx.array:
    """The experts in float32, one by one."""
    total, h = 0, h.astype(mx.float32)
    for rank, slot in enumerate(slots.tolist()):
        names = ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (widen(experts[n][slot : slot + 1], h.dtype)[0] for n in names)
        total += weights[0, rank] * ((silu(h @ gate.T) * (h @ up.T)) @ down.T)
    return total


def microseconds(function: Callable[[mx.array], mx.array], h: mx.array) -> float:
    """Of one call, in a chain of CHAIN."""
    seconds = []
    for _ in range(ROUNDS):
        start, y = time.perf_counter(), h
        for _ in range(CHAIN):
            y = function(y).astype(h.dtype)
        mx.eval(y)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[5:]) / CHAIN * 1e6


def main(table: str) -> None:
    """Measure all shapes, and write the table."""
    if gpu_kernels.language() is None:
        print("skipped: MLX has no GPU here")
        return
    rows = []
    for model, (d, f) in SHAPES.items():
        for bits in (4, 2):
            experts = {"gate_proj": bank(f, d, bits), "up_proj": bank(f, d, bits)}
            experts["down_proj"] = bank(d, f, bits)
            for k in (4, 10):
                rows.append({"model": model, "bits": bits, "k": k})
                rows[-1] |= compare(experts, d, k)
                print(rows[-1], flush=True)
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def compare(experts: dict, d: int, k: int) -> dict:
    """Times and errors of both for k experts."""
    slots = mx.array(np.arange(3, 3 + 5 * k, 5), mx.uint32)
    weights = mx.softmax(mx.random.normal((1, k)))
    h = mx.random.normal((1, d)).astype(mx.bfloat16)
    mx.eval(slots, weights, h)

    def stock(h: mx.array) -> mx.array:
        y = expert_mlp(h[None], experts, slots)
        return weights @ y.astype(mx.float32)

    def own(h: mx.array) -> mx.array:
        return gpu_kernels.expert_sum(h, experts, slots, weights)

    wanted = np.array(exact(h, experts, slots, weights))
    error = {
        name: float(np.abs(np.array(f(h)) - wanted).max() / np.abs(wanted).max())
        for name, f in (("stock", stock), ("own", own))
    }
    stock_us, own_us = microseconds(mx.compile(stock), h), microseconds(own, h)
    n_bytes = sum(a.nbytes for m in experts.values() for a in m.arrays) * k / N_SLOTS
    return {
        "stock_us": round(stock_us, 1),
        "own_us": round(own_us, 1),
        "times_faster": round(stock_us / own_us, 2),
        "own_gb_s": round(n_bytes / own_us / 1e3),
        "stock_error": f"{error['stock']:.1e}",
        "own_error": f"{error['own']:.1e}",
        "gpu": mx.device_info()["device_name"],
        "mlx": mx.__version__,
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    main(*sys.argv[1:2])
