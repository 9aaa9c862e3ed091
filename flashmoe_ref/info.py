"""What a model is and what it needs, from its headers alone: `flashmoe info`.

Takes a model's folder, or the name of a published model, whose sizes then follow from
its configuration. **But:** counts bytes, predicts no speed; that is lesson 12.
*Taught in notebooks/04 and 06.*
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from .accounting import (
    count_parameters,
    delta_state_bytes,
    dense_bytes,
    expert_bytes,
    kv_cache_bytes,
    module_shapes,
)
from .checkpoint import Checkpoint
from .config import PRESETS, ModelConfig, preset
from .errors import ConfigError
from .experts import experts_in_place
from .quantize import BITS, GROUP_SIZES

ROUTED = "routed experts"
ORDER = (
    "embeddings",
    "norms",
    "gated delta nets",
    "full attention",
    "routers",
    "routed experts",
    "shared experts",
    "shared gates",
    "lm_head",
)
ROUTER_BITS = 8  # what mlx-lm gives routers and shared gates, whatever the rest gets


@dataclass(frozen=True)
class Category:
    """One kind of weights. Bits and bytes are None where only their total is known."""

    name: str
    parameters: int
    n_bytes: int | None
    bits: str


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model, as stored or as it would be stored. All sizes in bytes."""

    name: str
    config: ModelConfig
    layout: str
    n_files: int
    categories: tuple[Category, ...]
    k: int
    expert_bytes: float  # of one expert, the mean where layers differ
    n_reads: float  # positioned reads for one expert
    dense_bytes: int
    routed_bytes: int
    state_bytes: int
    kv_bytes_per_token: int

    @property
    def parameters(self) -> int:
        """All parameters of the text model."""
        return sum(category.parameters for category in self.categories)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token touches at k."""
        return count_parameters(self.config).active(self.k)

    @property
    def experts_per_token(self) -> int:
        """Experts that one token needs, over all layers."""
        return self.config.num_hidden_layers * self.k

    @property
    def bytes_per_token(self) -> int:
        """Bytes of experts that one token needs: what is read if none is in memory."""
        return round(self.experts_per_token * self.expert_bytes)

    @property
    def slot_bytes(self) -> int:
        """Memory for the k experts of one layer: the least that streaming takes."""
        return round(self.k * self.expert_bytes)

    def as_dict(self) -> dict:
        """For JSON: everything, the derived figures too."""
        derived = ("parameters", "active_parameters", "experts_per_token")
        derived += ("bytes_per_token", "slot_bytes")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def facts_of_folder(path: str | Path, k: int | None = None) -> ModelFacts:
    """Facts of a checkpoint on disk; reads config.json and headers only.

    Raises: ConfigError, CheckpointError.
    """
    checkpoint = Checkpoint.open(path)
    config = _with_k(checkpoint.config, k)
    experts = experts_in_place(checkpoint)
    n_layers = len(experts.formats)
    routed = experts.n_bytes
    return ModelFacts(
        name=str(path),
        config=checkpoint.config,
        layout=checkpoint.layout,
        n_files=len({info.file for info in checkpoint.tensors.values()}),
        categories=tuple(_stored_categories(checkpoint)),
        k=config.num_experts_per_tok,
        expert_bytes=routed / n_layers / experts.n_experts,
        n_reads=sum(len(runs) for runs in experts.runs) / n_layers,
        dense_bytes=checkpoint.dense_bytes,
        routed_bytes=routed,
        state_bytes=delta_state_bytes(config),
        kv_bytes_per_token=kv_cache_bytes(config, 1, bytes_per_value=4),
    )


def facts_of_preset(
    name: str, k: int | None = None, bits: int = 4, group_size: int = 64
) -> ModelFacts:
    """Facts of a published model, as mlx-lm would store it with so many bits.

    Raises: ConfigError for an unknown name, K, width or group.
    """
    if bits not in (*BITS, 16) or group_size not in GROUP_SIZES:
        raise ConfigError(
            f"{bits} bits in groups of {group_size} is not a format; bits are one of "
            f"{(*BITS, 16)}, groups one of {GROUP_SIZES}"
        )
    trained = preset(name)
    config = _with_k(trained, k)
    counts = count_parameters(config)
    one = expert_bytes(config, bits, group_size)
    return ModelFacts(
        name=name.lower(),
        config=trained,
        layout=f"as stored with {bits} bits, group {group_size}",
        n_files=0,
        categories=tuple(
            Category(kind, counts.by_category[kind], None, "")
            for kind in _in_order(counts.by_category)
        ),
        k=config.num_experts_per_tok,
        expert_bytes=one,
        n_reads=9 if bits != 16 else 3,
        dense_bytes=dense_bytes(
            config, bits, group_size, ROUTER_BITS if bits != 16 else None
        ),
        routed_bytes=config.num_hidden_layers * config.num_experts * one,
        state_bytes=delta_state_bytes(config),
        kv_bytes_per_token=kv_cache_bytes(config, 1),
    )


def facts(model: str | Path, k: int | None, bits: int, group_size: int) -> ModelFacts:
    """Facts of a folder if there is one of this name, else of a published model."""
    if not Path(model).exists() and str(model).lower() in PRESETS:
        return facts_of_preset(str(model), k, bits, group_size)
    return facts_of_folder(model, k)


def _with_k(config: ModelConfig, k: int | None) -> ModelConfig:
    return config if k is None else config.with_experts_per_token(k)


def _stored_categories(checkpoint: Checkpoint) -> list[Category]:
    counts = count_parameters(checkpoint.config).by_category
    n_bytes = dict.fromkeys(counts, 0)
    widths: dict[str, set[str]] = {name: set() for name in counts}
    category_of = _category_of_module(checkpoint.config)
    for name, info in checkpoint.tensors.items():
        module = name.rsplit(".", 1)[0] if name not in category_of else name
        category = category_of.get(module) or _category_of_source(module)
        n_bytes[category] += info.n_bytes
        if module in checkpoint.quantization:
            widths[category].add(
                "{} bits, group {}".format(*checkpoint.quantization[module])
            )
        else:
            widths[category].add(str(info.dtype))
    return [
        Category(name, counts[name], n_bytes[name], "; ".join(sorted(widths[name])))
        for name in _in_order(counts)
    ]


def _in_order(categories: dict[str, int]) -> list[str]:
    """As a token meets them."""
    return sorted(categories, key=lambda name: (*ORDER, name).index(name))


def _category_of_module(config: ModelConfig) -> dict[str, str]:
    shapes = module_shapes(config)
    return {name: kind for kind, modules in shapes.items() for name in modules}


def _category_of_source(module: str) -> str:
    """For modules that a file holds in another cut: fused or one an expert."""
    return ROUTED if ".mlp.experts" in module else "gated delta nets"


def readable(facts: ModelFacts) -> str:
    """The facts as a table for people."""
    c = facts.config
    n_linear = c.layer_types.count("linear_attention")
    files = f", {facts.n_files} file{'s' * (facts.n_files != 1)}" * bool(facts.n_files)
    lines = [
        f"{facts.name}: {c.model_type}, {facts.layout}{files}",
        f"  {c.num_hidden_layers} layers ({n_linear} Gated DeltaNet, "
        f"{c.num_hidden_layers - n_linear} gated attention), width {c.hidden_size}, "
        f"vocabulary {c.vocab_size:,}",
        f"  {c.num_experts} experts a layer, {c.num_experts_per_tok} for a token as "
        f"trained, plus a shared one",
        "",
        *_weight_lines(facts),
        "",
        *_streaming_lines(facts),
    ]
    return "\n".join(lines)


def _weight_lines(facts: ModelFacts) -> list[str]:
    has_sizes = all(row.n_bytes is not None for row in facts.categories)
    total = Category(
        "total", facts.parameters, facts.dense_bytes + facts.routed_bytes, ""
    )
    lines = [f"  {'weights':18}{'parameters':>18}  {'share':>6}"]
    lines[0] += f"  {'size':>9}  stored as" * has_sizes
    for row in (*facts.categories, total):
        share = row.parameters / facts.parameters
        line = f"  {row.name:18}{row.parameters:18,}  {share:6.1%}"
        if has_sizes:
            line += f"  {in_bytes(row.n_bytes):>9}  {row.bits}"
        lines.append(line.rstrip())
    return lines


def _streaming_lines(facts: ModelFacts) -> list[str]:
    k, reads = facts.k, facts.experts_per_token * facts.n_reads
    return [
        f"  with K={k}, one token uses {facts.active_parameters:,} parameters "
        f"({facts.active_parameters / facts.parameters:.1%})",
        f"    and {facts.experts_per_token} experts of {in_bytes(facts.expert_bytes)}: "
        f"{in_bytes(facts.bytes_per_token)} in {reads:,.0f} reads in place, or "
        f"{facts.experts_per_token} packed",
        f"  streaming keeps in memory {in_bytes(facts.dense_bytes)} of other weights, "
        f"{in_bytes(facts.slot_bytes)} for {k} slots,",
        f"    {in_bytes(facts.state_bytes)} of recurrent state and "
        f"{in_bytes(facts.kv_bytes_per_token)} for every token of context,",
        f"    and leaves {in_bytes(facts.routed_bytes)} of experts on disk",
    ]


def in_bytes(n: float) -> str:
    """A size for people, in powers of ten: 7.08 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            break
        n /= 1000
    return f"{n:,.0f} {unit}" if unit == "bytes" else f"{n:,.{_decimals(n)}f} {unit}"


def _decimals(n: float) -> int:
    return 2 if n < 10 else 1 if n < 1000 else 0
