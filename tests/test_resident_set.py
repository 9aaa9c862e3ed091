"""Memory in use is the system's figure, by /proc or, where there is none, by ps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashmoe_ref.errors import ConfigError
from flashmoe_ref.resident_set import STATM, resident_set_bytes

GROWN = 64 << 20


def stand_in(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `ps` of our own, and a folder without /proc, as on macOS."""
    (folder / "ps").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "ps").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder / "statm"


@pytest.mark.parametrize("statm", [STATM, Path("/nonexistent/statm")], ids=str)
def test_memory_that_is_touched_counts(statm: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from flashmoe_ref.resident_set import resident_set_bytes\n"
        f"before = resident_set_bytes(Path({str(statm)!r}))\n"
        f"x = b'x' * {GROWN}\n"
        f"print(resident_set_bytes(Path({str(statm)!r})) - before)"
    )
    if not statm.exists() and subprocess.run(["which", "ps"]).returncode:
        pytest.skip("no ps here")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # what Python itself takes in between is far less than a tenth
    assert 0.95 * GROWN < int(done.stdout) < 1.1 * GROWN


def test_without_proc_ps_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'[ "$*" = "-o rss= -p {os.getpid()}" ] && echo "  1234"'
    assert resident_set_bytes(stand_in(tmp_path, script, monkeypatch)) == 1234 * 1024


@pytest.mark.parametrize("script", ["exit 1", "echo", "echo much"])
def test_a_ps_that_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    statm = stand_in(tmp_path, script, monkeypatch)
    with pytest.raises(ConfigError, match=r"memory of this process is not known.*ps"):
        resident_set_bytes(statm)


def test_proc_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statm = stand_in(tmp_path, "exit 1", monkeypatch)  # is not asked
    statm.write_text("900 17 5 1 0 80 0\n")
    monkeypatch.setattr("mmap.PAGESIZE", 4096)
    assert resident_set_bytes(statm) == 17 * 4096


def test_no_ps_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="not known here"):
        resident_set_bytes(tmp_path / "statm")
