"""Kernels compiled by several processes at once end up in the cache unharmed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.bytecode import FunctionIdentity

import flashmoe_ref.compiled  # noqa: F401 (it sets where the numbers start)

ROOT = Path(__file__).parents[1]

# Two processes compile the same function for different types. Saving waits a second
# after it has read the index, so that without a lock both choose the same file name.
COMPILE = """
import sys, time
import numpy as np
from numba.core.caching import IndexDataCacheFile
from flashmoe_ref.compiled import compiled

load = IndexDataCacheFile._load_index
save = IndexDataCacheFile.save

def slow_save(self, key, data):
    IndexDataCacheFile._load_index = slow_load
    save(self, key, data)
    IndexDataCacheFile._load_index = load

def slow_load(self):
    index = load(self)
    time.sleep(1)
    return index

if "slow" in sys.argv:
    IndexDataCacheFile.save = slow_save

def total(x):
    n = x[0] - x[0]
    for value in x:
        n += value
    return n

total = compiled(total)
for dtype in sys.argv[1].split(","):
    assert total(np.arange(5, dtype=dtype)) == 10, dtype
assert "slow" in sys.argv or not sum(total.stats.cache_misses.values())
"""


def _start(script: Path, *args: str, stdout: int | None = None) -> subprocess.Popen:
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(script.parent / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, str(script), *args],
        env=environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


def test_two_processes_compile_at_once(tmp_path: Path) -> None:
    script = tmp_path / "kernel.py"
    script.write_text(COMPILE)
    both = [_start(script, dtype, "slow") for dtype in ("int64", "float32")]
    for process in both:
        assert process.communicate(timeout=60)[1] == b""
        assert process.returncode == 0
    reader = _start(script, "int64,float32")
    _, err = reader.communicate(timeout=60)
    assert reader.returncode == 0, err.decode()


# Kernels that a factory makes have one name. Two processes compile one each, the third
# loads both and calls both from a kernel of its own.
FACTORY = """
import sys
from flashmoe_ref.compiled import compiled

def adder(n):
    def add(x):
        total = x
        for i in range(x):  # not inlined away
            total += n * (i % 2) + n
        return total
    return compiled(add)

one, ten = adder(1), adder(10)

@compiled
def both(x):
    return one(x), ten(x)

for name in sys.argv[1:]:
    print({"one": one, "ten": ten, "both": both}[name](3))
"""


def _printed(script: Path, *args: str) -> str:
    process = _start(script, *args, stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()
    return out.decode().strip()


def test_kernels_of_one_name_are_told_apart(tmp_path: Path) -> None:
    script = tmp_path / "factory.py"
    script.write_text(FACTORY)
    assert _printed(script, "one") == "7"
    assert _printed(script, "ten") == "43"
    assert _printed(script, "both") == "(7, 43)"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_forked_process_counts_from_elsewhere() -> None:
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, str(next(FunctionIdentity._unique_ids)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = int(os.read(reader, 100))
    os.close(reader)
    os.close(writer)
    assert abs(theirs - next(FunctionIdentity._unique_ids)) > 10**6
