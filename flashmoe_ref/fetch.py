"""A published model from the hub to this disk: what is needed, once, and checked.

First comes everything that can fail without a download: config.json must describe a
model that runs here, the index says which shards hold the text model, the disk must
have room. Then the shards come, several at a time; each keeps what has arrived if it is
cut off, and appears under its name when its digest is right. Where nothing else is said
the files lie in Hugging Face's own cache, so whatever another program has fetched is
used, and the other way round. **But:** tested against a server that imitates the hub
(`tests/fake_hub.py`), never against the hub itself. *Taught in notebooks/13.*
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

from filelock import FileLock, Timeout

from .checkpoint import INDEX_NAME, Checkpoint
from .config import ModelConfig
from .errors import ConfigError, FetchError
from .hub import (
    RemoteFile,
    Repository,
    Stopped,
    named,
    open_repository,
    told_in_one_line,
)
from .naming import canonical_name
from .small_files import decode, parse_json
from .writing import LOCK_NAME, PARTIAL_SUFFIX, progress_bar, write_small

RECORD_NAME = ".flashmoe_fetch.json"  # in a folder of our own: what it is a copy of
SPARE_BYTES = 1_000_000_000  # that stay free: a full disk harms everything else
SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    INDEX_NAME,
    "LICENSE",
)


@dataclass(frozen=True)
class Place:
    """Where a repository's files go: the hub's cache, or a folder of their own."""

    folder: Path  # of the model, when all is there
    blobs: Path  # of the cache: its files, named by digest
    is_cache: bool

    def target(self, file: RemoteFile) -> Path:
        """Where the model's folder has the file."""
        return self.folder / file.name

    def store(self, file: RemoteFile) -> Path:
        """Where its bytes come to lie."""
        return self.blobs / file.digest if self.is_cache else self.target(file)

    def partial(self, file: RemoteFile) -> Path:
        """Where they lie meanwhile."""
        if self.is_cache:
            return self.blobs / f"{file.digest}.incomplete"
        return self.folder / f".{file.name}{PARTIAL_SUFFIX}"

    def is_there(self, file: RemoteFile) -> bool:
        """True if the folder or the cache has the file, whole as far as its size says.

        Raises: FetchError if a folder of our own holds something else of this name.
        """
        target = self.target(file)
        if _has_size(target, file) and (file.is_large or file.is_right(target)):
            return True
        if not self.is_cache and target.exists():
            raise FetchError(
                f"{target}: is there, but is not the repository's (it has "
                f"{target.stat().st_size:,} of {file.n_bytes:,} bytes, or others); "
                "move it away, or give another --dir"
            )
        return _has_size(self.blobs / file.digest, file)

    def link(self, file: RemoteFile) -> None:
        """Let the folder name a file of the cache, where the folder lacks it."""
        target, blob = self.target(file), self.blobs / file.digest
        if target.exists() and _has_size(target, file):
            return
        target.unlink(missing_ok=True)  # dangling, or of another size
        try:
            inside = os.path.relpath(blob, target.parent)
            target.symlink_to(inside if self.is_cache else blob.resolve())
        except OSError:  # Windows, without the right to make links
            if not self.is_cache:
                raise FetchError(
                    f"{target}: cannot link to {blob}; leave --dir out"
                ) from None
            os.replace(blob, target)


