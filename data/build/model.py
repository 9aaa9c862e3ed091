"""The reduced model's shape, its balancing loss, and affine quantization in torch.

The model is Hugging Face's own Qwen3_5MoeForCausalLM, unchanged, with small numbers:
three Gated DeltaNet layers to one gated-attention layer, 128 experts, ten a token.
"""

from collections.abc import Iterable

import torch
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import (
    Qwen3_5MoeTextConfig,
)
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeForCausalLM

SHAPE = {
    "vocab_size": 6144,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 128,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
ROPE = {
    "rope_type": "default",
    "rope_theta": 10_000_000.0,
    "partial_rotary_factor": 0.25,  # 16 of 64 dimensions turn
    "mrope_section": [3, 3, 2],
    "mrope_interleaved": True,
}


def make_config(end_id: int, turn_end_id: int, **changes: int) -> Qwen3_5MoeTextConfig:
    """The model's configuration; `changes` override SHAPE for a dry run."""
    return Qwen3_5MoeTextConfig(
        **(SHAPE | changes),
        rope_parameters=ROPE,
        eos_token_id=turn_end_id,
        pad_token_id=end_id,
        bos_token_id=None,
    )


def make_model(
    config: Qwen3_5MoeTextConfig, device: str, seed: int = 0
) -> Qwen3_5MoeForCausalLM:
    """A fresh model: bfloat16 and grouped expert products on a GPU, else float32."""
    torch.manual_seed(seed)
    on_gpu = device == "cuda"
    model = Qwen3_5MoeForCausalLM(config)
    model = model.to(device, torch.bfloat16 if on_gpu else torch.float32)
    model.set_experts_implementation("grouped_mm" if on_gpu else "eager")
    return model


def set_k(model: Qwen3_5MoeForCausalLM, k: int) -> None:
    """Route every token to k experts; their weights are renormalised to one."""
    for layer in model.model.layers:
        layer.mlp.gate.top_k = k


class RouterLog:
    """Collects each layer's router logits of one forward pass, while `on`."""

    def __init__(self, model: Qwen3_5MoeForCausalLM) -> None:
        self.on, self.logits = False, []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._keep)

    def _keep(self, module, inputs, outputs) -> None:
        if self.on:
            self.logits.append(outputs[0])

    def take(self) -> list[torch.Tensor]:
        """The logits collected so far, (tokens, experts) a layer; forgets them."""
        taken, self.logits = self.logits, []
        return taken


def balance_loss(logits: Iterable[torch.Tensor], k: int) -> torch.Tensor:
    """Load-balancing loss, mean over layers; its minimum is k.

    E * sum_e f_e p_e: f_e the experts' shares of the tokens (they sum to k), p_e the
    mean router probabilities.
    DIFFERS: Hugging Face pools f and p over all layers before the product, so that one
    layer's imbalance can hide behind another's.
    """
    losses = []
    for layer in logits:
        probabilities = layer.float().softmax(-1)
        chosen = probabilities.topk(k, -1).indices.reshape(-1)
        counts = torch.zeros(layer.shape[1], device=layer.device)
        counts.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=counts.dtype))
        shares = counts / layer.shape[0]
        losses.append(layer.shape[1] * (shares * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


# -- quantization, as MLX does it (flashmoe_ref/quantize.py explains it) ---------------
def quantize(
    weights: torch.Tensor, bits: int, rule: str = "mlx", group: int = 64
) -> torch.Tensor:
    """Quantize and dequantize along the last axis; scales and biases in bfloat16.

    rule: "mlx" makes the end of larger magnitude and zero exact; "minmax" maps the
    smallest value to 0 and the largest to 2^bits - 1.
    """
    x = weights.float().reshape(*weights.shape[:-1], -1, group)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    n = 2**bits - 1
    scale = ((high - low) / n).clamp_min(1e-7)
    bias = low
    if rule == "mlx":
        from_low = low.abs() > high.abs()
        scale = torch.where(from_low, scale, -scale)
        edge = torch.where(from_low, low, high)
        steps = torch.round(edge / scale)
        nonzero = steps != 0
        safe = torch.where(nonzero, steps, torch.ones_like(steps))
        scale = torch.where(nonzero, edge / safe, scale)
        bias = torch.where(nonzero, edge, torch.zeros_like(edge))
    codes = torch.round((x - bias) / scale).clamp(0, n)
    kept = codes * scale.bfloat16().float() + bias.bfloat16().float()
    return kept.reshape(weights.shape).to(weights.dtype)
