"""The command line's options of what stays in memory, and what each of them costs.

**But:** parsing only; `engine.load` checks and acts. *Taught in notebooks/08 and 09.*
"""

from argparse import ArgumentParser, Namespace

NAMES = (
    "slots",
    "budget",
    "policy",
    "pin",
    "prefetch",
    "profile",
    "bypass_page_cache",
    "threads",
)
ABOUT = """Nothing here changes a bit of what the model says: only how many bytes are
read, and when. Record a run with --trace to see what would help."""


ABOUT_CHECKS = """Weights with NaN or infinity are refused, dense ones at the start and
experts as they are read; logits and a router's scores always."""


def add_options(parser: ArgumentParser) -> None:
    """Options of commands that run a model."""
    group = parser.add_argument_group("experts in memory", ABOUT)
    for name, kind, metavar, default, text in _OPTIONS:
        options = {"type": kind, "metavar": metavar, "default": default}
        group.add_argument(f"--{name}", help=" ".join(text.split()), **options)
    group.add_argument("--bypass-page-cache", action="store_true", help=_BYPASS)
    checks = parser.add_argument_group("checks", ABOUT_CHECKS)
    checks.add_argument("--verify-reads", action="store_true", help=_VERIFY)
    checks.add_argument("--no-guards", action="store_true", help=_NO_GUARDS)


def chosen(args: Namespace) -> dict[str, object]:
    """The same as keywords of load()."""
    return {name: getattr(args, name) for name in NAMES} | {
        "verify_reads": args.verify_reads,
        "guards": not args.no_guards,
    }


_OPTIONS = (
    (
        *("slots", int, "N", None),
        """keep N experts of each layer in memory. More slots, fewer reads; but memory
        that is taken from the system's own file cache may cost more than it saves
        (default: none, trust that cache)""",
    ),
    (
        *("budget", int, "N", None),
        """instead of --slots: keep N experts of all layers together, more of those that
        vary. Give more than a token uses in all layers: what a layer will want again is
        what was used longest ago, so with fewer lru finds next to nothing""",
    ),
    (
        *("policy", str, "NAME", "lru"),
        """which expert goes when a slot is needed: lru, the least recently used
        (default); lfu, the least often used of late; fifo, the oldest; clock, the
        oldest that was not used again""",
    ),
    (
        *("pin", int, "N", 0),
        """never let go of the N experts of each layer (with --budget: of all) that were
        used most in --profile. Good where routing has favourites, wasted where the
        text differs from the profile's""",
    ),
    (
        *("prefetch", str, "NAME[:N]", None),
        """while a layer computes, read N experts (default: as many as a token uses)
        that the next may need: look-ahead asks its router too early, last-token
        repeats, frequency and co-occurrence count. Pays where the disk would stand
        idle; a wrong guess costs a read, and may evict what was needed""",
    ),
    (
        *("profile", str, "TRACE.npz", None),
        """a recorded run, for --pin; --prefetch frequency and co-occurrence learn from
        it, too""",
    ),
    (
        *("threads", int, "N", 4),
        """threads that read. Many disks need several reads under way to reach their
        speed (default: 4)""",
    ),
)
_BYPASS = " ".join(
    """read past the system's file cache, so that slots need not share memory with a
    second copy. Every miss then costs a read from the disk: give slots or a budget.
    Linux copies what is not aligned to the disk's blocks, the report says so; macOS
    still serves what its cache already holds""".split()
)
_VERIFY = " ".join(
    """compare packed experts with their checksums at every read, so that a disk or a
    cable that changes bytes is an error. A thread does about 2 GB a second: tokens of
    the reduced model, all of it cached, take a quarter longer""".split()
)
_NO_GUARDS = " ".join(
    """look for neither in weights. Looking costs half a percent of a token's time on
    the reduced model""".split()
)
