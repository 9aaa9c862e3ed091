"""Long runs, behind `make soak`: about a quarter of an hour. Prints what they took."""

import os
from pathlib import Path

import long_runs
import numpy as np
import pytest

from flashmoe_ref import load

# MLX computes one token at a time more slowly on a CPU.
N_TOKENS = {"numpy": 20_000, "mlx": 4_000}
N_TURNS = int(os.environ.get("FLASHMOE_SOAK_TURNS", "200"))
PROMPT_TOKENS = 3_000

engines = pytest.mark.parametrize("engine", ["numpy", "mlx"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return long_runs.write_long_model(tmp_path_factory.mktemp("long") / "model")


def tell(capsys: pytest.CaptureFixture, what: str, run: long_runs.Run) -> None:
    with capsys.disabled():
        print(f"\n{what}: {run}", flush=True)


@engines
def test_a_long_text_in_a_quarter_of_the_memory(folder, engine, capsys) -> None:
    with load(folder, engine=engine, experts="resident") as model:
        want = long_runs.decode(model, N_TOKENS[engine])
        tell(capsys, f"{engine}, resident, tokens", want)
    with long_runs.open_streaming(folder, engine) as model:
        found = long_runs.decode(model, N_TOKENS[engine])
        tell(capsys, f"{engine}, streamed, tokens", found)
    assert found.written == want.written
    long_runs.assert_flat(found)


@engines
def test_long_prompts(folder, engine) -> None:
    with load(folder, engine=engine, experts="resident") as model:
        want = long_runs.logits_of_prompts(model, PROMPT_TOKENS, 3)
    with long_runs.open_streaming(folder, engine) as model:
        found = long_runs.logits_of_prompts(model, PROMPT_TOKENS, 3)
    for ours, theirs in zip(found, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_long_conversation_that_keeps_its_past(folder, capsys) -> None:
    checked = [turn for turn in range(N_TURNS) if turn % 10 == 9]
    with long_runs.open_streaming(folder, "numpy") as model:
        run, again = long_runs.converse(model, N_TURNS, checked)
    tell(capsys, "numpy, conversation, turns", run)
    assert again.written == [run.written[turn] for turn in checked]
    long_runs.assert_flat(run)
