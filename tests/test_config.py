"""Configurations: what is read, what is refused, and the exact accounting."""

import copy
import json

import pytest
from tiny import TEXT_CONFIG

from flashmoe_ref.accounting import (
    count_parameters,
    delta_state_bytes,
    dense_bytes,
    expert_bytes,
    kv_cache_bytes,
)
from flashmoe_ref.config import ModelConfig, preset
from flashmoe_ref.errors import ConfigError


def nested(**changes):
    return {"model_type": "qwen3_5_moe", "text_config": TEXT_CONFIG | changes}


def test_nested_and_flat_configs_agree():
    flat = TEXT_CONFIG | {"eos_token_id": [5, 3]}
    raw = {"model_type": "qwen3_5_moe", "text_config": flat, "eos_token_id": 3}
    a, b = ModelConfig.from_dict(raw), ModelConfig.from_dict(flat)
    assert a.hidden_size == b.hidden_size == 64
    assert a.layer_types == ("linear_attention",) * 3 + ("full_attention",)
    assert a.rotary_dim == 8
    assert a.eos_token_ids == (3, 5)
    assert b.eos_token_ids == (5, 3)


def test_rope_type_may_be_called_type():
    rope = {"type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    config = ModelConfig.from_dict(nested(rope_parameters=rope))
    assert (config.rope_theta, config.rotary_dim) == (1e6, 16)


def test_flat_qwen3_next_keeps_rope_at_top_level():
    raw = {k: v for k, v in TEXT_CONFIG.items() if k != "rope_parameters"}
    raw |= {"model_type": "qwen3_next", "rope_theta": 1e7, "rope_scaling": None}
    assert ModelConfig.from_dict(raw | {"partial_rotary_factor": 0.25}).rotary_dim == 8


def test_missing_rope_theta_is_refused():
    rope = {"rope_type": "default", "partial_rotary_factor": 0.25}
    with pytest.raises(ConfigError, match="rope_theta is missing"):
        ModelConfig.from_dict(nested(rope_parameters=rope))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen4_exp", None, 7])
def test_other_architectures_are_refused_with_the_list(model_type):
    with pytest.raises(ConfigError, match="qwen3_5_moe_text, qwen3_next"):
        ModelConfig.from_dict(nested() | {"model_type": model_type})


@pytest.mark.parametrize("field", [f for f, v in TEXT_CONFIG.items() if type(v) is int])
@pytest.mark.parametrize("value", [0, -1, 1.5, "4", None, True])
def test_bad_sizes_name_their_field(field, value):
    with pytest.raises(ConfigError, match=field):
        ModelConfig.from_dict(nested(**{field: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 3},
        {"linear_num_value_heads": 5},
        {"num_experts_per_tok": 9},
        {"layer_types": ["full_attention"] * 3},
        {"layer_types": ["full_attention"] * 3 + ["sliding"]},
        {"rms_norm_eps": 0},
        {"eos_token_id": "x"},
        {"num_hidden_layers": 10**12},  # would fill the memory
        {"num_experts": 10**6},
        {"hidden_size": 10**400},
        {"rms_norm_eps": 10**400},
        {"tie_word_embeddings": "false"},  # which is true, for Python
        {"tie_word_embeddings": 0},
        {"rope_parameters": []},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7}},
        {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 1.5}},
        {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.01}},
    ],
)
def test_inconsistent_fields_are_refused(changes):
    with pytest.raises(ConfigError):
        ModelConfig.from_dict(nested(**changes))


def test_reading_a_file_names_the_file(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        ModelConfig.from_json(file)
    for text in (
        *("", "{", "[1]", '{"model_type": "qwen3_5_moe"}', "[" * 100_000),
        '{"a": ' + "9" * 5000 + "}",  # more than int() takes
        '{"a": 1, "a": 2}',
        '{"a": "\\ud800"}',
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json"):
            ModelConfig.from_json(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_json(file)
    file.write_text(json.dumps(nested()))
    assert ModelConfig.from_json(file).num_experts == 8


def test_reading_does_not_change_the_dict():
    raw = nested()
    before = copy.deepcopy(raw)
    ModelConfig.from_dict(raw)
    assert raw == before


def test_k_is_cut_but_never_raised():
    config = preset("Qwen3.5-397B-A17B")
    assert config.with_experts_per_token(4).num_experts_per_tok == 4
    for k in (0, 11, -1):
        with pytest.raises(ConfigError, match=r"1\.\.10"):
            config.with_experts_per_token(k)
    with pytest.raises(ConfigError, match=r"qwen3\.5-397b-a17b"):
        preset("qwen9")


# Totals of the published models, exact to the parameter.
TOTALS = {
    "qwen3.5-397b-a17b": (396_346_350_336, 17_349_040_896, 12_819_192_576),
    "qwen3.5-122b-a10b": (122_111_526_912, 9_771_288_576, 7_959_349_248),
    "qwen3.5-35b-a3b": (34_660_610_688, 3_454_988_928, 2_951_672_448),
    "qwen3.6-35b-a3b": (34_660_610_688, 3_454_988_928, 2_951_672_448),
    "qwen3-next-80b-a3b": (79_674_391_296, 3_874_929_408, 2_968_959_744),
}


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_are_exact(name):
    count = count_parameters(preset(name))
    assert (count.total, count.active(), count.active(4)) == TOTALS[name]
    assert count.dense + count.routed == count.total


def test_categories_of_the_397b():
    by_category = count_parameters(preset("qwen3.5-397b-a17b")).by_category
    assert by_category == {
        "embeddings": 1_017_118_720,
        "lm_head": 1_017_118_720,
        "norms": 495_616,
        "gated delta nets": 5_310_639_360,
        "full attention": 1_572_871_680,
        "routers": 125_829_120,
        "shared experts": 754_974_720,
        "shared gates": 245_760,
        "routed experts": 386_547_056_640,
    }


def test_bytes_of_the_397b():
    config = preset("qwen3.5-397b-a17b")
    by_bits = {
        16: 25_165_824,
        8: 13_369_344,
        6: 10_223_616,
        5: 8_650_752,
        4: 7_077_888,
        3: 5_505_024,
        2: 3_932_160,
    }
    assert {bits: expert_bytes(config, bits) for bits in by_bits} == by_bits
    assert dense_bytes(config, 4) == 5_516_028_032
    assert dense_bytes(config, 4, router_bits=8) == 5_579_065_472
    assert dense_bytes(config, 8) == 10_414_311_552
    assert delta_state_bytes(config) == 192_061_440
    assert kv_cache_bytes(config, 1) == 30_720
