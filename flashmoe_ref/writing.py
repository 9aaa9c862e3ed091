"""Write big files so that a kill at any moment loses time, never correctness.

A file grows under a temporary name and gets its own, by an atomic rename, only when all
of its bytes are on the disk. Beside it lies a list of SHA-256 digests, one for each
part of the file (a tensor, or an expert), written first. A folder that we write into
holds a record of what it is made from and how: a run that was cut off is resumed only
by the same run, and two runs cannot share it. **But:** the source must stay unchanged
meanwhile; `identify` samples it, it does not read all of it. *Taught in notebooks/06.*
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from .checkpoint import Checkpoint
from .config import read_json
from .errors import CheckpointError, ConfigError, FlashMoeError, PackError
from .headers import TensorInfo, told_in_one_line
from .small_files import read_text

PARTIAL_SUFFIX = ".partial"
DIGEST_SUFFIX = ".sha256"
LOCK_NAME = ".flashmoe.lock"
SMALL_FILES_BYTES = 100_000_000  # tokenizer, digests and headers, generously
ZEROS_BYTES = 1 << 20  # written at a time
_being_written: set[str] = set()  # names of this process's partial files
SAMPLE_BYTES = 64  # read at the start and in the middle of every tensor


# ---- one file ------------------------------------------------------------------------


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn what the system says while a file is written into a PackError naming it."""
    try:
        yield
    except FlashMoeError:
        raise
    except OSError as error:
        raise PackError(
            f"{path}: cannot be written ({error.strerror or error}); remedy this and "
            f"run the same command again"
        ) from None


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing; it appears under its name when all of it is on disk.

    Of two processes that write it at once, each writes a file of its own; the later
    one stays.
    Raises: PackError naming the file, if the disk is full or does not take it.
    """
    if not path.name:
        raise PackError(f"{str(path)!r} names no file; give it a name")
    _remove_left_behind(path)
    mine = f"{os.getpid()}-{secrets.token_hex(4)}"
    partial = path.with_name(f".{path.name}.{mine}{PARTIAL_SUFFIX}")
    _being_written.add(partial.name)
    try:
        with writing_to(path):
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        _being_written.discard(partial.name)
        with suppress(OSError):  # the first error is the one to tell
            partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _remove_left_behind(path: Path) -> None:
    """Remove what processes that were killed left of this file, half written."""
    stem = f".{path.name}."
    for left in path.parent.glob(f"{escape(stem)}*{PARTIAL_SUFFIX}"):
        process = left.name[len(stem) :].partition("-")[0]
        if left.name not in _being_written and not _is_another(process):
            with suppress(OSError):
                left.unlink()


def _is_another(process: str) -> bool:
    """Whether this number is that of another process that runs."""
    if not process.isdecimal() or os.name == "nt":  # where asking would end it
        return True
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return int(process) != os.getpid()


def _sync_folder(folder: Path) -> None:
    # A rename survives a power cut once its folder is synced; Windows has no such call.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_small(path: Path, content: dict | bytes) -> None:
    """Write bytes, or a dict as JSON, whole or not at all."""
    if isinstance(content, dict):
        content = (json.dumps(content, indent=2) + "\n").encode()
    with new_file(path) as file:
        file.write(content)


class PartsFile:
    """A file of consecutive parts: each is filled front to back, and hashed meanwhile.

    The parts may be filled in any order or in turns: their places are known beforehand.
    """

    def __init__(self, file: BinaryIO, parts: dict[str, int]) -> None:
        self._file = file
        self._at, self._end = {}, {}  # next free byte and end of each part
        self._digests = {name: hashlib.sha256() for name in parts}
        start = 0
        for name, n_bytes in parts.items():
            self._at[name], self._end[name] = start, start + n_bytes
            start += n_bytes

    def write(self, name: str, data: np.ndarray | bytes) -> int:
        """Append to a part; returns the number of bytes."""
        if isinstance(data, np.ndarray):
            data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        view = memoryview(data)
        self._file.seek(self._at[name])
        self._file.write(view)
        self._digests[name].update(view)
        self._at[name] += view.nbytes
        return view.nbytes

    def digest_lines(self) -> bytes:
        """One line a part: digest and name. All parts must be full."""
        assert self._at == self._end, "a part is short or too long"
        lines = (f"{d.hexdigest()}  {name}\n" for name, d in self._digests.items())
        return "".join(lines).encode()


@contextmanager
def new_parts_file(path: Path, parts: dict[str, int]) -> Iterator[PartsFile]:
    """Like `new_file`, with the parts' digests written beside it before it appears."""
    with new_file(path) as file:
        parts_file = PartsFile(file, parts)
        yield parts_file
        write_small(digest_path(path), parts_file.digest_lines())


