"""Tiny random checkpoints for tests, in every layout that we read. No torch needed."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from flashmoe_ref.accounting import module_shapes
from flashmoe_ref.config import ModelConfig
from flashmoe_ref.quantize import quantize

TEXT_CONFIG = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 512,
    "full_attention_interval": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
    },
}
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
TEMPLATE = Path(__file__).parent / "fixtures" / "chat_template.jinja"
PREFIXES = {"mlx": "language_model.model.", "hf": "model.language_model."}


def write_tiny(
    folder: Path,
    layout: str = "mlx",  # "mlx", "hf" (fused) or "hf-per-expert"
    bits: int = 4,
    dense_bits: int = 8,
    group_size: int = 32,
    seed: int = 0,
    dtype: np.dtype = ml_dtypes.bfloat16,
    n_shards: int = 1,
    **changes: object,
) -> Path:
    """Write a random checkpoint; changes replace fields of TEXT_CONFIG."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {"model_type": "qwen3_5_moe", "text_config": TEXT_CONFIG | changes}
    config = ModelConfig.from_dict(raw)
    weights = _random_weights(config, np.random.default_rng(seed))
    if layout == "mlx":
        tensors, overrides = _as_mlx(weights, bits, dense_bits, group_size, dtype)
        raw["quantization"] = {
            "group_size": group_size,
            "bits": bits,
            "mode": "affine",
        } | overrides
    else:
        tensors = _as_hf(weights, layout, dtype)
    (folder / "config.json").write_text(json.dumps(raw))
    _save(folder, tensors, n_shards)
    return folder


def _random_weights(
    config: ModelConfig, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """By canonical name; norms are the plain factors."""
    weights = {}
    for modules in module_shapes(config).values():
        for name, shape in modules.items():
            w = rng.standard_normal(shape).astype(np.float32)
            if name.endswith("norm"):
                w = 1 + 0.2 * w
            elif name.endswith("conv1d"):
                w *= 0.4
            elif name.endswith("A_log"):
                w = rng.uniform(0, 2, shape)
            elif len(shape) > 1:
                w *= shape[-1] ** -0.5
            weights[name] = np.asarray(w, np.float32)
    return weights


def _as_mlx(
    weights: dict[str, np.ndarray], bits: int, dense_bits: int, group: int, dtype
) -> tuple[dict, dict]:
    tensors, overrides = {}, {}
    for name, w in weights.items():
        full = name.replace(".experts.", ".switch_mlp.")
        prefix = "language_model." if name == "lm_head" else PREFIXES["mlx"]
        full = prefix + full
        w = w.astype(dtype)
        if name.endswith("conv1d"):
            tensors[f"{full}.weight"] = w[:, :, None]
        elif name.endswith(("A_log", "dt_bias")):
            tensors[full] = w
        elif w.ndim == 1:
            tensors[f"{full}.weight"] = w
        else:
            own_bits = bits if ".experts." in name else dense_bits
            m = quantize(w, own_bits, group)
            tensors[f"{full}.weight"] = m.weight
            tensors[f"{full}.scales"], tensors[f"{full}.biases"] = m.scales, m.biases
            if own_bits != bits:
                overrides[full] = {"group_size": group, "bits": own_bits}
    return tensors, overrides


def _as_hf(weights: dict[str, np.ndarray], layout: str, dtype) -> dict:
    tensors = {}
    for name, w in weights.items():
        full = name if name == "lm_head" else PREFIXES["hf"] + name
        zero_centred = name.endswith("norm") and not name.endswith("linear_attn.norm")
        w = (w - 1 if zero_centred else w).astype(dtype)
        if name.endswith("conv1d"):
            w = w[:, None, :]
        if ".experts." not in name:
            bare = name.endswith(("A_log", "dt_bias"))
            tensors[full if bare else f"{full}.weight"] = w
        elif layout == "hf-per-expert":
            stem, projection = full.rsplit(".", 1)
            for e, matrix in enumerate(w):
                tensors[f"{stem}.{e}.{projection}.weight"] = matrix.copy()
        elif name.endswith("gate_proj"):
            up = weights[name.replace("gate_proj", "up_proj")].astype(dtype)
            fused = np.concatenate([w, up], axis=1)
            tensors[full.replace("gate_proj", "gate_up_proj")] = fused
        elif name.endswith("down_proj"):
            tensors[full] = w
    return tensors


def _save(folder: Path, tensors: dict[str, np.ndarray], n_shards: int) -> None:
    if n_shards == 1:
        return save_file(tensors, folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i in range(n_shards):
        file = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::n_shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path) -> Path:
    """Give a model of at least 261 tokens a tokenizer of bytes and five controls."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(CONTROL))
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"eos_token_id": [backend.token_to_id("<|endoftext|>")]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    shutil.copy(TEMPLATE, folder / "chat_template.jinja")
    return folder
