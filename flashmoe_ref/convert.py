"""Hugging Face checkpoint -> quantized checkpoint in MLX's layout.

Writes what `mlx_lm.convert` writes: the same names, shapes, dtypes and bytes, so that
mlx-lm, this package and flash-moe's tools read it. Unlike it, never holds more than a
few experts in memory, and goes on after a kill where it stopped.
**But:** affine quantization only; the vision tower and the multi-token-prediction head
are left out; a float keeps the dtype that the file has, whatever config.json says.
*Taught in notebooks/05 and 06.*
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .checkpoint import ZERO_CENTRED, Checkpoint
from .config import ModelConfig, read_json
from .errors import CheckpointError, ConfigError, PackError
from .experts import PROJECTIONS, ExpertFiles, experts_in_place
from .headers import TensorInfo, read_tensor, told_in_one_line
from .mlx_config import (
    GATE,
    GATE_BITS,
    GATE_GROUP_SIZE,
    converted_config,
    with_quantization,
)
from .quantize import BITS, GROUP_SIZES, QuantizedMatrix, quantize
from .shards import Block, NewModule, NewTensor, Shard, plan_shards, write_checkpoint
from .writing import identify

RECORD_NAME = "conversion.json"
FORMAT = 1  # of the record
SHARD_BYTES = 5_000_000_000
BLOCK_BYTES = 1 << 24  # of source weights worked on at a time, by each worker

COPIED_FILES = (
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
    "LICENSE*",
)


@dataclass(frozen=True)
class Settings:
    """How to quantize: bits of the routed experts and of the rest; one group size."""

    bits: int
    dense_bits: int
    group_size: int
    shard_bytes: int

    def __post_init__(self) -> None:
        for bits in (self.bits, self.dense_bits):
            check_settings(bits, self.group_size, self.shard_bytes)

    def widths(self, module: str, n_in: int) -> tuple[int, int] | None:
        """Bits and group size of a module; None if its rows cannot be cut so."""
        if n_in % self.group_size:
            return None  # as mlx-lm does
        if GATE.search(module):
            fits = n_in % GATE_GROUP_SIZE == 0
            return GATE_BITS, GATE_GROUP_SIZE if fits else self.group_size
        return (
            self.bits if ".mlp.experts." in module else self.dense_bits,
            self.group_size,
        )


def convert(
    source: str | Path,
    target: str | Path,
    bits: int = 4,
    group_size: int = 64,
    dense_bits: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Quantize a Hugging Face model folder into a new folder in MLX's layout.

    `bits` is for the routed experts, `dense_bits` (the same by default) for the rest;
    the gates get 8. A run that was cut off goes on if it is called again.
    Raises: ConfigError, CheckpointError; PackError if there is no room, or the target
            holds something else.
    Source: mlx-lm `convert`.
    """
    source, target = Path(source), Path(target)
    checkpoint = Checkpoint.open(source)
    if checkpoint.quantization:
        raise ConfigError(
            f"{source}: is quantized already; use 'flashmoe requantize' to change bits"
        )
    dense_bits = bits if dense_bits is None else dense_bits
    settings = Settings(bits, dense_bits, group_size, shard_bytes)
    _check_group_size(checkpoint, group_size)
    modules, widths = _plan_modules(checkpoint, settings)
    config = converted_config(checkpoint, read_json(source / "config.json"))
    config = with_quantization(config, (bits, group_size), widths)
    record = {"made_by": "convert", "settings": asdict(settings)}
    write_model(
        checkpoint, target, record, plan_shards(modules, shard_bytes), config, progress
    )
    return target


def check_settings(bits: int, group_size: int, shard_bytes: int) -> None:
    """Raises: ConfigError for bits, group sizes or shard sizes that do not exist."""
    if bits not in BITS:
        raise ConfigError(f"{bits} bits are not supported; use one of {BITS}")
    if group_size not in GROUP_SIZES:
        raise ConfigError(
            f"group size {group_size} is not supported; use one of {GROUP_SIZES}"
        )
    if shard_bytes < 1:
        raise ConfigError(f"a shard size of {shard_bytes} bytes is too small")


