"""Traces in other forms: a table of picks from any engine, and Chrome's timeline.

The table is a CSV of token, layer, expert and perhaps weight, a row for each pick, best
first. The timeline opens in chrome://tracing and in Perfetto (ui.perfetto.dev), with a
row for the computing thread and one for each thread that reads. **But:** a table has no
times, and its K must be the same everywhere. *Taught in notebooks/07 and 08.*
Source: "Trace Event Format" of the Chromium project, complete events (ph "X").
"""

import csv
import json
import warnings
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path

import numpy as np

from .errors import TraceError
from .recording import KINDS
from .small_files import size_of_file
from .trace import Trace
from .trace_format import STEP
from .writing import new_file

COLUMNS = ("token", "layer", "expert", "weight")
MICROSECONDS = 1e6
LONGEST_LINE = 1_000_000  # bytes
LARGEST = {"token": 2**31 - 1, "layer": 32_767, "expert": 32_767}

# --- tables ---------------------------------------------------------------------------


def read_csv(path: str | Path, n_experts: int | None = None) -> Trace:
    """Import the picks of another engine.

    The first line may name the columns token, layer, expert and weight in any order,
    among others; without it they are meant in this order. Rows of one token and layer
    are in the order of the file, best first; else rows may come in any order. Tokens
    and layers count as they are sorted; numbers may be left out (dense layers).
    n_experts: of a layer (default: the largest id and one).
    Raises: TraceError naming the line.
    """
    path = Path(path)
    if n_experts is not None and not 1 <= n_experts <= LARGEST["expert"] + 1:
        raise TraceError(
            f"{n_experts} experts of a layer: give 1 to {LARGEST['expert'] + 1}"
        )
    try:
        _check_start(path)
        found = _load(path)
        if found is None or _fault(found[0], n_experts):
            found = _parse(path, n_experts)  # slowly: it knows the lines
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: not a CSV file ({error})") from None
    rows, weights = found
    if n_experts is None:
        n_experts = int(rows[:, 2].max()) + 1
    order = np.lexsort((rows[:, 1], rows[:, 0]))  # stable
    tokens, layers = (np.unique(rows[:, column]) for column in (0, 1))
    shape = (len(tokens), len(layers), len(rows) // (len(tokens) * len(layers)))
    trace = Trace(
        picks=rows[order, 2].reshape(shape).astype(np.int32),
        n_experts=n_experts,
        steps=_steps(len(tokens)),
        about={"imported from": path.name, "layers": layers.tolist()},
    )
    if weights is not None:
        trace.weights = weights[order].reshape(shape).astype(np.float16)
    return trace


def _check_start(path: Path) -> None:
    """Readers take a line as a whole, and one may have all bytes of a large file."""
    n_bytes = size_of_file(path, TraceError)
    with open(path, "rb") as file:
        start = file.read(LONGEST_LINE)
    if b"\0" in start or (len(start) < n_bytes and b"\n" not in start):
        raise TraceError(f"{path}: not a CSV file (it has no lines of text)")


def _steps(n_tokens: int) -> np.ndarray:
    """Tokens one by one. Shapes: -> (n_tokens,) STEP."""
    steps = np.ones(n_tokens, STEP)
    steps["position"] = np.arange(n_tokens)
    return steps


def _load(path: Path) -> tuple[np.ndarray, np.ndarray | None] | None:
    """The same as `_parse`, by NumPy and so some ten times as fast.

    Returns: None where something is not as it should be; `_parse` says what and where.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.reader(file)
        first = next((fields for fields in table if any(fields)), None)
        if first is None:
            return None
        places, is_header = _places(first, path)
        n_before = table.line_num - (0 if is_header else 1)
    kinds = zip(COLUMNS, ("i8", "i8", "i8", "f8"), strict=True)
    dtype = list(kinds)[: len(places)]
    form = {"comments": None, "delimiter": ",", "quotechar": '"', "ndmin": 1}
    form |= {"skiprows": n_before, "usecols": places, "encoding": "utf-8-sig"}
    try:
        with warnings.catch_warnings(action="error"):  # such as 1.0 for an integer
            values = np.loadtxt(path, dtype, **form)
    except (ValueError, Warning):
        return None
    rows = np.stack([values[name] for name in COLUMNS[:3]], axis=1)
    weights = values["weight"] if len(places) == 4 else None
    if (rows < 0).any() or (rows > list(LARGEST.values())).any():
        return None
    if weights is not None and not ((weights >= 0) & (weights <= 1)).all():
        return None
    return rows, weights


def _parse(path: Path, n_experts: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Line by line. Shapes: -> token, layer, expert (N, 3); weights (N,).

    Raises: TraceError naming the first line with a fault.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows, lines, weights = _rows_of(csv.reader(file), path)
    if fault := _fault(rows, n_experts):
        raise TraceError(f"{path}: line {lines[fault[0]]}: {fault[1]}")
    return rows, weights


def _rows_of(
    table: Iterable[list[str]], path: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Shapes: -> token, layer, expert (N, 3); their lines (N,); weights (N,)."""
    rows, lines, weights = [], [], []
    places = None
    for line, fields in enumerate(table, 1):
        if not any(fields):
            continue
        if places is None:
            places, is_header = _places(fields, path)
            if is_header:
                continue
        if len(fields) <= max(places):
            raise TraceError(
                f"{path}: line {line} has {len(fields)} fields, too few for "
                f"{', '.join(COLUMNS[: len(places)])}"
            )
        values = [fields[place] for place in places]
        pairs = zip(COLUMNS[:3], values[:3], strict=True)
        rows.append([_whole(*pair, line, path) for pair in pairs])
        lines.append(line)
        if len(places) == 4:
            weights.append(_weight(values[3], line, path))
    if not rows:
        raise TraceError(f"{path}: no rows of token, layer, expert")
    return np.array(rows), np.array(lines), np.array(weights) if weights else None


def _places(fields: list[str], path: Path) -> tuple[list[int], bool]:
    """Where the columns are, and whether this line names them."""
    names = [field.strip().lower() for field in fields]
    if names[0].lstrip("-").isdigit():
        return list(range(4 if len(fields) > 3 else 3)), False
    missing = [name for name in COLUMNS[:3] if name not in names]
    if missing:
        raise TraceError(
            f"{path}: line 1 names no column {missing[0]!r}; "
            "wanted are token, layer, expert and perhaps weight"
        )
    return [names.index(name) for name in COLUMNS if name in names], True


def _whole(column: str, text: str, line: int, path: Path) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= LARGEST[column]:
        raise TraceError(
            f"{path}: line {line}: {column} {text!r} is not a whole number "
            f"in 0..{LARGEST[column]}"
        )
    return value


def _weight(text: str, line: int, path: Path) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise TraceError(f"{path}: line {line}: weight {text!r} is not within 0..1")
    return value


def _fault(rows: np.ndarray, n_experts: int | None) -> tuple[int, str] | None:
    """A row at fault and what is wrong, or None; so do the next three.

    Every token must have as many different experts in every layer.
    """
    limit = LARGEST["expert"] + 1 if n_experts is None else n_experts
    return _too_large(rows, limit) or _repeated(rows) or _uneven(rows)


def _too_large(rows: np.ndarray, n_experts: int) -> tuple[int, str] | None:
    for i in np.flatnonzero(rows[:, 2] >= n_experts):
        return i, f"expert {rows[i, 2]} is outside 0..{n_experts - 1}"
    return None


def _repeated(rows: np.ndarray) -> tuple[int, str] | None:
    order = np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))
    for i in sorted(order[1:][(np.diff(rows[order], axis=0) == 0).all(1)]):
        token, layer, expert = rows[i]
        return i, f"token {token} has expert {expert} of layer {layer} already"
    return None


