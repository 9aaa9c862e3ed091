"""`flashmoe fetch`: its options, what it says, and the run.

**But:** transfers and checks nothing itself; see `fetch.py` and `hub.py`.
*Taught in notebooks/13.*
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from .errors import ConfigError

ABOUT = "bring a published model to this disk"
EXAMPLES = """examples:
  flashmoe fetch mlx-community/Qwen3.5-397B-A17B-4bit --dry-run
  flashmoe fetch mlx-community/Qwen3.5-397B-A17B-4bit
  flashmoe fetch OWNER/MODEL --dir /Volumes/SSD/model --revision COMMIT

Says first how much will come, and stops if the disk has no room for it or the model is
none that flashmoe runs. Only the files that the text model needs are fetched. They go
into Hugging Face's cache (HF_HOME moves it), or into --dir; what the cache has already
is used where it lies, nothing is copied. A run that was cut off goes on, inside a file,
when the same command is given again. Every file is compared with the hub's digest as it
arrives; --check does so with those that were there before, too. Tested against a server
that imitates the hub, not yet against the hub itself."""


def add_options(parser: ArgumentParser) -> None:
    """Options of `flashmoe fetch`."""
    add = parser.add_argument
    add("repository", metavar="OWNER/MODEL", help="on the Hugging Face hub")
    add("--revision", metavar="NAME", help="branch, tag or commit (default: main)")
    add("--dir", type=Path, metavar="DIR", help="put the files here, not in the cache")
    add("--dry-run", action="store_true", help="only say what would come")
    add("--check", action="store_true", help="read and compare all files at the end")
    add("--at-once", type=int, default=4, metavar="N", help="files at a time (4)")
    add("--no-progress", action="store_true", help="no progress bar")


def run(
    args: Namespace, say: Callable[[str], None], note: Callable[[str], None]
) -> None:
    """Look at the repository, say what will come, bring it."""
    from huggingface_hub.utils import logging

    from .fetch import check_room, fetch, plan_fetch, readable

    if args.at_once < 1:
        raise ConfigError("--at-once: give 1 or more")
    logging.set_verbosity_error()  # of its retries; what ends a run is told in a line
    plan = plan_fetch(args.repository, args.revision, args.dir)
    for line in readable(plan):
        say(line)
    if args.dry_run:
        check_room(plan)
        return
    try:
        folder = fetch(plan, args.check, not args.no_progress, args.at_once)
    except KeyboardInterrupt:
        note("\nflashmoe: interrupted; the same command goes on where it stopped")
        raise
    say(f"complete  flashmoe doctor {folder}")