def _has_size(path: Path, file: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == file.n_bytes


@dataclass(frozen=True)
class Plan:
    """What a fetch will bring, and what is there already."""

    repository: Repository
    revision: str | None
    config: ModelConfig
    place: Place
    files: tuple[RemoteFile, ...]  # that are needed
    left_out: tuple[RemoteFile, ...]  # shards of the vision tower and the like
    missing: tuple[RemoteFile, ...]  # of files

    @property
    def n_bytes(self) -> int:
        """Bytes of all files that are needed."""
        return sum(file.n_bytes for file in self.files)

    @property
    def partial_bytes(self) -> int:
        """Bytes that an earlier run has left of files that are missing."""
        partials = ((self.place.partial(file), file) for file in self.missing)
        return sum(
            min(path.stat().st_size, file.n_bytes)
            for path, file in partials
            if path.is_file()
        )

    @property
    def bytes_to_come(self) -> int:
        """Bytes that have to be transferred."""
        return sum(file.n_bytes for file in self.missing) - self.partial_bytes


def plan_fetch(
    name: str,
    revision: str | None = None,
    folder: Path | None = None,
    endpoint: str | None = None,
) -> Plan:
    """Find out what a model needs, without writing anything.

    folder: of its own (default: Hugging Face's cache).
    Raises: FetchError; ConfigError or CheckpointError if it cannot run here anyway.
    """
    repository = open_repository(name, revision, endpoint)
    config = _checked_config(repository)
    shards, left_out = _shards(repository)
    small = [repository.files[name] for name in SMALL if name in repository.files]
    files = (*small, *shards)
    place = _place(repository, folder)
    with told_in_one_line(name, endpoint):
        missing = tuple(file for file in files if not place.is_there(file))
    return Plan(repository, revision, config, place, files, left_out, missing)


def _checked_config(repository: Repository) -> ModelConfig:
    where = f"{repository.name}/config.json"
    raw = _read_json(repository, "config.json")
    try:
        return ModelConfig.from_dict(raw, where)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; nothing was fetched: flashmoe runs Mixture-of-Experts models "
            "of these kinds"
        ) from None


def _read_json(repository: Repository, name: str) -> dict:
    where = f"{repository.name}/{name}"
    text = decode(repository.read(name), where, FetchError)
    found = parse_json(text, where, FetchError)
    if not isinstance(found, dict):
        raise FetchError(f"{repository.name}/{name}: must hold a JSON object")
    return found


def _shards(
    repository: Repository,
) -> tuple[list[RemoteFile], tuple[RemoteFile, ...]]:
    """The shards with tensors of the text model, and those with none."""
    name, files = repository.name, repository.files
    if INDEX_NAME not in files:
        found = sorted(n for n in files if n.endswith(".safetensors") and "/" not in n)
        if not found:
            raise FetchError(f"{name}: has no .safetensors file that flashmoe can run")
        return [files[n] for n in found], ()
    weight_map = _read_json(repository, INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FetchError(f"{name}/{INDEX_NAME}: has no weight_map")
    is_needed: dict[str, bool] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or "/" in shard or shard not in files:
            raise FetchError(
                f"{name}: its index names {shard!r}, which is not among its files"
            )
        used = canonical_name(tensor, Path(name, INDEX_NAME)) is not None
        is_needed[shard] = is_needed.get(shard, False) or used
    needed = [files[n] for n in sorted(is_needed) if is_needed[n]]
    return needed, tuple(files[n] for n in sorted(is_needed) if not is_needed[n])


def _place(repository: Repository, folder: Path | None) -> Place:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) / f"models--{repository.name}".replace(
        "/", "--"
    )
    if folder is None:
        snapshot = cache / "snapshots" / repository.commit
        return Place(snapshot, cache / "blobs", True)
    if folder.exists() and not folder.is_dir():
        raise FetchError(f"{folder}: is a file; give a folder to --dir")
    _check_same(folder, repository)
    return Place(folder, cache / "blobs", False)


def _check_same(folder: Path, repository: Repository) -> None:
    """A folder begun for another repository or commit would mix two models."""
    record = folder / RECORD_NAME
    if not record.exists():
        return
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if found != _record(repository):
        raise FetchError(
            f"{folder}: holds another model or version ({RECORD_NAME} says which); "
            "give another --dir, or --revision with the commit that it has"
        )


def _record(repository: Repository) -> dict[str, str]:
    return {"repository": repository.name, "commit": repository.commit}


# ---- doing it ------------------------------------------------------------------------


def fetch(
    plan: Plan, check: bool = False, progress: bool = True, n_at_once: int = 4
) -> Path:
    """Bring what is missing; returns the model's folder.

    check: compare also what was there before with the hub's digests.
    Raises: FetchError; KeyboardInterrupt leaves what has come for the next run.
    """
    check_room(plan)
    with told_in_one_line(plan.repository.name, plan.repository.endpoint):
        _fetch(plan, check, progress, n_at_once)
    Checkpoint.open(plan.place.folder)  # headers, names and shapes
    return plan.place.folder


