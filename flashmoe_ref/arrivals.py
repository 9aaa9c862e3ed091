"""What is checked of an expert between its read and its use: numbers, and checksums.

The thread that reads looks at the bytes while they are in the processor's cache. What
fails is an error that names file, layer and expert, and its slot is never served. Here
is the plain way to find NaN and infinity; `guard_kernels.py` has the quick one.
Checksums are CRC-32: they find what goes wrong by itself, at twice the speed of the
SHA-256 that `flashmoe verify` compares. **But:** only packed experts have them.
*Taught in notebooks/07.*
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import CheckpointError, NumericError, ReadError
from .experts import ExpertFiles, Part
from .guards import EXPONENTS, REMEDY, first_bad

CHECKSUM_SUFFIX = ".crc32"
WORD_BYTES = 8  # that the kernel looks at together: two floats or four


class Floats:
    """The floats of some slots, in the memory that records are read into."""

    def __init__(self, parts: Sequence[Part], memory: Sequence[np.ndarray]) -> None:
        """Shapes: memory (slots, bytes) uint8, for each part."""
        self.numbers = [i for i, p in enumerate(parts) if p.dtype.name in EXPONENTS]
        # for each of these parts: (slots, values)
        self.values = [memory[i].view(parts[i].dtype) for i in self.numbers]
        rows = [_table_row(values) for values in self.values]
        self.table = np.array(rows, np.int64).reshape(-1, 5)


def _table_row(values: np.ndarray) -> tuple[int, ...]:
    """What a kernel has to know of a part. Shapes: values (slots, n)."""
    n_lanes = WORD_BYTES // values.dtype.itemsize
    ones = sum(1 << 8 * values.dtype.itemsize * lane for lane in range(n_lanes))
    mask, _ = EXPONENTS[values.dtype.name]
    lowest = mask & -mask  # the exponent's lowest bit
    n_bytes = values.shape[1] * values.dtype.itemsize
    return values.ctypes.data, values.strides[0], n_bytes, mask * ones, lowest * ones


def find_bad(floats: Floats, slots: Sequence[int]) -> tuple[int, int] | None:
    """The first NaN or infinity in some slots: which of them, and the part's number."""
    for position, slot in enumerate(slots):
        for number, values in zip(floats.numbers, floats.values, strict=True):
            if first_bad(values[slot]) is not None:
                return position, number
    return None


FindBad = Callable[[Floats, Sequence[int]], tuple[int, int] | None]


@dataclass(frozen=True)
class Checks:
    """What a store looks at in an expert that was read; None: it does not."""

    find_bad: FindBad | None = None  # NaN and infinity
    checksums: Sequence[Sequence[int]] | None = None  # of all experts, by layer


def bad_expert(
    files: ExpertFiles, layer: int, expert: int, number: int
) -> NumericError:
    """The error for an expert with NaN or infinity in the part of that number."""
    parts = files.formats[layer].parts
    run = next(r for r in files.runs[layer] if r.first <= number < r.last)
    file, offset = run.places[expert]
    offset += sum(part.n_bytes for part in parts[run.first : number])
    return NumericError(
        f"{files.files[file]}: NaN or infinity in {parts[number].name} of expert "
        f"{expert} of layer {layer}, in the {parts[number].n_bytes:,} bytes from "
        f"{offset:,}; {REMEDY}"
    )


# --- checksums ------------------------------------------------------------------------


def checksum(pieces: Iterable[bytes | memoryview], start: int = 0) -> int:
    """The CRC-32 of a record that lies in pieces; start: of what came before them."""
    for piece in pieces:
        start = zlib.crc32(piece, start)
    return start


def checksum_path(path: Path) -> Path:
    """Where the checksums of a layer's packed experts lie."""
    return path.with_name(path.name + CHECKSUM_SUFFIX)


def checksum_lines(checksums: Iterable[int]) -> bytes:
    """The content of that file: a line of eight hexadecimal digits an expert."""
    return "".join(f"{value:08x}\n" for value in checksums).encode()


def read_checksums(path: Path, n_experts: int) -> list[int]:
    """The checksums of a layer's packed experts.

    Raises: CheckpointError if there are none, or the file is damaged.
    """
    where = checksum_path(path)
    try:
        content = where.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{where}: no such file, so reads cannot be verified; run 'flashmoe pack' "
            f"again, it adds the checksums"
        ) from None
    try:
        found = [int(line, 16) for line in content.split()]
    except ValueError:
        found = []
    if len(found) != n_experts or checksum_lines(found) != content:
        raise CheckpointError(
            f"{where}: does not hold {n_experts} checksums; delete it and run "
            f"'flashmoe pack' again"
        )
    return found


def changed_expert(files: ExpertFiles, layer: int, expert: int) -> ReadError:
    """The error for an expert whose bytes are not those that were packed."""
    file, _ = files.runs[layer][0].places[expert]
    return ReadError(
        f"{files.files[file]}: expert {expert} of layer {layer} does not match its "
        f"checksum: the file has changed since it was packed, or the read went wrong; "
        f"check it with 'flashmoe verify'"
    )
