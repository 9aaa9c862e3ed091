"""Two processes at one folder or file: one writes, the others are refused."""

import functools
import hashlib
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import serving
from filelock import FileLock
from tiny import TEXT_CONFIG, write_tiny, write_tokenizer

from flashmoe_ref import chat, fetch, load, sweep, writing
from flashmoe_ref.config import ModelConfig
from flashmoe_ref.convert import convert
from flashmoe_ref.errors import FlashMoeError
from flashmoe_ref.folding import write_folded
from flashmoe_ref.measures import Tasks
from flashmoe_ref.pack import pack
from flashmoe_ref.requantize import requantize
from flashmoe_ref.settings import Setting

ROOT = Path(__file__).parents[1]
REDUCED = ROOT / "data" / "reduced"
DONE, REFUSED = 0, 3
N_CROWD, N_ROUNDS = 3, 2
SMALL = {"num_hidden_layers": 2, "full_attention_interval": 2, "num_experts": 4}
CONFIG = ModelConfig.from_dict(
    {"model_type": "qwen3_5_moe", "text_config": TEXT_CONFIG | SMALL}
)
SETTINGS = [Setting(), Setting(k=2)]

# Its child processes start in milliseconds, and MLX is never loaded in them.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["test_two_processes", "huggingface_hub"])


# --- the writers ----------------------------------------------------------------------


def run_fetch(source: str, target: Path) -> None:
    fetch.fetch(fetch.plan_fetch("owner/model", None, target, source), progress=False)


def run_rehearse(source: Path, target: Path) -> None:
    write_folded(target, CONFIG, 1, group_size=32, progress=False)


def run_sweep(source: Path, target: Path) -> None:
    """A sweep whose measurements take no time; the table and its folder are real."""
    target.mkdir(exist_ok=True)
    text, other = source / "config.json", source / "tokenizer_config.json"
    tasks = Tasks((text,), (), other, 10, None, 1)
    sweep.sweep(source, SETTINGS, tasks, target / "t.csv", progress=False)


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "pack": functools.partial(pack, progress=False),
    "convert": functools.partial(convert, shard_bytes=40_000, progress=False),
    "requantize": functools.partial(
        requantize, bits=2, shard_bytes=40_000, progress=False
    ),
    "fetch": run_fetch,
    "rehearse": run_rehearse,
    "sweep": run_sweep,
}
# Where a writer is in the middle of its work.
MIDDLE: dict[str, tuple[object, str]] = {
    "fetch": (fetch, "_bring"),
    "sweep": (sweep, "append_row"),
} | dict.fromkeys(
    ("pack", "convert", "requantize", "rehearse"), (writing.PartsFile, "write")
)


def run(name: str, source: Path | str, target: Path) -> None:
    """Run a writer in this process."""
    measured = sweep.measure, sweep.make_baseline
    sweep.measure = lambda folder, setting, *_: ({"found": setting.name}, [])
    sweep.make_baseline = lambda *_: None
    try:
        WRITERS[name](source, target)
    finally:
        sweep.measure, sweep.make_baseline = measured


def run_and_wait_inside(name: str, source, target: Path, inside, go) -> None:
    owner, attribute = MIDDLE[name]
    original = getattr(owner, attribute)

    @functools.wraps(original)
    def waits(*args, **kwargs):
        inside.set()
        assert go.wait(60)
        return original(*args, **kwargs)

    setattr(owner, attribute, waits)
    run(name, source, target)


