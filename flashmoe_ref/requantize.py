"""Checkpoint in MLX's layout -> the same with other bits in its experts, or in all.

The experts take nearly all of a model's bytes, so 4 -> 2 bits nearly halves what has to
be read for a token; what it costs in quality is lesson 10. What is to stay as it is, is
copied byte for byte. Follows flash-moe's 2-bit experiment, with a choice of three
rules, and of widths by projection and by layer.
**But:** a vision tower is left out. *Taught in notebooks/05 and 10.*
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from .mlx_config import GATE, with_quantization
from .quantize import QuantizedMatrix
from .shards import NewModule, NewTensor, plan_shards

Width = tuple[int, int]  # bits, group size

BLOCK_BYTES = 1 << 20  # of words: small experts are worked on many at a time
EXPERTS = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\w+)")


@dataclass(frozen=True)
class Widths:
    """The bits that modules are to have; None leaves them as they are."""

    bits: int  # of the routed experts
    group_size: int  # of all that changes, except the gates
    down_bits: int | None = None  # of the experts' down projections
    dense_bits: int | None = None  # of all but experts and gates
    router_bits: int | None = None  # of the gates: router, and shared expert's
    layer_bits: Mapping[int, int] | None = None  # of the experts of single layers

    def of(self, module: str, old: Width) -> Width:
        """Of a quantized module, by its canonical name."""
        if match := EXPERTS.fullmatch(module):
            is_down = match[2] == "down_proj" and self.down_bits is not None
            bits = self.down_bits if is_down else self.bits
            return (self.layer_bits or {}).get(int(match[1]), bits), self.group_size
        if GATE.search(module):
            return self.router_bits or old[0], old[1]
        return old if self.dense_bits is None else (self.dense_bits, self.group_size)

    def check(self, n_layers: int, shard_bytes: int) -> None:
        """Raises: ConfigError for widths and layers that do not exist."""
        optional = (self.down_bits, self.dense_bits, self.router_bits)
        named = [self.bits, *(bits for bits in optional if bits is not None)]
        for layer, bits in (self.layer_bits or {}).items():
            if layer not in range(n_layers):
                raise ConfigError(
                    f"layer_bits: there is no layer {layer}, only 0..{n_layers - 1}"
                )
            named.append(bits)
        for bits in named:
            check_settings(bits, self.group_size, shard_bytes)


def requantize(
    model_dir: str | Path,
    target: str | Path,
    bits: int,
    group_size: int | None = None,
    rule: str = "mlx",
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
    *,
    down_bits: int | None = None,
    dense_bits: int | None = None,
    router_bits: int | None = None,
    layer_bits: Mapping[int, int] | None = None,
) -> Path:
    """Write a copy of a model whose routed experts have `bits` bits.

    The group size stays as it is by default. Rules are those of `quantize.requantize`:
    mlx, minmax, least_squares. A run that was cut off goes on if it is called again.
    down_bits:   of the experts' down projections, for example one step more.
    dense_bits:  of everything that is no expert and no gate; default: as it is.
    router_bits: of the gates, routers and shared expert's alike; default: as they are.
    layer_bits:  {layer: bits} of experts, in place of bits and down_bits there.
    Raises: ConfigError, CheckpointError; PackError if there is no room, or the target
            holds something else.
    """
    model_dir, target = Path(model_dir), Path(target)
    checkpoint = Checkpoint.open(model_dir)
    old_group_size = _group_size(checkpoint)
    group_size = old_group_size if group_size is None else group_size
    wanted = Widths(bits, group_size, down_bits, dense_bits, router_bits, layer_bits)
    wanted.check(checkpoint.config.num_hidden_layers, shard_bytes)
    if rule not in quantize.RULES:
        raise ConfigError(f"rule {rule!r} is unknown; use one of {[*quantize.RULES]}")
    modules, widths = plan_requantized(checkpoint, wanted.of, rule)
    raw = read_json(model_dir / "config.json")
    raw.pop("vision_config", None)
    config = with_quantization(raw, (bits, group_size), widths)
    shards = plan_shards(modules, shard_bytes)
    record = _record(wanted, rule, shard_bytes)
    write_model(checkpoint, target, record, shards, config, progress)
    return target


def _group_size(checkpoint: Checkpoint) -> int:
    """Of the experts. Raises: ConfigError if they are not quantized."""
    formats = experts_in_place(checkpoint).formats
    if any(len(fmt.quantization) < len(PROJECTIONS) for fmt in formats):
        raise ConfigError(
            f"{checkpoint.path}: its experts are not quantized; use 'flashmoe convert'"
        )
    return formats[0].quantization["gate_proj"][1]


def _record(wanted: Widths, rule: str, shard_bytes: int) -> dict:
    """What was asked for, as JSON gives it back."""
    settings = {name: v for name, v in vars(wanted).items() if v is not None}
    if wanted.layer_bits is not None:
        layers = sorted(wanted.layer_bits.items())
        settings["layer_bits"] = {str(layer): bits for layer, bits in layers}
    settings |= {"rule": rule, "shard_bytes": shard_bytes}
    return {"made_by": "requantize", "settings": settings}


def plan_requantized(
    checkpoint: Checkpoint, width_of: Callable[[str, Width], Width], rule: str
) -> tuple[list[NewModule], dict[str, Width]]:
    """Modules to write, and the widths of the quantized ones by their full path.

    `width_of` gives the bits and group size of a quantized module, from its canonical
    name and what it has; where these are the same, its bytes are copied.
    """
    experts = experts_in_place(checkpoint)
    modules, widths = [], {}
    for module, infos in _modules(checkpoint).items():
        path = infos[0].name.removesuffix(".weight")
        old = checkpoint.quantization.get(module)
        width = None if old is None else width_of(module, old)
        if width is not None:
            widths[path] = width
        if width == old:
            modules.append(_copied(infos, old))
        elif match := EXPERTS.fullmatch(module):
            layer, first = int(match[1]), PROJECTIONS.index(match[2]) * len(KINDS)
            pieces = [expert_pieces(experts, layer, first + i) for i in range(3)]
            modules.append(_requantized_experts(path, pieces, (old, width, rule)))
        else:
            modules.append(_requantized_matrix(path, infos, (old, width, rule)))
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


def _requantized_experts(
    path: str, pieces: list[list[TensorInfo]], change: tuple[Width, Width, str]
) -> NewModule:
    """Pieces: for words, scales and biases, one for each expert."""
    words, scales, _ = pieces
    shape = (len(words), *_float_shape(path, words[0], change))
    tensors = quantized_tensors(path, shape, scales[0].dtype, change[1])
    experts = [*zip(*pieces, strict=True)]
    step = max(1, BLOCK_BYTES // words[0].n_bytes)
    blocks = tuple(
        partial(_requantize_experts, experts[i : i + step], change)
        for i in range(0, len(experts), step)
    )
    return NewModule(tensors, int(np.prod(shape)), blocks)


def _requantized_matrix(
    path: str, infos: list[TensorInfo], change: tuple[Width, Width, str]
) -> NewModule:
    """Infos: of words, scales and biases."""
    words, scales, _ = infos
    shape = _float_shape(path, words, change)
    tensors = quantized_tensors(path, shape, scales.dtype, change[1])
    blocks = tuple(
        partial(_requantize_rows, infos, rows, change) for rows in row_blocks(words)
    )
    return NewModule(tensors, int(np.prod(shape)), blocks)


def _float_shape(
    path: str, words: TensorInfo, change: tuple[Width, Width, str]
) -> tuple[int, int]:
    """Rows and columns of a matrix. Raises: ConfigError if new groups do not fit."""
    (old_bits, _), (_, group_size), _ = change
    n_rows, n_words = words.shape
    n_columns = n_words * 32 // old_bits
    if n_columns % group_size:
        raise ConfigError(
            f"{path}: rows of {n_columns} weights cannot be cut into groups of "
            f"{group_size}; give a group size that divides them"
        )
    return n_rows, n_columns


def _requantize_rows(
    infos: list[TensorInfo], rows: slice, change: tuple[Width, Width, str]
) -> tuple[np.ndarray, ...]:
    old, (bits, group_size), rule = change
    matrix = QuantizedMatrix(*_copy_rows(infos, rows), *old)
    return arrays(quantize.requantize(matrix, bits, group_size, rule))


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
