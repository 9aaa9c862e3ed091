"""Peak memory: dense weights, slots, state and a constant, however large the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tiny import TEXT_CONFIG, write_tiny

from flashmoe_ref.accounting import module_shapes
from flashmoe_ref.config import ModelConfig
from flashmoe_ref.headers import DTYPES
from flashmoe_ref.quantize import quantize

CONSTANT_BYTES = 100_000_000
SHAPE = {
    "hidden_size": 512,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_experts": 128,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 1024,
}

# Peak of a process: first with imports, kernels and threads that a small model of the
# same kind has set up; then with the large one.
MEASURE = """
import json, sys
from flashmoe_ref import load
from flashmoe_ref.report import peak_memory_bytes

def run(folder):
    with load(folder, **json.loads(sys.argv[3])) as model:
        state = model.new_state()
        model.prefill(list(range(40)), state)
        for token in range(8):
            model.decode(token, state)
        return {
            "promised": model.checkpoint.dense_bytes + model.store.n_bytes
            + state.n_bytes,
            "model": model.report().model_bytes,
            "misses": model.store.counters.misses,
        }

run(sys.argv[1])
before = peak_memory_bytes()
result = run(sys.argv[2])
print(json.dumps(result | {"above": peak_memory_bytes() - before}))
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Few and narrow layers, quantized as the large model is."""
    return write_tiny(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """450 MB of experts in a sparse file: real shapes and routing, zeros as weights."""
    folder = tmp_path_factory.mktemp("large")
    raw = {"model_type": "qwen3_5_moe", "text_config": TEXT_CONFIG | SHAPE}
    (folder / "config.json").write_text(json.dumps(raw))
    write_sparse(folder / "model.safetensors", ModelConfig.from_dict(raw))
    return folder


def write_sparse(path: Path, config: ModelConfig) -> None:
    rng, dense, experts = np.random.default_rng(0), {}, {}
    for modules in module_shapes(config).values():
        for name, shape in modules.items():
            prefix = "language_model." if name == "lm_head" else "language_model.model."
            full = prefix + name.replace(".experts.", ".switch_mlp.")
            bare = name.endswith(("A_log", "dt_bias"))
            if ".mlp.experts." in name:
                scales = (*shape[:-1], shape[-1] // 64)
                experts[f"{full}.weight"] = ("U32", (*shape[:-1], shape[-1] // 8))
                experts[f"{full}.scales"] = experts[f"{full}.biases"] = ("BF16", scales)
            elif len(shape) == 1 or name.endswith("conv1d"):
                w = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
                w = w[:, :, None] if w.ndim == 2 else w
                dense[full if bare else f"{full}.weight"] = w
            else:
                m = quantize(
                    rng.standard_normal(shape).astype(ml_dtypes.bfloat16), 8, 32
                )
                for kind in ("weight", "scales", "biases"):
                    dense[f"{full}.{kind}"] = getattr(m, kind)
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, at = {}, 0
    for name, array in dense.items():
        header[name] = entry(names[array.dtype], array.shape, at, array.nbytes)
        at += array.nbytes
    for name, (dtype, shape) in experts.items():
        n_bytes = int(np.prod(shape)) * DTYPES[dtype].itemsize
        header[name] = entry(dtype, shape, at, n_bytes)
        at += n_bytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in dense.values():
            file.write(array.tobytes())
        file.truncate(8 + len(text) + at)


def entry(dtype: str, shape: tuple, at: int, n_bytes: int) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + n_bytes]}


@pytest.mark.parametrize("slots", [None, 8])
@pytest.mark.parametrize("engine", ["numpy", "mlx"])
def test_peak_memory_is_what_was_promised(small, large, engine, slots):
    options = json.dumps({"engine": engine, "slots": slots})
    command = [sys.executable, "-c", MEASURE, str(small), str(large), options]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    got = json.loads(result.stdout)
    assert got["misses"] > 200  # it did stream
    assert got["model"] > got["promised"] + 2 * CONSTANT_BYTES  # and could not hide
    assert got["above"] <= got["promised"] + CONSTANT_BYTES, got