def run_in_a_crowd(name: str, source, target: Path, start) -> None:
    start.wait(60)
    try:
        run(name, source, target)
    except FlashMoeError as error:
        refused = "another process" in str(error) or "another sweep" in str(error)
        raise SystemExit(REFUSED if refused else 1) from error


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module", params=WRITERS)
def case(request, tmp_path_factory) -> Iterator[tuple[str, object, dict[str, str]]]:
    """A writer's name, its source, and what it leaves when nobody disturbs it."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    layout = "hf" if name == "convert" else "mlx"
    source = write_tiny(
        folder / "source", layout=layout, n_shards=2, vocab_size=280, **SMALL
    )
    write_tokenizer(source)
    with serving(source) as hub:
        place = hub.url if name == "fetch" else source
        run(name, place, folder / "out")
        yield name, place, digests(folder / "out")


def test_the_second_is_refused_and_the_first_goes_on(case, tmp_path: Path) -> None:
    name, source, unbroken = case
    target = tmp_path / "out"
    inside, go = context.Event(), context.Event()
    child = context.Process(
        target=run_and_wait_inside, args=(name, source, target, inside, go)
    )
    child.start()
    assert inside.wait(60)
    before = digests(target)
    for _ in range(2):
        with pytest.raises(FlashMoeError, match=r"another (process|sweep) is"):
            run(name, source, target)
    assert digests(target) == before
    go.set()
    child.join(60)
    assert child.exitcode == DONE
    assert digests(target) == unbroken
    run(name, source, target)  # has nothing to do any more
    assert digests(target) == unbroken


def test_a_crowd_that_starts_at_once(case, tmp_path: Path) -> None:
    name, source, unbroken = case
    for number in range(N_ROUNDS):
        target, start = tmp_path / str(number), context.Barrier(N_CROWD)
        crowd = [
            context.Process(target=run_in_a_crowd, args=(name, source, target, start))
            for _ in range(N_CROWD)
        ]
        for child in crowd:
            child.start()
        for child in crowd:
            child.join(60)
        codes = {child.exitcode for child in crowd}
        assert DONE in codes and codes <= {DONE, REFUSED}, codes
        assert digests(target) == unbroken


# --- in the moment when one ends ------------------------------------------------------


def test_who_begins_as_another_ends_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "t.csv.work"
    second, release = writing.work_folder(folder, "busy"), FileLock.release

    def release_and_begin(lock, *args) -> None:
        release(lock, *args)
        monkeypatch.undo()
        second.__enter__()
        (folder / "baseline").write_text("of the second")

    with writing.work_folder(folder, "busy"):
        (folder / "baseline").write_text("of the first")
        (folder / "weights").mkdir()
        monkeypatch.setattr(FileLock, "release", release_and_begin)
    assert (folder / "baseline").read_text() == "of the second"
    with pytest.raises(FlashMoeError, match="busy"):
        writing.work_folder(folder, "busy").__enter__()
    second.__exit__(None, None, None)
    assert not folder.exists()


def test_a_table_by_another_name_is_the_same_table(tmp_path: Path) -> None:
    target, other = tmp_path / "one", tmp_path / "other"
    target.mkdir()
    other.mkdir()
    (target / "t.csv").touch()
    (other / "t.csv").symlink_to(target / "t.csv")
    source = write_tokenizer(write_tiny(tmp_path / "m", vocab_size=280, **SMALL))
    with (
        writing.work_folder(target / "t.csv.work", "another sweep"),
        pytest.raises(FlashMoeError, match="another sweep"),
    ):
        run("sweep", source, other)


def test_two_that_save_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with writing.new_file(path) as first, writing.new_file(path) as second:
        first.write(b"a" * 100)
        second.write(b"b" * 60)
        first.write(b"a" * 100)
    assert path.read_bytes() == b"a" * 200  # the later one; the other was whole, too
    assert [p.name for p in tmp_path.iterdir()] == ["trace.npz"]


# --- a chat and a sweep on one model --------------------------------------------------


@pytest.fixture(scope="module")
def small_sweep(tmp_path_factory) -> tuple[Tasks, Path, dict[str, str]]:
    """Tasks, a folder, and the row that a sweep gives when it is alone."""
    folder = tmp_path_factory.mktemp("sweep")
    text = (ROOT / "README.md").read_text("utf-8")
    texts = [folder / "a.txt", folder / "b.txt"]
    for number, path in enumerate(texts):
        path.write_text(text[1000 * number :][:500], "utf-8")
    tasks = Tasks((texts[0],), (), texts[1], 60, None, 1)
    return tasks, folder, real_row(tasks, folder / "alone.csv")


def real_row(tasks: Tasks, table: Path) -> dict[str, str]:
    """What a sweep of one setting finds, without the time it took."""
    sweep.sweep(REDUCED, [Setting(k=4)], tasks, table, progress=False)
    (row,) = sweep.read_table(table)
    return {k: v for k, v in row.items() if k not in ("tok_s", "row_s")}


def told(model) -> list[str]:
    session = chat(model)
    words = ("Who are you?", "Tell me a story")
    return ["".join(session.say(text, 30)) for text in words]


def test_a_chat_and_a_sweep_in_one_process(small_sweep) -> None:
    tasks, folder, alone = small_sweep
    rows: list[dict] = []
    with load(REDUCED, engine="numpy", slots=16) as model:
        want = told(model)
        thread = threading.Thread(
            target=lambda: rows.append(real_row(tasks, folder / "thread.csv"))
        )
        thread.start()
        while thread.is_alive():
            assert told(model) == want
        thread.join()
    assert rows == [alone]


def test_a_chat_and_a_sweep_in_two_processes(small_sweep) -> None:
    tasks, folder, alone = small_sweep
    child = context.Process(target=real_row, args=(tasks, folder / "process.csv"))
    child.start()
    with load(REDUCED, engine="numpy", slots=16) as model:
        want = told(model)
        while child.is_alive():
            assert told(model) == want
    child.join()
    (row,) = sweep.read_table(folder / "process.csv")
    assert {k: row[k] for k in alone} == alone
