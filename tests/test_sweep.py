"""A sweep's table: whole rows, each once, whatever kills it."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flashmoe_ref import cli, load, measures
from flashmoe_ref.errors import ConfigError
from flashmoe_ref.estimate import estimate, in_words
from flashmoe_ref.measures import Tasks
from flashmoe_ref.settings import COLUMNS, Setting, from_row, read_settings
from flashmoe_ref.sweep import (
    _forget_failures,
    append_row,
    failures_file,
    fingerprint,
    read_table,
    sweep,
)
from flashmoe_ref.writing import LOCK_NAME

ROOT = Path(__file__).parents[1]
REDUCED = ROOT / "data" / "reduced"
JSON_SET = ROOT / "data" / "eval" / "json.jsonl"
OF_THE_MOMENT = ("tok_s", "row_s")  # all other columns are the same again


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    """A little of everything."""
    folder, text = tmp_path_factory.mktemp("texts"), (ROOT / "README.md").read_text()
    files = [folder / f"{name}.txt" for name in "abc"]
    for number, path in enumerate(files):
        path.write_text(text[2000 * number :][:2000], "utf-8")
    lines = JSON_SET.read_text("utf-8").splitlines()
    chosen = folder / "json.jsonl"
    chosen.write_text("\n".join(lines[:2]) + "\n", "utf-8")
    return Tasks(tuple(files[:2]), (chosen,), files[2], 120, None, 2)


# --- settings -------------------------------------------------------------------------


def test_a_setting_comes_back_from_its_row() -> None:
    for setting in (
        Setting(),
        Setting(k=4, kept="scaled"),
        Setting(mass=0.7),
        Setting(10, 2, 32, "minmax", 3, 4, 8, "as-routed", 0.5),
    ):
        assert from_row(setting.as_row() | {"tok_s": "1"}) == setting
    assert Setting(k=4, bits=2, rule="minmax", down_bits=3).name == (
        "K=4, 2 bits minmax, down 3"
    )
    assert Setting(k=4, kept="scaled").weights == Setting().weights
    assert Setting(bits=2).weights != Setting(bits=3).weights


def test_settings_that_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give bits, too"):
        Setting(router_bits=4)
    for wrong in ({"kept": "louder"}, {"rule": "best"}, {"bits": 16}, {"mass": 1.5}):
        with pytest.raises(ConfigError, match=rf"{next(iter(wrong))}="):
            Setting(**wrong)
    path = tmp_path / "s.csv"
    for text, message in (
        ("k,speed\n4,1\n", "must name columns"),
        ("k\nfour\n", "row 1: column k: 'four' is no number"),
        ("k\n", "holds no settings"),
        ("k,bits\n4\n", "line 2 has not the 2 fields"),
        ("k,k\n4,5\n", "a column stands twice"),
        ('k\n"4\n', "not a CSV file"),
        ("\udcff", "not UTF-8 text"),
    ):
        path.write_text(text, "utf-8", "surrogateescape")
        with pytest.raises(ConfigError, match=message):
            read_settings(path)


def test_our_own_list_can_be_read() -> None:
    settings = read_settings(ROOT / "data" / "results" / "sweep_settings.csv")
    assert settings[0] == Setting()
    assert 45 <= len(settings) <= 70


# --- the table ------------------------------------------------------------------------


def test_half_a_row_is_no_row(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    assert read_table(table) == []
    append_row(table, {"k": 4, "text": 'a "quoted", one'})
    append_row(table, {"k": 3, "text": "b"})
    with open(table, "a") as file:
        file.write("2,unfin")
    assert [row["k"] for row in read_table(table)] == ["4", "3"]
    assert read_table(table)[0]["text"] == 'a "quoted", one'
    with pytest.raises(ConfigError, match=r"other columns \(bits, text\)"):
        append_row(table, {"k": 3, "bits": 2})


def test_a_character_cut_in_half_is_half_a_row(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes("k,model\n4,é\n3,é".encode()[:-1])
    assert read_table(table) == [{"k": "4", "model": "é"}]


@pytest.mark.parametrize("content", ["one line", "a,b\n1,2\nno end", "k\n1\n"])
def test_a_file_that_is_no_table_is_left_alone(
    tasks: Tasks, tmp_path: Path, content: str
) -> None:
    """Not cut to whole lines either, as a table of ours would be."""
    table = tmp_path / "notes.csv"
    table.write_text(content)
    with pytest.raises(ConfigError, match="no table of a sweep"):
        sweep(REDUCED, [Setting()], tasks, table, progress=False)
    assert table.read_text() == content


def test_wrong_answers_may_hold_any_character(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    lines = [
        json.dumps({"setting": name, "text": "a\u2028b\x85c"}, ensure_ascii=False)
        for name in ("K=2", "K=3")
    ]
    failures_file(table).write_text("\n".join(lines) + '\n{"cut', "utf-8")
    _forget_failures(table, {Setting(k=3)})
    assert failures_file(table).read_text("utf-8") == lines[1] + "\n"


def _comparable(table: Path) -> list[dict[str, str]]:
    return [
        {name: text for name, text in row.items() if name not in OF_THE_MOMENT}
        for row in read_table(table)
    ]


SETTINGS = [Setting(), Setting(k=2), Setting(k=2, bits=2, rule="minmax")]


@pytest.fixture(scope="module")
def whole(tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nothing disturbed."""
    table = tmp_path_factory.mktemp("whole") / "t.csv"
    return sweep(REDUCED, SETTINGS, tasks, table, progress=False)


