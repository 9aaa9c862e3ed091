"""A random checkpoint larger than the disk: many layers share few files of experts.

The dense weights are written whole; the experts only packed, and only for as many
layers as fit. Layer i of the others is a link to the file of layer i modulo that
number, so names, sizes and reads are those of the full model. **But:** the page cache
sees the few files: it may hold a larger share of them than it would of all. Measure
past it (`bypass_page_cache`), or with a limit on memory. *Taught in notebooks/13.*
"""

from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from .accounting import dense_bytes, expert_bytes
from .checkpoint import Checkpoint
from .config import ModelConfig
from .errors import ConfigError
from .experts import (
    KINDS,
    LAYOUT_NAME,
    PACKED_FOLDER,
    PROJECTIONS,
    ExpertFiles,
    ExpertFormat,
    Part,
    Run,
    packed_name,
)
from .pack import describe_layout, expert_label
from .rehearse import random_rows, write_random
from .shards import in_order
from .writing import (
    check_space,
    is_finished,
    new_parts_file,
    open_target,
    progress_bar,
    write_small,
    writing_to,
)

SPARE_BYTES = 50_000_000  # headers, digests and small files


def layers_that_fit(
    config: ModelConfig, disk_budget: int, bits: int, dense_bits: int, group_size: int
) -> int:
    """How many layers' experts fit beside the dense weights; at most all.

    Raises: ConfigError if not even one does.
    """
    layer = config.num_experts * expert_bytes(config, bits, group_size)
    dense = dense_bytes(config, dense_bits, group_size, 8) + SPARE_BYTES
    n_layers = (disk_budget - dense) // layer
    if n_layers < 1:
        raise ConfigError(
            f"disk_budget={disk_budget / 1e9:.1f} GB: the dense weights take "
            f"{dense / 1e9:.1f} GB and the experts of one layer {layer / 1e9:.1f} GB; "
            f"give at least {(dense + layer) / 1e9:.1f} GB"
        )
    return min(n_layers, config.num_hidden_layers)


def write_folded(
    folder: str | Path,
    config: ModelConfig,
    n_layers: int,
    bits: int = 4,
    dense_bits: int = 4,
    group_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write random dense weights, and packed experts of n_layers layers; link the rest.

    A run that was cut off goes on if it is called again.
    Raises: ConfigError, PackError as `rehearse.write_random`.
    """
    folder = Path(folder)
    fmt = planned_format(config, bits, group_size)
    target = folder / PACKED_FOLDER
    paths = [target / packed_name(i) for i in range(n_layers)]
    n_bytes = config.num_experts * fmt.n_bytes
    widths = (bits, dense_bits, group_size)
    write_random(folder, config, *widths, seed, progress=progress, experts=False)
    with writing_to(target):
        target.mkdir(exist_ok=True)  # a checkpoint without experts must have it
    layout = _layout(folder, config, fmt, n_layers, seed)
    with open_target(target, layout, LAYOUT_NAME):
        check_space(target, dict.fromkeys(paths, n_bytes))
        write_small(target / LAYOUT_NAME, layout)
        with progress_bar(target.name, n_bytes * n_layers, progress) as bar:
            for layer, path in enumerate(paths):
                if not is_finished(path):
                    _write_layer(path, config, fmt, (seed, layer), bar.update)
                else:
                    bar.update(n_bytes)
        for layer in range(n_layers, config.num_hidden_layers):
            link = target / packed_name(layer)
            if not link.is_symlink():
                link.symlink_to(packed_name(layer % n_layers))
    return folder


def planned_format(config: ModelConfig, bits: int, group_size: int) -> ExpertFormat:
    """What an expert of this width consists of, with scales and biases in bfloat16."""
    d, f = config.hidden_size, config.moe_intermediate_size
    parts = []
    for projection in PROJECTIONS:
        rows, columns = (d, f) if projection == "down_proj" else (f, d)
        shapes = ((rows, columns * bits // 32), *((rows, columns // group_size),) * 2)
        dtypes = (np.dtype(np.uint32), *(np.dtype(ml_dtypes.bfloat16),) * 2)
        for kind, shape, dtype in zip(KINDS, shapes, dtypes, strict=True):
            size = shape[0] * shape[1] * dtype.itemsize
            parts.append(Part(f"{projection}.{kind}", shape, dtype, size))
    return ExpertFormat(tuple(parts), dict.fromkeys(PROJECTIONS, (bits, group_size)))


def _layout(
    folder: Path, config: ModelConfig, fmt: ExpertFormat, n_layers: int, seed: int
) -> dict:
    """As `pack` describes it, and what is random and folded about it."""
    places = tuple((0, e * fmt.n_bytes) for e in range(config.num_experts))
    runs = ((Run(0, len(fmt.parts), fmt.n_bytes, places),),)
    n = config.num_hidden_layers
    files = ExpertFiles("packed", (), (fmt,) * n, runs * n)
    folded = {"random_weights": True, "seed": seed, "layers_on_disk": n_layers}
    return describe_layout(Checkpoint.open(folder), files) | folded


def _write_layer(
    path: Path, config: ModelConfig, fmt: ExpertFormat, seed: tuple[int, ...], step
) -> None:
    labels = [expert_label(e) for e in range(config.num_experts)]
    blocks = [partial(_random_expert, fmt, (*seed, e)) for e in range(len(labels))]
    with new_parts_file(path, dict.fromkeys(labels, fmt.n_bytes)) as file:
        for label, arrays in zip(labels, in_order(blocks), strict=True):
            for array in arrays:
                step(file.write(label, array))


def _random_expert(fmt: ExpertFormat, seed: tuple[int, ...]) -> list[np.ndarray]:
    """All parts of an expert, in their order."""
    arrays: list[np.ndarray] = []
    for number, width in enumerate(fmt.quantization.values()):
        rows, n_words = fmt.parts[3 * number].shape
        n_in = n_words * 32 // width[0]
        arrays += random_rows(rows, n_in, width, (*seed, number))
    return arrays
