"""`flashmoe evaluate`: its options, what it says, and the run.

**But:** measures nothing itself; see `sweep.py` and `measures.py`.
*Taught in notebooks/10.*
"""

import itertools
import json
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .errors import ConfigError

DATA = Path(__file__).parents[1] / "data" / "eval"  # only in a clone
ABOUT = "measure what fewer experts or fewer bits cost in quality"
EXAMPLES = """examples:
  flashmoe evaluate                                the reduced model, four K
  flashmoe evaluate DIR --quick                    a first look
  flashmoe evaluate DIR --k 10 4 --csv table.csv   kept, and continued if it is cut off
  flashmoe evaluate DIR --k 10 4 --bits 2 --rule minmax mlx
  flashmoe evaluate DIR --k 4 --kept renormalized as-routed scaled
  flashmoe evaluate DIR --mass 0.9 0.8 0.7         as many experts as a token needs
  flashmoe evaluate DIR --settings settings.csv    any list; data/results has ours
  flashmoe evaluate DIR --settings settings.csv --estimate     only say how long

Every setting does the same: it reads texts, and answers prompts that want a tool call
or JSON. The first row is the model as it is, with which all are compared:
  MB/token    read for a token that finds nothing in memory
  bits/byte   of text; perplexity is in the --csv, too
  cost        nats a token more than the baseline, with a 95 % interval
  same        share of tokens for which the likeliest next one is the baseline's
  tool, json  answers that parse / answers that are right in every value, %
Valid is not right: look at both. With 40 prompts a share is good to about 15 points.

Settings with other bits are written beside the table and removed again: they need the
space of the model's experts. --quick and --tokens decide how long it takes."""
COLUMNS = ("setting", "MB/token", "bits/byte", "cost", "same", "tok/s")
QUICK = {"tokens": 300, "prompts": 6, "continued": 4}
FULL = {"tokens": 2000, "prompts": 40, "continued": 12}


def add_options(parser: ArgumentParser) -> None:
    """Options of `flashmoe evaluate`, but for the model."""
    settings = parser.add_argument_group(
        "settings", "every combination of these is measured, and the model as it is"
    )
    for name, kind, metavar, text in _SETTINGS:
        settings.add_argument(
            f"--{name}",
            type=kind,
            nargs="+",
            metavar=metavar,
            default=[None],
            help=text,
        )
    settings.add_argument(
        "--settings", type=Path, metavar="FILE.csv", help="a list of settings instead"
    )
    tasks = parser.add_argument_group("tasks")
    for name, kind, text in _TASKS:
        options = {"nargs": "+"} if kind is Path else {}
        metavar = "FILE" if kind is Path else "N"
        tasks.add_argument(
            f"--{name}", type=kind, metavar=metavar, help=text, **options
        )
    tasks.add_argument("--quick", action="store_true", help="few tokens and prompts")
    run = parser.add_argument_group("run")
    run.add_argument("--engine", default="auto", help="numpy, mlx or auto (default)")
    run.add_argument(
        "--experts",
        default="stream",
        help="resident: all in memory, sooner where they fit, the same figures; stream "
        "(default)",
    )
    run.add_argument("--csv", type=Path, metavar="FILE", help="keep the table; go on")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    run.add_argument("--estimate", action="store_true", help="say how long, and stop")
    run.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(
    args: Namespace,
    model_dir: str,
    say: Callable[[str], None],
    note: Callable[[str], None],
) -> None:
    """Say how long it takes, measure, print the table, save it."""
    from .estimate import estimate, in_words
    from .sweep import read_table, sweep
    from .writing import write_small

    tasks, settings = make_tasks(args), make_settings(args)
    found = estimate(model_dir, settings, tasks)
    note(f"{found}")
    if args.estimate:
        say(f"{in_words(found.seconds)}")
        return
    with tempfile.TemporaryDirectory() as folder:
        table = args.csv or Path(folder) / "table.csv"
        sweep(model_dir, settings, tasks, table, not args.no_progress)
        rows = read_table(table)
    say(readable(rows))
    if args.json:
        write_small(args.json, json.dumps(rows, indent=1).encode())


