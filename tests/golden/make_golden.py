"""Make the golden files: tiny random checkpoints and what transformers computes.

For each of three published layouts this writes a checkpoint folder and, beside it, an
.npz file with the float32 logits of Hugging Face transformers. The tests compare our
engines with these files, so neither torch nor transformers' models are needed to test.

    python3 -m venv /tmp/golden
    /tmp/golden/bin/pip install torch==2.13.0 transformers==5.24.0
    /tmp/golden/bin/python tests/golden/make_golden.py

| folder | architecture, layout |
|---|---|
| qwen35_fused | Qwen3.5-MoE as released: fused experts, nested config, vision, mtp |
| qwen35_per_expert | the same as text-only, as save_pretrained writes it: two shards |
| qwen3_next | Qwen3-Next: one tensor per expert, fused in_proj_qkvz and in_proj_ba |

The weights are random, chosen so that every convention shows in the logits: norms far
from 0 and 1, decays from almost none to almost all, GQA, partial rotation, unequal
widths of everything. Weights are stored in bfloat16, rounded before the evaluation, so
float32 arithmetic on the stored values is exact about them.

Each .npz holds (T = 52 tokens = 40 of prompt + 12 decoded, V = 128):

    ids          (T,)           token ids, the input of all but the long pass
    full         (T, V)         logits of one pass over all tokens
    decode       (12, V)        logits of the last 12 tokens, one token at a time after
                                a pass over the 40 of the prompt
    chunked      (T, V)         logits of passes over 7 tokens each, state kept
    fewer        (T, V)         as full, with FEWER_EXPERTS per token in every layer
    hidden       (L + 1, T, D)  embeddings, then the residual stream after each layer
    long_ids     (135,)         a prompt of more than two 64-token chunks of the delta
    long         (135, V)       rule, and its logits
    margin       ()             smallest gap, in router logits, between the last expert
                                chosen and the first not chosen, in all of the above
    sensitivity  ()             largest change of `full` and `long` when every weight is
                                changed by one relative rounding error
    versions     ()             of torch, transformers, python, and the processor
"""

import json
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

HERE = Path(__file__).parent
PROMPT_TOKENS, DECODED_TOKENS, CHUNK, LONG_TOKENS = 40, 12, 7, 135
FEWER_EXPERTS = 2
REAL_IDS = 120  # of 128 rows; the others are padding, as in the published models
# Rounding moves router logits by about 1e-5: with a gap this wide, the same experts are
# chosen whatever the order of the sums, and the logits can be compared at all.
SMALLEST_MARGIN = 2e-4
# A norm divides by the length of its input, so rounding grows where that happens to be
# tiny. rms_norm_eps limits this, and prompts are chosen where one rounding error on
# every weight (2**-24, relative) moves no logit by more; the tests then allow 5e-5.
LARGEST_SENSITIVITY = 1.2e-5

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,  # quantizable in groups of 64 and of 32
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-3,  # the published 1e-6 would magnify rounding: see below
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 119,
}
QWEN35_FUSED = {
    **COMMON,
    "head_dim": 32,
    "num_experts": 6,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,  # two value heads to a key head
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000.0,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],  # of the 32 * 0.25 / 2 angles
    },
}
QWEN35_PER_EXPERT = {
    **COMMON,
    "head_dim": 16,
    "num_experts": 6,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,  # three value heads to a key head
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 100_000.0,
        "partial_rotary_factor": 0.5,
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
    },
}
QWEN3_NEXT = {
    **COMMON,
    "head_dim": 32,
    "num_experts": 5,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000.0,
        "partial_rotary_factor": 0.25,
    },
}
VISION = {  # the smallest tower that the class accepts; the engines must skip it
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 2,
    "num_position_embeddings": 4,
    "out_hidden_size": 64,
}


# --- random weights -------------------------------------------------------------------


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Replace every weight by a random one, rounded to bfloat16 but kept in float32."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        weight.data = rescale(name, values).bfloat16().float()


