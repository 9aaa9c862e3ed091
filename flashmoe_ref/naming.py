"""Names of tensors in published checkpoints -> one canonical naming.

Canonical names drop every prefix and call the routed experts `mlp.experts`:
`layers.3.mlp.experts.down_proj.weight`. Follows the names that transformers and mlx-lm
write. **But:** only the text models of `config.SUPPORTED_MODEL_TYPES` are known.
*Taught in notebooks/06.*
"""

import re
from pathlib import Path

import numpy as np

from .config import ModelConfig
from .errors import CheckpointError
from .headers import TensorInfo

PACKED_FOLDER = "packed_experts"  # see experts.py
_PREFIXES = (
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "model.",
)
_SKIPPED = re.compile(
    r"^(model\.|language_model\.|language_model\.model\.)?"
    r"(visual|vision_tower|multi_modal_projector|mtp)\."
)
_KNOWN = re.compile(
    r"^((embed_tokens|lm_head)\.(weight|scales|biases)|norm\.weight"
    r"|layers\.\d+\.("
    r"(input_layernorm|post_attention_layernorm)\.weight"
    r"|linear_attn\.((in_proj_(qkv|z|b|a|qkvz|ba)|out_proj)\.(weight|scales|biases)"
    r"|conv1d\.weight|norm\.weight|A_log|dt_bias)"
    r"|self_attn\.([qkvo]_proj\.(weight|scales|biases)|[qk]_norm\.weight)"
    r"|mlp\.(gate|shared_expert_gate)\.(weight|scales|biases)"
    r"|mlp\.shared_expert\.(gate|up|down)_proj\.(weight|scales|biases)"
    r"|mlp\.experts\.(gate_up_proj|down_proj)"
    r"|mlp\.experts\.(\d+\.)?(gate|up|down)_proj\.(weight|scales|biases)"
    r"))$"
)


def canonical_name(name: str, where: Path) -> str | None:
    """Canonical name of a tensor; None for the vision tower and the prediction head.

    Raises: CheckpointError for a tensor that no supported architecture has: it would
    change the result, so the model must not run without it.
    """
    if _SKIPPED.match(name):
        return None
    short = name
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            short = name[len(prefix) :]
            break
    short = short.replace(".mlp.switch_mlp.", ".mlp.experts.")
    if not _KNOWN.match(short):
        raise CheckpointError(
            f"{where}: tensor {name!r} belongs to no supported architecture; "
            f"is the model_type in config.json right?"
        )
    return short


def find_layout(path: Path, found: dict[str, TensorInfo]) -> str:
    """Which layout the routed experts are in: hf, hf-per-expert, mlx, or packed.

    Packed: none in the shards, but there is a folder of packed experts beside them.
    Raises: CheckpointError if there are no experts, or layouts are mixed.
    """
    kinds = {
        "hf": re.compile(r"experts\.(gate_up_proj|down_proj)$"),
        "hf-per-expert": re.compile(r"experts\.\d+\.\w+\.weight$"),
        "mlx": re.compile(r"experts\.(gate|up|down)_proj\.weight$"),
    }
    seen = [
        layout
        for layout, pattern in kinds.items()
        if any(pattern.search(name) for name in found)
    ]
    if not seen and (path / PACKED_FOLDER).is_dir():
        return "packed"
    if not seen:
        raise CheckpointError(
            f"{path}: holds no routed experts; it is no Mixture-of-Experts model, "
            f"or its shards are incomplete"
        )
    if len(seen) > 1:
        raise CheckpointError(f"{path}: mixes the layouts {' and '.join(seen)}")
    return seen[0]


def next_projection_rows(
    config: ModelConfig, module: str, found: dict[str, TensorInfo]
) -> tuple[str, np.ndarray | None]:
    """Where a linear-attention projection is stored: its module, and which of its rows.

    Qwen3-Next fuses q, k, v, z and b, a, grouped by key head; the rows undo it. Every
    other module is stored as it is, and rows is None.
    Source: transformers `Qwen3NextGatedDeltaNet.fix_query_key_value_ordering`.
    """
    stem, _, name = module.rpartition("in_proj_")
    fused = {"qkv": "qkvz", "z": "qkvz", "b": "ba", "a": "ba"}.get(name)
    if not stem or fused is None or f"{stem}in_proj_{fused}.weight" not in found:
        return module, None
    return f"{stem}in_proj_{fused}", _fused_rows(config, name)


def _fused_rows(config: ModelConfig, name: str) -> np.ndarray:
    n_heads, dk = config.linear_num_key_heads, config.linear_key_head_dim
    ratio = config.linear_num_value_heads // n_heads
    dv = ratio * config.linear_value_head_dim
    if name in "ba":
        grid = np.arange(n_heads * 2 * ratio).reshape(n_heads, 2 * ratio)
        half = slice(0, ratio) if name == "b" else slice(ratio, None)
        return grid[:, half].ravel()
    grid = np.arange(n_heads * 2 * (dk + dv)).reshape(n_heads, -1)  # (Hk, q|k|v|z)
    q, k, v, z = np.split(grid, [dk, 2 * dk, 2 * dk + dv], axis=1)
    if name == "z":
        return z.ravel()
    return np.concatenate([q.ravel(), k.ravel(), v.ravel()])
