"""Folded random checkpoints, and routing with a given locality."""

import numpy as np
import pytest
from tiny import TEXT_CONFIG

from flashmoe_ref import load
from flashmoe_ref.accounting import dense_bytes, expert_bytes
from flashmoe_ref.config import PRESETS, ModelConfig
from flashmoe_ref.errors import CheckpointError, ConfigError, PackError
from flashmoe_ref.experts import PACKED_FOLDER
from flashmoe_ref.folding import layers_that_fit, planned_format, write_folded
from flashmoe_ref.locality import QWEN35_397B, routing_with_locality
from flashmoe_ref.simulator import decode_requests, simulate

CONFIG = ModelConfig.from_dict(
    {"model_type": "qwen3_5_moe", "text_config": TEXT_CONFIG}
)
TINY = {"group_size": 32, "progress": False}
N_LAYERS = CONFIG.num_hidden_layers


def test_layers_share_files_and_the_engine_runs_them(tmp_path):
    folder = write_folded(tmp_path / "model", CONFIG, 2, **TINY)
    packed = folder / PACKED_FOLDER
    for layer in range(N_LAYERS):
        path = packed / f"layer_{layer:02d}.bin"
        assert path.is_symlink() == (layer >= 2)
        assert path.resolve().name == f"layer_{layer % 2:02d}.bin"
        one = expert_bytes(CONFIG, 4, 32)
        assert path.stat().st_size == CONFIG.num_experts * one
    with load(folder, experts="packed", compiled=False) as model:
        logits = model.logits(range(12))
        banks = [model.store.bank(0).matrix("up_proj") for _ in range(2)]
    with load(folder, experts="packed", slots=6, compiled=False) as model:
        np.testing.assert_array_equal(model.logits(range(12)), logits)
    assert np.isfinite(logits).all() and logits.std() > 0.1
    assert banks[0].bits == 4


def test_experts_in_place_are_missed_with_one_line(tmp_path):
    folder = write_folded(tmp_path / "model", CONFIG, 1, **TINY)
    with pytest.raises(CheckpointError, match="in packed_experts only; use"):
        load(folder)
    (folder / PACKED_FOLDER / "layout.json").unlink()
    with pytest.raises(CheckpointError, match=r"layout\.json is missing"):
        load(folder, experts="packed")
    for path in (folder / PACKED_FOLDER).iterdir():
        path.unlink()
    (folder / PACKED_FOLDER).rmdir()
    with pytest.raises(CheckpointError, match="holds no routed experts"):
        load(folder, experts="packed")


def test_a_second_run_goes_on_and_other_settings_are_refused(tmp_path):
    folder = write_folded(tmp_path / "model", CONFIG, 2, **TINY)
    kept = folder / PACKED_FOLDER / "layer_01.bin"
    whole, before = kept.read_bytes(), (folder / PACKED_FOLDER / "layer_00.bin").stat()
    kept.unlink()
    write_folded(folder, CONFIG, 2, **TINY)
    assert kept.read_bytes() == whole
    after = (folder / PACKED_FOLDER / "layer_00.bin").stat()
    assert after.st_mtime_ns == before.st_mtime_ns
    with pytest.raises(PackError):
        write_folded(folder, CONFIG, 1, **TINY)


def test_what_fits_into_a_budget():
    config = PRESETS["qwen3.5-397b-a17b"]
    layer = 512 * 7_077_888
    dense = dense_bytes(config, 4, 64, 8)
    enough = dense + 50_000_000 + layer
    assert layers_that_fit(config, enough, 4, 4, 64) == 1
    assert layers_that_fit(config, enough + 8 * layer, 4, 4, 64) == 9
    assert layers_that_fit(config, 10**12, 4, 4, 64) == 60
    with pytest.raises(ConfigError, match="give at least"):
        layers_that_fit(config, enough - 1, 4, 4, 64)
    assert planned_format(config, 2, 64).n_bytes == 3_932_160


# --- locality -------------------------------------------------------------------------


def test_a_cache_finds_what_the_curve_says():
    picks = routing_with_locality(800, 2, 512, 10)
    requests = decode_requests(picks, 512)
    for share, hits in zip(*QWEN35_397B, strict=True):
        found = simulate(requests, "lru", round(share * 512)).hit_rate
        assert hits - 0.05 < found < hits + 0.02  # it starts empty


def test_picks_are_distinct_and_the_seed_decides():
    picks = routing_with_locality(50, 3, 16, 4)
    assert picks.shape == (50, 3, 4)
    assert picks.min() >= 0 and picks.max() < 16
    assert all(len(set(row)) == 4 for row in picks.reshape(-1, 4).tolist())
    again = routing_with_locality(50, 3, 16, 4)
    np.testing.assert_array_equal(picks, again)
    assert (picks != routing_with_locality(50, 3, 16, 4, seed=1)).any()
    assert set(routing_with_locality(2, 1, 4, 4).ravel()) == {0, 1, 2, 3}


@pytest.mark.parametrize("curve", [((0.5, 0.2), (0.1, 0.2)), ((0.2, 0.5), (0.9, 0.1))])
def test_a_falling_curve_is_refused(curve):
    with pytest.raises(ConfigError, match="must rise"):
        routing_with_locality(2, 1, 8, 2, curve)


def test_k_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r"outside 1\.\.8"):
        routing_with_locality(2, 1, 8, 9)