def rescale(name: str, normal: torch.Tensor) -> torch.Tensor:
    """Turn standard normal values into a weight of the kind that `name` says."""
    if name.endswith("A_log"):
        # Decay rates from 0.01 (the state lasts past 64 tokens) to 7 (gone in one).
        return torch.linspace(-4.6, 2.0, len(normal)) + 0.1 * normal
    if name.endswith("dt_bias"):
        return normal
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.3 * normal  # a plain weight, unlike the other norms
    if "norm" in name:
        return 0.3 * normal  # zero-centred: the model multiplies by 1 + weight
    if name.endswith("conv1d.weight"):
        # The first queries are so small that the 1e-6 in their normalisation shows.
        return 0.5 * normal * torch.linspace(0.02, 1, len(normal))[:, None, None]
    if name.endswith("embed_tokens.weight"):
        return normal
    gain = 1.0
    if name.endswith("mlp.gate.weight"):
        gain = 2.0  # clear preferences among the experts
    if name.endswith("lm_head.weight"):
        gain = 1.5  # logits of several
    return gain * normal / normal.shape[-1] ** 0.5


# --- checkpoints ----------------------------------------------------------------------


def make_fused(folder: Path) -> PreTrainedModel:
    """Qwen3.5-MoE as released. save_pretrained would write one tensor per expert."""
    config = Qwen3_5MoeConfig(text_config=QWEN35_FUSED, vision_config=VISION)
    model = Qwen3_5MoeForConditionalGeneration(config)
    randomise(model, seed=1)
    tensors = {
        # The 397B stores A_log in float32 and everything else in bfloat16.
        name: weight if name.endswith("A_log") else weight.bfloat16()
        for name, weight in model.state_dict().items()
    }
    tensors["mtp.fc.weight"] = torch.ones(64, 128).bfloat16()
    tensors["mtp.layers.0.input_layernorm.weight"] = torch.ones(64).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["Qwen3_5MoeForConditionalGeneration"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    return Qwen3_5MoeForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    )


def make_per_expert(folder: Path) -> PreTrainedModel:
    """Qwen3.5-MoE, text only, as save_pretrained writes it, with an index."""
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**QWEN35_PER_EXPERT))
    randomise(model, seed=2)
    model.bfloat16().save_pretrained(folder, max_shard_size="450KB")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make_next(folder: Path) -> PreTrainedModel:
    """Qwen3-Next as save_pretrained writes it."""
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**QWEN3_NEXT))
    randomise(model, seed=3)
    model.bfloat16().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


MAKERS: dict[str, Callable[[Path], PreTrainedModel]] = {
    "qwen35_fused": make_fused,
    "qwen35_per_expert": make_per_expert,
    "qwen3_next": make_next,
}


# --- what transformers computes -------------------------------------------------------


def text_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder layers, wherever the class keeps them."""
    return getattr(model.model, "language_model", model.model).layers


def run(model: PreTrainedModel, ids: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Logits (T, V) of passes over `sizes` tokens each, with the state kept between."""
    cache = DynamicCache(config=model.config.get_text_config())
    parts = torch.from_numpy(ids)[None].split(sizes, dim=1)
    logits = [model(part, cache=cache, use_cache=True).logits for part in parts]
    return torch.cat(logits, dim=1)[0].numpy()


def run_hidden(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """Embeddings and the residual stream after each layer, (L + 1, T, D)."""
    hidden: list[torch.Tensor] = []
    layers = text_layers(model)
    hooks = [
        layers[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0])),
        *(
            layer.register_forward_hook(lambda _, args, out: hidden.append(out))
            for layer in layers
        ),
    ]
    model(torch.from_numpy(ids)[None])
    for hook in hooks:
        hook.remove()
    return torch.cat(hidden).numpy()


@contextmanager
def experts_per_token(model: PreTrainedModel, k: int) -> Iterator[None]:
    """Let every router choose k experts for a while."""
    routers = [layer.mlp.gate for layer in text_layers(model)]
    trained = routers[0].top_k
    for router in routers:
        router.top_k = k
    yield
    for router in routers:
        router.top_k = trained


@contextmanager
def smallest_margin(model: PreTrainedModel, margins: list[float]) -> Iterator[None]:
    """Collect the smallest gap between chosen and left out experts of each pass."""

    def collect(router: torch.nn.Module, args: tuple, _: object) -> None:
        hidden = args[0].reshape(-1, router.weight.shape[1])
        best = (hidden @ router.weight.T).sort(dim=-1, descending=True).values
        gaps = best[:, router.top_k - 1] - best[:, router.top_k]
        margins.append(float(gaps.min()))

    hooks = [
        layer.mlp.gate.register_forward_hook(collect) for layer in text_layers(model)
    ]
    yield
    for hook in hooks:
        hook.remove()


