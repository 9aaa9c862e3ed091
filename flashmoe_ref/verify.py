"""Check that a model's files, and its packed experts, still hold what was written.

Three checks, each as far as the files allow: headers, sizes and shapes; the digests
that lie beside files that we wrote; packed experts against the checkpoint's bytes.
**But:** a checkpoint from elsewhere has no digests, so only its headers are checked.
*Taught in notebooks/06.*
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from .arrivals import checksum, checksum_path, read_checksums
from .checkpoint import Checkpoint, find_shards
from .config import read_json
from .errors import CheckpointError, PackError
from .experts import (
    LAYOUT_NAME,
    PACKED_FOLDER,
    ExpertFiles,
    experts_in_place,
    formats_of_layout,
    packed_experts,
    packed_name,
)
from .headers import read_header, told_in_one_line
from .pack import expert_label
from .shards import HEADER_PART
from .writing import digest_path, progress_bar, read_bytes, read_digests

CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Verified:
    """What was found to be right."""

    n_files: int
    n_bytes: int  # compared with digests or with the checkpoint
    n_unchecked: int  # files with neither, of which only headers and sizes were checked


@dataclass(frozen=True)
class _Check:
    """Work on one file: it yields the problems found. None: nothing to compare with."""

    n_bytes: int
    problems: Callable[[tqdm], Iterator[str]] | None


def verify(
    folder: str | Path, packed: str | Path | None = None, progress: bool = True
) -> Verified:
    """Check a model folder and its packed experts, or a folder of packed experts alone.

    Packed experts are looked for in MODEL/packed_experts, unless `packed` names another
    folder; those with other bits than the model's are held against their digests only.
    Raises: ConfigError, CheckpointError if headers, sizes or layout are wrong;
            PackError naming file, layer and expert (or tensor) of a changed byte.
    """
    folder = Path(folder)
    with told_in_one_line(folder):
        return _verify(folder, packed, progress)


def _verify(folder: Path, packed: str | Path | None, progress: bool) -> Verified:
    if (folder / LAYOUT_NAME).exists() and not (folder / "config.json").exists():
        return _run(folder, _checks_of_packed_alone(folder), progress)
    checkpoint = Checkpoint.open(folder)
    checks = [_check_of_shard(path) for path in find_shards(folder)]
    where = Path(packed or folder / PACKED_FOLDER)
    if packed or where.exists():
        checks += _checks_of_packed(where, checkpoint)
    return _run(folder, checks, progress)


def _run(folder: Path, checks: list[_Check], progress: bool) -> Verified:
    found, able = [], [check for check in checks if check.problems]
    n_bytes = sum(check.n_bytes for check in able)
    with progress_bar(f"verify {folder.name}", n_bytes, progress) as bar:
        for check in able:
            found += check.problems(bar)
    if found:
        more = f" (and {len(found) - 1} more like this)" if len(found) > 1 else ""
        raise PackError(f"{found[0]}{more}")
    return Verified(len(checks), n_bytes, len(checks) - len(able))


# ---- shards --------------------------------------------------------------------------


def _check_of_shard(path: Path) -> _Check:
    digests = read_digests(path)
    problems = partial(_shard_problems, path, digests) if digests else None
    return _Check(path.stat().st_size, problems)


def _shard_problems(path: Path, digests: dict[str, str], bar: tqdm) -> Iterator[str]:
    infos = read_header(path)
    data_start = min(info.offset for info in infos.values())
    places = {HEADER_PART: (0, data_start)}
    places |= {name: (info.offset, info.n_bytes) for name, info in infos.items()}
    if set(places) != set(digests):
        yield f"{path}: holds other tensors than {digest_path(path).name} lists"
        return
    with open(path, "rb") as file:
        for name, place in places.items():
            if _digest(file, *place, bar) != digests[name]:
                yield f"{path}: {name} has changed since it was written; make it again"


def _digest(file: BinaryIO, offset: int, n_bytes: int, bar: tqdm) -> str:
    digest = hashlib.sha256()
    for start in range(0, n_bytes, CHUNK_BYTES):
        n = min(CHUNK_BYTES, n_bytes - start)
        digest.update(read_bytes(file, offset + start, n))
        bar.update(n)
    return digest.hexdigest()


# ---- packed experts ------------------------------------------------------------------


def _checks_of_packed(folder: Path, checkpoint: Checkpoint) -> list[_Check]:
    packed = packed_experts(folder, checkpoint.config)
    source: ExpertFiles | None = experts_in_place(checkpoint)
    if _sizes(source) != _sizes(packed):
        source = None  # other bits: packed from another checkpoint
    return [
        _check_of_layer(folder, layer, (fmt.n_bytes, packed.n_experts), source)
        for layer, fmt in enumerate(packed.formats)
    ]


def _sizes(experts: ExpertFiles) -> list[tuple]:
    return [tuple((p.name, p.n_bytes) for p in fmt.parts) for fmt in experts.formats]


def _checks_of_packed_alone(folder: Path) -> list[_Check]:
    where = folder / LAYOUT_NAME
    layout = read_json(where)
    kinds, layers = formats_of_layout(layout, where)
    sizes = [(kind.get("expert_size"), layout.get("num_experts")) for kind in kinds]
    if any(type(n) is not int or n < 1 for size in sizes for n in size):
        raise CheckpointError(
            f"{where}: expert_size and num_experts must be positive numbers; pack again"
        )
    checks = []
    for layer, number in enumerate(layers):
        path, (n_bytes, n_experts) = folder / packed_name(layer), sizes[number]
        if not path.exists() or path.stat().st_size != n_bytes * n_experts:
            raise CheckpointError(
                f"{path}: is missing or has not the {n_bytes * n_experts:,} bytes that "
                f"{LAYOUT_NAME} promises; pack again"
            )
        checks.append(_check_of_layer(folder, layer, sizes[number], None))
    return checks


def _check_of_layer(
    folder: Path, layer: int, size: tuple[int, int], source: ExpertFiles | None
) -> _Check:
    """Size: bytes of an expert, number of experts."""
    digests = read_digests(folder / packed_name(layer))
    if digests is None and source is None:
        return _Check(size[0] * size[1], None)
    problems = partial(_layer_problems, folder, layer, size, source, digests)
    return _Check(size[0] * size[1], problems)


def _layer_problems(
    folder: Path,
    layer: int,
    size: tuple[int, int],
    source: ExpertFiles | None,
    digests: dict[str, str] | None,
    bar: tqdm,
) -> Iterator[str]:
    path = folder / packed_name(layer)
    n_bytes, n_experts = size
    if digests and list(digests) != [expert_label(e) for e in range(n_experts)]:
        yield f"{digest_path(path)}: does not list the experts; pack again"
        return
    checksums = None
    if checksum_path(path).exists():
        checksums = read_checksums(path, n_experts)
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        runs = source.runs[layer] if source else ()
        numbers = {place[0] for run in runs for place in run.places}
        files = {n: stack.enter_context(open(source.files[n], "rb")) for n in numbers}
        for expert in range(n_experts):
            where = f"{path}: layer {layer}, expert {expert}"
            record = read_bytes(file, expert * n_bytes, n_bytes)
            bar.update(n_bytes)
            sha256 = hashlib.sha256(record).hexdigest()
            if digests and sha256 != digests[expert_label(expert)]:
                yield f"{where} has changed since it was packed; pack again"
            elif source and record != b"".join(_in_place(source, layer, expert, files)):
                yield f"{where} differs from the checkpoint; verify that, or pack again"
            elif checksums and checksum([record]) != checksums[expert]:
                yield f"{where}: its checksum has changed; pack again"


def _in_place(
    source: ExpertFiles, layer: int, expert: int, files: dict[int, BinaryIO]
) -> Iterator[bytes]:
    for run in source.runs[layer]:
        number, offset = run.places[expert]
        yield read_bytes(files[number], offset, run.n_bytes)
