"""Fetching a model from a server that imitates the hub; never from the hub itself."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_hub import COMMIT, FakeHub, serving
from safetensors.numpy import save_file
from tiny import write_tiny, write_tokenizer

from flashmoe_ref import cli, fetch, hub
from flashmoe_ref.checkpoint import INDEX_NAME, Checkpoint
from flashmoe_ref.errors import CheckpointError, FetchError

ROOT = Path(__file__).parents[1]
SHARD = "model-00001-of-00003.safetensors"
VISION = "model-00004-of-00004.safetensors"
MODEL = "owner/model"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in three shards, and one with nothing but a vision tower."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    write_tiny(folder, n_shards=3, vocab_size=280)
    write_tokenizer(folder)
    save_file({"vision_tower.a": np.zeros(50_000, np.float32)}, folder / VISION)
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["vision_tower.a"] = VISION
    (folder / INDEX_NAME).write_text(json.dumps(index))
    (folder / "README.md").write_text("not needed")
    return folder


@pytest.fixture
def served(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeHub]:
    """The model on a server, and an empty cache; retries do not wait."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "RETRY_S", 0.0)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    shutil.copytree(original, tmp_path / "served")
    with serving(tmp_path / "served") as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def _fetch(server: FakeHub, folder: Path | None = None, **options: object) -> Path:
    plan = fetch.plan_fetch(MODEL, None, folder, server.url)
    return fetch.fetch(plan, progress=False, **options)


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


def _same_model(folder: Path, original: Path) -> bool:
    names = [p.name for p in original.iterdir() if p.name not in (VISION, "README.md")]
    return all(
        (folder / name).read_bytes() == (original / name).read_bytes() for name in names
    )


# --- what goes right ------------------------------------------------------------------


def test_into_the_cache_as_other_programs_read_it(served, original, tmp_path) -> None:
    from huggingface_hub import try_to_load_from_cache

    folder = _fetch(served)
    assert _same_model(folder, original)
    assert Checkpoint.open(folder).config.num_experts == 8
    found = try_to_load_from_cache(MODEL, SHARD, cache_dir=tmp_path / "cache")
    assert Path(found) == folder / SHARD  # by the name of the branch, main
    assert not os.path.isabs((folder / SHARD).readlink())  # the cache may be moved
    stored = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    n_links = sum(p.is_symlink() for p in stored)
    assert n_links == len(stored) - n_links - 1  # a link for each blob, and the ref
    assert not [p for p in stored if "incomplete" in p.name or "lock" in p.name]


def test_what_the_text_model_does_not_need_is_left_out(served) -> None:
    folder = _fetch(served)
    assert not (folder / VISION).exists() and not (folder / "README.md").exists()
    assert {name for name, _ in served.asked} == {p.name for p in folder.iterdir()}
    plan = fetch.plan_fetch(MODEL, endpoint=served.url)
    assert [file.name for file in plan.left_out] == [VISION]
    assert "1 of 4 shards, 0.00 GB: vision" in " ".join(fetch.readable(plan))
    (folder / SHARD).unlink()  # but a shard that is needed is missed
    with pytest.raises(CheckpointError, match=f"1 of 4 .* first {SHARD}"):
        Checkpoint.open(folder)


def test_a_second_run_transfers_no_shard(served) -> None:
    _fetch(served)
    served.asked.clear()
    plan = fetch.plan_fetch(MODEL, endpoint=served.url)
    assert (plan.missing, plan.bytes_to_come) == ((), 0)
    fetch.fetch(plan, progress=False)
    assert {name for name, _ in served.asked} == {"config.json", INDEX_NAME}


def test_a_folder_of_its_own_uses_what_the_cache_has(served, original, tmp_path):
    cached = _fetch(served)
    (cached / SHARD).resolve().unlink()  # the cache has lost this one
    folder = _fetch(served, tmp_path / "own")
    assert _same_model(folder, original)
    assert not (folder / SHARD).is_symlink()
    others = [p for p in folder.iterdir() if p.suffix == ".safetensors"]
    assert sum(p.is_symlink() for p in others) == 2
    assert fetch.RECORD_NAME in _files(folder)


def test_without_a_cache_a_folder_has_the_files(served, original, tmp_path) -> None:
    folder = _fetch(served, tmp_path / "a" / "own")
    assert _same_model(folder, original)
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert not (tmp_path / "cache").exists()
    assert _files(folder) - {fetch.RECORD_NAME} <= {p.name for p in original.iterdir()}