def test_rows_say_what_was_measured(whole: Path, tasks: Tasks) -> None:
    rows = read_table(whole)
    assert [from_row(row) for row in rows] == SETTINGS
    first, second, third = rows
    assert float(first["cost_nats"]) == float(first["divergence"]) == 0
    assert float(first["agreement"]) == 1
    assert float(second["cost_nats"]) > 0.05
    assert (first["k_used"], second["k_used"]) == ("10", "2")
    assert float(second["bytes_per_token"]) == float(first["bytes_per_token"]) / 5
    assert (second["expert_bits"], third["expert_bits"]) == ("4", "2")
    assert first["json_n"] == "2"
    assert {row["model_sha256"] for row in rows} == {fingerprint(REDUCED)}
    assert not whole.with_name("t.csv.work").exists()


def test_bytes_a_token_are_those_that_a_run_reads(whole: Path) -> None:
    with load(REDUCED, engine="numpy", k=2) as model:
        state = model.new_state()
        model.prefill([5, 6, 7], state)
        model.reset_report()
        for token in range(8, 28):
            model.decode(token, state)
        read = model.report().bytes_per_token
    assert float(read_table(whole)[1]["bytes_per_token"]) == read


def test_wrong_answers_are_kept_as_text(whole: Path) -> None:
    lines = failures_file(whole).read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    wrong = {row["k_used"]: 1 - float(row["json_right"]) for row in read_table(whole)}
    assert {r["setting"] for r in records} <= {s.name for s in SETTINGS}
    assert wrong["2"] == 1, "K=2 gets no JSON right"
    assert {"text", "reason", "chosen_token", "p_chosen"} <= set(records[0])


def test_another_model_s_table_is_refused(whole: Path, tasks: Tasks) -> None:
    other = Tasks(tasks.texts, tasks.sets, tasks.calibration, 60, None, 2)
    with pytest.raises(ConfigError, match="tokens_a_text '120', this sweep '60'"):
        sweep(REDUCED, SETTINGS, other, whole)
    before = whole.read_text()
    sweep(REDUCED, SETTINGS, tasks, whole, progress=False)  # nothing is left to do
    assert whole.read_text() == before


KILLED = """
import os, signal, sys
from pathlib import Path
from flashmoe_ref import measures, sweep
from flashmoe_ref.measures import Tasks
from flashmoe_ref.settings import Setting
sys.path.insert(0, {tests!r})
from test_sweep import REDUCED, SETTINGS

count = 0
def dies(*args):
    global count
    count += 1
    if count == {at}:
        with open({table!r}, "a") as file:
            file.write("half a row")
        os.kill(os.getpid(), signal.SIGKILL)
    return measures.measure(*args)

sweep.measure = dies
files = [Path(name) for name in {files!r}]
sweep.sweep(REDUCED, SETTINGS, Tasks((files[0], files[1]), (files[3],), files[2], 120,
            None, 2), {table!r}, progress=False)
"""


