"""`flashmoe trace`: its options, and the run.

**But:** reads and writes nothing itself; see `trace.py` and `trace_exchange.py`.
*Taught in notebooks/07.*
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from .errors import ConfigError

ABOUT = "look at a recorded run"
EXAMPLES = """examples:
  flashmoe generate --trace run.npz "She"          record a run, then look at it:
  flashmoe trace run.npz
  flashmoe trace run.npz --chrome run.json         for ui.perfetto.dev
  flashmoe trace other.csv --npz other.npz         picks of another engine

A trace holds the router's picks, what was read when, and where the time went. A .csv
has a row token, layer, expert (and perhaps weight) for each pick, best first."""


def add_options(parser: ArgumentParser) -> None:
    """Options of `flashmoe trace`."""
    add = parser.add_argument
    add("file", type=Path, help="a trace: .npz, or .csv")
    add("--chrome", type=Path, metavar="FILE.json", help="write its timeline")
    add("--csv", type=Path, metavar="FILE", help="write its picks")
    add("--npz", type=Path, metavar="FILE", help="write it as a trace")
    add(
        "--n-experts",
        type=int,
        metavar="N",
        help="of a layer, for a .csv (default: its largest id and one)",
    )


def run(
    args: Namespace, say: Callable[[str], None], note: Callable[[str], None]
) -> None:
    """Say what a recorded run did, and write it in other forms."""
    from .trace import Trace
    from .trace_exchange import read_csv, write_chrome, write_csv

    is_table = args.file.suffix.lower() == ".csv"
    if args.n_experts is not None and not is_table:
        raise ConfigError("--n-experts is for a .csv: other traces say it themselves")
    trace = read_csv(args.file, args.n_experts) if is_table else Trace.load(args.file)
    say(str(trace))
    writers = {"chrome": write_chrome, "csv": write_csv, "npz": Trace.save}
    for form, write in writers.items():
        if (path := getattr(args, form)) is not None:
            write(trace, path)
            note(f"{path}: written")