def test_a_single_file_needs_no_index(served, tmp_path) -> None:
    shutil.rmtree(served.folder)
    write_tiny(served.folder)
    assert (_fetch(served) / "model.safetensors").exists()


# --- cut off, and again ---------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_a_transfer_that_was_cut_off_goes_on(served, original, tmp_path, own) -> None:
    served.cut_after[SHARD] = 20_000
    target = tmp_path / "own" if own else None
    with pytest.raises(FetchError, match="goes on where it stopped"):
        _fetch(served, target, n_at_once=1)
    plan = fetch.plan_fetch(MODEL, None, target, served.url)
    assert plan.partial_bytes == 20_000
    assert "of an earlier run" in " ".join(fetch.readable(plan))
    served.cut_after.clear()
    served.asked.clear()
    assert _same_model(fetch.fetch(plan, progress=False), original)
    assert (SHARD, 20_000) in served.asked and (SHARD, 0) not in served.asked


def test_a_server_that_knows_no_ranges(served, original) -> None:
    served.cut_after[SHARD] = 20_000
    with pytest.raises(FetchError):
        _fetch(served)
    served.cut_after.clear()
    served.ignores_ranges = True
    served.asked.clear()
    assert _same_model(_fetch(served), original)
    assert [at for name, at in served.asked if name == SHARD] == [20_000]


def test_leftovers_of_another_version_are_replaced(served, original) -> None:
    plan = fetch.plan_fetch(MODEL, endpoint=served.url)
    file = next(file for file in plan.files if file.name == SHARD)
    plan.place.blobs.mkdir(parents=True)
    for n_bytes in (500, file.n_bytes, file.n_bytes + 9):
        plan.place.partial(file).write_bytes(bytes(n_bytes))
        assert _same_model(_fetch(served), original)
        plan.place.store(file).unlink()


def test_a_file_that_came_damaged_is_fetched_once_more(served, original) -> None:
    served.spoil[SHARD] = 1
    assert _same_model(_fetch(served), original)
    assert served.asked.count((SHARD, 0)) == 2


def test_a_file_that_stays_damaged_is_refused(served, tmp_path) -> None:
    served.spoil[SHARD] = 99
    with pytest.raises(FetchError, match=f"{SHARD}: does not have the digest"):
        _fetch(served)
    assert not list((tmp_path / "cache").rglob(SHARD))


def test_damage_in_the_cache_is_found_by_check(served, original) -> None:
    folder = _fetch(served)
    blob = (folder / SHARD).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\xff")
    _fetch(served)  # sizes are right, which is all that it looks at
    with pytest.raises(FetchError, match="was damaged and is removed"):
        _fetch(served, check=True)
    assert _same_model(_fetch(served, check=True), original)


def test_a_short_file_in_the_cache_is_fetched_again(served, original) -> None:
    folder = _fetch(served)
    (folder / SHARD).resolve().write_bytes(b"short")
    assert _same_model(_fetch(served), original)


# --- what is refused, before anything is written --------------------------------------


def _refused(server: FakeHub, tmp_path: Path, *args: object, match: str) -> None:
    before = _files(tmp_path)
    with pytest.raises(FetchError, match=match) as caught:
        fetch.check_room(fetch.plan_fetch(*args or (MODEL,), endpoint=server.url))
    assert len(str(caught.value).splitlines()) == 1
    assert _files(tmp_path) == before


def test_what_the_hub_refuses(served, tmp_path) -> None:
    _refused(served, tmp_path, "owner/other", match="no such repository")
    _refused(served, tmp_path, "not a name", match="OWNER/MODEL")
    _refused(served, tmp_path, MODEL, "v9", match="has no revision 'v9'")
    served.refuses = "GatedRepo"
    _refused(served, tmp_path, match="is gated; accept its terms at http")
    served.refuses = "Broken"
    _refused(served, tmp_path, match="answered 500")
    served.refuses, served.gated_files = None, True
    _refused(served, tmp_path, match="is gated")


def test_no_network(served, tmp_path) -> None:
    served.url = "http://127.0.0.1:9"  # nobody listens to this port
    _refused(served, tmp_path, match="127.0.0.1:9 cannot be reached")


