"""How kernels are compiled: once a machine, kept on disk, discarded when code changes.

Numba's own cache compares a kernel with the date of its file alone, so a change in a
file that the kernel calls into goes unnoticed. Here the cache folder is named by a
digest of all kernel files instead. It lies beside the package, or in the user's cache
where that cannot be written, or in NUMBA_CACHE_DIR where that is set.

Numba also tells functions of one name apart by a number that each process counts from
1. Kernels for different types or widths, compiled by different processes, then have one
name, and a process that loads both calls the wrong one. So here each process counts
from a number of its own (numba issue 10486).
**But:** if no folder can be written, kernels are compiled again in each process.
*Taught in notebooks/05.*
"""

import hashlib
import itertools
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import numba
from filelock import FileLock
from numba.core.bytecode import FunctionIdentity
from numba.core.event import Event, Listener, register

KERNEL_FILES = (
    "compiled.py",
    "vectors.py",
    "kernels.py",
    "prompt_kernels.py",
    "steps.py",
)


def _candidates() -> list[Path]:
    if os.environ.get("NUMBA_CACHE_DIR"):
        return [Path(os.environ["NUMBA_CACHE_DIR"])]
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folders = [Path(__file__).parent / "__pycache__"]
    if os.path.isabs(user_cache):  # not in a container whose user has no home
        folders.append(Path(user_cache) / "flashmoe_ref")
    return [folder / "kernels" for folder in folders]


def _cache_folder() -> Path | None:
    """A writable folder for exactly this code, made if need be."""
    here = Path(__file__).parent
    sources = [(here / name).read_bytes() for name in KERNEL_FILES]
    digest = hashlib.sha256(b"\0".join(sources)).hexdigest()[:12]
    for parent in _candidates():
        folder = parent / f"flashmoe-{digest}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # raises if not writable
        except OSError:
            continue
        if parent.is_relative_to(here):  # elsewhere, other installations may live
            for other in set(parent.glob("flashmoe-*")) - {folder}:
                shutil.rmtree(other, ignore_errors=True)
        return folder
    return None


CACHE_FOLDER = _cache_folder()


def _count_from_a_number_of_our_own() -> None:
    FunctionIdentity._unique_ids = itertools.count(secrets.randbits(62))


_count_from_a_number_of_our_own()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_from_a_number_of_our_own)


def compiled(function: Callable, **options: bool) -> Callable:
    """Compile a function on its first call with arguments of new types.

    Arithmetic is as written, never reordered: a kernel gives the same bits wherever it
    is inlined and whichever process compiled it. Division by zero gives infinity, as in
    NumPy; other threads may run meanwhile.
    """
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(CACHE_FOLDER or "")
    try:
        kernel = numba.njit(
            error_model="numpy",
            nogil=True,
            cache=CACHE_FOLDER is not None,
            **options,
        )(function)
    finally:
        numba.config.CACHE_DIR = before
    if CACHE_FOLDER is not None:
        _save_one_at_a_time(kernel)
    return kernel


def _save_one_at_a_time(kernel: Callable) -> None:
    """Let no two processes save kernels at once.

    Numba numbers the files of a function's kernels without a lock. Two processes that
    compile it for different types may choose the same number, and a later one would run
    machine code made for other types.
    """
    cache_file = kernel._cache._cache_file
    save = cache_file.save

    def save_locked(key: object, data: object) -> None:
        with FileLock(CACHE_FOLDER / "lock"):
            save(key, data)

    cache_file.save = save_locked


def serial_and_parallel(function: Callable) -> tuple[Callable, Callable]:
    """Compile a function twice: its `prange` loops in one thread, or shared by all."""
    copy = FunctionType(function.__code__, function.__globals__, function.__name__)
    copy.__qualname__ = function.__qualname__ + "_parallel"  # names its cache file
    return compiled(function), compiled(copy, parallel=True)


def announce_compiling(notify: Callable[[str], None]) -> None:
    """Call notify with one line, once, if a kernel has to be compiled from now on."""
    register("numba:compile", _FirstCompile(notify))


class _FirstCompile(Listener):
    def __init__(self, notify: Callable[[str], None]) -> None:
        self.tell = notify

    def on_start(self, event: Event) -> None:
        """A function is not in the cache: Numba begins to compile it."""
        function = event.data["dispatcher"].py_func
        if self.tell and function.__module__.startswith(__package__):
            self.tell("compiling kernels for this CPU: once, about half a minute ...")
            self.tell = None

    def on_end(self, event: Event) -> None:
        """Nothing to say: the model answers."""
