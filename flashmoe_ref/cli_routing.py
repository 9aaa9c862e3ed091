"""The command line's options of the routing budget: how few experts, weighted how.

**But:** parsing only, but for `--calibrate`, which opens the model once more to measure
its output scales; `engine.load` checks and acts. *Taught in notebooks/10.*
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

ABOUT = """Fewer experts than trained read and compute less in proportion, and answer
worse. The router's weights sum to 1 over the trained number."""


def add_options(parser: ArgumentParser) -> None:
    """Options of commands that run a model."""
    group = parser.add_argument_group("routing budget", ABOUT)
    for name, kind, metavar, default, text in _OPTIONS:
        options = {"type": kind, "metavar": metavar, "default": default}
        group.add_argument(f"--{name}", help=" ".join(text.split()), **options)


def chosen(args: Namespace, model_dir: str) -> dict[str, object]:
    """The same as keywords of load(). Raises: ConfigError, OSError."""
    options = {"k": args.k, "kept": args.kept, "mass": args.mass}
    if args.calibrate is not None:
        options["output_scale"] = _measured_scale(args, model_dir)
    return options


def _measured_scale(args: Namespace, model_dir: str):
    from .calibrate import calibrate_output_scale
    from .engine import load
    from .errors import ConfigError
    from .small_files import read_text

    if args.k is None or args.mass is not None:
        raise ConfigError("--calibrate measures for one --k: give it, without --mass")
    if (text := read_text(args.calibrate, ConfigError)) is None:
        raise ConfigError(f"--calibrate {args.calibrate}: no such file")
    compiled = not args.no_compile
    with load(model_dir, args.engine, args.experts, compiled=compiled) as model:
        ids = model.tokenizer.encode(text)
        return calibrate_output_scale(model, ids, args.k, args.kept)


_OPTIONS = (
    (
        *("k", int, "N", None),
        """experts a token; JSON and tool calls suffer first from fewer (default: as
        trained)""",
    ),
    (
        *("kept", str, "HOW", "renormalized"),
        """weights of the experts that are kept: renormalized, to sum to 1 again
        (default); as-routed, so that what was dropped is missing""",
    ),
    (
        *("mass", float, "SHARE", None),
        """adaptive K: a token takes the fewest experts that hold this share of the
        router's weight, 0.8 say, so that easy tokens read less; at most --k""",
    ),
    (
        *("calibrate", Path, "TEXT.txt", None),
        """with --k: measure on this text how much louder the fewer experts are, layer
        by layer, and turn them down by that""",
    ),
)
