"""The 397B's shape on one GPU: slots, page cache, K and bits, each beside its limit.

    python -m tests.benchmarks.bench_gpu_rehearsal FOLDER TABLE.csv

writes random checkpoints of the full shape into FOLDER (about 40 GB, left there) and
one row for every run. Routing is replayed with the published locality. Slots are filled
through the page cache first, with 80 tokens, so that hits are those of a long run; what
is measured then reads warm (from the page cache) or cold (past it).
"""

import csv
import datetime
import os
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from flashmoe_ref import load
from flashmoe_ref.accounting import expert_bytes
from flashmoe_ref.config import PRESETS
from flashmoe_ref.engine import Model
from flashmoe_ref.folding import write_folded
from flashmoe_ref.locality import routing_with_locality
from flashmoe_ref.reading import open_file
from flashmoe_ref.rehearsal import measure_rates, rehearse, replay
from flashmoe_ref.trace import record

MODEL = "qwen3.5-397b-a17b"
N_FILES = 5  # layers with files of their own
N_FILL, N_TRACED = 80, 3
N_TOKENS = {"warm": 20, "cold": 6}
LARGE, SMALL = 64e9, 2e9  # bytes of the banks
CURVE = (4, 16, 32, 64, 100)  # slots of each layer
K_TRAINED, K_CUT = 10, 4

# k, bits, bytes of the bank or slots of each layer, how it reads
RUNS = [
    *((k, 4, size, "warm") for size in (LARGE, SMALL) for k in (K_CUT, K_TRAINED)),
    *((k, 4, size, "cold") for size in (LARGE, SMALL) for k in (K_CUT, K_TRAINED)),
    *((K_CUT, 4, slots, "warm") for slots in CURVE),
    *((k, 2, size, "warm") for size in (LARGE, SMALL) for k in (K_CUT, K_TRAINED)),
    *((K_CUT, 2, size, "cold") for size in (LARGE, SMALL)),
]


def options_of(expert_bytes: int, size: float, n_layers: int) -> dict[str, int]:
    """Slots of each layer where the bank holds 16 or more; else all layers share."""
    if isinstance(size, int):
        return {"slots": size}
    n_slots = int(size // expert_bytes)
    each = n_slots // n_layers
    return {"slots": each} if each >= 16 else {"budget": n_slots}


def fill(model: Model, picks: np.ndarray) -> None:
    """Request the experts of some tokens, through the page cache, computing nothing."""
    store = model.store
    kept = store._fds, store._blocks
    opened = [open_file(path, False) for path in store.files.files]
    store._fds, store._blocks = ([pair[i] for pair in opened] for i in (0, 1))
    for token in picks.tolist():
        for layer, experts in enumerate(token):
            store.request(layer, experts).wait()
    for fd in store._fds:
        os.close(fd)
    store._fds, store._blocks = kept


def run(folder: Path, k: int, bits: int, size: float, cache: str, rates: dict) -> dict:
    """Load, fill, decode; a row of the table."""
    config = PRESETS[MODEL]
    n_layers, n_experts = config.num_hidden_layers, config.num_experts
    n_tokens = N_TOKENS[cache]
    n_all = N_FILL + 2 + n_tokens + N_TRACED
    picks = routing_with_locality(n_all, n_layers, n_experts, k)
    options = options_of(expert_bytes(config, bits, 64), size, n_layers)
    mx.clear_cache()
    mx.reset_peak_memory()
    cold = {"bypass_page_cache": cache == "cold", "threads": max(4, k)}
    with load(folder, engine="mlx", experts="packed", k=k, **options, **cold) as model:
        fill(model, picks[:N_FILL])
        mode = "direct" if cache == "cold" else "warm"
        if (bits, mode, k) not in rates:
            rates[bits, mode, k] = measure_rates(model, N_FILES, max(4, k), mode)
        measured = picks[N_FILL:]
        found = rehearse(
            model, measured, [1, 2], n_tokens, rates[bits, mode, k], n_warm=2
        )
        with replay(model.store, k, measured[-N_TRACED:]), record(model) as trace:
            state = model.new_state()
            for token in range(N_TRACED):
                model.decode(token, state)
        state_bytes = state.n_bytes
    split = {name: 1e3 * float(np.median(s)) for name, s in trace.breakdown().items()}
    names = ("embed", "mix", "request", "shared", "experts", "head")
    allowed = found.resident_bytes + state_bytes + 1e9
    return {
        "gpu": mx.device_info()["device_name"],
        "model": MODEL,
        "k": k,
        "bits": bits,
        **{"slots": "", "budget": ""},
        **options,
        "slot_gb": round(model.store.n_bytes / 1e9, 2),
        "page_cache": cache,
        "routing": "published locality",
        "tok_s": round(1 / found.token_s, 2),
        "slowest_tok_s": round(1 / found.slowest_s, 2),
        "limit_tok_s": round(1 / found.limit_s, 2),
        "share_of_limit": round(1 / found.times_limit, 3),
        "hit_rate": round(found.hit_rate, 3),
        "read_gb": round(found.read_bytes / 1e9, 3),
        "matvec_gb_s": round(found.rates.matvec_gb_s, 1),
        "read_gb_s": round(found.rates.disk_gb_s, 2),
        "launch_ms": round(sum(split[name] for name in names), 1),
        "sync_ms": round(split["sync"], 1),
        "wait_ms": round(split["wait"], 1),
        "gpu_memory_gb": round(mx.get_peak_memory() / 1e9, 2),
        "allowed_memory_gb": round(allowed / 1e9, 2),
        "mlx": mx.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main(folder: str, table: str, bits: str = "42") -> None:
    """All runs, the rows written as they come; bits: only the runs with these."""
    if mx.default_device() != mx.Device(mx.gpu):
        print("skipped: MLX has no GPU here")
        return
    rates: dict = {}
    for k, width, size, cache in RUNS:
        if str(width) not in bits:
            continue
        place = Path(folder) / f"{MODEL}-{width}bit"
        write_folded(place, PRESETS[MODEL], N_FILES, width, 4, progress=False)
        row = run(place, k, width, size, cache, rates)
        print(row, flush=True)
        is_new = not Path(table).exists()
        with open(table, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main(*sys.argv[1:4])