def digest_path(path: Path) -> Path:
    """Where the digests of a file lie."""
    return path.with_name(path.name + DIGEST_SUFFIX)


def read_digests(path: Path) -> dict[str, str] | None:
    """Digest of each part of a file, in order; None where we have not written any.

    Raises: PackError if the list cannot be understood.
    """
    where = digest_path(path)
    text = read_text(where, PackError)
    if text is None:
        return None
    digests: dict[str, str] = {}
    for line in text.splitlines() or [""]:  # an empty list checks nothing: damaged
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name or name in digests:
            raise PackError(f"{where}: is damaged; delete it, or make the files again")
        digests[name] = digest
    return digests


def is_finished(path: Path) -> bool:
    """True if a file and its digests are there: both appear only when whole."""
    return path.exists() and digest_path(path).exists()


# ---- one folder ----------------------------------------------------------------------


@contextmanager
def open_target(folder: Path, record: dict, record_name: str) -> Iterator[None]:
    """Hold a folder for writing what `record` describes, new or begun by the same run.

    Raises: PackError if the folder holds something else, is being written to by another
            process, or cannot be written to.
    """
    try:
        _check_ours(folder, record, record_name)
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder, is_new):
            _check_ours(folder, record, record_name)
            for partial in folder.glob(f".*{PARTIAL_SUFFIX}"):
                partial.unlink()
            yield
    except FlashMoeError:
        raise
    except OSError as error:
        raise PackError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); "
            f"remedy this and run the same command again, it continues where it stopped"
        ) from None


@contextmanager
def _lock(folder: Path, is_new: bool) -> Iterator[None]:
    path = folder / LOCK_NAME
    try:
        lock = FileLock(path, timeout=0)
        with lock:
            try:
                yield
            finally:
                # Removed while held: whoever waits for it sees that it lost its name.
                with suppress(OSError):  # whoever comes next can use it
                    path.unlink(missing_ok=True)
    except Timeout:
        raise PackError(
            f"{folder}: another process is writing to this folder; wait for its end"
        ) from None
    finally:
        if is_new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _check_ours(folder: Path, record: dict, record_name: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise PackError(f"{folder}: is a file; give a folder to write to")
    if not folder.exists():
        return
    found = folder / record_name
    if found.exists():
        _check_same(folder, read_json(found), record)
        return
    for path in folder.iterdir():
        if path.name != LOCK_NAME and not path.name.endswith(PARTIAL_SUFFIX):
            raise PackError(
                f"{folder}: is not empty (it holds {path.name}); "
                f"give a new folder, nothing is overwritten"
            )


def _check_same(folder: Path, found: dict, wanted: dict) -> None:
    wanted = json.loads(json.dumps(wanted))  # as it reads back: tuples become lists
    different = [k for k in {**wanted, **found} if found.get(k) != wanted.get(k)]
    if different:
        raise PackError(
            f"{folder}: holds the result of another source or other settings "
            f"({', '.join(different)} differ); give a new folder or delete this one"
        )


def check_space(folder: Path, files: dict[Path, int]) -> None:
    """Raises: PackError unless the disk has room for the files that are not there yet.

    Units: files maps each path to its size in bytes.
    """
    missing = [n for path, n in files.items() if not is_finished(path)]
    if not missing:
        return
    needed, free = sum(missing) + SMALL_FILES_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise PackError(
            f"{folder}: needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB "
            f"free; free some space or give a folder on another disk"
        )


@contextmanager
def work_folder(folder: Path, busy: str) -> Iterator[Path]:
    """A folder for this process alone, removed at the end.

    What a killed run has left in it is there. busy: what to say if another has it.
    Raises: ConfigError if another process has it, or it is not ours; PackError.
    """
    lock = FileLock(folder / LOCK_NAME, timeout=0)
    with writing_to(folder):
        folder.mkdir(exist_ok=True)
        if not (folder / LOCK_NAME).exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder}: is in the way; move it, it is not ours")
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(busy) from None
    try:
        yield folder
    finally:
        with suppress(OSError):  # what cannot be removed stays
            for path in set(folder.iterdir()) - {folder / LOCK_NAME}:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            # Removed while held, and last: who begins now finds nothing of ours.
            (folder / LOCK_NAME).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # another has begun
            folder.rmdir()


