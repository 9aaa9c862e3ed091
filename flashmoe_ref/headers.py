"""The header of one safetensors file: where each tensor lies, checked before use.

Follows the safetensors format: 8 bytes with the header's length (little-endian), a JSON
header, then the data. We accept nothing that the `safetensors` library rejects: the
tensors must cover the data exactly, without holes or overlaps. **But:** floats of fewer
than 8 bits are refused. *Taught in notebooks/06.*
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from .errors import CheckpointError, FlashMoeError
from .small_files import GIT_LFS_MAGIC, size_of_file

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_AXES = 64  # NumPy's own limit
MAX_VALUES = 2**60  # of a tensor: beyond it, sizes in bits do not fit into 64 bits

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F64": np.dtype(np.float64),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. Nothing of it has been read."""

    name: str  # as the file calls it
    file: Path
    offset: int  # bytes from the start of the file
    n_bytes: int
    dtype: np.dtype
    shape: tuple[int, ...]


@contextmanager
def told_in_one_line(path: Path) -> Iterator[None]:
    """Turn what the system says while a model is read into a CheckpointError."""
    try:
        yield
    except FlashMoeError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f"{error.filename or path}: cannot be read ({reason})"
        ) from None


def stamp(file: Path | int, path: Path) -> tuple[int, int, int]:
    """What differs when a file was replaced or written to. file: perhaps open.

    Raises: CheckpointError naming the path.
    """
    with told_in_one_line(path):
        found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file; no tensor data is read.

    Raises: CheckpointError naming the file, what is wrong with it and what to do.
    Source: the safetensors format description.
    """
    path = Path(path)
    header, data_start, n_data_bytes = _read_json(path)
    infos = [
        _tensor_info(path, name, entry, data_start)
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    _check_cover(path, infos, data_start, n_data_bytes)
    return {info.name: info for info in infos}


def _read_json(path: Path) -> tuple[dict, int, int]:
    try:
        size = size_of_file(path, CheckpointError)
        with open(path, "rb") as file:
            head = file.read(len(GIT_LFS_MAGIC))
            _check_start(path, head, size)
            n_header = int.from_bytes(head[:8], "little")
            if n_header > size - 8 or n_header > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: its header claims {n_header:,} bytes, but the file has "
                    f"{size:,}; it is damaged or no safetensors file, fetch it again"
                )
            file.seek(8)
            text = file.read(n_header)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; fetch this part of the model"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return _parse_json(path, text), 8 + n_header, size - 8 - n_header


def _check_start(path: Path, head: bytes, size: int) -> None:
    if head.startswith(GIT_LFS_MAGIC):
        raise CheckpointError(
            f"{path}: is a Git-LFS pointer, not the weights; "
            f"run 'git lfs pull' or fetch the file itself"
        )
    if size < 8:
        raise CheckpointError(
            f"{path}: has only {size} bytes, too few for a safetensors file; "
            f"fetch it again"
        )


def _parse_json(path: Path, text: bytes) -> dict:
    def unique(pairs: list[tuple[str, object]]) -> dict:
        out = dict(pairs)
        if len(out) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(
                f"{path}: {twice!r} appears twice in the header; fetch the file again"
            )
        return out

    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not start with '{'")
        header = json.loads(
            text.decode("utf-8"), object_pairs_hook=unique, parse_int=_size
        )
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its header is not valid JSON ({error}); fetch the file again"
        ) from None
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or any(
        not isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(
            f"{path}: __metadata__ must map names to strings; the file is damaged"
        )
    try:
        "".join([*header, *metadata, *metadata.values()]).encode()
    except UnicodeEncodeError:  # half of a character, which JSON can write
        raise CheckpointError(
            f"{path}: a name in its header is not Unicode text; fetch the file again"
        ) from None
    return header


def _size(text: str) -> int:
    if text.startswith("-"):  # also -0, which is none for the library
        raise ValueError(f"{text[:20]} is not a size")
    return int(text)


def _tensor_info(path: Path, name: str, entry: object, start: int) -> TensorInfo:
    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r} {what}; fetch the file again")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad("must have exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {entry['dtype']!r}, which is not "
            f"supported; supported: {', '.join(DTYPES)}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_AXES
        or not all(_is_size(n) for n in shape)
        or math.prod(max(n, 1) for n in shape) > MAX_VALUES
    ):
        raise bad(f"has the impossible shape {shape!r}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_is_size(n) for n in offsets)
        or offsets[0] > offsets[1]
    ):
        raise bad(f"has the impossible data_offsets {offsets!r}")
    n_bytes = offsets[1] - offsets[0]
    if n_bytes != math.prod(shape) * dtype.itemsize:
        raise bad(f"takes {n_bytes} bytes, which does not fit its shape {shape}")
    return TensorInfo(name, path, start + offsets[0], n_bytes, dtype, tuple(shape))


def _is_size(n: object) -> bool:
    return type(n) is int and 0 <= n < 2**63


def _check_cover(
    path: Path, infos: list[TensorInfo], data_start: int, n_data_bytes: int
) -> None:
    """Tensors laid end to end must fill the data part exactly."""
    at = data_start
    for info in sorted(infos, key=lambda info: (info.offset, info.n_bytes)):
        if info.offset != at:
            what = "overlaps the one before it" if info.offset < at else "leaves a hole"
            raise CheckpointError(
                f"{path}: tensor {info.name!r} {what}; the file is damaged, "
                f"fetch it again"
            )
        at += info.n_bytes
    n_expected = at - data_start
    if n_expected > n_data_bytes:
        raise CheckpointError(
            f"{path}: is truncated: the header describes {n_expected:,} bytes of data, "
            f"the file holds {n_data_bytes:,}; fetch it again"
        )
    if n_expected < n_data_bytes:
        raise CheckpointError(
            f"{path}: has {n_data_bytes - n_expected:,} bytes that belong to no "
            f"tensor; the file is damaged, fetch it again"
        )


def read_tensor(info: TensorInfo, rows: slice | None = None) -> np.ndarray:
    """Read one tensor, or a range of its leading axis, into new memory.

    Raises: CheckpointError if the file has become shorter than its header said.
    """
    start, n_rows, shape = 0, None, info.shape
    if rows is not None:
        start, stop, _ = rows.indices(info.shape[0])
        n_rows = stop - start
        shape = (n_rows, *info.shape[1:])
    row_items = math.prod(info.shape[1:])
    offset = info.offset + start * row_items * info.dtype.itemsize
    try:
        data = np.fromfile(info.file, info.dtype, math.prod(shape), offset=offset)
    except OSError as error:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} cannot be read ({error.strerror})"
        ) from None
    if data.size != math.prod(shape):
        raise CheckpointError(
            f"{info.file}: ended inside tensor {info.name!r}; was the file changed? "
            f"fetch it again"
        )
    return data.reshape(shape)
