"""Write a checkpoint in MLX's layout: safetensors shards and their index.

All sizes are known before the first byte is written: so the headers and places are
planned first, then each shard is filled block by block, and no more than a few blocks
are ever in memory. Follows the safetensors format and mlx-lm's file names.
*Taught in notebooks/06.*
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .checkpoint import INDEX_NAME
from .headers import DTYPES, told_in_one_line
from .writing import (
    check_space,
    is_finished,
    new_parts_file,
    open_target,
    progress_bar,
    write_small,
)

HEADER_PART = "header"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_OFFSET = 10**15  # for planning: no shard's offset has more digits
N_WORKERS = min(8, os.cpu_count() or 1)  # NumPy releases the GIL in its loops

Block = Callable[[], tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class NewTensor:
    """A tensor that will be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class NewModule:
    """Tensors made together and kept in one shard, such as words, scales and biases.

    Each block gives the next piece of every tensor, in the order of `tensors`.
    """

    tensors: tuple[NewTensor, ...]
    n_parameters: int
    blocks: tuple[Block, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class Shard:
    """A safetensors file that will be written."""

    name: str
    header: bytes
    modules: tuple[NewModule, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(module.n_bytes for module in self.modules)


def plan_shards(modules: Iterable[NewModule], shard_bytes: int) -> list[Shard]:
    """Fill shards in the given order; no shard is larger than `shard_bytes`.

    Only a module that alone is larger than that gets a larger shard, of its own.
    """
    groups: list[list[NewModule]] = []
    used = 0
    for module in modules:
        n_bytes = module.n_bytes + sum(_entry_bytes(t) for t in module.tensors)
        if not groups or used + n_bytes > shard_bytes:
            groups.append([])
            used = len(_header_bytes(())) + 8  # 8: the header's own padding
        groups[-1].append(module)
        used += n_bytes
    return [
        Shard(_shard_name(i, len(groups)), _header_bytes(group), tuple(group))
        for i, group in enumerate(groups)
    ]


def _shard_name(number: int, n_shards: int) -> str:
    if n_shards == 1:
        return "model.safetensors"
    return f"model-{number + 1:05d}-of-{n_shards:05d}.safetensors"


def _entry(tensor: NewTensor, start: int) -> dict:
    return {
        "dtype": DTYPE_NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "data_offsets": [start, start + tensor.n_bytes],
    }


def _entry_bytes(tensor: NewTensor) -> int:
    """Bytes that a tensor takes in a header, at most."""
    return len(json.dumps({tensor.name: _entry(tensor, LARGEST_OFFSET)}))


def _header_bytes(modules: Iterable[NewModule]) -> bytes:
    header: dict[str, dict] = {"__metadata__": {"format": "mlx"}}
    start = 0
    for module in modules:
        for tensor in module.tensors:
            header[tensor.name] = _entry(tensor, start)
            start += tensor.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts aligned
    return len(text).to_bytes(8, "little") + text


def write_checkpoint(
    folder: Path,
    shards: list[Shard],
    record: tuple[str, dict],
    config: dict,
    copied: Iterable[Path] = (),
    progress: bool = True,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write shards, index, copies of small files and, last, config.json into a folder.

    Last, because a folder without config.json is not taken for a model. record: the
    name and the content of the file that says what the folder is made from. check: is
    called before a shard gets its name; it raises if the source has changed meanwhile.
    Raises: PackError if there is no room, or the folder holds something else.
    """
    record_name, content = record
    with open_target(folder, content, record_name):
        check_space(folder, {folder / shard.name: shard.n_bytes for shard in shards})
        write_small(folder / record_name, content)
        n_bytes = sum(shard.n_bytes for shard in shards)
        with progress_bar(folder.name, n_bytes, progress) as bar:
            write_shards(folder, shards, bar, check)
        for path in copied:
            with told_in_one_line(path):
                content = path.read_bytes()
            write_small(folder / path.name, content)
        write_small(folder / "config.json", config)


def write_shards(
    folder: Path, shards: list[Shard], bar: tqdm, check: Callable[[], None]
) -> None:
    """Write the shards that are not finished yet, then the index."""
    for shard in shards:
        if is_finished(folder / shard.name):
            bar.update(shard.n_bytes)
        else:
            _write_shard(folder / shard.name, shard, bar, check)
    modules = [module for shard in shards for module in shard.modules]
    weight_map = {t.name: s.name for s in shards for m in s.modules for t in m.tensors}
    metadata = {
        "total_size": sum(module.n_bytes for module in modules),
        "total_parameters": sum(module.n_parameters for module in modules),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_small(folder / INDEX_NAME, index)


def _write_shard(
    path: Path, shard: Shard, bar: tqdm, check: Callable[[], None]
) -> None:
    parts = {HEADER_PART: len(shard.header)}
    parts |= {t.name: t.n_bytes for module in shard.modules for t in module.tensors}
    with new_parts_file(path, parts) as file:
        bar.update(file.write(HEADER_PART, shard.header))
        blocks = (block for module in shard.modules for block in module.blocks)
        owners = (module for module in shard.modules for _ in module.blocks)
        for module, arrays in zip(owners, in_order(blocks), strict=True):
            for tensor, array in zip(module.tensors, arrays, strict=True):
                bar.update(file.write(tensor.name, array))
        check()


def in_order(blocks: Iterable[Block]) -> Iterator[tuple[np.ndarray, ...]]:
    """Results of the blocks, in order; a few are worked on at the same time."""
    with ThreadPoolExecutor(N_WORKERS) as pool:
        running: deque = deque()
        for block in blocks:
            running.append(pool.submit(block))
            if len(running) > N_WORKERS:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
