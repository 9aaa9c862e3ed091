"""The file of a trace: its arrays, and what must hold of them.

A NumPy .npz (a zip of arrays, nothing pickled), described in data/traces/README.md.
Arrays of other names are ignored, so later versions may add some. **But:** reading and
checking only; `trace.py` gives the arrays their meaning. *Taught in notebooks/07.*
"""

import json
import math
import struct
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError

import numpy as np

from .errors import TraceError
from .recording import KINDS
from .small_files import parse_json, size_of_file
from .writing import new_file

VERSION = 1  # of the file format
STEP = np.dtype([("n_tokens", "<i4"), ("position", "<i4")])  # tokens of the text before
SPAN = np.dtype(
    [
        ("step", "<i4"),
        ("layer", "<i2"),  # -1: embedding or logits
        ("kind", "u1"),  # index into recording.KINDS
        ("start_s", "<f8"),  # since the first step began
        ("end_s", "<f8"),
    ]
)
READ = np.dtype(
    [
        ("step", "<i4"),  # during which it began
        ("layer", "<i2"),
        ("expert", "<i2"),
        ("thread", "<i2"),  # 0: the computing one; readers from 1
        ("n_bytes", "<i8"),
        ("start_s", "<f8"),
        ("end_s", "<f8"),
    ]
)
REQUIRED = ("picks", "n_experts", "steps", "about")
OPTIONAL = ("ids", "weights", "hits", "spans", "reads")
KNOWN = ("version", *REQUIRED, *OPTIONAL)
MAX_EXPERTS = MAX_LAYERS = 32_768  # READ counts both in 16 bits
# What an array may unpack to: hits that are all alike take a thousandth of their bytes.
ROOM_BYTES, MOST_PACKED = 100_000_000, 100

