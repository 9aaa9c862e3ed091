"""The file of a trace: its arrays, and what must hold of them.

A NumPy .npz (a zip of arrays, nothing pickled), described in data/traces/README.md.
Arrays of other names are ignored, so later versions may add some. **But:** reading and
checking only; `trace.py` gives the arrays their meaning. *Taught in notebooks/07.*
"""

import json
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from .errors import TraceError
from .recording import KINDS
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

# What NumPy and zipfile raise for bytes that are not what they should be.
DAMAGE = (
    ValueError,
    EOFError,
    LookupError,
    RuntimeError,  # "encrypted", "version not implemented"
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
    about = _parse(arrays.pop("about"))
    if about is None:
        raise TraceError(f"{path}: 'about' is not a JSON object")
    return {n: a for n, a in arrays.items() if n in REQUIRED + OPTIONAL}, about


def _unzip(path: str | Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":  # as every zip begins
                raise TraceError(f"{path}: not a trace (it is no .npz)")
        with np.load(path, allow_pickle=False) as found:
            return dict(found)
    except OSError as error:
        reason = error.strerror or error
        raise TraceError(f"{path}: cannot be read ({reason})") from None
    except DAMAGE as error:
        reason = " ".join(str(error).split())
        raise TraceError(f"{path}: a damaged .npz ({reason}); get it again") from None


def _parse(text: np.ndarray) -> dict | None:
    try:
        about = json.loads(str(text))
    except ValueError:
        return None
    return about if isinstance(about, dict) else None


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
    limits = {
        "step": (0, len(steps)),
        "layer": (-1, picks.shape[1]),
        "kind": (0, len(KINDS)),
        "expert": (0, n_experts),
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
        if not (rows["end_s"] >= rows["start_s"]).all():
            return f"{name} end before they start"
    return None


def _form(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"
