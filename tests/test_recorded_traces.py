"""The traces in data/traces: whole, small, of the model that ships, and repeatable."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from flashmoe_ref import load
from flashmoe_ref.engine import Model
from flashmoe_ref.trace import Trace, record

ROOT = Path(__file__).parents[1]
TRACES = ROOT / "data" / "traces"
REDUCED = ROOT / "data" / "reduced"
NAMES = [f"{text}_k{k}" for k in (10, 4) for text in ("stories", "tools", "chat")]
N_REPLAYED = 120  # tokens


@pytest.fixture(scope="module", params=NAMES)
def trace(request: pytest.FixtureRequest) -> Trace:
    """Each of the six files."""
    return Trace.load(TRACES / f"{request.param}.npz")


@pytest.fixture(scope="module")
def recording() -> Iterator[ModuleType]:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("record", TRACES / "record.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


@pytest.fixture(scope="module")
def models() -> Iterator[dict[int, Model]]:
    """The shipped model at both K, resident."""
    options = {"engine": "numpy", "experts": "resident"}
    with load(REDUCED, **options) as as_trained, load(REDUCED, k=4, **options) as four:
        yield {10: as_trained, 4: four}


@pytest.mark.parametrize("name", NAMES)
def test_files_are_small(name: str) -> None:
    assert (TRACES / f"{name}.npz").stat().st_size < 2_000_000


def test_data_stays_small() -> None:
    """16 MB for the ReLU model, 40 MB for all the rest."""
    files = (path for path in (ROOT / "data").rglob("*") if path.is_file())
    shipped = [f for f in files if not {"__pycache__", "packed_experts"} & {*f.parts}]
    relu = [file for file in shipped if file.is_relative_to(ROOT / "data" / "relu")]
    n_relu = sum(file.stat().st_size for file in relu)
    assert n_relu < 16_000_000
    assert sum(file.stat().st_size for file in shipped) - n_relu < 40_000_000


def test_a_trace_is_what_it_says(trace: Trace, recording: ModuleType) -> None:
    assert trace.n_tokens >= 10_000 and trace.is_decode.all()
    assert (trace.n_layers, trace.n_experts) == (8, 128)
    assert trace.about["mode"]["k"] == trace.k
    assert trace.about["model_sha256"] == recording.digest(REDUCED), (
        "the model has changed: python data/traces/record.py"
    )
    texts = trace.about["texts"]
    assert sum(n_tokens for _, _, n_tokens in texts) == trace.n_tokens
    starts = np.flatnonzero(trace.steps["position"] == 0)
    sizes = np.diff(np.append(starts, trace.n_tokens))
    assert sizes.tolist() == [n_tokens for _, _, n_tokens in texts]
    assert all(0 < n_prompt <= n_tokens <= 512 for _, n_prompt, n_tokens in texts)


def test_picks_are_neither_random_nor_all_the_same(trace: Trace) -> None:
    """Random picks of K repeat K / E of the token before, and use all experts alike."""
    before, now = trace.picks[:-1, ..., None], trace.picks[1:, ..., None, :]
    repeated = (before == now).any(-1).mean()
    assert 1.5 * trace.k / trace.n_experts < repeated < 0.5
    for layer in range(trace.n_layers):
        used = np.bincount(trace.picks[:, layer].ravel(), minlength=trace.n_experts)
        assert used.max() > 1.2 * np.median(used)
        assert (used > 0).mean() > 0.5


def test_the_model_picks_the_same_again(trace: Trace, models: dict[int, Model]) -> None:
    """Another CPU may round otherwise: a few picks in a hundred may differ."""
    model = models[trace.k]
    with record(model, times=False) as again:
        state = model.new_state()
        for token in trace.ids[:N_REPLAYED].tolist():
            model.decode(token, state)
    n_first = trace.about["texts"][0][2]  # of the first text, in one state
    n = min(N_REPLAYED, n_first)
    assert (again.picks[:n] == trace.picks[:n]).mean() > 0.97


def test_the_script_records_the_same_again(
    recording: ModuleType, models: dict[int, Model]
) -> None:
    """Stories need no pools, so this is quick: the first text of the shipped trace."""
    model, shipped = models[10], Trace.load(TRACES / "stories_k10.npz")
    draw = recording.kinds_of_text(model, {})["stories"]
    got = recording.record_texts(model, "stories", draw, 60)
    assert got.n_tokens == 60 and got.weights is None
    n_prompt = got.about["texts"][0][1]
    np.testing.assert_array_equal(got.ids[:n_prompt], shipped.ids[:n_prompt])
    for name in ("model", "mode", "model_sha256", "seed"):
        assert got.about[name] == shipped.about[name], name


def test_dialogues_are_drawn_from_this_repository_alone(
    recording: ModuleType, models: dict[int, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "N_TALES", 2)
    monkeypatch.setattr(recording, "STORY_TOKENS", 130)  # shorter than shipped
    pools = recording.make_pools(models[10])
    assert len(pools["words"]) > 1000 and len(pools["tales"]) == 2
    for name in ("tools", "chat"):
        draw = recording.kinds_of_text(models[10], pools)[name]
        found = recording.record_texts(models[10], name, draw, 100)
        assert found.n_tokens == 100 and found.is_decode.all()
