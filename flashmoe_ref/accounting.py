"""Exact accounting: every parameter and every byte of a model, from its configuration.

Follows the module shapes of Hugging Face's `modeling_qwen3_5_moe.py` and the storage of
MLX checkpoints (affine quantization with a 16-bit scale and bias per group).
**But:** the vision tower and the multi-token-prediction head are not counted.
*Taught in notebooks/04.*
"""

import math
from dataclasses import dataclass

from .config import ModelConfig

FLOAT_BYTES = 2  # bf16, also for the scale and the bias of a group
A_LOG_BYTES = 4  # the 397B stores A_log in float32

# One-dimensional and convolution weights stay in floating point.
UNQUANTIZED = ("norm", "layernorm", "conv1d", "A_log", "dt_bias")


def module_shapes(config: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shape of every weight by category and canonical name; experts once per layer.

    Matrices are (out, in) and routed experts (E, out, in), as files store them.
    Source: `modeling_qwen3_5_moe.py` in Hugging Face transformers (module shapes).
    """
    d, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "embeddings": {"embed_tokens": (vocab, d)},
        "lm_head": {} if config.tie_word_embeddings else {"lm_head": (vocab, d)},
        "norms": {"norm": (d,)},
    }
    for layer in range(config.num_hidden_layers):
        for category, modules in _layer_shapes(config, layer).items():
            named = {f"layers.{layer}.{name}": s for name, s in modules.items()}
            shapes.setdefault(category, {}).update(named)
    return shapes


def _layer_shapes(config: ModelConfig, layer: int) -> dict[str, dict[str, tuple]]:
    d, e, f = config.hidden_size, config.num_experts, config.moe_intermediate_size
    shared = config.shared_expert_intermediate_size
    mixer = (
        {"gated delta nets": _delta_net_shapes(config)}
        if config.is_linear(layer)
        else {"full attention": _attention_shapes(config)}
    )
    return mixer | {
        "routers": {"mlp.gate": (e, d)},
        "shared experts": {
            "mlp.shared_expert.gate_proj": (shared, d),
            "mlp.shared_expert.up_proj": (shared, d),
            "mlp.shared_expert.down_proj": (d, shared),
        },
        "shared gates": {"mlp.shared_expert_gate": (1, d)},
        "routed experts": {
            "mlp.experts.gate_proj": (e, f, d),
            "mlp.experts.up_proj": (e, f, d),
            "mlp.experts.down_proj": (e, d, f),
        },
        "norms": {"input_layernorm": (d,), "post_attention_layernorm": (d,)},
    }


def _delta_net_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    d, heads = config.hidden_size, config.linear_num_value_heads
    return {
        "linear_attn.in_proj_qkv": (config.conv_dim, d),
        "linear_attn.in_proj_z": (config.value_dim, d),
        "linear_attn.in_proj_b": (heads, d),
        "linear_attn.in_proj_a": (heads, d),
        "linear_attn.out_proj": (d, config.value_dim),
        "linear_attn.conv1d": (config.conv_dim, config.linear_conv_kernel_dim),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm": (config.linear_value_head_dim,),
    }


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    d, dh = config.hidden_size, config.head_dim
    q_dim, kv_dim = config.num_attention_heads * dh, config.num_key_value_heads * dh
    return {
        "self_attn.q_proj": (2 * q_dim, d),  # query and output gate, head by head
        "self_attn.k_proj": (kv_dim, d),
        "self_attn.v_proj": (kv_dim, d),
        "self_attn.o_proj": (d, q_dim),
        "self_attn.q_norm": (dh,),
        "self_attn.k_norm": (dh,),
    }


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the text model, by category."""

    by_category: dict[str, int]
    per_expert: int  # gate, up and down projection of one routed expert
    num_hidden_layers: int
    num_experts_per_tok: int

    @property
    def total(self) -> int:
        """All parameters of the text model."""
        return sum(self.by_category.values())

    @property
    def routed(self) -> int:
        """Parameters of all routed experts: what streaming leaves on disk."""
        return self.by_category["routed experts"]

    @property
    def dense(self) -> int:
        """Parameters that every token needs: what streaming keeps in memory."""
        return self.total - self.routed

    def active(self, k: int | None = None) -> int:
        """Parameters that one token touches with k experts a layer (or as trained)."""
        k = self.num_experts_per_tok if k is None else k
        return self.dense + self.num_hidden_layers * k * self.per_expert


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count every parameter of the text model, exactly.

    Source: shapes as in `module_shapes`; agrees with Hugging Face's module totals.
    """
    by_category = {
        category: sum(math.prod(shape) for shape in modules.values())
        for category, modules in module_shapes(config).items()
    }
    return ParameterCount(
        by_category=by_category,
        per_expert=3 * config.moe_intermediate_size * config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_experts_per_tok=config.num_experts_per_tok,
    )


def matrix_bytes(shape: tuple[int, ...], bits: int, group_size: int = 64) -> int:
    """Bytes of a (..., out, in) matrix stored with `bits` per weight.

    16 bits means bf16 without groups; fewer adds a bf16 scale and bias per group.
    """
    n = math.prod(shape)
    if bits == 16:
        return n * FLOAT_BYTES
    return n * bits // 8 + n // group_size * 2 * FLOAT_BYTES


def expert_bytes(config: ModelConfig, bits: int, group_size: int = 64) -> int:
    """Bytes of one routed expert: what one cache miss reads."""
    shape = (3 * config.moe_intermediate_size, config.hidden_size)
    return matrix_bytes(shape, bits, group_size)


def dense_bytes(
    config: ModelConfig, bits: int, group_size: int = 64, router_bits: int | None = None
) -> int:
    """Bytes of everything but the routed experts.

    router_bits: bits of the router and the shared expert's gate, where they differ
    (MLX converts them at 8 bits by default).
    """
    total = 0
    for category, modules in module_shapes(config).items():
        if category == "routed experts":
            continue
        own_bits = router_bits if category in ("routers", "shared gates") else None
        for name, shape in modules.items():
            total += _module_bytes(name, shape, own_bits or bits, group_size)
    return total


def _module_bytes(name: str, shape: tuple[int, ...], bits: int, group_size: int) -> int:
    if name.endswith("A_log"):
        return math.prod(shape) * A_LOG_BYTES
    if name.endswith(UNQUANTIZED):
        return math.prod(shape) * FLOAT_BYTES
    return matrix_bytes(shape, bits, group_size)


def kv_cache_bytes(config: ModelConfig, n_tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes of the keys and values of all full-attention layers after n_tokens."""
    n_layers = config.layer_types.count("full_attention")
    per_layer = 2 * config.num_key_value_heads * config.head_dim * bytes_per_value
    return n_tokens * n_layers * per_layer


def delta_state_bytes(config: ModelConfig) -> int:
    """Bytes of all recurrent states: float32 S (Hv, Dv, Dk) and the bf16 conv tail.

    Does not grow with the number of tokens.
    """
    n_layers = config.layer_types.count("linear_attention")
    s = config.value_dim * config.linear_key_head_dim * 4
    tail = (config.linear_conv_kernel_dim - 1) * config.conv_dim * FLOAT_BYTES
    return n_layers * (s + tail)
