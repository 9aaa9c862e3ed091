"""How much memory this process has right now, on Linux and on macOS.

The resident set: pages of the process that are in memory, libraries and mapped files
included. **But:** one process, and a sample, no peak (`report.peak_memory_bytes`); a
peak starts from what the parent process had, where a system starts programs by fork.
*Taught in notebooks/07.*
"""

import mmap
import os
import subprocess
from pathlib import Path

from .errors import ConfigError

STATM = Path("/proc/self/statm")  # Linux: pages in all, pages in memory, ...


def resident_set_bytes(statm: Path = STATM) -> int:
    """Bytes of this process that are in memory now.

    Raises: ConfigError where neither the system nor its `ps` tells.
    """
    if statm.exists():
        return int(statm.read_text().split()[1]) * mmap.PAGESIZE
    command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout) * 1024  # every ps counts KiB
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"the memory of this process is not known here: there is no {statm}, and "
            f"'{' '.join(command)}' failed ({error})"
        ) from None