def test_too_little_room(served, tmp_path, monkeypatch) -> None:
    few = shutil.disk_usage(tmp_path)._replace(free=fetch.SPARE_BYTES + 1000)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: few)
    _refused(served, tmp_path, match=r"must stay free, the disk has 1\.0 GB")
    with pytest.raises(FetchError, match="must stay free"):
        _fetch(served)
    assert not (tmp_path / "cache").exists()
    few = few._replace(free=fetch.SPARE_BYTES + 10**7)
    fetch.check_room(fetch.plan_fetch(MODEL, endpoint=served.url))


def test_a_full_disk(served, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub._Stoppable, "write", full)
    with pytest.raises(FetchError, match="the disk is full"):
        _fetch(served)


@pytest.mark.parametrize("kind", ["llama", "qwen3_5", None])
def test_a_model_that_is_no_mixture_of_experts(served, tmp_path, kind) -> None:
    (served.folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"{kind!r} is not supported.*nothing was"):
        fetch.plan_fetch(MODEL, endpoint=served.url)
    assert {name for name, _ in served.asked} == {"config.json"}
    assert not (tmp_path / "cache").exists()


def test_repositories_without_what_is_needed(served, tmp_path) -> None:
    (served.folder / "config.json").write_text("{")
    _refused(served, tmp_path, match="not valid JSON")
    (served.folder / "config.json").unlink()
    _refused(served, tmp_path, match=r"has no config\.json")
    write_tiny(served.folder)
    (served.folder / INDEX_NAME).write_text('{"weight_map": {"a": "../../b"}}')
    _refused(served, tmp_path, match="not among its files")
    for path in served.folder.glob("model*"):
        path.unlink()
    _refused(served, tmp_path, match=r"no \.safetensors file")


def test_a_folder_with_something_else(served, tmp_path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / SHARD).write_bytes(b"mine")
    _refused(served, tmp_path, MODEL, None, own, match="not the repository's")
    assert (own / SHARD).read_bytes() == b"mine"
    (own / SHARD).unlink()
    _fetch(served, own)
    served.commit = "f" * 40
    _refused(served, tmp_path, MODEL, None, own, match="another model or version")
    _refused(served, tmp_path, MODEL, None, own / SHARD, match="is a file")


def test_two_at_once(served) -> None:
    plan = fetch.plan_fetch(MODEL, endpoint=served.url)
    folder = plan.place.blobs.parent
    folder.mkdir(parents=True)
    with (
        fetch._locked(folder),
        pytest.raises(FetchError, match="another process is fetching"),
    ):
        fetch.fetch(plan, progress=False)


# --- the command ----------------------------------------------------------------------


def test_the_command_says_what_it_does(served, capsys, tmp_path) -> None:
    assert cli.main(["fetch", MODEL, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert COMMIT[:12] in out and "to come   9 files" in out, out
    assert not (tmp_path / "cache").exists()
    assert cli.main(["fetch", MODEL, "--no-progress", "--check"]) == 0
    assert "complete  flashmoe doctor" in capsys.readouterr().out
    assert cli.main(["fetch", "owner/other"]) == 2
    assert capsys.readouterr().err.startswith("flashmoe: owner/other: no such")
    assert cli.main(["fetch", MODEL, "--at-once", "0"]) == 2


def _start_command(environment: dict[str, str]) -> subprocess.Popen:
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "FLASHMOE_PROFILE": "ci"}
    return subprocess.Popen(
        [sys.executable, "-m", "flashmoe_ref.cli", "fetch", MODEL],
        cwd=ROOT,
        env=os.environ | environment | quiet,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_interrupted_command_goes_on(served, original, tmp_path) -> None:
    served.piece_s = 0.02
    home = {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "home")}
    first = _start_command(home)
    blobs = tmp_path / "home" / "hub" / "models--owner--model" / "blobs"
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in blobs.glob("*.incomplete")):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130
    assert err.split("\n")[1:2] == [
        "flashmoe: interrupted; the same command goes on where it stopped"
    ]
    assert "Traceback" not in err
    served.piece_s = 0
    served.asked.clear()
    out, err = _start_command(home).communicate(timeout=60)
    assert ("of an earlier run" in out, err) == (True, "")
    assert any(at > 0 for _, at in served.asked)
    folder = blobs.parent / "snapshots" / COMMIT
    assert _same_model(folder, original)
