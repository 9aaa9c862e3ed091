"""How fast a machine decodes a model whose experts stay on disk: a cost model.

A token's time is a sum of parts that do not overlap, each a quantity of bytes over a
rate, or a count times a delay:

    other weights      dense bytes / (the share of memory bandwidth that is reached)
    experts computed   K experts of every layer / (the same)
    synchronisation    layers x (the delay until the router's answer is known)
    disk               misses x expert bytes / (the disk's rate at that size)
    page cache         hits outside of slots x expert bytes / (rate of a copy)
    paging             what does not fit in memory / (the disk's rate in pages)

Sizes come from headers; the six coefficients were fitted to published runs, see
`planner_fit.py`. **But:** disk and computation do not overlap, one text at a time; and
what engines make of the same machine differs by a factor of two.
*Taught in notebooks/12.*
"""

from dataclasses import dataclass, replace

import numpy as np

from .accounting import expert_bytes, matrix_bytes
from .config import PRESETS
from .errors import ConfigError
from .info import ModelFacts, facts_of_preset
from .machines import GB, MEMORY_GB, Machine

Values = float | np.ndarray

PARTS = (
    "other weights",
    "experts computed",
    "synchronisation",
    "disk",
    "page cache",
    "paging",
)
USABLE = 0.8  # of memory: the system and others keep the rest; Metal's limit is 0.78
PAGED = 0.12  # rate of 16 KiB reads to that of experts: slotstream, 2.04 / 17.25 GB/s
PROMPT_CHUNK = 512  # tokens that the engine takes at a time
PROMPT_REUSE = 8  # a prompt's token computes that much faster: a guess, never fitted
PREFILL_FACTOR = 2.5  # and its interval, both ways: a guess too


# --- what is planned for --------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """A model as the cost model sees it."""

    name: str
    n_layers: int  # with experts
    n_experts: int  # of each
    k: int  # of them for a token
    trained_k: int
    expert_bytes: float
    dense_bytes: float  # all other weights: they stay in memory
    read_bytes: float  # of those, what a token reads: not the embedding's other rows
    state_bytes: float = 0.0  # recurrent state, and keys and values of a short text

    @property
    def routed_bytes(self) -> float:
        """All experts."""
        return self.n_layers * self.n_experts * self.expert_bytes

    @property
    def bytes_per_token(self) -> float:
        """Experts of a token: what is read if none is in memory."""
        return self.n_layers * self.k * self.expert_bytes

    def with_k(self, k: int) -> "Sizes":
        """The same with K experts a token. Raises: ConfigError beyond the trained K."""
        if not 1 <= k <= self.trained_k:
            raise ConfigError(
                f"k={k} is outside 1..{self.trained_k}, what {self.name} was trained "
                f"with"
            )
        return replace(self, k=k)


CONTEXT = 4096  # tokens whose keys and values are counted


def sizes_of(facts: ModelFacts, bits: int | None = None) -> Sizes:
    """Sizes of a model from its headers; bits: as if its experts were requantized."""
    embedding = 0.0
    if not facts.config.tie_word_embeddings:
        (row,) = (c for c in facts.categories if c.name == "embeddings")
        embedding = row.n_bytes or matrix_bytes((1, row.parameters), 4)
    one = facts.expert_bytes if bits is None else expert_bytes(facts.config, bits)
    return Sizes(
        name=facts.name,
        n_layers=facts.config.num_hidden_layers,
        n_experts=facts.config.num_experts,
        k=facts.k,
        trained_k=facts.config.num_experts_per_tok,
        expert_bytes=one,
        dense_bytes=facts.dense_bytes,
        read_bytes=facts.dense_bytes - embedding,
        state_bytes=facts.state_bytes + CONTEXT * facts.kv_bytes_per_token,
    )


def sizes_of_preset(name: str, k: int | None = None, bits: int = 4) -> Sizes:
    """Sizes of a published model; below 4 bits only its experts shrink.

    Raises: ConfigError for an unknown name, K or width.
    """
    if name.lower() not in PRESETS:
        raise ConfigError(f"preset {name!r} is not known; known: {', '.join(PRESETS)}")
    return sizes_of(facts_of_preset(name, k, max(bits, 4)), bits)


