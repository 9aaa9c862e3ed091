"""`flashmoe rehearse`: its options, what it says, and the run.

**But:** writes and measures nothing itself; see `folding.py` and `rehearsal.py`.
*Taught in notebooks/13.*
"""

import json
import os
import shutil
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .config import PRESETS, ModelConfig
from .errors import ConfigError
from .quantize import BITS

ABOUT = "run a published model's shape with random weights, before fetching it"
EXAMPLES = """examples:
  flashmoe rehearse --disk-budget 40GB                 Qwen3.5-397B-A17B, K as trained
  flashmoe rehearse --disk-budget 40GB --k 4 --slots 64
  flashmoe rehearse --preset qwen3.5-35b-a3b --disk-budget 25GB --bits 2
  flashmoe rehearse --disk-budget 40GB --keep DIR      and once more: --keep DIR

Writes files of the exact sizes of the model, with random weights in them, runs the
ordinary engine on them, and sets the time of a token beside what its bytes need at the
rates of this disk and this processor, measured in the same run. What the model says is
noise. As many layers get files of their own as the budget allows; the others share
them, so reads go past the page cache unless you say --page-cache. Routing imitates the
published locality of the 397B (--routing published), is left to the random router
(random), or comes from a trace of the real model (a file)."""
MOST_TOKENS, MOST_THREADS = 100_000, 1024
WRITE_PROBE_BYTES = 64 << 20


def add_options(parser: ArgumentParser) -> None:
    """Options of `flashmoe rehearse`."""
    add = parser.add_argument
    add("--preset", default="qwen3.5-397b-a17b", choices=[*PRESETS], metavar="NAME")
    add(
        "--disk-budget",
        required=True,
        metavar="SIZE",
        help="write at most this much, such as 40GB",
    )
    add("--dir", type=Path, default=Path(), metavar="DIR", help="on the disk to try")
    add(
        "--keep",
        type=Path,
        metavar="DIR",
        help="write into this folder and leave it there; a second run uses it",
    )
    add("--bits", type=int, default=4, choices=BITS, help="of the experts (4)")
    add("--k", type=int, help="experts for a token (as trained)")
    add("--engine", default="auto", choices=("auto", "numpy", "mlx"))
    add("--slots", type=int, metavar="N", help="experts of each layer kept in memory")
    add("--threads", type=int, default=4, metavar="N", help="that read (4)")
    add("--page-cache", action="store_true", help="read through the page cache")
    add("--routing", default="published", metavar="published|random|FILE")
    add("--tokens", type=int, default=20, metavar="N", help="to decode (20)")
    add(
        "--warm-tokens",
        type=int,
        default=5,
        metavar="N",
        help="to decode before that, to fill slots; not counted (5)",
    )
    add("--prompt", type=int, default=32, metavar="N", help="prompt tokens (32)")
    add("--json", metavar="FILE", help="save the figures")
    add("--no-progress", action="store_true", help="no progress bars")


def run(args: Namespace, say: Callable[[str], None]) -> None:
    """Write, measure, compare, remove."""
    from .folding import layers_that_fit
    from .machines import GB, parse_quantity
    from .writing import write_small

    config = PRESETS[args.preset]
    k = config.num_experts_per_tok if args.k is None else args.k
    config.with_experts_per_token(k)
    _check(args)
    dense_bits = 4
    budget = int(parse_quantity(args.disk_budget, "GB") * GB)
    n_layers = layers_that_fit(config, budget, args.bits, dense_bits, 64)
    picks = _routing(args, config, k)
    with _folder(args) as folder:
        _announce(args, config, n_layers, dense_bits, folder, say)
        found = _measure(args, config, k, n_layers, dense_bits, folder, picks)
    for line in readable(found, args.preset):
        say(line)
    if args.json:
        write_small(Path(args.json), (json.dumps(found.as_dict()) + "\n").encode())


def _check(args: Namespace) -> None:
    for name, low, high in (
        ("tokens", 1, MOST_TOKENS),
        ("warm_tokens", 0, MOST_TOKENS),
        ("prompt", 1, MOST_TOKENS),
        ("threads", 1, MOST_THREADS),
    ):
        if not low <= getattr(args, name) <= high:
            raise ConfigError(f"--{name.replace('_', '-')}: give {low} to {high:,}")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ConfigError(f"--json {args.json}: there is no such folder")
    if not args.keep and not args.dir.is_dir():
        raise ConfigError(f"--dir {args.dir}: there is no such folder")


