"""Something else in the place of a file: a folder, a loop, a pipe, a device, a pointer.

And the sum of all inputs that these files try.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzz import bounded_memory, bounded_time, check_message, planned
from tally import count
from test_fuzz_tables import PROBE, arrays, routing_csv
from test_fuzz_text import TOOLS
from tiny import write_tiny, write_tokenizer

from flashmoe_ref.checkpoint import INDEX_NAME, Checkpoint
from flashmoe_ref.cli_chat import read_tools
from flashmoe_ref.errors import FlashMoeError
from flashmoe_ref.experts import packed_experts
from flashmoe_ref.headers import read_header
from flashmoe_ref.machines import machine, with_probe
from flashmoe_ref.pack import pack
from flashmoe_ref.quality import read_sweep
from flashmoe_ref.relu_model import ReluConfig
from flashmoe_ref.settings import read_settings
from flashmoe_ref.structured_runs import load_prompts
from flashmoe_ref.sweep import read_table
from flashmoe_ref.tokenizer import Tokenizer
from flashmoe_ref.trace import Trace
from flashmoe_ref.trace_exchange import read_csv
from flashmoe_ref.writing import read_digests

SHARD = "model-00001-of-00002.safetensors"


def packed(path: Path) -> object:
    """The folder of packed experts, by any file in it."""
    return packed_experts(path.parent, Checkpoint.open(path.parents[1]).config)


READERS: dict[str, Callable[[Path], object]] = {
    "config.json": lambda path: Checkpoint.open(path.parent),
    INDEX_NAME: lambda path: Checkpoint.open(path.parent),
    SHARD: lambda path: Checkpoint.open(path.parent),
    "packed_experts/layout.json": packed,
    "packed_experts/layer_00.bin": packed,
    "packed_experts/layer_00.bin.sha256": lambda p: read_digests(p.with_suffix("")),
    "tokenizer.json": lambda path: Tokenizer.from_dir(path.parent),
    "tokenizer_config.json": lambda path: Tokenizer.from_dir(path.parent),
    "generation_config.json": lambda path: Tokenizer.from_dir(path.parent),
    "chat_template.jinja": lambda path: Tokenizer.from_dir(path.parent),
    "tools.json": read_tools,
    "t.npz": Trace.load,
    "t.csv": read_csv,
    "s.csv": read_settings,
    "table.csv": read_table,
    "sweep.csv": read_sweep,
    "set.jsonl": load_prompts,
    "probe.json": lambda path: with_probe(machine("pc-32"), path),
    "relu.json": ReluConfig.from_json,
    "one.safetensors": read_header,
}
MAY_BE_ABSENT = {"tokenizer_config.json", "generation_config.json", "sweep.csv"}
MAY_BE_ABSENT |= {"chat_template.jinja", "table.csv", INDEX_NAME}
MAY_BE_EMPTY = {"table.csv", "sweep.csv", "chat_template.jinja"}
MAY_BE_ABSENT |= {"packed_experts/layer_00.bin.sha256"}


def put_huge(path: Path) -> None:
    """A file without blocks that has a terabyte."""
    with open(path, "wb") as file:
        file.truncate(1 << 40)


ODD: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a loop of links": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
    "a pipe": os.mkfifo,
    "a device without end": lambda path: path.symlink_to("/dev/zero"),
    "a terabyte": put_huge,
    "nothing": lambda path: None,
    "no bytes": Path.touch,
    "a Git-LFS pointer": lambda path: path.write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    ),
    "UTF-16": lambda path: path.write_text('{"a": 1}', "utf-16"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with all its files, and one of everything else that is read."""
    folder = tmp_path_factory.mktemp("places") / "m"
    write_tiny(folder, n_shards=2, num_hidden_layers=1, vocab_size=264)
    write_tokenizer(folder)
    pack(folder, progress=False)
    np.savez(folder / "t.npz", **arrays())
    (folder / "t.csv").write_bytes(routing_csv())
    (folder / "s.csv").write_text("k\n2\n")
    for name in ("table.csv", "sweep.csv"):
        (folder / name).write_text("k,bits\n2,4\n")
    for name, value in (("tools.json", TOOLS), ("probe.json", PROBE)):
        (folder / name).write_text(json.dumps(value))
    prompt = {"id": "1", "kind": "json", "group": "", "messages": [], "wanted": 1}
    (folder / "set.jsonl").write_text(json.dumps(prompt))
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    relu = dict.fromkeys(sizes, 8) | {"num_attention_heads": 2}
    relu |= {"rope_theta": 1e4, "rms_norm_eps": 1e-6}
    (folder / "relu.json").write_text(json.dumps(relu))
    os.link(folder / SHARD, folder / "one.safetensors")
    os.rename(folder / "one.safetensors", folder.parent / "one.safetensors")
    return folder


@pytest.mark.parametrize("odd", ODD)
def test_places(whole: Path, odd: str) -> None:
    for name, read in READERS.items():
        outside = name == "one.safetensors"
        path = (whole.parent if outside else whole) / name
        kept = path.with_name("kept away")
        read(path)  # as it is, it can be read
        path.rename(kept)
        try:
            ODD[odd](path)
            with bounded_memory(), bounded_time():
                check_odd(path, name, odd, read)
        finally:
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            path.unlink(missing_ok=True)
            kept.rename(path)
    count("inputs: something else in place of a file", len(READERS))


def check_odd(path: Path, name: str, odd: str, read: Callable) -> None:
    """Refused in one line that names the file; else it may be absent or empty."""
    try:
        read(path)
    except FlashMoeError as error:
        check_message(str(error), path.name if name != SHARD else str(path.parent))
        return
    is_absent = odd in ("nothing", "a link to nothing") and name in MAY_BE_ABSENT
    is_empty = odd == "no bytes" and name in MAY_BE_EMPTY
    # Of a table only whole lines count, and here is none.
    is_cut_off = odd == "UTF-16" and name == "table.csv"
    assert is_absent or is_empty or is_cut_off, f"{name}: {odd}"


def test_enough_is_tried() -> None:
    """At least 20,000 damaged inputs, by the marks of the tests that try them."""
    kinds = planned()
    assert len(kinds) > 20 and min(kinds.values()) >= 300
    assert sum(kinds.values()) >= 20_000