def make_settings(args: Namespace) -> list:
    """All combinations of the options; the model as it is comes first."""
    from .settings import Setting, read_settings, unique

    if args.settings is not None:
        return unique([Setting(), *read_settings(args.settings)])
    names = [name.replace("-", "_") for name, *_ in _SETTINGS]
    choices = [getattr(args, name) for name in names]
    if all(choice == [None] for choice in choices):
        choices[names.index("k")] = [6, 4, 2]
    settings = [
        Setting(**{n: v for n, v in zip(names, chosen, strict=True) if v is not None})
        for chosen in itertools.product(*choices)
    ]
    return unique([Setting(), *settings])


def make_tasks(args: Namespace):
    """From the options. Raises: ConfigError if there is nothing to read."""
    from .measures import Tasks

    texts = args.text or sorted((DATA / "prose").glob("*.txt"))
    sets = args.sets or [path for name in ("tool", "json") if (path := _set(name))]
    if not texts:
        raise ConfigError("no text to measure on: name one with --text")
    sizes = dict(QUICK if args.quick else FULL)
    for name, low in (("tokens", 2), ("prompts", 1), ("sampled", 0)):
        wanted = getattr(args, name)
        if wanted is not None and wanted < low:
            raise ConfigError(f"--{name} {wanted}: give {low} or more")
        if wanted is not None:
            sizes[name] = wanted
    n_sampled = sizes.get("sampled", 0)
    return Tasks(
        texts=tuple(texts[:-1] or texts),
        calibration=texts[-1] if len(texts) > 1 else None,
        sets=tuple(sets),
        n_tokens=sizes["tokens"],
        n_prompts=sizes["prompts"],
        n_continued=sizes["continued"],
        seeds=(0,) if n_sampled else (),
        n_sampled=n_sampled,
        experts=args.experts,
        engine=args.engine,
    )


def _set(name: str) -> Path | None:
    path = DATA / f"{name}.jsonl"
    return path if path.exists() else None


def readable(rows: list[dict[str, str]]) -> str:
    """The table in words of `EXAMPLES`, one line a setting.

    Raises: ConfigError naming the column of a figure that is none.
    """
    from .settings import from_row
    from .small_files import number

    kinds = [c.removesuffix("_parses") for c in rows[0] if c.endswith("_parses")]
    lines = [[*COLUMNS[:5], *kinds, COLUMNS[5]]]
    for row in rows:
        value = partial(number, row, kind=ConfigError)
        cost, low, high = (value(f"cost_{n}") for n in ("nats", "low", "high"))
        cells = [
            from_row(row).name,
            f"{value('bytes_per_token') / 1e6:.2f}",
            f"{value('bits_per_byte'):.3f}",
            f"{cost:+.3f} ({low:+.3f} to {high:+.3f})",
            f"{value('agreement'):.0%}",
        ]
        cells += [
            f"{value(f'{k}_parses'):.0%} / {value(f'{k}_right'):.0%}" for k in kinds
        ]
        lines.append([*cells, row.get("tok_s", "")])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in pairs)
        for pairs in (enumerate(zip(line, widths, strict=True)) for line in lines)
    )


_SETTINGS = (
    ("k", int, "K", "experts a token (default, if nothing is chosen: 6 4 2)"),
    ("bits", int, "N", "bits of the experts, requantized from those of the model"),
    ("group-size", int, "N", "weights that share a scale: 32, 64 or 128"),
    ("rule", str, "NAME", "mlx, minmax or least_squares: how bits are cut"),
    ("down-bits", int, "N", "other bits for the experts' down projection"),
    ("dense-bits", int, "N", "bits of all that is no expert and no gate"),
    ("router-bits", int, "N", "bits of the router"),
    (
        *("kept", str, "HOW"),
        "renormalized; as-routed; scaled: renormalized, its norm corrected by a text",
    ),
    ("mass", float, "SHARE", "adaptive K: the share of the router's weight to keep"),
)
_TASKS = (
    ("text", Path, "texts to read; the last calibrates (default: data/eval/prose)"),
    ("sets", Path, "prompts as JSON lines (default: tool and json of data/eval)"),
    ("tokens", int, "of each text (default: 2000; --quick: 300)"),
    ("prompts", int, "of each set (default: 40; --quick: 6)"),
    ("sampled", int, "of each set also at temperature 0.7 (default: none)"),
)