def _check_group_size(checkpoint: Checkpoint, group_size: int) -> None:
    # DIFFERS: mlx-lm would leave such experts unquantized.
    config = checkpoint.config
    for n_in in (config.hidden_size, config.moe_intermediate_size):
        if n_in % group_size:
            raise ConfigError(
                f"{checkpoint.path}: experts have rows of {n_in} weights, which groups "
                f"of {group_size} do not divide; give a smaller group size"
            )


def write_model(
    checkpoint: Checkpoint,
    target: Path,
    record: dict,
    shards: list[Shard],
    config: dict,
    progress: bool,
) -> None:
    """Write a checkpoint that was made from another, with its tokenizer files."""
    check_apart(checkpoint.path, target)
    source = identify(checkpoint, lambda name: True)
    record = {"format": FORMAT, **record, "source": source}
    folder = checkpoint.path
    with told_in_one_line(folder):
        copied = [p for pattern in COPIED_FILES for p in sorted(folder.glob(pattern))]
    named = (RECORD_NAME, record)
    check = checkpoint.check_unchanged
    write_checkpoint(target, shards, named, config, copied, progress, check)


def check_apart(source: Path, target: Path) -> None:
    """Raises: PackError if a model would be written over its own source."""
    if target.resolve() == source.resolve():
        raise PackError(f"{target}: is the source itself; give another folder")


# ---- which tensors -------------------------------------------------------------------


def _plan_modules(
    checkpoint: Checkpoint, settings: Settings
) -> tuple[list[NewModule], dict[str, tuple[int, int]]]:
    """All modules to write, in the model's order, and the widths of the quantized."""
    experts = experts_in_place(checkpoint)
    modules, widths = [], {}
    for name, pieces in _sources(checkpoint, experts):
        stem = name.removesuffix(".weight")
        path = target_name(checkpoint.config, stem)
        info = pieces[0]
        is_matrix = len(info.shape) == 2 and name.endswith(".weight")
        width = settings.widths(stem, info.shape[-1]) if is_matrix else None
        if width is not None:
            widths[path] = width
            modules.append(_quantized(path, pieces, width))
        else:
            path = target_name(checkpoint.config, name)
            modules.append(_plain(checkpoint, name, path, pieces))
    return modules, widths


def _sources(
    checkpoint: Checkpoint, experts: ExpertFiles
) -> Iterator[tuple[str, list[TensorInfo]]]:
    """Canonical name of each module's tensor, and its pieces: one, or one an expert."""
    named = {n: [i] for n, i in checkpoint.tensors.items() if ".mlp.experts." not in n}
    if checkpoint.config.tie_word_embeddings:
        named.pop("lm_head.weight", None)
    for layer in range(checkpoint.config.num_hidden_layers):
        for number, projection in enumerate(PROJECTIONS):
            name = f"layers.{layer}.mlp.experts.{projection}.weight"
            named[name] = expert_pieces(experts, layer, number)
    for name in sorted(named, key=model_order):
        yield name, named[name]


def model_order(name: str) -> tuple:
    """Sort key: embedding, layers by number, final norm, lm_head."""
    match = re.match(r"layers\.(\d+)\.(.*)", name)
    if match:
        return 1, int(match[1]), match[2]
    return (0 if name.startswith("embed_tokens") else 2), name != "norm.weight", name


def expert_pieces(experts: ExpertFiles, layer: int, number: int) -> list[TensorInfo]:
    """Where part `number` of each expert of a layer lies, as a tensor of its own."""
    parts = experts.formats[layer].parts
    part = parts[number]
    run = next(r for r in experts.runs[layer] if r.first <= number < r.last)
    inside = sum(p.n_bytes for p in parts[run.first : number])
    name = f"layers.{layer}.mlp.experts.{part.name}"
    return [
        TensorInfo(
            f"{name} of expert {e}",
            experts.files[file],
            offset + inside,
            part.n_bytes,
            part.dtype,
            part.shape,
        )
        for e, (file, offset) in enumerate(run.places)
    ]