# What NumPy and zipfile raise for bytes that are not what they should be.
DAMAGE = (
    ValueError,
    EOFError,
    LookupError,
    RuntimeError,  # "encrypted", "version not implemented"
    SyntaxError,  # of an array's header; so is the next
    TokenError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def write_arrays(path: str | Path, arrays: dict[str, np.ndarray], about: dict) -> None:
    """Write the arrays of a trace: the same content gives the same bytes."""
    n_experts = int(arrays["n_experts"])
    arrays = arrays | {
        "version": np.array(VERSION),
        "about": np.array(json.dumps(about)),
        "picks": arrays["picks"].astype(_type_of_picks(arrays["picks"], n_experts)),
    }
    with new_file(Path(path)) as file:  # given a name, NumPy would add .npz to it
        np.savez_compressed(file, **arrays)


def _type_of_picks(picks: np.ndarray, n_experts: int) -> type:
    if picks.size and picks.min() < 0:  # adaptive K dropped some
        return np.int16
    return np.uint8 if n_experts <= 256 else np.uint16


def read_arrays(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """The known arrays of a trace, and what it says about itself.

    Raises: TraceError for a file that is no trace, damaged, or of another version.
    """
    arrays = _unzip(path)
    version = arrays.get("version")
    if version is None or version.shape or version.dtype.kind not in "iu":
        raise TraceError(f"{path}: not a trace (it has no version)")
    if version != VERSION:
        raise TraceError(
            f"{path}: a trace of version {version}, but this flashmoe reads version "
            f"{VERSION}; record it again"
        )
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise TraceError(f"{path}: the array {missing[0]!r} is missing")
    n_experts = arrays["n_experts"]
    if n_experts.shape or n_experts.dtype.kind not in "iu":
        raise TraceError(f"{path}: n_experts is not one integer")
    about = _parse(arrays.pop("about"), path)
    del arrays["version"]
    return arrays, about


def _unzip(path: str | Path) -> dict[str, np.ndarray]:
    """The known arrays; of none is memory taken that its file does not fill."""
    try:
        n_bytes = size_of_file(Path(path), TraceError)
        with open(path, "rb") as file:
            if file.read(2) != b"PK":  # as every zip begins
                raise TraceError(f"{path}: not a trace (it is no .npz)")
        with np.load(path, allow_pickle=False) as found:
            names = [name for name in KNOWN if name in found.files]
            infos = [_member(found.zip, name) for name in names]
            if sum(i.file_size for i in infos) > ROOM_BYTES + MOST_PACKED * n_bytes:
                raise ValueError("it unpacks to more than a trace would")
            for info in found.zip.infolist():
                found.zip.open(info).close()  # fails for a name that was changed
            for info in infos:
                _check_claim(found.zip, info)
            return {name: found[name] for name in names}
    except TraceError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise TraceError(f"{path}: cannot be read ({reason})") from None
    except DAMAGE as error:
        reason = " ".join(str(error).split())
        raise TraceError(f"{path}: a damaged .npz ({reason}); get it again") from None


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    names = archive.namelist()
    return archive.getinfo(name if name in names else f"{name}.npy")


def _check_claim(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """NumPy takes the memory that an array's header claims: so look at it first."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, dtype = readers[version](file)
    if math.prod(shape) * dtype.itemsize > info.file_size:
        raise ValueError(f"{info.filename} claims more than it holds")


def _parse(text: np.ndarray, path: str | Path) -> dict:
    if text.shape or text.dtype.kind != "U":
        raise TraceError(f"{path}: 'about' is not one text")
    about = parse_json(str(text), f"{path}: 'about'", TraceError)
    if not isinstance(about, dict) or not isinstance(about.get("mode", {}), dict):
        raise TraceError(f"{path}: 'about' is not a JSON object with a mode")
    return about


# --- what must hold -------------------------------------------------------------------


def first_fault(
    arrays: dict[str, np.ndarray | None], n_experts: int, n_accesses: int | None = None
) -> str | None:
    """What is wrong with the arrays of a trace, or None. Absent ones may be None.

    n_accesses: how many the picks amount to, which is how many hits there must be.
    """
    picks, steps = arrays["picks"], arrays["steps"]
    if picks.ndim != 3 or picks.dtype.kind not in "iu" or 0 in picks.shape[1:]:
        return f"picks are {_form(picks)}, expected integers (T, L, K)"
    if steps.dtype != STEP or steps.ndim != 1:
        return f"steps are {_form(steps)}, expected (S,) of {STEP}"
    if not 1 <= n_experts <= MAX_EXPERTS or picks.shape[1] > MAX_LAYERS:
        return (
            f"{n_experts} experts in {picks.shape[1]} layers; at most "
            f"{MAX_EXPERTS} in {MAX_LAYERS} can be told"
        )
    n_tokens = int(steps["n_tokens"].sum())
    if len(picks) != n_tokens or (steps["n_tokens"] < 1).any():
        return f"steps are of {n_tokens} tokens, but picks of {len(picks)}"
    bad = picks[(picks < -1) | (picks >= n_experts)]
    if bad.size:
        return f"expert {bad[0]} is outside 0..{n_experts - 1}"
    if fault := _fault_of_dropped(picks):
        return fault
    ordered = np.sort(picks, axis=2)
    if ((np.diff(ordered, axis=2) == 0) & (ordered[..., 1:] >= 0)).any():
        return "a token picks an expert twice in one layer"
    shapes = {"ids": ("i", picks.shape[:1]), "weights": ("f", picks.shape)}
    if n_accesses is not None:
        shapes["hits"] = ("b", (n_accesses,))
    for name, (kind, shape) in shapes.items():
        array = arrays.get(name)
        if array is not None and (array.dtype.kind, array.shape) != (kind, shape):
            return f"{name} are {_form(array)}, expected {shape}"
    weights = arrays.get("weights")
    if weights is not None and not (np.isfinite(weights) & (weights >= 0)).all():
        return "a weight is no number from 0 on"
    limits = {
        "step": (0, len(steps)),
        "layer": (-1, picks.shape[1]),
        "kind": (0, len(KINDS)),
        "expert": (0, n_experts),
        "thread": (0, 1 << 15),
        "n_bytes": (0, 1 << 62),
    }
    return _fault_of_times(arrays, limits)


def _fault_of_dropped(picks: np.ndarray) -> str | None:
    """Adaptive K leaves -1 where it dropped an expert: only at the end, never all."""
    is_kept = picks >= 0
    if not is_kept[..., 0].all():
        return "expert -1, where the best of a token should be"
    if (is_kept[..., 1:] & ~is_kept[..., :-1]).any():
        return "an expert follows after -1, which stands for dropped ones"
    return None


def _fault_of_times(
    arrays: dict[str, np.ndarray | None], limits: dict[str, tuple[int, int]]
) -> str | None:
    for name, dtype in (("spans", SPAN), ("reads", READ)):
        rows = arrays.get(name)
        if rows is None:
            continue
        if rows.dtype != dtype or rows.ndim != 1:
            return f"{name} are {_form(rows)}, expected (n,) of {dtype}"
        for column, (low, high) in limits.items():
            if column in dtype.names and len(rows):
                values = rows[column]
                if values.min() < low or values.max() >= high:
                    return f"{name} have a {column} outside {low}..{high - 1}"
        ends, starts = rows["end_s"], rows["start_s"]
        if not ((ends >= starts) & np.isfinite(ends) & np.isfinite(starts)).all():
            return f"{name} end before they start"
    return None


def _form(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"
