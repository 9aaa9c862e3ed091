"""Many settings of one model, measured one after the other into a CSV file.

A row is written when its setting is done, whole and synced to the disk, and never done
again: a sweep that was killed goes on where it was, to the same table. Settings with
other bits are made by `requantize` into a folder beside the table and removed again.
**But:** one process a table; two would measure each other's speed.
*Taught in notebooks/10.*
"""

import csv
import errno
import hashlib
import io
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from . import __version__
from .checkpoint import Checkpoint, find_shards
from .errors import ConfigError, PackError
from .headers import read_header
from .measures import Baseline, Tasks, make_baseline, measure
from .requantize import requantize
from .settings import COLUMNS, Setting, check_experts, from_row
from .small_files import decode, parse_json, parse_table, read_bytes
from .structured_runs import Outcome, as_record
from .writing import work_folder, write_small, writing_to

END_BYTES = 1 << 16  # of each file's end, for a model's fingerprint
FAILURES = 3  # wrong answers of a set that are kept as text, for each setting


def sweep(
    model_dir: str | Path,
    settings: Sequence[Setting],
    tasks: Tasks,
    table: str | Path,
    progress: bool = True,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Measure settings of a model into a table (.csv); those it has are left alone.

    The baseline, with which all are compared, is the model as it is. Wrong answers go
    to a file beside the table: TABLE.failures.jsonl.
    tell:   is called with a line of words when a setting is done.
    Raises: ConfigError if the table holds another model's figures or other tasks';
            PackError if there is no room for what has to be written meanwhile.
    """
    model_dir, table = Path(model_dir), Path(table)
    check_experts(settings, Checkpoint.open(model_dir).config)
    given = provenance(model_dir, tasks)
    if not table.absolute().parent.is_dir():
        raise ConfigError(f"{table}: there is no such folder")
    real = table.resolve()  # whatever name it goes by
    work = real.with_name(f"{real.name}.work")
    with work_folder(work, f"{table}: another sweep is writing it"):
        done = _finished(table, given)
        todo = [setting for setting in settings if setting not in done]
        if not todo:
            return table
        _forget_failures(table, done)
        baseline = _baseline(model_dir, tasks, work)
        hidden = not progress or os.environ.get("FLASHMOE_PROFILE") == "ci"
        with tqdm(total=len(todo), unit="row", disable=hidden) as bar:
            for weights in dict.fromkeys(setting.weights for setting in todo):
                with _stored(model_dir, weights, work) as folder:
                    for setting in (s for s in todo if s.weights == weights):
                        bar.set_description(setting.name)
                        row, wrong = measure(folder, setting, tasks, baseline)
                        _append_failures(table, setting, wrong)
                        append_row(table, setting.as_row() | row | given)
                        bar.update()
                        if tell is not None:
                            tell(setting.name)
    return table


def _baseline(model_dir: Path, tasks: Tasks, work: Path) -> Baseline:
    config = Checkpoint.open(model_dir).config
    n_tokens = sum(path.stat().st_size for path in tasks.texts) // 3  # and fewer
    if tasks.n_tokens is not None:
        n_tokens = min(n_tokens, tasks.n_tokens * len(tasks.texts))
    needed, free = 4 * n_tokens * config.vocab_size, shutil.disk_usage(work).free
    if needed > free:
        raise PackError(
            f"{work}: the baseline's probabilities need up to {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; score fewer tokens"
        )
    return make_baseline(model_dir, tasks, work)


# --- weights --------------------------------------------------------------------------


@contextmanager
def _stored(model_dir: Path, weights: Setting, work: Path) -> Iterator[Path]:
    """A folder with a setting's weights: the model's own, or one made for a while."""
    if weights.is_stored:
        yield model_dir
        return
    name = hashlib.sha256(weights.name.encode()).hexdigest()[:12]
    folder = work / f"weights_{name}"
    with writing_to(work):
        for other in set(work.glob("weights_*")) - {folder}:  # of a killed sweep
            shutil.rmtree(other)
    names = ("group_size", "down_bits", "dense_bits", "router_bits")
    widths = {name: getattr(weights, name) for name in names}
    given = {name: width for name, width in widths.items() if width is not None}
    requantize(
        *(model_dir, folder, weights.bits), rule=weights.rule, progress=False, **given
    )
    yield folder
    with writing_to(folder):
        shutil.rmtree(folder)


# --- the table ------------------------------------------------------------------------


def read_table(table: str | Path) -> list[dict[str, str]]:
    """The whole rows of a table, as text by column; none if there is no file.

    Raises: ConfigError if it is no table.
    """
    data = read_bytes(Path(table), ConfigError) or b""
    whole = data[: data.rfind(b"\n") + 1]  # a killed sweep may leave half a line
    return parse_table(decode(whole, table, ConfigError), table, ConfigError)


def append_row(table: Path, row: dict[str, object]) -> None:
    """Add a row: all of it or nothing, and on the disk when this returns.

    Raises: ConfigError if the table has other columns.
    """
    text, is_new = io.StringIO(), not table.exists() or not table.stat().st_size
    writer = csv.DictWriter(text, list(row), lineterminator="\n")
    if is_new:
        writer.writeheader()
    elif (rows := read_table(table)) and list(rows[0]) != list(row):
        other = sorted(set(rows[0]) ^ set(row))
        raise ConfigError(f"{table}: has other columns ({', '.join(other)})")
    writer.writerow(row)
    _append(table, text.getvalue())


def _append(path: Path, text: str) -> None:
    data = text.encode()
    with writing_to(path), open(path, "ab", buffering=0) as file:
        n_before = file.tell()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(n_before)  # better none than half of it
            raise


def _finished(table: Path, given: dict[str, object]) -> set[Setting]:
    """Settings that the table has. Half a row at its end is cut off.

    Raises: ConfigError if its rows are of another model or of other tasks, or it is no
            table of a sweep at all; then nothing is cut.
    """
    rows, data = read_table(table), read_bytes(table, ConfigError) or b""
    head = ",".join(COLUMNS).encode()  # or its start, if a first row was cut off
    if data[: len(head)] != head[: len(data)]:
        raise ConfigError(f"{table}: is no table of a sweep; give another file")
    for row in rows:
        for name in DECIDING:
            if row.get(name) != str(given[name]):
                raise ConfigError(
                    f"{table}: its rows have {name} {row.get(name)!r}, this sweep "
                    f"{str(given[name])!r}; give another file"
                )
    try:
        done = {from_row(row) for row in rows}
    except ConfigError as error:
        raise ConfigError(f"{table}: {error}") from None
    if data:  # after all else: no other file is ever cut
        with writing_to(table):
            os.truncate(table, data.rfind(b"\n") + 1 if rows else 0)
    return done


# --- wrong answers --------------------------------------------------------------------


def failures_file(table: str | Path) -> Path:
    """Where a table's wrong answers are."""
    return Path(table).with_suffix(".failures.jsonl")


def _append_failures(
    table: Path, setting: Setting, wrong: list[tuple[str, Outcome]]
) -> None:
    lines, counts = [], {}
    for name, outcome in wrong:
        counts[name] = counts.get(name, 0) + 1
        if counts[name] <= FAILURES:
            record = {"setting": setting.name, "set": name, **as_record(outcome)}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    _append(failures_file(table), "".join(lines))


def _forget_failures(table: Path, done: set[Setting]) -> None:
    """Leave out those of settings that have no row, for they will come again."""
    path, names = failures_file(table), {setting.name for setting in done}
    if path.exists():
        # Not splitlines(): an answer may hold other characters that end lines.
        *whole, _cut_off = (read_bytes(path, ConfigError) or b"").split(b"\n")
        kept = [line + b"\n" for line in whole if _setting_of(line, path) in names]
        write_small(path, b"".join(kept))


def _setting_of(line: bytes, path: Path) -> object:
    found = parse_json(decode(line, path, ConfigError), path, ConfigError)
    return found.get("setting") if isinstance(found, dict) else None


# --- where figures come from ----------------------------------------------------------

DECIDING = (
    "model_sha256",
    "data_sha256",
    "tokens_a_text",
    "prompts_a_set",
    "continuations",
    "seeds",
    "sampled_prompts",
    "window",
    "stride",
)


def provenance(model_dir: Path, tasks: Tasks) -> dict[str, object]:
    """What a row was measured on, and with what."""
    return {
        "model": model_dir.resolve().name,
        "model_sha256": fingerprint(model_dir),
        **tasks.words(),
        "engine": tasks.engine,
        "flashmoe_ref": __version__,
        "numpy": version("numpy"),
        "numba": version("numba"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def fingerprint(model_dir: Path) -> str:
    """The first 16 digits of a SHA-256 over a model's configuration, its headers, and
    the end of each of its files.

    Not over all bytes: that would take minutes for 200 GB. `verify` compares them.
    """
    whole = hashlib.sha256((model_dir / "config.json").read_bytes())
    for path in find_shards(model_dir):
        places = [(i.name, i.offset, i.n_bytes) for i in read_header(path).values()]
        whole.update(repr(sorted(places)).encode())
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - END_BYTES))
            whole.update(file.read())
    return whole.hexdigest()[:16]
