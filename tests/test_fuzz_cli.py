"""Command lines that make no sense: each ends with 0, or with 2 and one line."""

import io
import json
import random
import sys
from contextlib import redirect_stderr, redirect_stdout
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from fuzz import inputs, survive
from test_fuzz_tables import PROBE, arrays, routing_csv
from test_fuzz_text import TOOLS
from tiny import write_tiny, write_tokenizer

from flashmoe_ref import cli, cli_rehearse, estimate, fetch, probe_disk
from flashmoe_ref.cli_options import build_parser
from flashmoe_ref.errors import ConfigError
from flashmoe_ref.pack import pack

RUN = ("--model", "M", "--engine", "numpy", "--no-compile", "--max-tokens", "2")
COMMANDS = [
    line.split()
    for line in (
        "generate {run} --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 Hi",
        "generate {run} --slots 2 --policy lfu --threads 2 --k 1 --kept as-routed Hi",
        "generate {run} --mass 0.9 --repetition-penalty 1.1 --trace new.npz --json Hi",
        "generate {run} --budget 4 --pin 1 --profile t.npz --prefetch look-ahead:2 Hi",
        "generate {run} --experts packed --no-report --presence-penalty 0.5 Hi",
        "chat {run} --system Brief --tools tools.json --thinking off",
        "chat {run} --example-tools --slots 2",
        "generate {run} --k 1 --calibrate t.csv --bypass-page-cache --no-report Hi",
        "info M --k 1 --bits 4 --group-size 64 --json",
        "info qwen3.5-397b-a17b --k 4 --bits 2 --group-size 32",
        "doctor qwen3.5-397b-a17b --machine m3-max-48 --memory 48GB --disk 7GB/s --k 4",
        "doctor M --machine pc-32 --probe p.json --trace t.npz --bits 2 --json",
        "trace t.npz --chrome new.json --csv new.csv --npz new.npz",
        "trace t.csv --n-experts 8 --npz new.npz",
        "verify M --packed M/packed_experts --no-progress",
        "pack M new --no-progress",
        "convert M new --bits 4 --group-size 32 --dense-bits 8 --shard-mb 5",
        "requantize M new --bits 2 --group-size 32 --rule minmax --down-bits 3",
        "requantize M new --bits 2 --dense-bits 4 --router-bits 8 --layer-bits 0:4",
        "evaluate M --k 2 1 --bits 2 --rule mlx --mass 0.9 --quick --csv new.csv",
        "evaluate M --settings s.csv --text t.csv --tokens 5 --prompts 2 --sampled 1",
        "rehearse --disk-budget 40GB --k 4 --bits 4 --slots 8 --threads 2 --tokens 3",
        "rehearse --preset qwen3.5-35b-a3b --disk-budget 9GB --routing t.npz",
        "probe --size 5 --quick --dir . --json new.json",
        "fetch owner/model --revision main --dir new --at-once 4 --dry-run",
    )
]
VALUES = (
    *("", " ", "-", "--", "-1", "0", "1", "2", "3", "-0", "+1", "007", "1.5", "1e3"),
    *("nan", "inf", "-inf", "1e999", "1e-999", "9" * 30, "-" + "9" * 30, "9" * 5000),
    *("1_0", "\u0664", "0x10", "true", "None", "lru", "mlx", "auto", "stream", "x"),
    *("48GB", "0GB", "1e9GB", "-5GB", "GB", "9" * 400 + "GB", "7GB/s", "m1-0", "m9-9"),
    *("look-ahead:0", "look-ahead:-1", "frequency:x", "0-9999:4", "1-0:4", "0:99", ":"),
    *("nowhere", "M", ".", "..", "t.npz", "t.csv", "p.json", "s.csv", "tools.json"),
    *("bad.bin", "empty", "a\nb", "\u202e\x1b[31m", "\udcff", "é" * 300, "x/y", "~"),
    *("[1]", "{}", "%s%n", "'", '"', "$HOME", "*", "qwen3.5-397b-a17b", "QWEN"),
)
OPTIONS = sorted({word for line in COMMANDS for word in line if word[:2] == "--"})


def change_command(_: bytes, rng: random.Random) -> bytes:
    """Words of a command taken out, repeated, exchanged or replaced."""
    words = [*rng.choice(COMMANDS)]
    at = words.index("{run}") if "{run}" in words else len(words)
    words[at : at + 1] = RUN if at < len(words) else ()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        i, change = rng.randrange(len(words)), rng.randrange(12)
        if change == 0:
            words = words[: max(1, i)] + words[max(1, i) + 1 :]
        elif change == 1:
            words.insert(i, rng.choice(words))
        elif change == 2:
            words += [rng.choice(OPTIONS), rng.choice(VALUES)]
        elif change == 3:
            words[i] = rng.choice((words[i][:-1], words[i] + "x", words[i].upper()))
        elif change == 4:
            words[i] += "=" + rng.choice(VALUES)
        else:  # mostly: another value
            values = [j for j in range(1, len(words)) if words[j][:2] != "--"]
            words[rng.choice(values or [0])] = rng.choice(VALUES)
    return json.dumps(words).encode()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the commands name; long work is left out."""
    model = write_tiny(
        tmp_path / "M",
        num_hidden_layers=1,
        full_attention_interval=1,
        num_experts=2,
        num_experts_per_tok=2,
        vocab_size=264,
    )
    write_tokenizer(model)
    pack(model, progress=False)
    np.savez(tmp_path / "t.npz", **arrays())
    files = {"t.csv": routing_csv(), "p.json": json.dumps(PROBE).encode()}
    files |= {"tools.json": json.dumps(TOOLS).encode(), "s.csv": b"k,bits\n1,\n2,2\n"}
    for name, content in (files | {"bad.bin": b"\xff\0PK", "empty": b""}).items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)

    def reached(*_: object, **__: object) -> None:
        raise ConfigError("the options were taken")

    for module, name in (
        *((estimate, "estimate"), (fetch, "plan_fetch"), (probe_disk, "own_file")),
        *((cli_rehearse, "_announce"), (cli_rehearse, "_measure")),
    ):
        monkeypatch.setattr(module, name, reached)
    monkeypatch.setattr(cli, "show", lambda pieces: [*islice(pieces, 2)])
    parser = build_parser()
    monkeypatch.setattr(cli, "build_parser", lambda: parser)
    return tmp_path


def run(words: list[str]) -> tuple[int, str]:
    """The exit code, and what went to standard error."""
    err = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as ended:  # of argparse
            code = ended.code
    return code, err.getvalue()


@inputs({"command line": 2000})
def test_command_lines(place: Path, monkeypatch, kind: str, n: int) -> None:
    kept = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    stamps = {path: path.stat().st_mtime_ns for path in kept}

    def read(data: bytes) -> None:
        for path, stamp in stamps.items():  # a command may have written over one
            if not path.exists() or path.stat().st_mtime_ns != stamp:
                path.write_bytes(kept[path])
                stamps[path] = path.stat().st_mtime_ns
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n/new\n/quit\n"))
        code, err = run(json.loads(data))
        assert code in (0, 2) and "Traceback" not in err, err
        assert "out of memory" not in err and "standard input" not in err, err
        if code == 2:
            lines = [x for x in err.split("\n") if x.startswith("flashmoe: ")]
            assert len(lines) == 1, err
            raise ConfigError(err[err.index("flashmoe: ") :].rstrip("\n"))

    n_read, n_refused = survive(kind, n, b"", change_command, read)
    assert n_read > n / 50 and n_refused > n / 4
