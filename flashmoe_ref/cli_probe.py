"""`flashmoe probe`: its options, what it says, and the run.

**But:** measures nothing itself; see `probe_disk.py` and `hardware.py`.
*Taught in notebooks/06 and 12.*
"""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConfigError

ABOUT = "measure what this disk, memory and processor can do"
EXAMPLES = """examples:
  flashmoe probe                                   the disk that this folder is on
  flashmoe probe --dir /Volumes/SSD --json ssd.json
  flashmoe probe --model DIR                       the disk that a model lies on
  flashmoe probe --quick                           in seconds, roughly

An expert is one record of some megabytes: look at its size, in the column of as many
threads as read (4, unless you say --threads). Three tables, because a read may come
from two places. Warm is memory: the page cache had it. Cold is the disk, through the
page cache, as an expert's first use is. Direct is the disk past the page cache. Small
records are slow since each read waits for the disk once, however little it wants; many
at a time keep the disk busy. Divide the bytes that a token reads ('flashmoe info') by
the cold rate: that is the longest a token waits for its experts.

No record is read twice where the disk should answer, and where the system keeps a file
in memory all the same, the table is left out rather than filled with wrong figures."""


def add_options(parser: ArgumentParser) -> None:
    """Options of `flashmoe probe`."""
    parser.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help="where to make a file of random bytes, which is removed again (default: "
        "this folder)",
    )
    parser.add_argument(
        "--model", metavar="DIR", help="read this model's files instead; writes nothing"
    )
    parser.add_argument(
        "--size",
        type=float,
        metavar="MB",
        help="take records from so many million bytes (default: 537; --quick: 134). "
        "Large records by many threads need many bytes",
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer sizes and depths, less accurate"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="save the figures, for a planner"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: Namespace, say: Callable[[str], None]) -> None:
    """Measure, print the tables, save them."""
    from .hardware import MEMORY_BYTES, QUICK_MEMORY_BYTES, probe_hardware, readable
    from .probe_disk import DEPTHS, MODES, QUICK_DEPTHS, QUICK_SIZES, SIZES, probe_disk

    _check(args)
    quick = args.quick
    shape = (QUICK_SIZES, QUICK_DEPTHS) if quick else (SIZES, DEPTHS)
    n_steps = len(shape[0]) * len(shape[1]) * len(MODES) + 3
    with _bar(n_steps, args.no_progress) as step, _spans(args) as (spans, what):
        step()
        disk = probe_disk(spans, what, *shape, step=step)
        memory = QUICK_MEMORY_BYTES if quick else MEMORY_BYTES
        found = probe_hardware(disk, memory, step)
    say(readable(found))
    if args.json:
        found.save(args.json)


def _check(args: Namespace) -> None:
    if args.dir is not None and args.model is not None:
        raise ConfigError("--dir makes a file, --model reads one: give one of them")
    if args.size is not None and not 1 <= args.size < 1e6:
        raise ConfigError(f"--size {args.size:g}: give 1 to a million, in MB")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ConfigError(f"--json {args.json}: there is no such folder")


@contextmanager
def _spans(args: Namespace) -> Iterator[tuple[list, str]]:
    from .checkpoint import find_shards
    from .probe_disk import FILE_BYTES, QUICK_BYTES, own_file, spans_of_files

    n_bytes = QUICK_BYTES if args.quick else FILE_BYTES
    n_bytes = n_bytes if args.size is None else int(args.size * 1e6)
    if args.model is None:
        with own_file(args.dir or Path.cwd(), n_bytes) as spans:
            yield spans, "a file of its own"
    else:
        paths = find_shards(Path(args.model))
        with spans_of_files(paths, n_bytes) as spans:
            yield spans, f"files of {args.model}"


@contextmanager
def _bar(n_steps: int, hidden: bool) -> Iterator[Callable[[], object]]:
    from tqdm import tqdm

    hidden = hidden or os.environ.get("FLASHMOE_PROFILE") == "ci"
    with tqdm(total=n_steps, desc="probe", disable=hidden, leave=False) as bar:
        yield bar.update
