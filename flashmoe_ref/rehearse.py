"""A checkpoint of random weights in a real shape: to measure a size before fetching it.

Files, names, dtypes and sizes are those of a quantized MLX checkpoint, so the ordinary
engine reads it and does all the work of a trained one. **But:** what it says is noise,
and its router picks experts at random: no expert is needed twice in a row more often
than chance wants, so caches find less than in a trained model. config.json says
"random_weights". *Taught in notebooks/08 and 13.*
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from .accounting import module_shapes
from .config import ModelConfig
from .convert import (
    SHARD_BYTES,
    check_settings,
    model_order,
    quantized_tensors,
    target_name,
)
from .mlx_config import (
    GATE,
    GATE_BITS,
    full_attention_interval,
    with_quantization,
)
from .shards import NewModule, NewTensor, plan_shards, write_checkpoint

RECORD_NAME = "rehearsal.json"
BLOCK_BYTES = 1 << 24  # of words made at a time
FLOAT = np.dtype(ml_dtypes.bfloat16)
FLAT_FIELDS = ("rope_theta", "partial_rotary_factor", "model_type", "eos_token_ids")


def write_random(
    folder: str | Path,
    config: ModelConfig,
    bits: int = 4,
    dense_bits: int = 8,
    group_size: int = 64,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
    experts: bool = True,
) -> Path:
    """Write a checkpoint of random weights of this shape in MLX's layout.

    bits are those of the routed experts, dense_bits of the rest; gates have 8. The same
    seed gives the same bytes. Without experts, those are left to `folding.py`. A run
    that was cut off goes on if it is called again.
    Raises: ConfigError for widths that do not exist; PackError if there is no room, or
            the folder holds something else.
    """
    folder = Path(folder)
    for width in (bits, dense_bits):
        check_settings(width, group_size, shard_bytes)
    modules, widths = [], {}
    for number, (name, shape) in enumerate(_sorted_shapes(config)):
        if ".mlp.experts." in name and not experts:
            continue
        path = target_name(config, name)
        if _is_quantized(name, shape, group_size):
            widths[path] = (_bits_of(name, bits, dense_bits), group_size)
            modules.append(_quantized(path, shape, widths[path], (seed, number)))
        else:
            modules.append(_plain(name, path, shape, (seed, number)))
    shards = plan_shards(modules, shard_bytes)
    settings = {"bits": bits, "dense_bits": dense_bits, "group_size": group_size}
    record = {"made_by": "rehearse", "seed": seed, "shard_bytes": shard_bytes}
    raw = with_quantization(as_json(config), (bits, group_size), widths)
    record |= settings | {"config": as_json(config)}
    write_checkpoint(folder, shards, (RECORD_NAME, record), raw, progress=progress)
    return folder


def as_json(config: ModelConfig) -> dict:
    """A config.json, in Qwen3.5's nested form, that reads as this configuration."""
    text = {k: v for k, v in asdict(config).items() if k not in FLAT_FIELDS}
    text["layer_types"] = list(config.layer_types)
    interval = full_attention_interval(config)
    text |= {"model_type": "qwen3_5_moe_text", "full_attention_interval": interval}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": config.partial_rotary_factor,
    }
    eos = {"eos_token_id": list(config.eos_token_ids)} if config.eos_token_ids else {}
    tied = {"tie_word_embeddings": config.tie_word_embeddings}
    top = {"model_type": "qwen3_5_moe", "random_weights": True}
    return top | eos | tied | {"text_config": text}


def _sorted_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Canonical module names and shapes, in the order in which files hold them."""
    shapes = {
        name: shape
        for modules in module_shapes(config).values()
        for name, shape in modules.items()
    }
    for name in sorted(shapes, key=lambda name: model_order(f"{name}.weight")):
        yield name, shapes[name]


def _is_quantized(name: str, shape: tuple[int, ...], group_size: int) -> bool:
    is_matrix = len(shape) > 1 and not name.endswith("conv1d")
    return is_matrix and shape[-1] % group_size == 0


def _bits_of(name: str, bits: int, dense_bits: int) -> int:
    if GATE.search(name):
        return GATE_BITS
    return bits if ".mlp.experts." in name else dense_bits


# ---- what the weights are ------------------------------------------------------------


def _quantized(
    path: str, shape: tuple[int, ...], width: tuple[int, int], seed: tuple[int, int]
) -> NewModule:
    """Random words are uniform levels; the scale gives rows of unit length."""
    tensors = quantized_tensors(path, shape, FLOAT, width)
    n_rows, n_in = int(np.prod(shape[:-1])), shape[-1]
    step = max(1, BLOCK_BYTES * 8 // (n_in * width[0]))
    blocks = [
        partial(random_rows, min(step, n_rows - first), n_in, width, (*seed, first))
        for first in range(0, n_rows, step)
    ]
    return NewModule(tensors, n_rows * n_in, tuple(blocks))


def random_rows(
    n_rows: int, n_in: int, width: tuple[int, int], seed: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words, scales and biases of rows of about unit length; width: (bits, group)."""
    bits, group_size = width
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << 32, (n_rows, n_in * bits // 32), np.uint32)
    levels = 1 << bits
    deviation = np.sqrt((levels**2 - 1) / 12)  # of a uniform integer below levels
    scale = 1 / (deviation * np.sqrt(n_in))
    scales = np.full((n_rows, n_in // group_size), scale, FLOAT)
    return words, scales, (scales * FLOAT.type(-(levels - 1) / 2)).astype(FLOAT)


def _plain(
    name: str, path: str, shape: tuple[int, ...], seed: tuple[int, int]
) -> NewModule:
    bare = name.endswith(("A_log", "dt_bias"))
    stored = (*shape, 1) if name.endswith("conv1d") else shape
    dtype = np.dtype(np.float32) if name.endswith("A_log") else FLOAT  # as published
    tensor = NewTensor(path if bare else f"{path}.weight", dtype, stored)
    block = partial(_random_floats, name, stored, seed)
    return NewModule((tensor,), int(np.prod(shape)), (block,))


def _random_floats(
    name: str, shape: tuple[int, ...], seed: tuple[int, int]
) -> tuple[np.ndarray]:
    rng = np.random.default_rng(seed)
    if name.endswith("norm"):
        return (np.ones(shape, FLOAT),)
    if name.endswith("A_log"):  # decays of 1 to 16, as before training
        return (np.log(rng.uniform(1, 16, shape)).astype(np.float32),)
    return ((rng.standard_normal(shape) * shape[-1] ** -0.5).astype(FLOAT),)
