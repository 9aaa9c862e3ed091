"""A rehearsal: replayed routing, its limit, and the command from beginning to end."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import TEXT_CONFIG

from flashmoe_ref import cli_rehearse, load
from flashmoe_ref.cli import main
from flashmoe_ref.config import ModelConfig
from flashmoe_ref.errors import ConfigError
from flashmoe_ref.folding import write_folded
from flashmoe_ref.locality import routing_with_locality
from flashmoe_ref.rehearsal import Rates, multiplied_bytes, rehearse, replay
from flashmoe_ref.streaming import ExpertStore

CONFIG = ModelConfig.from_dict(
    {"model_type": "qwen3_5_moe", "text_config": TEXT_CONFIG}
)
SHAPE = (CONFIG.num_hidden_layers, CONFIG.num_experts, CONFIG.num_experts_per_tok)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("rehearsal") / "model"
    return write_folded(target, CONFIG, 1, group_size=32, progress=False)


def test_replayed_experts_are_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picks, asked = routing_with_locality(6, *SHAPE), []
    request = ExpertStore.request

    def watch(self: ExpertStore, layer: int, experts: list) -> object:
        asked.append((layer, list(experts)))
        return request(self, layer, experts)

    monkeypatch.setattr(ExpertStore, "request", watch)
    with load(folder, experts="packed", slots=8, compiled=False) as model:
        state = model.new_state()
        model.prefill([1, 2, 3], state)
        asked.clear()
        with replay(model.store, SHAPE[2], picks):
            for token in range(7):
                model.decode(token, state)
        assert "request" not in vars(model.store)
    wanted = picks[[*range(6), 0]].tolist()
    assert asked == [pair for token in wanted for pair in enumerate(token)]


@pytest.mark.parametrize("shape", [(3, 1, 2), (3, SHAPE[0], 1)])
def test_picks_of_another_model_are_refused(folder: Path, shape: tuple) -> None:
    with load(folder, experts="packed", compiled=False) as model:
        unknown = np.full((1, SHAPE[0], SHAPE[2]), SHAPE[1])
        for picks in (np.zeros(shape, int), unknown):
            with pytest.raises(ConfigError, match="give another trace"):
                replay(model.store, SHAPE[2], picks).__enter__()


def test_the_limit_is_bytes_over_rates(folder: Path) -> None:
    picks = routing_with_locality(5, *SHAPE)
    rates = Rates(matvec_gb_s=2.0, disk_gb_s=0.5)
    with load(folder, experts="packed", compiled=False) as model:
        found = rehearse(model, picks, [1, 2, 3], 4, rates, n_warm=1)
        one = model.store.files.formats[0].n_bytes
        table = sum(
            info.n_bytes
            for name, info in model.checkpoint.tensors.items()
            if name.startswith("embed_tokens")
        )
        assert multiplied_bytes(model) == model.checkpoint.dense_bytes - table
    used = SHAPE[0] * SHAPE[2] * one
    assert found.used_bytes == found.read_bytes == used  # nothing is kept
    assert found.compute_limit_s == (found.dense_bytes + used) / 2e9
    assert found.read_limit_s == used / 0.5e9
    assert found.times_limit == found.token_s / found.limit_s
    assert found.fastest_s <= found.token_s <= found.slowest_s
    assert found.hit_rate == 0 and found.n_tokens == 4


# --- the command ----------------------------------------------------------------------


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that take seconds."""
    monkeypatch.setitem(cli_rehearse.PRESETS, "tiny", CONFIG)
    monkeypatch.setattr(cli_rehearse, "WRITE_PROBE_BYTES", 1 << 20)
    numbers = ["--tokens", "3", "--warm-tokens", "1", "--prompt", "4", "--k", "2"]
    return ["rehearse", "--preset", "tiny", *numbers, "--engine", "numpy"]


def test_the_command_says_measures_and_removes(
    tiny_preset: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    figures = tmp_path / "figures.json"
    options = ["--dir", str(tmp_path), "--disk-budget", "51MB", "--page-cache"]
    options += ["--slots", "4", "--json", str(figures), "--no-progress"]
    assert main([*tiny_preset, *options]) == 0
    out = capsys.readouterr().out
    assert "GB of random weights in the shape of tiny" in out
    assert "what it says is noise" in out and "times its limit" in out
    saved = json.loads(figures.read_text())
    assert saved["n_tokens"] == 3 and 0 < saved["hit_rate"] < 1
    assert saved["mode"]["k"] == 2 and saved["limit_s"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_kept_files_are_used_again(
    tiny_preset: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    kept = tmp_path / "kept"
    options = ["--keep", str(kept), "--disk-budget", "51MB", "--page-cache"]
    assert main([*tiny_preset, *options, "--no-progress"]) == 0
    before = (kept / "packed_experts" / "layer_00.bin").stat().st_mtime_ns
    assert main([*tiny_preset, *options, "--routing", "random", "--no-progress"]) == 0
    assert "is there already" in capsys.readouterr().out
    assert (kept / "packed_experts" / "layer_00.bin").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--disk-budget", "1MB"], "give at least"),
        (["--disk-budget", "40 apples"], "40 apples"),
        (["--disk-budget", "51MB", "--k", "99"], "outside 1.."),
        (["--disk-budget", "51MB", "--tokens", "0"], "--tokens: give 1 to 100,000"),
        (["--disk-budget", "51MB", "--routing", "no.npz"], "no.npz"),
        (["--disk-budget", "51MB", "--dir", "/no/such"], "no such folder"),
        (["--disk-budget", "51MB", "--json", "/no/such/f"], "no such folder"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    options: list[str],
    words: str,
    tiny_preset: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*tiny_preset, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and error.count("\n") == 0
    assert not list(tmp_path.iterdir())
