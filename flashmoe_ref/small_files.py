"""The small files beside the weights: read whole, but never more than they may be.

A path may lead to a folder, to a pipe that nobody writes to, or to a device without
end; a text may be no UTF-8, and JSON may be nested beyond any stack, hold numbers of
thousands of digits or a key twice. All of that ends in one line. **But:** what the
values mean, the callers check. *Used from notebooks/04 on.*
"""

import csv
import io
import json
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from .errors import FlashMoeError

MAX_BYTES = 200_000_000  # the largest known, an index or a tokenizer, have some 20 MB
GIT_LFS_MAGIC = b"version https://git-lfs"  # how an undownloaded file begins
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON may write one

Kind = type[FlashMoeError]  # of the errors that a caller wants


def size_of_file(path: Path, kind: Kind) -> int:
    """Bytes of a plain file. Raises: kind if it is none; OSError if there is none."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise kind(f"{path}: is {what}, not a file; give the file itself")
    return found.st_size


def read_bytes(path: Path, kind: Kind) -> bytes | None:
    """All of a small file, None if it does not exist.

    Raises: kind naming the file, what is wrong and what to do.
    """
    try:
        n_bytes = size_of_file(path, kind)
        if n_bytes > MAX_BYTES:
            raise kind(
                f"{path}: has {n_bytes:,} bytes, too many for what it should be; fetch "
                f"the file again"
            )
        with open(path, "rb") as file:
            return file.read(MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        if isinstance(error, FlashMoeError):
            raise
        raise kind(
            f"{path}: cannot be read ({error.strerror}); check the path and its rights"
        ) from None


def read_text(path: Path, kind: Kind) -> str | None:
    """The text of a small file, None if it does not exist. Raises: as `read_bytes`."""
    data = read_bytes(path, kind)
    return None if data is None else decode(data, path, kind)


def decode(data: bytes, where: object, kind: Kind) -> str:
    """The text of bytes. Raises: kind unless they are UTF-8."""
    if data.startswith(GIT_LFS_MAGIC):
        raise kind(
            f"{where}: a Git-LFS pointer, not the file itself; run `git lfs pull` there"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(
            f"{where}: not UTF-8 text (byte {error.start:,}); fetch the file again"
        ) from None


def parse_json(text: str, where: object, kind: Kind) -> Any:
    """The value of a JSON text in which no key stands twice in one object.

    Raises: kind naming the place and what is wrong.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        if HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # fails for one half alone
        return value
    except (ValueError, RecursionError) as error:
        # RecursionError: nested too deeply; ValueError: also a number too long for int
        raise kind(f"{where}: not valid JSON ({error}); fetch the file again") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r} appears twice in one object")
    return found


def parse_table(text: str, where: object, kind: Kind) -> list[dict[str, str]]:
    """Rows of a CSV text by the columns that its first line names, all of them whole.

    Raises: kind naming the place, and the line where a row is at fault.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        names = reader.fieldnames or []
        if len(set(names)) != len(names):
            raise kind(f"{where}: a column stands twice in its first line")
        for row in reader:
            if None in row or None in row.values():
                raise kind(
                    f"{where}: line {reader.line_num} has not the {len(names)} fields "
                    f"of the first line"
                )
            rows.append(row)
    except csv.Error as error:
        raise kind(f"{where}: not a CSV file ({error})") from None
    return rows


def number(row: dict[str, str], column: str, kind: Kind) -> float:
    """A finite number of a table. Raises: kind naming the column."""
    text = row.get(column) or ""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise kind(f"column {column}: {text!r} is no number")
    return value
