"""Checkpoint in MLX's layout -> the same with fewer bits in its routed experts.

The experts take nearly all of a model's bytes, so 4 -> 2 bits nearly halves what has to
be read for a token; what it costs in quality is lesson 10. All other tensors are copied
byte for byte. Follows flash-moe's 2-bit experiment, with a choice of three rules.
**But:** a vision tower is left out. *Taught in notebooks/05 and 10.*
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from . import quantize
from .checkpoint import Checkpoint
from .config import read_json
from .convert import (
    SHARD_BYTES,
    arrays,
    check_settings,
    expert_pieces,
    model_order,
    quantized_tensors,
    row_blocks,
    write_model,
)
from .errors import ConfigError
from .experts import KINDS, PROJECTIONS, experts_in_place
from .headers import TensorInfo, read_tensor
from .mlx_config import with_quantization
from .quantize import QuantizedMatrix
from .shards import NewModule, NewTensor, plan_shards

Width = tuple[int, int]  # bits, group size

BLOCK_BYTES = 1 << 20  # of words: small experts are worked on many at a time


def requantize(
    model_dir: str | Path,
    target: str | Path,
    bits: int,
    group_size: int | None = None,
    rule: str = "mlx",
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Write a copy of a model whose routed experts have `bits` bits.

    The group size stays as it is by default. Rules are those of `quantize.requantize`:
    mlx, minmax, least_squares. A run that was cut off goes on if it is called again.
    Raises: ConfigError, CheckpointError; PackError if there is no room, or the target
            holds something else.
    """
    model_dir, target = Path(model_dir), Path(target)
    checkpoint = Checkpoint.open(model_dir)
    formats = experts_in_place(checkpoint).formats
    if any(len(fmt.quantization) < len(PROJECTIONS) for fmt in formats):
        raise ConfigError(
            f"{model_dir}: its experts are not quantized; use 'flashmoe convert'"
        )
    if group_size is None:
        group_size = formats[0].quantization["gate_proj"][1]
    width = (bits, group_size)
    check_settings(*width, shard_bytes)
    if rule not in quantize.RULES:
        raise ConfigError(f"rule {rule!r} is unknown; use one of {[*quantize.RULES]}")
    modules, widths = plan_requantized(checkpoint, lambda layer, name: width, rule)
    raw = read_json(model_dir / "config.json")
    raw.pop("vision_config", None)
    config = with_quantization(raw, width, widths)
    settings = {
        "bits": bits,
        "group_size": group_size,
        "rule": rule,
        "shard_bytes": shard_bytes,
    }
    record = {"made_by": "requantize", "settings": settings}
    shards = plan_shards(modules, shard_bytes)
    write_model(checkpoint, target, record, shards, config, progress)
    return target


def plan_requantized(
    checkpoint: Checkpoint, width_of: Callable[[int, str], Width], rule: str
) -> tuple[list[NewModule], dict[str, Width]]:
    """Modules to write, and the widths of the quantized ones by their full path.

    `width_of` gives the bits and group size of a layer's projection; where these are
    what the source has, its bytes are copied.
    """
    experts = experts_in_place(checkpoint)
    new_widths = {
        f"layers.{layer}.mlp.experts.{name}": (layer, number, width_of(layer, name))
        for layer in range(checkpoint.config.num_hidden_layers)
        for number, name in enumerate(PROJECTIONS)
    }
    modules, widths = [], {}
    for module, infos in _modules(checkpoint).items():
        path = infos[0].name.removesuffix(".weight")
        old = checkpoint.quantization.get(module)
        layer, number, width = new_widths.get(module, (None, None, old))
        if width is not None:
            widths[path] = width
        if width == old:
            modules.append(_copied(infos, old))
        else:
            first = number * len(KINDS)
            pieces = [expert_pieces(experts, layer, first + i) for i in range(3)]
            modules.append(_requantized(path, pieces, (old, width, rule)))
    return modules, widths


def _modules(checkpoint: Checkpoint) -> dict[str, list[TensorInfo]]:
    """Canonical modules in the model's order, with their one or three tensors."""
    modules: dict[str, list[TensorInfo]] = {}
    for name in sorted(checkpoint.tensors, key=model_order):
        stem, _, kind = name.rpartition(".")
        module = stem if kind in KINDS else name
        modules.setdefault(module, [])
    for module, infos in modules.items():
        names = [f"{module}.{kind}" for kind in KINDS] + [module]
        infos += [checkpoint.tensors[n] for n in names if n in checkpoint.tensors]
    return modules


def _copied(infos: list[TensorInfo], width: Width | None) -> NewModule:
    tensors = tuple(NewTensor(i.name, i.dtype, i.shape) for i in infos)
    blocks = [partial(_copy_rows, infos, rows) for rows in row_blocks(infos[0])]
    n_parameters = infos[0].n_bytes // infos[0].dtype.itemsize
    if width is not None:
        n_parameters = n_parameters * 32 // width[0]
    return NewModule(tensors, n_parameters, tuple(blocks))


def _copy_rows(infos: list[TensorInfo], rows: slice) -> tuple[np.ndarray, ...]:
    return tuple(read_tensor(info, rows) for info in infos)


def _requantized(
    path: str, pieces: list[list[TensorInfo]], change: tuple[Width, Width, str]
) -> NewModule:
    """Pieces: for words, scales and biases, one for each expert."""
    old, width, _ = change
    words, scales, _ = pieces
    n_rows, n_words = words[0].shape
    shape = (len(words), n_rows, n_words * 32 // old[0])
    if shape[-1] % width[1]:
        raise ConfigError(
            f"{path}: rows of {shape[-1]} weights cannot be cut into groups of "
            f"{width[1]}; give a group size that divides them"
        )
    tensors = quantized_tensors(path, shape, scales[0].dtype, width)
    experts = [*zip(*pieces, strict=True)]
    step = max(1, BLOCK_BYTES // words[0].n_bytes)
    blocks = tuple(
        partial(_requantize_experts, experts[i : i + step], change)
        for i in range(0, len(experts), step)
    )
    return NewModule(tensors, int(np.prod(shape)), blocks)


def _requantize_experts(
    experts: list[tuple[TensorInfo, ...]], change: tuple[Width, Width, str]
) -> tuple[np.ndarray, ...]:
    old, (bits, group_size), rule = change
    parts = (
        np.stack([read_tensor(info) for info in infos])
        for infos in zip(*experts, strict=True)
    )
    matrix = QuantizedMatrix(*parts, *old)
    return arrays(quantize.requantize(matrix, bits, group_size, rule))
