"""Runs under a memory limit: in real control groups, and in folders that stand in."""

import sys

import pytest

from flashmoe_ref.errors import ConfigError
from flashmoe_ref.memory_limit import run_limited, why_not

LIMIT = 120 << 20
REASON = why_not()
needs_groups = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@needs_groups
def test_a_program_within_its_limit():
    done = run_limited(python("x = bytearray(40 << 20); print(len(x))"), LIMIT)
    assert (done.returncode, done.stdout.strip()) == (0, str(40 << 20))
    assert not done.was_killed
    assert 40 << 20 < done.peak_bytes <= LIMIT


@needs_groups
def test_a_program_beyond_its_limit_is_killed():
    done = run_limited(python("x = bytearray(400 << 20); print(len(x))"), LIMIT)
    assert done.was_killed and done.returncode != 0
    assert done.stdout == ""


@needs_groups
def test_the_page_cache_counts(tmp_path):
    """Reading a file larger than the limit works, and stays within it."""
    path = tmp_path / "large"
    path.write_bytes(bytes(3 * LIMIT))
    code = f"""
with open({str(path)!r}, "rb") as file:
    while file.read(1 << 20):
        pass
"""
    done = run_limited(python(code), LIMIT)
    assert done.returncode == 0 and not done.was_killed
    assert done.peak_bytes <= LIMIT


@needs_groups
def test_errors_of_the_program_are_its_own():
    done = run_limited(python("1 / 0"), LIMIT)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    assert not done.was_killed


@pytest.mark.parametrize(
    ("version", "limit", "swap"),
    [
        (1, "memory.limit_in_bytes", ("memory.memsw.limit_in_bytes", str(LIMIT))),
        (2, "memory.max", ("memory.swap.max", "0")),
    ],
)
def test_both_versions_of_control_groups(tmp_path, version, limit, swap, monkeypatch):
    """Plain folders stand in for the groups; the program sees what was written."""
    monkeypatch.setattr(sys, "platform", "linux")
    if version == 1:
        (tmp_path / "memory").mkdir()
    code = """
import glob, os, sys
folder = [f for f in glob.glob(sys.argv[1] + "/**/cgroup.procs", recursive=True)][-1]
folder = os.path.dirname(folder)
for name in sorted(os.listdir(folder)):
    print(name, open(os.path.join(folder, name)).read().strip())
print(os.getpid())
"""
    done = run_limited([*python(code), str(tmp_path)], LIMIT, root=tmp_path)
    *files, pid = done.stdout.splitlines()
    seen = dict(line.split() for line in files)
    assert seen == {"cgroup.procs": pid, limit: str(LIMIT), swap[0]: swap[1]}
    assert (done.peak_bytes, done.was_killed) == (0, False)  # no kernel behind them


def test_it_says_why_not(tmp_path, monkeypatch):
    missing = tmp_path / "nothing"
    with pytest.raises(ConfigError, match="no control group can be made"):
        run_limited(["true"], LIMIT, root=missing)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Linux only" in why_not()