@contextmanager
def every_weight_nudged(model: PreTrainedModel) -> Iterator[None]:
    """Multiply every weight by 1 +- one relative rounding error of float32."""
    generator = torch.Generator().manual_seed(0)
    exact = [weight.data.clone() for weight in model.parameters()]
    for weight in model.parameters():
        sign = torch.randn(weight.shape, generator=generator).sign()
        weight.data *= 1 + sign * 2.0**-24
    yield
    for weight, values in zip(model.parameters(), exact, strict=True):
        weight.data = values


def golden(model: PreTrainedModel, seed: int) -> dict[str, np.ndarray]:
    """All golden arrays of one model, for prompts drawn with `seed`."""
    rng = np.random.default_rng(seed)
    n_tokens = PROMPT_TOKENS + DECODED_TOKENS
    ids = rng.integers(0, REAL_IDS, n_tokens)
    long_ids = rng.integers(0, REAL_IDS, LONG_TOKENS)
    margins: list[float] = []
    with torch.no_grad(), smallest_margin(model, margins):
        arrays = {
            "ids": ids.astype(np.int32),
            "full": run(model, ids, [n_tokens]),
            "decode": run(model, ids, [PROMPT_TOKENS] + [1] * DECODED_TOKENS)[
                PROMPT_TOKENS:
            ],
            "chunked": run(model, ids, chunk_sizes(n_tokens)),
            "hidden": run_hidden(model, ids),
            "long_ids": long_ids.astype(np.int32),
            "long": run(model, long_ids, [LONG_TOKENS]),
        }
        with experts_per_token(model, FEWER_EXPERTS):
            arrays["fewer"] = run(model, ids, [n_tokens])
        with every_weight_nudged(model):
            moved = (run(model, ids, [n_tokens]), run(model, long_ids, [LONG_TOKENS]))
    arrays["margin"] = np.float32(min(margins))
    arrays["sensitivity"] = max(
        np.abs(nudged - arrays[name]).max()
        for name, nudged in zip(("full", "long"), moved, strict=True)
    )
    return arrays


def is_stable(arrays: dict[str, np.ndarray]) -> bool:
    """True where rounding cannot move the logits much: see the two constants."""
    return bool(
        arrays["margin"] >= SMALLEST_MARGIN
        and arrays["sensitivity"] <= LARGEST_SENSITIVITY
    )


def chunk_sizes(n_tokens: int) -> list[int]:
    """n_tokens in passes of CHUNK, the last one shorter."""
    sizes = [CHUNK] * (n_tokens // CHUNK)
    return [*sizes, n_tokens % CHUNK] if n_tokens % CHUNK else sizes


def versions() -> str:
    """What the golden values were made with."""
    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"python {platform.python_version()}, {platform.machine()}"
    )


def tidy(folder: Path) -> None:
    """Remove what is no part of a model; sort config.json for readable differences."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps(config, indent=1, sort_keys=True)
    (folder / "config.json").write_text(text + "\n")


def main() -> None:
    """Make everything, and print what a reader should check."""
    torch.set_num_threads(1)  # one order of sums, the same on every machine
    for name, make in MAKERS.items():
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model = make(folder).eval()
        tidy(folder)
        seed, arrays = next(
            (seed, arrays)
            for seed in range(100)
            if is_stable(arrays := golden(model, seed))
        )
        arrays["versions"] = np.array(versions())
        np.savez_compressed(HERE / f"{name}.npz", **arrays)
        report(name, seed, arrays)


def report(name: str, seed: int, arrays: dict[str, np.ndarray]) -> None:
    """Print sizes, and how far transformers differs from itself."""
    full = arrays["full"]
    files = [*(HERE / name).iterdir(), HERE / f"{name}.npz"]
    print(
        f"{name}: seed {seed}, {sum(f.stat().st_size for f in files) / 1e6:.2f} MB, "
        f"largest logit {np.abs(full).max():.1f}, margin {arrays['margin']:.1e}, "
        f"sensitivity {arrays['sensitivity']:.1e}, "
        f"decode - full {np.abs(arrays['decode'] - full[PROMPT_TOKENS:]).max():.1e}, "
        f"chunked - full {np.abs(arrays['chunked'] - full).max():.1e}, "
        f"fewer - full {np.abs(arrays['fewer'] - full).max():.1f}"
    )
    for file in files:
        n_tensors = len(load_file(file)) if file.suffix == ".safetensors" else ""
        print(f"    {file.name} {file.stat().st_size:,} bytes {n_tensors}")


if __name__ == "__main__":
    main()
