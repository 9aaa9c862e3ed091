"""`flashmoe doctor`: its options, and the run.

**But:** predicts nothing itself; see `doctor.py` and `planner.py`.
*Taught in notebooks/12 and 13.*
"""

import json
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace

ABOUT = "say whether a model will run, how fast, and what would help"
EXAMPLES = """examples:
  flashmoe doctor qwen3.5-397b-a17b                on this machine
  flashmoe doctor DIR --probe probe.json           with what 'flashmoe probe' measured
  flashmoe doctor qwen3.5-397b-a17b --machine m3-max-48 --k 4
  flashmoe doctor qwen3.5-35b-a3b --machine pc-32 --disk 7GB/s

Reads config.json and the headers of the files, no weights: it is quick for any size.
Speeds come from a cost model that was fitted to what people published for some ninety
runs, nearly all on Macs; its interval holds four of five of them. Memory that holds
cached files counts as free, since it gives way."""


def add_options(parser: ArgumentParser) -> None:
    """Options of `flashmoe doctor` beside the model."""
    parser.add_argument(
        "--machine",
        metavar="NAME",
        help="another machine: its chip and memory, such as m3-max-48, rtx-4090-64, "
        "pc-32, a19-pro-12 (default: this one)",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="that it has, such as 48GB, in place of its own",
    )
    parser.add_argument(
        "--disk", metavar="RATE", help="of its disk, such as 17.5GB/s, as quoted"
    )
    parser.add_argument(
        "--probe", metavar="FILE", help="use what 'flashmoe probe --json FILE' measured"
    )
    parser.add_argument(
        "--trace",
        metavar="FILE.npz",
        help="hits as in this recorded run (default: those of published curves)",
    )
    parser.add_argument(
        "--k", type=int, help="experts a token (default: as recommended)"
    )
    parser.add_argument(
        "--bits", type=int, help="of the experts (default: as recommended)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace, model: str, say: Callable[[str], None]) -> None:
    """Look at the model, print what was found."""
    from .doctor import diagnose, readable
    from .info import facts

    place, sizes = chosen(args, model), facts(model, None, 4, 64)
    found = diagnose(sizes, place, args.k, args.bits, c=_coefficients(args))
    say(as_json(found.as_dict()) if args.json else readable(found))


def chosen(args: Namespace, model: str):
    """The machine that the options describe. Raises: ConfigError."""
    from .machines import machine, parse_quantity, this_machine, with_probe

    found = machine(args.machine) if args.machine else this_machine(model)
    if args.probe:
        found = with_probe(found, args.probe)
    if args.memory:
        memory = parse_quantity(args.memory, "GB")
        found = replace(found, memory_gb=memory, reclaimable_gb=None)
    if args.disk:
        disk = parse_quantity(args.disk, "GB/s")
        found = replace(found, disk_gb_s=disk, disk_is_measured=False)
    if args.memory or args.disk:
        found = replace(found, name=f"{found.name}, as you say")
    return found


def _coefficients(args: Namespace):
    from .planner import FITTED

    if args.trace is None:
        return FITTED
    from .planner_fit import scale_of_trace
    from .trace import Trace

    return replace(FITTED, hit_scale=scale_of_trace(Trace.load(args.trace)))


def as_json(found: dict) -> str:
    """Strict JSON: what is not known is null, not NaN."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        is_number = isinstance(value, float) and math.isfinite(value)
        return value if is_number or not isinstance(value, float) else None

    return json.dumps(plain(found), indent=2)