def test_a_killed_sweep_ends_in_the_same_table(
    whole: Path, tasks: Tasks, tmp_path: Path
) -> None:
    """Killed at its third setting, with half a row and other weights lying there."""
    table, at = tmp_path / "t.csv", 3
    files = [str(p) for p in (*tasks.texts, tasks.calibration, *tasks.sets)]
    code = KILLED.format(
        at=at, table=str(table), files=files, tests=str(ROOT / "tests")
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(read_table(table)) == at - 1
    kept = table.read_text().rpartition("\n")[0]
    sweep(REDUCED, SETTINGS, tasks, table, progress=False)
    assert table.read_text().startswith(kept), "a finished row was touched"
    assert _comparable(table) == _comparable(whole)
    assert failures_file(table).read_text() == failures_file(whole).read_text()
    assert not table.with_name("t.csv.work").exists()


def test_two_at_a_time_are_refused(tasks: Tasks, tmp_path: Path) -> None:
    from filelock import FileLock

    work = tmp_path / "t.csv.work"
    work.mkdir()
    with FileLock(work / LOCK_NAME), pytest.raises(ConfigError, match="another sweep"):
        sweep(REDUCED, SETTINGS, tasks, tmp_path / "t.csv", progress=False)


# --- tasks and time -------------------------------------------------------------------


def test_scaled_weights_need_a_text_of_their_own(tasks: Tasks) -> None:
    alone = Tasks(tasks.texts, (), None, 60)
    setting = Setting(k=4, kept="scaled")
    with (
        pytest.raises(ConfigError, match="a text to calibrate on"),
        measures.open_setting(REDUCED, setting, alone),
    ):
        pass
    with pytest.raises(ConfigError, match="another to calibrate on"):
        Tasks(tasks.texts, (), tasks.texts[0])
    with measures.open_setting(REDUCED, setting, tasks) as model:
        assert "output scale" in model.mode


def test_an_estimate_counts_what_is_done(tasks: Tasks) -> None:
    found = estimate(REDUCED, SETTINGS, tasks)
    assert (found.n_settings, found.n_requantized) == (3, 1)
    assert found.n_read > 2 * 120 + 2 * (48 + 64)
    assert found.seconds > 3 * found.seconds_a_setting
    assert "3 settings, about" in str(found)


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0.2, "about 1 s"),
        (61, "about 61 s"),
        (600, "about 10 min"),
        (7200, "about 2.0 h"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


# --- the command ----------------------------------------------------------------------


def test_evaluate_prints_a_table_and_writes_it(
    tasks: Tasks, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = [
        "evaluate",
        str(REDUCED),
        "--k",
        "3",
        "--no-progress",
        "--engine",
        "numpy",
    ]
    options += ["--text", *map(str, tasks.texts), "--sets", str(tasks.sets[0])]
    options += ["--tokens", "80", "--prompts", "1", "--quick", "--engine", "numpy"]
    options += ["--experts", "resident"]
    assert cli.main([*options, "--estimate"]) == 0
    assert capsys.readouterr().out.startswith("about ")
    files = tmp_path / "t.csv", tmp_path / "t.json"
    options += ["--csv", str(files[0]), "--json", str(files[1])]
    assert cli.main(options) == 0
    shown = capsys.readouterr()
    assert "2 settings, about" in shown.err
    header, *lines = shown.out.splitlines()
    assert header.split() == ("setting MB/token bits/byte cost same json tok/s".split())
    assert [line.split("  ")[0] for line in lines] == ["as shipped", "K=3"]
    with open(files[0], newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == json.loads(files[1].read_text())
    assert set(COLUMNS) < set(rows[0])


def test_evaluate_says_what_is_wrong_in_one_line(capsys: pytest.CaptureFixture) -> None:
    for options, message in (
        (["--router-bits", "4"], "give bits, too"),
        (["--k", "11"], "11"),
        (["--rule", "best"], "mlx, minmax, least_squares"),
    ):
        begun = ["evaluate", str(REDUCED), *options, "--estimate"]
        assert cli.main(begun) == 2
        shown = capsys.readouterr().err
        assert message in shown and shown.count("\n") == 1
