"""The committed table is of the committed model and sets, and comes out again."""

import random
from pathlib import Path

import pytest

from flashmoe_ref.measures import Baseline, Tasks, make_baseline, measure
from flashmoe_ref.requantize import requantize
from flashmoe_ref.settings import from_row, read_settings
from flashmoe_ref.sweep import failures_file, fingerprint, provenance, read_table

DATA = Path(__file__).parents[1] / "data"
REDUCED, TABLE = DATA / "reduced", DATA / "results" / "sweep.csv"
ROWS = read_table(TABLE)
FIXED = {"k_used", "mean_k", "expert_bits", "bytes_per_token", "tokens"}
# A processor of another kind sums in another order: a token in a thousand may change.
CLOSE = {"perplexity": 1e-3, "cost_nats": 2e-3, "bits_per_byte": 1e-3}
SHARES = {"agreement": 5e-3, "divergence": 2e-3}


def whole_tasks(sets: tuple[str, ...], n_continued: int = 0) -> Tasks:
    """What each row had to do, but for free generation."""
    row = ROWS[0]
    prose = DATA / "eval" / "prose"
    return Tasks(
        texts=tuple(prose / name for name in row["texts"].split()),
        calibration=prose / row["calibration"],
        sets=tuple(DATA / "eval" / name for name in sets),
        n_tokens=int(row["tokens_a_text"]),
        n_prompts=int(row["prompts_a_set"]),
        n_continued=n_continued,
        engine="numpy",
    )


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    work = tmp_path_factory.mktemp("baseline")
    return make_baseline(REDUCED, whole_tasks(()), work)


def test_rows_are_of_this_model_and_these_sets() -> None:
    sets = tuple(ROWS[0]["sets"].split())
    given = provenance(REDUCED, whole_tasks(sets, int(ROWS[0]["continuations"])))
    for row in ROWS:
        assert row["model_sha256"] == fingerprint(REDUCED)
        for name in ("data_sha256", "tokens_a_text", "prompts_a_set", "continuations"):
            assert row[name] == str(given[name]), name
    wanted = read_settings(TABLE.with_name("sweep_settings.csv"))
    settings = [from_row(row) for row in ROWS]
    assert len(set(settings)) == len(settings) >= 45
    assert set(settings) <= set(wanted)


def test_bytes_follow_from_the_number_of_experts() -> None:
    for row in ROWS:
        expert = int(row["experts_bytes"]) / (8 * 128)
        mean = float(row["mean_k"])
        assert int(row["bytes_per_token"]) == pytest.approx(8 * mean * expert, rel=1e-4)


def test_stages_only_lose(subtests) -> None:
    for row in ROWS:
        with subtests.test(from_row(row).name):
            tool = [
                f"tool_{stage}" for stage in ("parses", "declared", "fits", "right")
            ]
            json = [f"json_{stage}" for stage in ("parses", "fits", "right")]
            for columns in (tool, json):
                shares = [float(row[name]) for name in columns]
                assert shares == sorted(shares, reverse=True)
                low, high = (
                    float(row[f"{columns[-1]}_{end}"]) for end in ("low", "high")
                )
                assert low <= shares[-1] <= high


def test_failures_are_of_rows() -> None:
    import json

    names = {from_row(row).name for row in ROWS}
    lines = failures_file(TABLE).read_text("utf-8").splitlines()
    assert {json.loads(line)["setting"] for line in lines} <= names


def _compare(row: dict[str, str], got: dict[str, object]) -> None:
    for name in FIXED:
        assert float(got[name]) == pytest.approx(float(row[name]), rel=1e-3), name
    for name, tolerance in CLOSE.items():
        near = pytest.approx(float(row[name]), rel=tolerance, abs=tolerance)
        assert got[name] == near, name
    for name, tolerance in SHARES.items():
        assert got[name] == pytest.approx(float(row[name]), abs=tolerance), name


STORED = [row for row in ROWS if from_row(row).is_stored]
OTHERS = [row for row in ROWS if row["expert_bits"] in ("2", "3")]
DRAWN = random.Random(0).sample(STORED, 2), random.Random(0).sample(OTHERS, 1)


@pytest.mark.parametrize("row", DRAWN[0], ids=lambda row: from_row(row).name)
def test_rows_of_the_shipped_weights_come_out_again(row, baseline) -> None:
    got, _ = measure(REDUCED, from_row(row), whole_tasks(()), baseline)
    _compare(row, got)


@pytest.mark.parametrize("row", DRAWN[1], ids=lambda row: from_row(row).name)
def test_rows_of_fewer_bits_come_out_again(row, baseline, tmp_path) -> None:
    setting = from_row(row)
    names = ("group_size", "down_bits", "dense_bits", "router_bits")
    widths = {n: v for n in names if (v := getattr(setting, n)) is not None}
    source = (REDUCED, tmp_path / "q", setting.bits)
    folder = requantize(*source, rule=setting.rule, progress=False, **widths)
    _compare(row, measure(folder, setting, whole_tasks(()), baseline)[0])


def test_answers_come_out_again(baseline) -> None:
    """Of the row that answers soonest; greedy, so at most a near tie may turn over."""
    (row,) = (row for row in STORED if from_row(row).name == "K=3")
    got, _ = measure(REDUCED, from_row(row), whole_tasks(("json.jsonl",)), baseline)
    for name in ("json_parses", "json_fits", "json_right"):
        assert abs(got[name] - float(row[name])) * int(row["json_n"]) <= 1, name
