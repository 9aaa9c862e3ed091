"""Kernels compiled by several processes at once end up in the cache unharmed."""

import os
import subprocess
import sys
from pathlib import Path

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


def _start(script: Path, *args: str) -> subprocess.Popen:
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(script.parent / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, str(script), *args], env=environment, stderr=subprocess.PIPE
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
