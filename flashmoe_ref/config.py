"""Model configurations: read from config.json, or a preset of a published model.

Follows the ``config.json`` of Qwen3.5-MoE (nested or flat) and of Qwen3-Next, with
Hugging Face's field names. **But:** only the text model is described; the vision
tower and the multi-token-prediction head are left out. `accounting.py` counts.
*Taught in notebooks/04.*
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import ConfigError
from .ranges import is_whole
from .small_files import parse_json, read_text

SUPPORTED_MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next")
LAYER_TYPES = ("linear_attention", "full_attention")
MAX_LAYERS = 10_000  # the largest published model has 60
MAX_EXPERTS = 32_768  # of a layer: traces count them in 16 bits; published: 512
MAX_SIZE = 2**31 - 1  # of everything else


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Qwen3.5-MoE text model; comments give Qwen3.5-397B-A17B's values."""

    model_type: str  # qwen3_5_moe
    vocab_size: int  # 248,320 rows, of which 248,077 are real tokens
    hidden_size: int  # D = 4096
    num_hidden_layers: int  # 60
    num_attention_heads: int  # 32 query heads
    num_key_value_heads: int  # 2
    head_dim: int  # 256
    num_experts: int  # E = 512
    num_experts_per_tok: int  # K = 10
    moe_intermediate_size: int  # F = 1024
    shared_expert_intermediate_size: int  # 1024
    linear_num_key_heads: int  # 16
    linear_num_value_heads: int  # 64
    linear_key_head_dim: int  # 128
    linear_value_head_dim: int  # 128
    linear_conv_kernel_dim: int  # 4
    rope_theta: float  # 1e7
    partial_rotary_factor: float  # 0.25: the first 64 of 256 dimensions rotate
    rms_norm_eps: float  # 1e-6
    max_position_embeddings: int  # 262,144 tokens
    layer_types: tuple[str, ...]  # three linear_attention, one full_attention, ...
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()  # from config.json; the tokenizer adds more

    @property
    def rotary_dim(self) -> int:
        """Number of leading dimensions of a head that are rotated (even)."""
        return int(self.head_dim * self.partial_rotary_factor) // 2 * 2

    @property
    def key_dim(self) -> int:
        """Width of all linear-attention keys together: Hk x Dk."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of all linear-attention values together: Hv x Dv."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: queries, keys and values."""
        return 2 * self.key_dim + self.value_dim

    def is_linear(self, layer: int) -> bool:
        """True where the layer is a Gated DeltaNet, False where it is attention."""
        return self.layer_types[layer] == "linear_attention"

    def with_experts_per_token(self, k: int) -> "ModelConfig":
        """The same model with its routing budget cut to k.

        Raises: ConfigError unless 1 <= k <= the trained value; more was never trained.
        """
        if not is_whole(k, 1, self.num_experts_per_tok):
            raise ConfigError(
                f"k={k} is outside 1..{self.num_experts_per_tok}, "
                f"the number of experts per token that this model was trained with; "
                f"choose a value in that range"
            )
        return replace(self, num_experts_per_tok=int(k))

    @classmethod
    def from_json(cls, path: str | Path) -> "ModelConfig":
        """Read a config.json. Raises: ConfigError naming the file and the field."""
        return cls.from_dict(read_json(Path(path)), str(path))

    @classmethod
    def from_dict(cls, raw: dict, where: str = "config.json") -> "ModelConfig":
        """Build from the dict of a config.json, nested under text_config or flat.

        Raises: ConfigError for an unsupported model_type or a bad or missing field.
        """
        model_type = raw.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise ConfigError(
                f"{where}: model_type {model_type!r} is not supported; "
                f"supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
            )
        text = raw.get("text_config", raw)
        if not isinstance(text, dict):
            raise ConfigError(f"{where}: text_config must be an object; fix the file")
        fields = _read_sizes(text, where)
        fields.update(_read_rope(text, where))
        config = cls(
            model_type=model_type,
            rms_norm_eps=_number(text, "rms_norm_eps", where, default=1e-6),
            layer_types=_read_layer_types(text, fields["num_hidden_layers"], where),
            tie_word_embeddings=_read_tied(raw, text, where),
            eos_token_ids=_read_eos(raw, text, where),
            **fields,
        )
        _check_consistent(config, where)
        return config


