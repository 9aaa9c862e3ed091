"""Everything that writes long files, on models so small that a run takes milliseconds.

Each is called with its source and a target folder, and called again after a kill or a
fault it must leave there what an unbroken run leaves. Used by test_kill_resume.py and
test_write_faults.py, also in child processes: so nothing here needs pytest.
"""

import functools
import hashlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from tiny import TEXT_CONFIG, write_tiny

from flashmoe_ref import cli_rehearse, sweep, trace_exchange
from flashmoe_ref.config import ModelConfig
from flashmoe_ref.convert import convert
from flashmoe_ref.fetch import fetch, plan_fetch
from flashmoe_ref.folding import write_folded
from flashmoe_ref.measures import Tasks
from flashmoe_ref.pack import pack
from flashmoe_ref.requantize import requantize
from flashmoe_ref.settings import Setting
from flashmoe_ref.trace import Trace
from flashmoe_ref.trace_format import READ, SPAN, STEP
from flashmoe_ref.writing import LOCK_NAME, PARTIAL_SUFFIX

SMALL = {"num_hidden_layers": 2, "full_attention_interval": 2, "num_experts": 4}
SHAPE = ModelConfig.from_dict(
    {"model_type": "qwen3_5_moe", "text_config": TEXT_CONFIG | SMALL}
)
# what a killed run may leave under another name than that of a whole file
UNFINISHED = (PARTIAL_SUFFIX, ".incomplete", LOCK_NAME)


def digests(folder: Path) -> dict[str, str]:
    """What a folder holds, links followed."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_source(name: str, folder: Path) -> Path:
    """What a writer reads: a model, a trace, or a model and a text."""
    if name == "traces":
        return _trace(folder)
    layout = "hf" if name == "convert" else "mlx"
    source = write_tiny(folder, layout=layout, group_size=32, n_shards=2, **SMALL)
    (source / "tokenizer.json").write_text("{}")
    if name == "sweep":
        (source / "text.txt").write_text("one text")
    return source


def _trace(folder: Path) -> Path:
    rng, n = np.random.default_rng(0), 400
    folder.mkdir(parents=True)
    picks = rng.random((n, 4, 64)).argsort(axis=-1)[..., :3].astype(np.int32)
    steps = np.zeros(n, STEP)
    steps["n_tokens"], steps["position"] = 1, np.arange(n)
    Trace(picks, 64, steps).save(folder / "source.npz")
    return folder


# --- the writers ----------------------------------------------------------------------


def _write_rehearsal(folder: Path) -> Path:
    return write_folded(folder, SHAPE, 1, group_size=32, progress=False)


def rehearse_keep(source: Path, target: Path) -> None:
    """`flashmoe rehearse --keep`, up to where it begins to measure."""
    with cli_rehearse._folder(Namespace(keep=target)) as folder:
        _write_rehearsal(folder)


def rehearse(source: Path, target: Path) -> None:
    """Without --keep: nothing is left, of this run nor of a killed one before it."""
    target.mkdir(parents=True, exist_ok=True)
    with cli_rehearse._folder(Namespace(keep=None, dir=target)) as folder:
        _write_rehearsal(folder)


def write_traces(source: Path, target: Path) -> None:
    """A recorded run, in its three forms."""
    target.mkdir(parents=True, exist_ok=True)
    trace = Trace.load(source / "source.npz")
    trace.save(target / "run.npz")
    trace_exchange.write_csv(trace, target / "run.csv")
    trace.spans, trace.reads = np.zeros(0, SPAN), np.zeros(0, READ)
    trace_exchange.write_chrome(trace, target / "run.json")


def run_sweep(source: Path, target: Path) -> None:
    """Real weights and tables, made-up figures."""

    def figures(folder: Path, setting: Setting, *_: object) -> tuple[dict, list]:
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        wrong = [("json", {"text": f"{setting.name} {size} {i}"}) for i in range(2)]
        return {"tok_s": size}, wrong

    made_up = mock.patch.multiple(
        sweep,
        measure=figures,
        make_baseline=lambda *_: None,
        as_record=lambda outcome: outcome,
    )
    target.mkdir(parents=True, exist_ok=True)
    two_bits = {"bits": 2, "rule": "minmax"}
    settings = [Setting(), Setting(k=2), Setting(**two_bits), Setting(k=2, **two_bits)]
    tasks = Tasks((source / "text.txt",), (), None, 10, None, 0)
    with made_up:
        sweep.sweep(source, settings, tasks, target / "table.csv", progress=False)


def run_fetch(url: str, target: Path) -> None:
    """Into the cache. url: of tests/fake_hub.py."""
    from huggingface_hub import constants

    from flashmoe_ref import hub

    with (
        mock.patch.object(constants, "HF_HUB_CACHE", str(target)),
        mock.patch.object(hub, "RETRY_S", 0.0),
    ):
        fetch(plan_fetch("owner/model", endpoint=url), progress=False)


WRITERS: dict[str, Callable[[Path | str, Path], object]] = {
    "convert": functools.partial(convert, shard_bytes=40_000, progress=False),
    "requantize": functools.partial(
        requantize, bits=2, shard_bytes=40_000, progress=False
    ),
    "pack": functools.partial(pack, progress=False),
    "rehearse --keep": rehearse_keep,
    "rehearse": rehearse,
    "traces": write_traces,
    "sweep": run_sweep,
    "fetch": run_fetch,
}