def target_name(config: ModelConfig, name: str) -> str:
    """The name that mlx-lm gives a canonical tensor or module.

    Source: mlx-lm `qwen3_5_moe.py` and `qwen3_next.py`, `sanitize`.
    """
    prefix = "" if config.model_type == "qwen3_next" else "language_model."
    if not name.startswith("lm_head"):
        prefix += "model."
    return prefix + name.replace(".mlp.experts.", ".mlp.switch_mlp.")


# ---- how a tensor becomes a new one --------------------------------------------------


def _quantized(
    path: str, pieces: list[TensorInfo], width: tuple[int, int]
) -> NewModule:
    rows, n_in = pieces[0].shape
    lead = (len(pieces), rows) if ".switch_mlp." in path else (rows,)
    blocks = [
        partial(_quantize_rows, piece, part, width)
        for piece in pieces
        for part in row_blocks(piece)
    ]
    tensors = quantized_tensors(path, (*lead, n_in), pieces[0].dtype, width)
    return NewModule(tensors, len(pieces) * rows * n_in, tuple(blocks))


def quantized_tensors(
    path: str, shape: tuple[int, ...], dtype: np.dtype, width: tuple[int, int]
) -> tuple[NewTensor, ...]:
    """Words, scales and biases of a module; shape (..., out, in) is its float shape."""
    bits, group_size = width
    *lead, n_in = shape
    groups = (*lead, n_in // group_size)
    return (
        NewTensor(f"{path}.weight", np.dtype(np.uint32), (*lead, n_in * bits // 32)),
        NewTensor(f"{path}.scales", dtype, groups),
        NewTensor(f"{path}.biases", dtype, groups),
    )


def row_blocks(info: TensorInfo) -> list[slice]:
    """Ranges of the leading axis, none of much more than `BLOCK_BYTES`."""
    n_rows = info.shape[0]
    step = max(1, BLOCK_BYTES * n_rows // max(info.n_bytes, 1))
    return [slice(i, min(i + step, n_rows)) for i in range(0, n_rows, step)]


def _quantize_rows(
    info: TensorInfo, rows: slice, width: tuple[int, int]
) -> tuple[np.ndarray, ...]:
    try:
        return arrays(quantize(read_tensor(info, rows), *width))
    except ConfigError as error:
        raise CheckpointError(f"{info.file}: {info.name}: {error}") from None


def arrays(matrix: QuantizedMatrix) -> tuple[np.ndarray, ...]:
    """The stored parts, in the order of `quantized_tensors`."""
    return matrix.weight, matrix.scales, matrix.biases


def _plain(
    checkpoint: Checkpoint, name: str, path: str, pieces: list[TensorInfo]
) -> NewModule:
    info = pieces[0]
    shape = (len(pieces), *info.shape) if ".switch_mlp." in path else info.shape
    if name.endswith("conv1d.weight"):
        channels = shape[0]
        shape = (channels, info.n_bytes // info.dtype.itemsize // channels, 1)
    stem = name.removesuffix(".weight")
    add_one = checkpoint.norms_are_zero_centred and ZERO_CENTRED.search(stem)
    blocks: list[Block] = [
        partial(_copy_rows, piece, part, bool(add_one))
        for piece in pieces
        for part in row_blocks(piece)
    ]
    tensor = NewTensor(path, info.dtype, shape)
    n_parameters = tensor.n_bytes // info.dtype.itemsize
    return NewModule((tensor,), n_parameters, tuple(blocks))


def _copy_rows(info: TensorInfo, rows: slice, add_one: bool) -> tuple[np.ndarray]:
    values = read_tensor(info, rows)
    if add_one:  # NOTE: rounds to the file's dtype, as mlx-lm does
        values = values + values.dtype.type(1)
    return (values,)