@dataclass(frozen=True)
class Run:
    """One model on one machine; every field may be an array, then so is the result."""

    n_layers: Values
    picked_gb: Values  # experts of a token: layers x K x bytes
    routed_gb: Values  # all experts
    read_gb: Values  # other weights that a token reads
    resident_gb: Values  # what must be in memory
    memory_gb: Values  # of 10^9 bytes
    memory_gb_s: Values
    core_speed: Values
    disk_gb_s: Values
    disk_is_measured: Values  # bool
    on_gpu: Values  # bool
    slots_gb: Values = 0.0  # of a cache of its own; inf: whatever memory leaves
    page_cache: Values = True  # is what memory leaves a cache of the files?
    host_gb_s: Values = np.nan  # of the memory that caches files, if another
    matvec_gb_s: Values = np.nan  # if it was probed
    copy_gb_s: Values = np.nan


def run_of(
    sizes: Sizes, machine: Machine, slots_gb: float = 0.0, page_cache: bool = True
) -> Run:
    """Put a model on a machine. slots_gb: of slots, inf for all that memory leaves."""
    return Run(
        n_layers=sizes.n_layers,
        picked_gb=sizes.bytes_per_token / GB,
        routed_gb=sizes.routed_bytes / GB,
        read_gb=sizes.read_bytes / GB,
        resident_gb=(sizes.dense_bytes + sizes.state_bytes) / GB,
        memory_gb=machine.memory_gb * MEMORY_GB,
        memory_gb_s=machine.memory_gb_s,
        core_speed=machine.core_speed,
        disk_gb_s=machine.disk_gb_s,
        disk_is_measured=machine.disk_is_measured,
        on_gpu=machine.computes_on == "gpu",
        slots_gb=slots_gb,
        page_cache=page_cache,
        host_gb_s=machine.host_gb_s or np.nan,
        matvec_gb_s=machine.matvec_gb_s or np.nan,
        copy_gb_s=machine.copy_gb_s or np.nan,
    )


# --- the model ------------------------------------------------------------------------


@dataclass(frozen=True)
class Coefficients:
    """What the fit finds. Shares are of rates that data sheets promise."""

    gpu_share: float  # of memory bandwidth, reached by small matrix x vector products
    cpu_share: float
    sync_s: float  # for each layer, on a GPU, beside an M1's core
    disk_share: float  # of a quoted rate, where nobody measured expert-sized reads
    copy_share: float  # of memory bandwidth: copies out of the page cache
    hit_scale: float  # where the hit curve bends: smaller, more hits


def hit_rate(fraction: Values, working_set: Values, scale: float) -> Values:
    """Share of requested experts found in a cache that holds a fraction of them all.

    A cache that keeps what was used last finds nothing until it holds more than a
    token's working set, K / E of all. Beyond, a logarithm: each doubling adds about as
    much, and at fraction 1 everything is a hit. scale is where it bends.
    Source: fitted to published curves, `data/published_hits.csv`.
    """
    rest = np.maximum(1 - working_set, 1e-9)  # 0 where a token uses all experts
    beyond = np.where(fraction >= 1, 1.0, (fraction - working_set) / rest)
    beyond = np.clip(beyond, 0.0, 1.0)
    return np.log1p(beyond / scale) / np.log1p(1 / scale)


@dataclass(frozen=True)
class Split:
    """Where memory goes. GB, or arrays of them."""

    slots_gb: Values
    page_cache_gb: Values
    over_gb: Values  # wanted but not there: read again for every token


def split_memory(run: Run) -> Split:
    """Dense weights first, then slots; what is left caches files.

    The cliff: weights and slots beyond what memory holds go to and from the disk.
    """
    left = USABLE * np.asarray(run.memory_gb, float) - run.resident_gb
    slots = np.where(np.isinf(run.slots_gb), np.maximum(left, 0), run.slots_gb)
    slots = np.minimum(slots, run.routed_gb)
    page_cache = np.where(run.page_cache, np.maximum(left - slots, 0), 0.0)
    return Split(slots, page_cache, np.maximum(slots - left, 0))


def hit_rates(run: Run, scale: float) -> tuple[Values, Values]:
    """Shares of a token's experts that are in slots, and anywhere in memory."""
    split, k = split_memory(run), run.picked_gb / run.routed_gb
    cached = split.slots_gb + split.page_cache_gb
    in_slots = hit_rate(split.slots_gb / run.routed_gb, k, scale)
    return in_slots, hit_rate(cached / run.routed_gb, k, scale)


