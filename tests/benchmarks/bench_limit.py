"""A model four times larger than memory: streamed, mapped, and by mlx-lm, in one run.

Writes a random checkpoint of 2.8 GB, gives each contender a control group with a
quarter of that (page cache included, no swap), and lets it decode. mlx-lm must hold all
of the model. The router is random, so caches find what chance leaves them: about the
share of the experts that fits.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flashmoe_ref import load
from flashmoe_ref.checkpoint import Checkpoint
from flashmoe_ref.config import ModelConfig
from flashmoe_ref.experts import experts_in_place
from flashmoe_ref.mapped import load_mapped
from flashmoe_ref.memory_limit import run_limited, why_not
from flashmoe_ref.pack import pack
from flashmoe_ref.rehearse import write_random

from .fio import evict_file

SHAPE = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 6144,
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 4096,
    "full_attention_interval": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
    },
}
N_WARM, N_DECODE, ROUNDS = 4, 24, 3
SLOTS = 24  # for each layer: what the limit leaves room for, beside everything else


def contender(folder: str, name: str):
    """The model under its name; `decode(token)` advances it."""
    if name == "mlx-lm":
        return MlxLm(folder)
    if name == "mapped":
        return Ours(load_mapped(folder))
    experts, _, slots = name.partition(", ")
    slots = int(slots.split()[0]) if slots else None
    source = {"packed": "packed", "in place": "stream"}[experts]
    return Ours(load(folder, engine="numpy", experts=source, slots=slots))


class Ours:
    """One of our models."""

    def __init__(self, model) -> None:
        self.model, self.state = model, model.new_state()

    def decode(self, token: int) -> None:
        """One token."""
        self.model.decode(token, self.state)


class MlxLm:
    """mlx-lm, which reads all of the model first."""

    def __init__(self, folder: str) -> None:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        self.mx, (self.model, _) = mx, load_model(Path(folder))
        self.model.set_dtype(mx.float32)
        self.cache = make_prompt_cache(self.model)

    def decode(self, token: int) -> None:
        """One token."""
        mx = self.mx
        mx.eval(self.model(mx.array([[token]]), cache=self.cache))


def run_inside(folder: str, name: str) -> None:
    """What runs under the limit: prints seconds a token."""
    case = contender(folder, name)
    for token in range(N_WARM):
        case.decode(token)
    start = time.perf_counter()
    for token in range(N_WARM, N_WARM + N_DECODE):
        case.decode(37 * token % SHAPE["vocab_size"])
    print(json.dumps({"seconds": (time.perf_counter() - start) / N_DECODE}))


def main() -> None:
    """Write the model, run everybody, print the table."""
    reason = why_not()
    if reason is not None:
        print(f"skipped: {reason}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "random"
        raw = {"model_type": "qwen3_5_moe", "text_config": SHAPE}
        write_random(folder, ModelConfig.from_dict(raw), progress=False)
        pack(folder, progress=False)
        run_inside_warm(folder)
        measure(folder)


def run_inside_warm(folder: Path) -> None:
    """Compile kernels before the clock runs, and outside of the limit."""
    command = [sys.executable, "-m", __spec__.name, str(folder), "packed"]
    subprocess.run(command, check=True, capture_output=True)


def measure(folder: Path) -> None:
    """Rounds over the contenders, each in a group of its own."""
    checkpoint = Checkpoint.open(folder)
    n_experts_bytes = experts_in_place(checkpoint).n_bytes
    n_bytes = checkpoint.dense_bytes + n_experts_bytes
    limit = n_bytes // 4
    print(
        f"model {n_bytes / 1e9:.2f} GB ({checkpoint.dense_bytes / 1e6:.0f} MB of it "
        f"dense), limit {limit / 1e6:.0f} MB"
    )
    names = ["packed", f"packed, {SLOTS} slots", "in place", "mapped", "mlx-lm"]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in names:
            command = [sys.executable, "-m", __spec__.name, str(folder), name]
            # A cached page counts for the group that read it first: so first, none is.
            for path in folder.rglob("*.*"):
                evict_file(path)
            done = run_limited(command, limit)
            if done.was_killed:
                how = "killed for want of memory"
            elif done.returncode:
                how = f"failed: {done.stderr.strip().splitlines()[-1]}"
            else:
                seconds[name].append(json.loads(done.stdout)["seconds"])
                how = f"{1 / seconds[name][-1]:.2f} tok/s"
            print(f"{name:20} {how}, peak {done.peak_bytes / 1e6:.0f} MB", flush=True)
    medians = {n: statistics.median(s) for n, s in seconds.items() if s}
    best = min(medians.values())
    for name, median in medians.items():
        print(
            f"{name:20} median {1 / median:.2f} tok/s, {best / median:.2f} of the best"
        )


if __name__ == "__main__":
    run_inside(*sys.argv[1:])
