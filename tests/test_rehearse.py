"""Random checkpoints: the engine reads them, the seed decides, a kill loses nothing."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import TEXT_CONFIG

from flashmoe_ref import load
from flashmoe_ref.accounting import dense_bytes, expert_bytes
from flashmoe_ref.checkpoint import Checkpoint
from flashmoe_ref.config import PRESETS, ModelConfig
from flashmoe_ref.errors import ConfigError, PackError
from flashmoe_ref.quantize import dequantize
from flashmoe_ref.rehearse import as_json, write_random

CONFIG = ModelConfig.from_dict(
    {"model_type": "qwen3_5_moe", "text_config": TEXT_CONFIG}
)
TINY = {"group_size": 32, "progress": False}


@pytest.mark.parametrize("name", [n for n in PRESETS if not n.startswith("qwen3-next")])
def test_a_configuration_survives_its_json(name):
    raw = json.loads(json.dumps(as_json(PRESETS[name])))
    assert ModelConfig.from_dict(raw) == PRESETS[name]
    assert raw["random_weights"]


def test_the_engine_runs_it_and_sizes_are_exact(tmp_path):
    folder = write_random(tmp_path / "model", CONFIG, **TINY)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config == CONFIG
    with load(folder, compiled=False) as model:
        logits = model.logits(range(12))
        one = model.store.files.formats[0].n_bytes
    assert np.isfinite(logits).all() and logits.std() > 0.1
    assert one == expert_bytes(CONFIG, 4, 32)
    assert checkpoint.dense_bytes == dense_bytes(CONFIG, 8, 32)


def test_routing_is_spread(tmp_path):
    folder = write_random(tmp_path / "model", CONFIG, **TINY)
    with load(folder, compiled=False) as model:
        picks = []
        route = model.engine.route_topk

        def watch(logits, k):
            experts, weights = route(logits, k)
            picks.append(experts)
            return experts, weights

        model.engine.route_topk = watch
        model.logits(range(90))
    for experts in picks:  # of a layer
        counts = np.bincount(experts.ravel(), minlength=CONFIG.num_experts)
        assert counts.min() > 0 and counts.max() < 3 * counts.mean()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_have_unit_length(tmp_path, bits):
    config = replace(CONFIG, moe_intermediate_size=512)
    folder = write_random(tmp_path / "model", config, bits=bits, **TINY)
    checkpoint = Checkpoint.open(folder)
    down = dequantize(checkpoint.module("layers.0.mlp.experts.down_proj"))
    np.testing.assert_allclose(np.linalg.norm(down, axis=-1).mean(), 1, rtol=0.02)
    assert abs(down.mean()) < 0.02 * down.std()


def test_the_seed_decides(tmp_path):
    folders = [
        write_random(tmp_path / name, CONFIG, seed=seed, **TINY)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = ((f / "model.safetensors").read_bytes() for f in folders)
    assert a == b
    assert a != c and len(a) == len(c)


def test_another_model_is_not_overwritten(tmp_path):
    folder = write_random(tmp_path / "model", CONFIG, **TINY)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(PackError, match="model"):
        write_random(folder, CONFIG, seed=9, **TINY)
    assert (folder / "model.safetensors").read_bytes() == before
    with pytest.raises(ConfigError, match="7 bits"):
        write_random(tmp_path / "other", CONFIG, bits=7, **TINY)
    assert not (tmp_path / "other").exists()


def test_no_room(tmp_path, monkeypatch):
    disk = SimpleNamespace(total=100, used=99, free=1)
    monkeypatch.setattr("flashmoe_ref.writing.shutil.disk_usage", lambda _: disk)
    with pytest.raises(PackError, match="GB free"):
        write_random(tmp_path / "model", CONFIG, **TINY)


def test_a_peer_reads_it(tmp_path):
    """mlx-lm reads the same folder and agrees, with the epsilon of the golden tests."""
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    config = replace(CONFIG, rms_norm_eps=1e-3)
    folder = write_random(tmp_path / "model", config, **TINY)
    model, _ = utils.load_model(folder)
    model.set_dtype(mx.float32)
    ids = [5, 3, 80, 7, 2, 90]
    theirs = np.array(model(mx.array([ids])).astype(mx.float32))[0]
    with load(folder, compiled=False) as ours:
        np.testing.assert_allclose(ours.logits(ids), theirs, atol=5e-5)
