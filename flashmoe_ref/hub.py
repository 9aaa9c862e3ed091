"""What a repository of the Hugging Face hub holds, and one file of it, byte for byte.

Follows the hub's interface as `huggingface_hub` speaks it. That library keeps nothing
of a file that was cut off (a shard has 5 GB); so the bytes go through its own ranged
request into a file that stays, and are compared, when all are there, with the digest
that the hub lists: SHA-256 for large files, git's for small ones.
**But:** plain HTTP, not Xet's protocol; models only, no data sets. Tested against a
server that imitates the hub, never against the hub itself. *Taught in notebooks/13.*
"""

import errno
import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import BinaryIO

from .errors import FetchError, FlashMoeError

LARGEST_SMALL_FILE = 100_000_000  # an index of a trillion parameters has some 20 MB
TIMEOUT_S = 20  # without a byte
N_RETRIES, RETRY_S = 5, 1.0  # of a line that goes dead, until it brings nothing new
AGAIN = "the same command goes on where it stopped"


@dataclass(frozen=True)
class RemoteFile:
    """One file, as the hub lists it."""

    name: str
    n_bytes: int
    digest: str  # SHA-256 in hex; git's SHA-1 where the hub keeps no other
    is_large: bool  # kept apart from git (LFS), with a SHA-256

    def is_right(self, path: Path) -> bool:
        """True if a local file has this file's size and digest; reads all of it."""
        if path.stat().st_size != self.n_bytes:
            return False
        with open(path, "rb") as file:
            return self._digest_of(file) == self.digest

    def _digest_of(self, file: BinaryIO) -> str:
        if self.is_large:
            return hashlib.file_digest(file, "sha256").hexdigest()
        # git hashes a file's length with it
        data = b"blob %d\0" % self.n_bytes + file.read()
        return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Repository:
    """A repository at one commit, and its files."""

    name: str  # owner/model
    commit: str
    files: dict[str, RemoteFile]
    endpoint: str | None  # None: HF_ENDPOINT, or huggingface.co

    def read(self, name: str) -> bytes:
        """All of a small file, checked; nothing is written to the disk.

        Raises: FetchError if there is no such file, or it does not arrive whole.
        """
        if name not in self.files:
            raise FetchError(f"{self.name}: has no {name}; is it a model's repository?")
        file, buffer = self.files[name], io.BytesIO()
        if file.n_bytes > LARGEST_SMALL_FILE:
            raise FetchError(f"{self.name}/{name}: is too large for what it should be")
        with told_in_one_line(self.name, self.endpoint):
            self._transfer(file, buffer, 0)
        buffer.seek(0)
        if file._digest_of(buffer) != file.digest:
            raise FetchError(f"{self.name}/{name}: arrived damaged; try again")
        return buffer.getvalue()

    def download(
        self, file: RemoteFile, partial: Path, stop: Event, count: Callable[[int], None]
    ) -> None:
        """Bring a file under a temporary name, from where it was cut off, and check it.

        stop: once set, ends the transfer with `Stopped`; what has come stays.
        count(n) is told of bytes as they arrive, and of -n that had to be dropped.
        Raises: FetchError if the bytes are wrong twice, or do not come.
        """
        for _ in range(2):
            self._continue(file, partial, stop, count)
            if file.is_right(partial):
                return
            partial.unlink()  # kept from another version, perhaps: once more from 0
            count(-file.n_bytes)
        raise FetchError(
            f"{self.name}/{file.name}: does not have the digest that the hub lists, "
            f"twice; nothing of it was kept, {AGAIN}"
        )

    def _continue(
        self,
        file: RemoteFile,
        partial: Path,
        stop: Event,
        count: Callable[[int], None],
    ) -> None:
        with (
            told_in_one_line(self.name, self.endpoint),
            named(partial),
            open(partial, "ab") as out,
        ):
            start = out.tell()
            if start > file.n_bytes or not file.is_large:
                out.truncate(0)
                count(-start)
                start = 0
            self._transfer(file, _Stoppable(out, stop, count), start)
            out.flush()
            os.fsync(
                out.fileno()
            )  # a new name must not reach the disk before the bytes

    def _transfer(self, file: RemoteFile, out: BinaryIO, start: int) -> None:
        """Append a file's bytes from `start` on; a line that goes dead is taken up."""
        from huggingface_hub import errors

        n_failures, at = 0, start
        while at < file.n_bytes:
            try:
                for data in self._answers(file, at, out):
                    out.write(data)
            except errors.HfHubHTTPError:
                raise
            except errors.HTTPError:
                n_failures = 1 if out.tell() > at else n_failures + 1
                if n_failures > N_RETRIES:
                    raise
                time.sleep(RETRY_S)
            else:
                if out.tell() <= at:
                    raise FetchError(f"{self.name}/{file.name}: ended early; {AGAIN}")
            at = out.tell()

    def _answers(self, file: RemoteFile, at: int, out: BinaryIO) -> Iterator[bytes]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        url = hf_hub_url(
            self.name, file.name, revision=self.commit, endpoint=self.endpoint
        )
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if at:
            headers["Range"] = f"bytes={at}-"
        options = {"headers": headers, "timeout": TIMEOUT_S, "retry_on_exceptions": ()}
        with http_stream_backoff("GET", url, **options) as response:
            hf_raise_for_status(response)
            if at and response.status_code != 206:  # all of it, from the start
                out.seek(0)
                out.truncate()
            yield from response.iter_bytes()