def _routing(args: Namespace, config: ModelConfig, k: int):
    from .locality import routing_with_locality
    from .trace_format import read_arrays

    if args.routing == "random":
        return None
    if args.routing != "published":
        return read_arrays(args.routing)[0]["picks"]
    n_tokens = args.tokens + args.warm_tokens
    shape = (config.num_hidden_layers, config.num_experts, k)
    return routing_with_locality(n_tokens, *shape)


@contextmanager
def _folder(args: Namespace) -> Iterator[Path]:
    """Where the files go; removed afterwards, unless they are to be kept.

    Always the same folder, so that what a killed run left goes with the next.
    """
    from .writing import work_folder

    if args.keep:
        yield args.keep
        return
    folder = args.dir / "flashmoe-rehearsal.work"
    with work_folder(folder, f"{folder}: another rehearsal is using it"):
        shutil.rmtree(folder / "model", ignore_errors=True)
        yield folder / "model"


def _announce(
    args: Namespace,
    config: ModelConfig,
    n_layers: int,
    dense_bits: int,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """How much will be written, and about how long that takes."""
    from .accounting import dense_bytes, expert_bytes
    from .writing import is_finished

    size = dense_bytes(config, dense_bits, 64, 8)
    size += n_layers * config.num_experts * expert_bytes(config, args.bits, 64)
    all_layers = config.num_hidden_layers
    packed = folder / "packed_experts" / f"layer_{n_layers - 1:02d}.bin"
    if is_finished(packed):
        say(f"{folder}: is there already")
        return
    parent = folder if folder.is_dir() else folder.absolute().parent
    seconds = size / _write_rate(parent)
    say(
        f"writing {size / 1e9:.1f} GB of random weights in the shape of {args.preset} "
        f"to {folder}: experts of {n_layers} of {all_layers} layers, about "
        f"{seconds / 60:.1f} minutes"
    )


def _write_rate(folder: Path) -> float:
    """Bytes a second that this disk takes."""
    from .writing import writing_to

    block = os.urandom(1 << 20)
    with writing_to(folder), tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(WRITE_PROBE_BYTES >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return WRITE_PROBE_BYTES / (time.perf_counter() - start)


def _measure(args, config, k, n_layers, dense_bits, folder, picks):
    from tqdm import tqdm

    from .engine import load
    from .folding import write_folded
    from .rehearsal import measure_rates, rehearse

    hidden = args.no_progress or os.environ.get("FLASHMOE_PROFILE") == "ci"
    widths = (args.bits, dense_bits)
    write_folded(folder, config, n_layers, *widths, progress=not hidden)
    options = {"engine": args.engine, "k": k, "slots": args.slots}
    options |= {"bypass_page_cache": not args.page_cache, "threads": args.threads}
    prompt = [(7 * i) % config.vocab_size for i in range(args.prompt)]
    total = args.tokens + args.warm_tokens
    with ExitStack() as stack:
        model = stack.enter_context(load(folder, experts="packed", **options))
        mode = "cold" if args.page_cache else "direct"
        rates = measure_rates(model, n_layers, args.threads, mode)
        bar = tqdm(total=total, desc="decode", disable=hidden, leave=False)
        step = stack.enter_context(bar).update
        return rehearse(
            model, picks, prompt, args.tokens, rates, step, args.warm_tokens
        )


def readable(found, preset: str) -> list[str]:
    """What was measured, beside its limit."""
    bytes_used = (found.dense_bytes + found.used_bytes) / 1e9
    return [
        f"rehearsal of {preset}, random weights: what it says is noise",
        "mode     " + ", ".join(f"{key} {value}" for key, value in found.mode.items()),
        f"prefill  {found.prefill_tok_s:.2f} tok/s",
        f"decode   {1 / found.token_s:.2f} tok/s: {found.token_s:.3f} s a token "
        f"(median of {found.n_tokens}; {found.fastest_s:.3f} to {found.slowest_s:.3f})",
        f"limit    {found.limit_s:.3f} s a token, so a token took "
        f"{found.times_limit:.2f} times its limit",
        f"         {found.compute_limit_s:.3f} s: {bytes_used:.2f} GB of weights "
        f"multiplied at {found.rates.matvec_gb_s:.1f} GB/s",
        f"         {found.read_limit_s:.3f} s: {found.read_bytes / 1e9:.2f} GB read at "
        f"{found.rates.disk_gb_s:.2f} GB/s (hit rate {found.hit_rate:.0%})",
        f"waiting  {found.wait_s:.3f} s a token for reads",
        f"memory   {found.resident_bytes / 1e9:.2f} GB of weights and slots",
    ]
