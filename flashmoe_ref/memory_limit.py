"""Run a program in less memory than the machine has: a Linux control group.

The page cache of the files that the program reads counts against the limit, as it does
on a machine of that size; this is what makes the figures of such a run honest. Works
with both versions of control groups. **But:** Linux, and leave to make a group (root,
in most places); elsewhere `why_not` says what is missing. *Taught in notebooks/08.*
"""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError

ROOT = Path("/sys/fs/cgroup")
# The shell enters the group, then becomes the program: nothing runs outside.
ENTER = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True)
class LimitedRun:
    """What became of a program under a limit."""

    returncode: int
    stdout: str
    stderr: str
    peak_bytes: int  # of the group: the program's memory and its page cache
    was_killed: bool  # by the kernel, for want of memory


@dataclass(frozen=True)
class _Names:
    """What the files of a group are called."""

    limit: str
    peak: str
    swap: str
    swap_value: str | None  # None: the same as the limit


VERSION_1 = _Names(
    "memory.limit_in_bytes",
    "memory.max_usage_in_bytes",
    "memory.memsw.limit_in_bytes",
    None,
)
VERSION_2 = _Names("memory.max", "memory.peak", "memory.swap.max", "0")


def why_not(root: Path = ROOT) -> str | None:
    """Why no group can be made here, or None if one can."""
    if sys.platform != "linux":
        return f"control groups exist on Linux only, this is {sys.platform}"
    try:
        with _new_group(1 << 30, root):
            return None
    except OSError as error:
        return (
            f"no control group can be made in {error.filename or root} "
            f"({error.strerror}); run as root, or in a container that may"
        )


def run_limited(
    command: Sequence[str], limit_bytes: int, timeout_s: float = 600, root: Path = ROOT
) -> LimitedRun:
    """Run a command whose memory and page cache together stay below a limit.

    Raises: ConfigError where no control group can be made; TimeoutExpired.
    """
    reason = why_not(root)
    if reason is not None:
        raise ConfigError(reason)
    with _new_group(limit_bytes, root) as (group, names):
        enter = ["/bin/sh", "-c", ENTER, str(group / "cgroup.procs"), *command]
        done = subprocess.run(enter, capture_output=True, text=True, timeout=timeout_s)
        peak = group / names.peak  # absent before Linux 5.19 in version 2
        peak_bytes = int(peak.read_text()) if peak.exists() else 0
        killed = _kills(group) > 0
    return LimitedRun(done.returncode, done.stdout, done.stderr, peak_bytes, killed)


@contextmanager
def _new_group(limit_bytes: int, root: Path) -> Iterator[tuple[Path, _Names]]:
    """A group with the limit, and no swap; removed afterwards."""
    version_1 = root / "memory"
    parent, names = (version_1, VERSION_1) if version_1.exists() else (root, VERSION_2)
    group = parent / f"flashmoe-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    group.mkdir()
    try:
        (group / names.limit).write_text(str(limit_bytes))
        with suppress(OSError):  # kernels without accounting of swap
            (group / names.swap).write_text(names.swap_value or str(limit_bytes))
        yield group, names
    finally:
        with suppress(OSError):
            group.rmdir()


def _kills(group: Path) -> int:
    """Processes that the kernel killed in the group."""
    for name in ("memory.events", "memory.oom_control"):
        path = group / name
        if path.exists():
            pairs = dict(line.split() for line in path.read_text().splitlines())
            return int(pairs.get("oom_kill", 0))
    return 0