def token_seconds(run: Run, c: Coefficients) -> dict[str, Values]:
    """Seconds of one decoded token, by part: the lines at the top of this file."""
    in_slots, in_memory = hit_rates(run, c.hit_scale)
    compute, disk, copy = rates(run, c)
    return {
        "other weights": run.read_gb / compute,
        "experts computed": run.picked_gb / compute,
        "synchronisation": np.where(run.on_gpu, run.n_layers, 0)
        * (c.sync_s / run.core_speed),
        "disk": (1 - in_memory) * run.picked_gb / disk,
        "page cache": (in_memory - in_slots) * run.picked_gb / copy,
        "paging": split_memory(run).over_gb / (PAGED * disk),
    }


def rates(run: Run, c: Coefficients) -> tuple[Values, Values, Values]:
    """GB/s of weights computed, of misses read, of hits copied; probed where known."""
    share = np.where(run.on_gpu, c.gpu_share, c.cpu_share)
    compute = _known(run.matvec_gb_s, share * run.memory_gb_s)
    disk = np.where(run.disk_is_measured, 1.0, c.disk_share) * run.disk_gb_s
    host = _known(run.host_gb_s, run.memory_gb_s)  # a card's copies begin there
    copy = _known(run.copy_gb_s, c.copy_share * host)
    return compute, disk, copy


def _known(probed: Values, otherwise: Values) -> Values:
    return np.where(np.isnan(probed), otherwise, probed)


def tokens_per_second(run: Run, c: Coefficients) -> Values:
    """One over the sum of the parts."""
    return 1 / sum(token_seconds(run, c).values())


def disk_needed(run: Run, c: Coefficients, tok_s: float) -> float:
    """GB/s of expert-sized reads for so many tokens a second, one run (no arrays).

    Returns: 0 if nothing is missed; inf where the rest of a token takes too long.
    """
    parts = {name: float(part) for name, part in token_seconds(run, c).items()}
    missed_gb = (1 - float(hit_rates(run, c.hit_scale)[1])) * run.picked_gb
    rest_s = sum(parts.values()) - parts["disk"]
    left_s = 1 / tok_s - rest_s
    if parts["paging"] or left_s <= 0:
        return float("inf")
    return missed_gb / left_s


def prompt_seconds(run: Run, sizes: Sizes, n_tokens: int, c: Coefficients) -> float:
    """Seconds of a prompt, expert by expert: each is read once a chunk and layer.

    Nobody published enough of such runs to fit this: the bytes are exact, the
    arithmetic is a guess (PROMPT_REUSE).
    """
    compute, disk, _copy = (float(rate) for rate in rates(run, c))
    miss = 1 - float(hit_rates(run, c.hit_scale)[1])
    per_token = (run.read_gb + run.picked_gb) / compute / PROMPT_REUSE
    total = n_tokens * per_token
    for first in range(0, n_tokens, PROMPT_CHUNK):
        chunk = min(PROMPT_CHUNK, n_tokens - first)
        used = 1 - (1 - sizes.k / sizes.n_experts) ** chunk  # share of experts
        total += miss * used * run.routed_gb / disk
    return total


# --- with an interval -----------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """Tokens a second, and where the time goes."""

    tok_s: float
    low: float  # four of five published runs lie between these
    high: float
    parts_s: dict[str, float]
    hit_rate: float  # of experts, in memory

    @property
    def dominates(self) -> str:
        """The part that takes longest."""
        return max(self.parts_s, key=self.parts_s.get)


# Fitted by planner_fit.fit() to data/published.csv; tests/test_planner.py fits again.
FITTED = Coefficients(0.593, 0.258, 1.29e-3, 0.547, 0.091, 0.00283)
# Published over predicted, of sources that were held out: 10 % and 90 % quantiles.
SPREAD = (0.50, 1.60)


def predict(run: Run, c: Coefficients = FITTED, spread=SPREAD) -> Prediction:
    """Speed of decoding with its interval, for one run (no arrays)."""
    parts = {name: float(part) for name, part in token_seconds(run, c).items()}
    tok_s = 1 / sum(parts.values())
    hits = float(hit_rates(run, c.hit_scale)[1])
    return Prediction(tok_s, tok_s * spread[0], tok_s * spread[1], parts, hits)