def _uneven(rows: np.ndarray) -> tuple[int, str] | None:
    groups, last, counts = _groups(rows)
    for i in np.flatnonzero(counts != counts[0]):
        token, layer = groups[i]
        return last[i], (
            f"token {token} has {counts[i]} experts in layer {layer}, the first token "
            f"has {counts[0]}; all need the same number"
        )
    layers = np.unique(groups[:, 1])
    tokens, n_layers = np.unique(groups[:, 0], return_counts=True)
    for token in tokens[n_layers < len(layers)]:
        mine = np.flatnonzero(rows[:, 0] == token)
        layer = np.setdiff1d(layers, rows[mine, 1])[0]
        return mine[-1], f"token {token} ends without layer {layer} of other tokens"
    return None


def _groups(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of token and layer, ascending; the last row of each; how many rows."""
    keys = rows[:, 0] * 2**31 + rows[:, 1]
    _, last_from_end, counts = np.unique(
        keys[::-1], return_index=True, return_counts=True
    )
    last = len(rows) - 1 - last_from_end
    return rows[last, :2], last, counts


def write_csv(trace: Trace, path: str | Path) -> None:
    """Write token, layer, expert and, where recorded, weight: a row for each pick."""
    kept = trace.picks >= 0
    tokens, layers, _ = np.nonzero(kept)
    columns = [tokens, layers, trace.picks[kept]]
    if trace.weights is not None:
        columns.append(trace.weights[kept])
    with new_file(Path(path)) as file:
        text = TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS[: len(columns)])
        writer.writerows(zip(*(column.tolist() for column in columns), strict=True))
        text.detach()  # written out; new_file closes the file


# --- timelines ------------------------------------------------------------------------


def write_chrome(trace: Trace, path: str | Path) -> None:
    """Write a timeline as JSON.

    Raises: TraceError where times were not recorded.
    """
    content = {
        "traceEvents": list(chrome_events(trace)),
        "displayTimeUnit": "ms",
        "otherData": trace.about,
    }
    with new_file(Path(path)) as file:
        file.write(json.dumps(content).encode())


def chrome_events(trace: Trace) -> Iterator[dict]:
    """Names of the threads, then an event for each step, span and read.

    Raises: TraceError where times were not recorded.
    """
    spans, reads = trace.need("spans"), trace.need("reads")
    n_readers = int(reads["thread"].max(initial=0))
    yield _name("process_name", 0, f"flashmoe {trace.about.get('model', '')}".strip())
    yield _name("thread_name", 0, "computing")
    for thread in range(1, n_readers + 1):
        yield _name("thread_name", thread, f"reader {thread}")
    for step, start, end in _step_times(spans):
        n_tokens = int(trace.steps["n_tokens"][step])
        yield _event(f"step {step}", "step", 0, start, end, {"tokens": n_tokens})
    for step, layer, kind, start, end in spans.tolist():
        args = {"step": step, "layer": layer}
        yield _event(KINDS[kind], "compute", 0, start, end, args)
    for step, layer, expert, thread, n_bytes, start, end in reads.tolist():
        args = {"step": step, "layer": layer, "bytes": n_bytes}
        yield _event(f"expert {expert}", "read", thread, start, end, args)


def _step_times(spans: np.ndarray) -> list[tuple[int, float, float]]:
    """Number, start and end of each step."""
    first = np.flatnonzero(np.diff(spans["step"], prepend=-1))
    last = np.append(first[1:], len(spans))[: len(first)] - 1
    columns = (spans["step"][first], spans["start_s"][first], spans["end_s"][last])
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _event(
    name: str, category: str, thread: int, start_s: float, end_s: float, args: dict
) -> dict:
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "pid": 1,
        "tid": thread,
        "ts": round(start_s * MICROSECONDS, 3),
        "dur": round((end_s - start_s) * MICROSECONDS, 3),
        "args": args,
    }


def _name(kind: str, thread: int, name: str) -> dict:
    return {"name": kind, "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}
