"""Child processes, in which a writer runs until it is killed; they start fast.

A server process has imported everything beforehand and is copied for each child. MLX is
never loaded in it.
"""

import multiprocessing
import os
import signal
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from faults import CHANGES, inject
from writers import WRITERS

context = multiprocessing.get_context("forkserver")
PRELOADED = ["killing", "huggingface_hub.hf_api", "huggingface_hub.file_download"]


def start_server() -> None:
    """Start it, with this folder on its path: it does not take over sys.path."""
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, str(Path(here).parent)])
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, {"PYTHONPATH": path}):
        forkserver.ensure_running()


def run_killed(name: str, source: Path | str, target: Path, kill_at: int) -> None:
    """In a child: run a writer that dies of SIGKILL at its n-th event (0: never)."""
    left = kill_at

    def step(kind: str, path: str) -> None:
        nonlocal left
        left -= kind in CHANGES
        if left == 0 and kind in CHANGES:
            os.kill(os.getpid(), signal.SIGKILL)

    inject(setattr, target, step)
    WRITERS[name](source, target)


def run_counted(name: str, source: Path | str, target: Path, events) -> None:
    """In a child: run a writer and count its events."""

    def step(kind: str, path: str) -> None:
        events.value += kind in CHANGES

    inject(setattr, target, step)
    WRITERS[name](source, target)


def in_child(function, *args) -> int:
    """Returns the exit code."""
    child = context.Process(target=function, args=args)
    child.start()
    child.join(60)
    return child.exitcode