_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "max_position_embeddings",
)
_LIMITS = {"num_hidden_layers": MAX_LAYERS, "num_experts": MAX_EXPERTS}


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises: ConfigError naming the file and the line."""
    text = read_text(path, ConfigError)
    if text is None:
        raise ConfigError(f"{path}: no such file; is this the folder of a model?")
    raw = parse_json(text, path, ConfigError)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold a JSON object, not {type(raw).__name__}")
    return raw


def _read_sizes(text: dict, where: str) -> dict[str, int]:
    sizes = {}
    for name in _SIZES:
        value = text.get(name)
        if type(value) is not int or value < 1:
            raise ConfigError(
                f"{where}: {name} must be a positive integer, got {value!r}"
            )
        limit = _LIMITS.get(name, MAX_SIZE)
        if value > limit:
            raise ConfigError(f"{where}: {name} is {value}, which is beyond {limit:,}")
        sizes[name] = value
    return sizes


def _read_tied(raw: dict, text: dict, where: str) -> bool:
    tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    if tied is not None and not isinstance(tied, bool):
        raise ConfigError(
            f"{where}: tie_word_embeddings must be true or false, got {tied!r}"
        )
    return bool(tied)


def _number(source: dict, name: str, where: str, default: float | None = None) -> float:
    value = source.get(name, default)
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"{where}: {name} must be a positive number, got {value!r}")
    return float(value)


def _read_rope(text: dict, where: str) -> dict[str, float]:
    # Libraries disagree on the default of rope_theta (1e4, 1e5), so there is none here.
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{where}: rope_parameters must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(
            f"{where}: rope type {kind!r} is not supported; only 'default' is"
        )
    merged = {**text, **rope}
    if "rope_theta" not in merged:
        raise ConfigError(
            f"{where}: rope_theta is missing, also from rope_parameters; "
            f"it cannot be guessed, take config.json from the model's publisher"
        )
    factor = _number(merged, "partial_rotary_factor", where)
    if factor > 1:
        raise ConfigError(
            f"{where}: partial_rotary_factor must be at most 1, got {factor}"
        )
    return {
        "rope_theta": _number(merged, "rope_theta", where),
        "partial_rotary_factor": factor,
    }


def _read_layer_types(text: dict, n_layers: int, where: str) -> tuple[str, ...]:
    types = text.get("layer_types")
    if types is None:
        interval = text.get("full_attention_interval", 4)
        if type(interval) is not int or interval < 1:
            raise ConfigError(
                f"{where}: full_attention_interval must be a positive integer, "
                f"got {interval!r}"
            )
        return tuple(LAYER_TYPES[(i + 1) % interval == 0] for i in range(n_layers))
    if (
        not isinstance(types, list)
        or len(types) != n_layers
        or any(t not in LAYER_TYPES for t in types)
    ):
        raise ConfigError(
            f"{where}: layer_types must list {n_layers} entries, each one of "
            f"{', '.join(LAYER_TYPES)}"
        )
    return tuple(types)


def _read_eos(raw: dict, text: dict, where: str) -> tuple[int, ...]:
    ids: list[int] = []
    for source in (raw, text):
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if type(token) is not int or token < 0:
                raise ConfigError(
                    f"{where}: eos_token_id must be token ids, got {value!r}"
                )
            ids.append(token)
    return tuple(dict.fromkeys(ids))


def _check_consistent(config: ModelConfig, where: str) -> None:
    checks = (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    )
    for many, few in checks:
        if getattr(config, many) % getattr(config, few):
            raise ConfigError(
                f"{where}: {many}={getattr(config, many)} is not a multiple of "
                f"{few}={getattr(config, few)}"
            )
    if config.num_experts_per_tok > config.num_experts:
        raise ConfigError(
            f"{where}: num_experts_per_tok={config.num_experts_per_tok} exceeds "
            f"num_experts={config.num_experts}"
        )
    if config.rotary_dim < 2:
        raise ConfigError(
            f"{where}: partial_rotary_factor={config.partial_rotary_factor} leaves "
            f"no dimension of head_dim={config.head_dim} to rotate"
        )


# --- presets of published models ------------------------------------------------------


def _published(
    model_type: str, layers: int, hidden: int, heads: int, value_heads: int, **other
) -> ModelConfig:
    defaults = {
        "vocab_size": 248_320,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262_144,
        "layer_types": tuple(LAYER_TYPES[(i + 1) % 4 == 0] for i in range(layers)),
    }
    return ModelConfig(
        model_type=model_type,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        linear_num_value_heads=value_heads,
        **{**defaults, **other},
    )


def _experts(count: int, per_token: int, width: int) -> dict[str, int]:
    return {
        "num_experts": count,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,  # equal in all published sizes
    }


_MOE = "qwen3_5_moe"
PRESETS = {
    "qwen3.5-397b-a17b": _published(_MOE, 60, 4096, 32, 64, **_experts(512, 10, 1024)),
    "qwen3.5-122b-a10b": _published(_MOE, 48, 3072, 32, 64, **_experts(256, 8, 1024)),
    "qwen3.5-35b-a3b": _published(_MOE, 40, 2048, 16, 32, **_experts(256, 8, 512)),
    "qwen3.6-35b-a3b": _published(_MOE, 40, 2048, 16, 32, **_experts(256, 8, 512)),
    "qwen3-next-80b-a3b": _published(
        "qwen3_next", 48, 2048, 16, 32, vocab_size=151_936, **_experts(512, 10, 512)
    ),
}


def preset(name: str) -> ModelConfig:
    """Configuration of a published model, by its lower-case name.

    Raises: ConfigError listing the known names.
    Source: the models' config.json files and their published parameter totals.
    """
    if name.lower() not in PRESETS:
        raise ConfigError(f"preset {name!r} is not known; known: {', '.join(PRESETS)}")
    return PRESETS[name.lower()]
