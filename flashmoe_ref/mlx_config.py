"""The config.json that mlx-lm expects beside converted weights.

Follows mlx-lm's `save_config`, `quantize_model` and the `ModelArgs` of its Qwen3.5 and
Qwen3-Next. **But:** `rope_type` keeps its name, which mlx-lm changes to `type`.
*Taught in notebooks/05.*
"""

import copy
import re

from .checkpoint import Checkpoint
from .config import ModelConfig, read_json

# mlx-lm keeps the gates that decide about whole experts at 8 bits.
# Source: mlx-lm `qwen3_5.py` and `qwen3_next.py`, `quant_predicate`.
GATE = re.compile(r"mlp\.(gate|shared_expert_gate)$")
GATE_BITS, GATE_GROUP_SIZE = 8, 64


def converted_config(checkpoint: Checkpoint, raw: dict) -> dict:
    """A config.json that says in mlx-lm's terms what the source's says.

    Raises: ConfigError if the result could not be read, for the stop ids beside it.
    Source: mlx-lm `save_config`, and `ModelArgs` of the two models.
    """
    config = checkpoint.config
    raw = copy.deepcopy(raw)
    for key in ("vision_config", "_name_or_path"):
        raw.pop(key, None)
    if config.model_type != "qwen3_next":
        raw = _nested(raw, config)
    else:
        _name_rope_flat(raw, config)
    generation = checkpoint.path / "generation_config.json"
    if generation.exists() and (stops := read_json(generation).get("eos_token_id")):
        raw["eos_token_id"] = stops
        ModelConfig.from_dict(raw, str(generation))  # refuse what could not be read
    return raw


def _nested(raw: dict, config: ModelConfig) -> dict:
    """The published form: everything about the text model under text_config."""
    if "text_config" not in raw:
        raw = {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "text_config": raw | {"model_type": "qwen3_5_moe_text"},
            "tie_word_embeddings": config.tie_word_embeddings,
        }
        raw["text_config"].pop("architectures", None)
    raw["model_type"] = "qwen3_5_moe"  # the text model's own type is unknown to mlx-lm
    text = raw["text_config"]
    text["rope_parameters"] = _full_rope(text.get("rope_parameters"), config)
    # mlx-lm reads these two nowhere else, and has defaults of its own.
    if config.tie_word_embeddings:
        text["tie_word_embeddings"] = True
    text.setdefault("full_attention_interval", full_attention_interval(config))
    return raw


def _full_rope(rope: dict | None, config: ModelConfig) -> dict:
    return {
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": config.partial_rotary_factor,
        **(rope or {"rope_type": "default"}),
    }


def _name_rope_flat(raw: dict, config: ModelConfig) -> None:
    """What mlx-lm's Qwen3-Next needs at the top level; newer files may lack it."""
    raw["rope_theta"] = config.rope_theta
    raw["partial_rotary_factor"] = config.partial_rotary_factor
    defaults = {
        "intermediate_size": config.moe_intermediate_size,  # of dense layers: none
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "full_attention_interval": full_attention_interval(config),
    }
    for key, value in defaults.items():
        raw.setdefault(key, value)


def full_attention_interval(config: ModelConfig) -> int:
    """Every how many layers comes one with attention; beyond the last if none does."""
    if "full_attention" not in config.layer_types:
        return config.num_hidden_layers + 1
    return config.layer_types.index("full_attention") + 1


def with_quantization(
    config: dict, experts: tuple[int, int], widths: dict[str, tuple[int, int]]
) -> dict:
    """Declare bits and group size: the experts' for all, overrides for what differs.

    The gates are always named, as mlx-lm does. Keys are sorted, as mlx-lm does.
    """
    bits, group_size = experts
    quantization: dict = {"group_size": group_size, "bits": bits, "mode": "affine"}
    for path, width in widths.items():
        if width != experts or GATE.search(path):
            quantization[path] = {"group_size": width[1], "bits": width[0]}
    both = {"quantization": quantization, "quantization_config": quantization}
    return dict(sorted({**config, **both}.items()))