class Stopped(Exception):
    """A transfer ended because it was told to."""


class _Stoppable:
    """An open file that counts what is written, until it is told to stop."""

    def __init__(
        self, file: BinaryIO, stop: Event, count: Callable[[int], None]
    ) -> None:
        self._file, self._stop, self._count = file, stop, count
        self.seek, self.tell = file.seek, file.tell

    def write(self, data: bytes) -> int:
        if self._stop.is_set():
            raise Stopped
        n_bytes = self._file.write(data)
        self._count(n_bytes)
        return n_bytes

    def truncate(self) -> None:
        """Drop what lies behind: the server began at the start, in place of there."""
        at, end = self._file.tell(), self._file.seek(0, io.SEEK_END)
        self._file.truncate(at)
        self._count(at - end)


def open_repository(
    name: str, revision: str | None = None, endpoint: str | None = None
) -> Repository:
    """Ask the hub for a model's files, their sizes and digests.

    revision: a branch, tag or commit (default: main).
    Raises: FetchError in one line: no network, no such repository or revision, gated.
    """
    from huggingface_hub import HfApi

    with told_in_one_line(name, endpoint, revision):
        api = HfApi(endpoint=endpoint)
        info = api.model_info(name, revision=revision, files_metadata=True, timeout=30)
    files = {}
    for item in info.siblings or []:
        digest = item.lfs.sha256 if item.lfs else item.blob_id
        if item.size is None or not _is_digest(digest):
            raise FetchError(
                f"{name}: the hub tells no size or digest of {item.rfilename}"
            )
        files[item.rfilename] = RemoteFile(
            item.rfilename, item.size, digest, bool(item.lfs)
        )
    if not _is_digest(info.sha):
        raise FetchError(f"{name}: the hub tells no commit")
    return Repository(name, info.sha, files, endpoint)


def _is_digest(text: str | None) -> bool:
    # They become names of files, so nothing else will do.
    return bool(text and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", text))


@contextmanager
def told_in_one_line(
    name: str, endpoint: str | None, revision: str | None = None
) -> Iterator[None]:
    """Turn what `huggingface_hub` raises into a FetchError that says what to do."""
    from huggingface_hub import constants, errors

    hub = endpoint or constants.ENDPOINT
    try:
        yield
    except errors.HFValidationError:
        raise FetchError(
            f"{name!r} is no repository's name; write OWNER/MODEL"
        ) from None
    except errors.GatedRepoError:
        raise FetchError(
            f"{name}: is gated; accept its terms at {hub}/{name}, log in with "
            "'hf auth login', and try again"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FetchError(
            f"{name}: no such repository at {hub}, or it is private and you are not "
            "logged in ('hf auth login')"
        ) from None
    except errors.RevisionNotFoundError:
        raise FetchError(
            f"{name}: has no revision {revision!r}; give a branch, tag or commit"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise FetchError("HF_HUB_OFFLINE is set: unset it to fetch a model") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "?"
        raise FetchError(f"{name}: {hub} answered {status}; {AGAIN}") from None
    except errors.HTTPError as error:  # the library's HTTP client: no answer at all
        raise FetchError(
            f"{hub} cannot be reached ({_shortened(error)}); is there a network? "
            f"{AGAIN[0].upper()}{AGAIN[1:]}"
        ) from None
    except OSError as error:
        if isinstance(error, FlashMoeError):
            raise
        raise FetchError(_of_the_system(error, name)) from None


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Let an error of the system say which file it was."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _of_the_system(error: OSError, name: str) -> str:
    if error.errno == errno.ENOSPC:
        return f"{error.filename or name}: the disk is full; free some space, {AGAIN}"
    if error.errno is not None:
        return f"{error.filename or name}: {error.strerror}"
    return f"{name}: {_shortened(error)}; {AGAIN}"  # too few bytes came


def _shortened(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."
