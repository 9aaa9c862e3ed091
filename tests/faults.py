"""Faults of a disk, put in where Python calls the system; the package has no hooks.

`inject` makes every call that touches a file below a folder announce itself, and write
in two halves. What happens then is up to the caller: count, raise, or kill the process.
"""

import builtins
import errno
import functools
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

# (kind, path). By name: "look", or "change" of the disk; by handle: "read", or "write".
Step = Callable[[str, str], None]

KINDS = {
    "change": ("replace", "rename", "mkdir", "rmdir", "unlink", "symlink", "truncate"),
    "look": ("stat", "scandir", "listdir", "readlink"),
    "write": ("fsync", "write", "posix_fallocate"),
    "read": ("preadv",),
}
CHANGES = ("change", "write")


def inject(patch: Callable[[object, str, object], object], root: Path, step: Step):
    """Announce what touches files below root. patch: setattr, or monkeypatch's."""
    root, handles = os.path.realpath(root), {}

    def is_ours(file: object) -> bool:
        if isinstance(file, int):
            return file in handles
        return os.path.abspath(os.fsdecode(file)).startswith(root)

    def announce(owner: object, name: str, kind: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(file, *args, **kwargs):
            if is_ours(file):
                step(kind, handles.get(file) or str(file))
            return original(file, *args, **kwargs)

        patch(owner, name, wrapped)

    for kind, names in KINDS.items():
        for name in names:
            announce(os, name, kind)
    announce(np, "fromfile", "read")
    open_file, is_writing = os.open, os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def os_open(path, flags, *args, **kwargs):
        if is_ours(path):
            step("change" if flags & is_writing else "look", str(path))
        handle = open_file(path, flags, *args, **kwargs)
        handles.pop(handle, None)
        if is_ours(path):
            handles[handle] = str(path)
        return handle

    close = os.close

    def os_close(handle):
        handles.pop(handle, None)
        close(handle)

    patch(os, "open", os_open)
    patch(os, "close", os_close)
    for module in (builtins, io):
        patch(module, "open", _opener(module.open, is_ours, step, handles))


def _opener(real: Callable, is_ours: Callable, step: Step, handles: dict) -> Callable:
    def opened(file, mode="r", buffering=-1, *args, **kwargs):
        if isinstance(file, int) or "x" in mode or not is_ours(file):
            return real(file, mode, buffering, *args, **kwargs)
        step("change" if set(mode) & set("wa+") else "look", str(file))
        raw = _File(file, mode.replace("b", "").replace("t", ""))
        raw.step, raw.handles = step, handles
        handles[raw.fileno()] = str(file)
        kinds = {"r": io.BufferedReader, "w": io.BufferedWriter, "a": io.BufferedWriter}
        kind = io.BufferedRandom if "+" in mode else kinds[mode.strip("bt")]
        binary = kind(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, *args, **kwargs)

    return opened


class _File(io.FileIO):
    """A file whose reads are announced, and whose writes are in the middle."""

    step: Step
    handles: dict[int, str]

    def close(self) -> None:
        if not self.closed:
            self.handles.pop(self.fileno(), None)  # the number will be another file's
        super().close()

    def readinto(self, buffer) -> int:
        self.step("read", str(self.name))
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self.step("read", str(self.name))
        return super().readall()

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        half = len(view) // 2
        super().write(view[:half])
        self.step("write", str(self.name))
        return half + super().write(view[half:])


class Failing:
    """A step that fails at the n-th event of some kinds, once or from then on."""

    def __init__(
        self,
        at: int,
        code: int = errno.EIO,
        kinds: tuple[str, ...] = (*KINDS,),
        forever: bool = False,
    ) -> None:
        self.at, self.code, self.kinds, self.forever = at, code, kinds, forever
        self.n, self.path = 0, None  # events so far, and where it failed first
        self._lock = threading.Lock()

    def __call__(self, kind: str, path: str) -> None:
        if kind not in self.kinds:
            return
        with self._lock:
            self.n += 1
            fails = self.n >= self.at if self.forever else self.n == self.at
            if fails and self.path is None:
                self.path = path
        if fails and self.at:
            named = (path,) if kind in ("look", "change") else ()
            raise OSError(self.code, os.strerror(self.code), *named)
