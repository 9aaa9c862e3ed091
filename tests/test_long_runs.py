"""Hundreds of tokens and some turns: nothing grows. `make soak` does thousands."""

from pathlib import Path

import long_runs
import numpy as np
import pytest

from flashmoe_ref import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return long_runs.write_long_model(tmp_path_factory.mktemp("long") / "model")


def test_a_text_in_a_quarter_of_the_memory(folder: Path) -> None:
    with load(folder, engine="numpy", experts="resident") as model:
        want = long_runs.decode(model, 160)
        prompts = long_runs.logits_of_prompts(model, 600, 1)
    with long_runs.open_streaming(folder, "numpy") as model:
        found = long_runs.decode(model, 160)
        for ours, theirs in zip(
            long_runs.logits_of_prompts(model, 600, 1), prompts, strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    assert found.written == want.written
    long_runs.assert_flat(found)


def test_a_conversation_that_keeps_its_past(folder: Path) -> None:
    with long_runs.open_streaming(folder, "numpy") as model:
        run, again = long_runs.converse(model, 8, checked := (3, 7))
    assert again.written == [run.written[turn] for turn in checked]
    long_runs.assert_flat(run)