def reserve(path: Path, first: int, n_bytes: int) -> None:
    """Let the disk promise the bytes of a file that will be written through memory.

    Without this, a full disk ends the process (SIGBUS) when they are written.
    Raises: PackError if the disk has no room.
    """
    with writing_to(path), open(path, "r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), first, n_bytes)
            return
        file.seek(first)
        for start in range(0, n_bytes, ZEROS_BYTES):
            file.write(bytes(min(ZEROS_BYTES, n_bytes - start)))


# ---- what a folder was made from -----------------------------------------------------


def identify(checkpoint: Checkpoint, wanted: Callable[[str], bool]) -> dict:
    """Identify tensors of a checkpoint, wherever it lies, without reading all of them.

    The digest covers names, files, places, dtypes and shapes, and a few bytes of every
    tensor, so that two fine-tunes of one model differ.
    """
    infos = [info for name, info in checkpoint.tensors.items() if wanted(name)]
    infos.sort(key=lambda info: (info.file.name, info.offset))
    digest = hashlib.sha256()
    for path, group in groupby(infos, key=lambda info: info.file):
        with told_in_one_line(path), open(path, "rb") as file:
            for info in group:
                place = (info.name, path.name, info.offset, info.shape, str(info.dtype))
                digest.update(repr(place).encode())
                digest.update(_sample(file, info))
    n_bytes = sum(info.n_bytes for info in infos)
    return {"tensors": len(infos), "bytes": n_bytes, "sha256": digest.hexdigest()}


def _sample(file: BinaryIO, info: TensorInfo) -> bytes:
    n = min(SAMPLE_BYTES, info.n_bytes)
    middle = info.offset + (info.n_bytes - n) // 2
    return read_bytes(file, info.offset, n) + read_bytes(file, middle, n)


def read_bytes(file: BinaryIO, offset: int, n_bytes: int) -> bytes:
    """Read bytes of a source file. Raises: CheckpointError if that fails."""
    with told_in_one_line(Path(file.name)):
        file.seek(offset)
        data = file.read(n_bytes)
    if len(data) != n_bytes:
        raise CheckpointError(
            f"{file.name}: ended at byte {offset + len(data):,} instead of "
            f"{offset + n_bytes:,}; was the file changed?"
        )
    return data


def progress_bar(label: str, n_bytes: int, shown: bool) -> tqdm:
    """A bar counting bytes; silent if not wanted, and in automated test runs."""
    silent = not shown or os.environ.get("FLASHMOE_PROFILE") == "ci"
    return tqdm(
        total=n_bytes,
        desc=label,
        unit="B",
        unit_scale=True,
        disable=silent,
        leave=False,
    )