def _fetch(plan: Plan, check: bool, progress: bool, n_at_once: int) -> None:
    place = plan.place
    for folder in (place.folder, place.blobs if place.is_cache else place.folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(place.blobs.parent if place.is_cache else place.folder):
        if not place.is_cache:
            for left in place.folder.glob(f".{RECORD_NAME}.*{PARTIAL_SUFFIX}"):
                left.unlink()  # by a run that was killed
            write_small(place.folder / RECORD_NAME, _record(plan.repository))
        with progress_bar("fetch", plan.n_bytes, progress) as bar:
            bar.update(plan.n_bytes - plan.bytes_to_come)
            _bring(plan, bar.update, n_at_once)
        for file in plan.files:
            if place.is_cache or not place.target(file).exists():
                place.link(file)
        if check:
            _check_all(plan, progress)
        if place.is_cache:
            _name_revision(plan)


def check_room(plan: Plan) -> None:
    """Raises: FetchError unless the disk has room for what is to come."""
    place = plan.place
    at = (place.blobs if place.is_cache else place.folder).absolute()
    while not at.exists():
        at = at.parent
    free, needed = shutil.disk_usage(at).free, plan.bytes_to_come
    if needed and needed + SPARE_BYTES > free:
        raise FetchError(
            f"{at}: {needed / 1e9:.1f} GB are to come and {SPARE_BYTES / 1e9:.0f} GB "
            f"must stay free, the disk has {free / 1e9:.1f} GB; free some space, or "
            "give --dir on another disk"
        )


def _bring(plan: Plan, count: Callable[[int], object], n_at_once: int) -> None:
    """Download the missing files, largest first; the first fault stops them all."""
    stop, lock = Event(), Lock()

    def counted(n_bytes: int) -> None:
        with lock:
            count(n_bytes)

    def bring(file: RemoteFile) -> None:
        partial = plan.place.partial(file)
        try:
            with named(partial):
                plan.repository.download(file, partial, stop, counted)
                os.replace(partial, plan.place.store(file))
        except BaseException:
            stop.set()
            raise

    files = sorted(plan.missing, key=lambda file: -file.n_bytes)
    with ThreadPoolExecutor(n_at_once) as pool:
        jobs = [pool.submit(bring, file) for file in files]
        try:
            for job in jobs:
                with suppress(Stopped):  # another file's fault, which is raised below
                    job.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _check_all(plan: Plan, progress: bool) -> None:
    """Compare every file's digest. A wrong one of the cache is removed."""
    with progress_bar("check", plan.n_bytes, progress) as bar:
        for file in plan.files:
            target = plan.place.target(file)
            with named(target):
                is_right = file.is_right(target)
            if not is_right:
                target.resolve().unlink()
                target.unlink(missing_ok=True)
                raise FetchError(
                    f"{target}: was damaged and is removed; the same command fetches "
                    "it again"
                )
            bar.update(file.n_bytes)


def _name_revision(plan: Plan) -> None:
    """Let other programs find the snapshot by the name of its branch."""
    revision = plan.revision or "main"
    if revision != plan.repository.commit:
        ref = plan.place.blobs.parent / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        write_small(ref, plan.repository.commit.encode())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / LOCK_NAME
    try:
        with FileLock(path, timeout=0):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout:
        raise FetchError(
            f"{folder}: another process is fetching this model; wait for its end"
        ) from None


def readable(plan: Plan) -> Iterator[str]:
    """What the plan amounts to, in a few lines."""
    yield f"model     {plan.repository.name} at {plan.repository.commit[:12]}"
    yield f"folder    {plan.place.folder}"
    yield f"needed    {len(plan.files)} files, {plan.n_bytes / 1e9:.2f} GB"
    if plan.left_out:
        n_bytes = sum(file.n_bytes for file in plan.left_out)
        kept = sum(file.name.endswith(".safetensors") for file in plan.files)
        n_out = len(plan.left_out)
        yield (
            f"left out  {n_out} of {kept + n_out} shards, {n_bytes / 1e9:.2f} GB: "
            "vision and multi-token prediction, which flashmoe does not run"
        )
    yield (
        f"to come   {len(plan.missing)} files, {plan.bytes_to_come / 1e9:.2f} GB"
        + (f" ({plan.partial_bytes / 1e9:.2f} GB are here of an earlier run)")
        * bool(plan.partial_bytes)
    )
