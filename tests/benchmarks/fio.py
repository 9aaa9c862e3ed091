"""fio, to compare with: what a C program gets out of the same file.

Random reads of one size by several threads, each in its own part of the file.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

from flashmoe_ref.page_cache import evict


def why_not() -> str | None:
    """Why fio cannot be asked here, or None if it can."""
    if shutil.which("fio") and hasattr(os, "posix_fadvise"):
        return None
    return "needs Linux and fio (apt-get install fio)"


def write_random_file(path: Path, n_blocks: int, block_bytes: int) -> None:
    """Make a file that no disk can compress, and wait until it is stored."""
    with open(path, "wb") as file:
        for _ in range(n_blocks):
            file.write(os.urandom(block_bytes))
        os.fsync(file.fileno())


def evict_file(path: Path) -> None:
    """Drop a file from the page cache. Raises: OSError if the system keeps it."""
    with open(path, "rb") as file:
        if evict(file.fileno()) != 0:
            raise OSError(f"{path}: this file system drops nothing from its cache")


def fio_gb_s(
    path: Path, n_bytes: int, threads: int, part_bytes: int, warm_s: int | None = None
) -> float:
    """GB/s of reads of n_bytes; each thread has part_bytes of the file.

    Each block once, or, with warm_s, over and over for so many seconds.
    """
    command = [
        "fio",
        "--name=records",
        f"--filename={path}",
        "--rw=randread",
        "--ioengine=psync",
        "--iomem=mmap",  # from a page's start, as ours; else copies are up to 3x slower
        f"--bs={n_bytes}",
        f"--numjobs={threads}",
        "--thread",
        f"--size={part_bytes}",
        f"--offset_increment={part_bytes}",
        *(("--time_based", f"--runtime={warm_s}") if warm_s else ()),
        "--invalidate=0",  # we evict ourselves, and check that it worked
        "--randrepeat=0",
        "--group_reporting",
        "--output-format=json",
    ]
    result = subprocess.run(command, capture_output=True, check=True, text=True)
    report = json.loads(result.stdout[result.stdout.index("{") :])
    return report["jobs"][0]["read"]["bw_bytes"] / 1e9
