"""A toy Mixture-of-Experts layer in NumPy, and a task whose structure it can discover.

The layer is the model's own: `route_topk`, `expert_mlp` and `shared_expert` of
`layers.py`, at a width of 8. The task: every input comes from one of several clusters,
and each cluster has its own map to the target, so that an expert for each cluster would
be ideal. No label says so. Follows Switch Transformers (arXiv 2101.03961) for the
balance loss. **But:** one layer, regression, float64; a language model's tokens form no
such clean clusters. *Taught in notebooks/01.*
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .errors import ConfigError
from .layers import expert_mlp, linear, route_topk, shared_expert, softmax

Weights = dict[str, np.ndarray]  # by the names of `layers.py`; experts are stacked

MATRICES = ("gate_proj", "up_proj", "down_proj")
ROUTER_SCALE = 0.1  # first logits are small: every expert starts with a similar chance
IDLE_SHARE = 0.1  # an expert is idle below this fraction of an equal share


@dataclass(frozen=True)
class ToySizes:
    """The toy's shape. In brackets what Qwen3.5-397B has."""

    width: int = 8  # D [4,096]
    n_experts: int = 16  # E [512]
    k: int = 4  # K [10]
    expert_width: int = 8  # F [1,024]
    shared_width: int = 4  # F of the shared expert [1,024]


# --- the task -------------------------------------------------------------------------


class Batch(NamedTuple):
    """Tokens with what is wanted of them, and the cluster that nobody tells."""

    x: np.ndarray  # (T, D)
    target: np.ndarray  # (T, D)
    cluster: np.ndarray  # (T,) int


@dataclass(frozen=True)
class Task:
    """Clusters of inputs, each with its own linear map."""

    centres: np.ndarray  # (C, D)
    maps: np.ndarray  # (C, D, D), orthogonal

    def draw(self, rng: np.random.Generator, n_tokens: int) -> Batch:
        """Draw tokens: a centre plus noise of unit variance; the target maps the noise.

        A constant target 0 has mean squared error 1, the most that a layer should make.
        """
        cluster = rng.integers(len(self.centres), size=n_tokens)
        noise = rng.standard_normal((n_tokens, self.centres.shape[1]))
        target = np.einsum("tij,tj->ti", self.maps[cluster], noise)
        return Batch(self.centres[cluster] + noise, target, cluster)


def make_task(
    seed: int,
    width: int = 8,
    n_clusters: int = 8,
    distance: float = 4.0,
    common: float = 6.0,
) -> Task:
    """A random task.

    Centres lie `distance` from their common middle, at right angles to one another; the
    middle lies `common` from the origin. Inputs of a language model's routers share
    a (smaller) part too, and it is what makes a router start out lopsided.
    Raises: ConfigError for more clusters than dimensions.
    """
    if not 1 <= n_clusters <= width:
        raise ConfigError(
            f"n_clusters={n_clusters} is not in 1..{width}: centres at right angles "
            "need a dimension each; raise width or lower n_clusters"
        )
    rng = np.random.default_rng(seed)
    middle = rng.standard_normal(width)
    centres = distance * _orthogonal(rng, width)[:n_clusters]
    centres = centres + common * middle / np.linalg.norm(middle)
    return Task(centres, np.stack([_orthogonal(rng, width) for _ in range(n_clusters)]))


def _orthogonal(rng: np.random.Generator, n: int) -> np.ndarray:
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return q * np.sign(np.diag(r))  # the sign that LAPACK picks is not fixed


# --- the layer ------------------------------------------------------------------------


def init_weights(seed: int, sizes: ToySizes) -> Weights:
    """Random weights.

    Shapes: gate (E, D); gate_proj and up_proj (E, F, D), down_proj (E, D, F); for the
    shared expert the names and shapes of `layers.shared_expert`.
    """
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape) / shape[-1] ** 0.5

    d, e, f, s = sizes.width, sizes.n_experts, sizes.expert_width, sizes.shared_width
    return {
        "gate": ROUTER_SCALE * matrix(e, d),
        "gate_proj": matrix(e, f, d),
        "up_proj": matrix(e, f, d),
        "down_proj": matrix(e, d, f),
        "shared_gate_proj": matrix(s, d),
        "shared_up_proj": matrix(s, d),
        "shared_down_proj": matrix(d, s),
        "shared_expert_gate": matrix(1, d),
    }


def route(x: np.ndarray, w: Weights, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Score all experts and pick k. Shapes: x (T, D) -> experts, weights (T, k)."""
    return route_topk(linear(x, w["gate"]), k)


def expert_outputs(x: np.ndarray, w: Weights, experts: np.ndarray) -> np.ndarray:
    """What each chosen expert answers, before weighting.

    Shapes: x (T, D), experts (T, k) -> (T, k, D). Goes expert by expert, as the engine
    does with a prompt.
    """
    outputs = np.empty((*experts.shape, x.shape[1]), x.dtype)
    for e in np.unique(experts):
        tokens, ranks = np.nonzero(experts == e)
        outputs[tokens, ranks] = expert_mlp(
            x[tokens], *(w[name][e] for name in MATRICES)
        )
    return outputs


def moe(
    x: np.ndarray, w: Weights, experts: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The layer: the shared expert, plus chosen experts in proportion to their weights.

    Shapes: x (T, D), experts and weights (T, k) -> (T, D). Weights need not sum to 1.
    """
    mixed = np.einsum("tk,tkd->td", weights, expert_outputs(x, w, experts))
    return shared_expert(x, w) + mixed


def cut(weights: np.ndarray, k: int, renormalise: bool) -> np.ndarray:
    """Keep the first k of a token's weights.

    Shapes: weights (T, K), best first, rows sum to 1 -> (T, k). Renormalised, rows sum
    to 1 again, which is what `route_topk` with a smaller k gives.
    """
    kept = weights[:, :k]
    return kept / kept.sum(axis=-1, keepdims=True) if renormalise else kept


# --- what to measure ------------------------------------------------------------------


def squared_error(y: np.ndarray, target: np.ndarray) -> float:
    """Mean over tokens and dimensions."""
    return float(np.mean((y - target) ** 2))


def expert_load(experts: np.ndarray, n_experts: int) -> np.ndarray:
    """Each expert's share of all assignments. Shapes: experts (T, k) -> (E,), sum 1."""
    return np.bincount(experts.ravel(), minlength=n_experts) / experts.size


def balance_loss(logits: np.ndarray, k: int) -> float:
    """How unevenly experts are used: 1 if evenly, up to E / k if k experts do it all.

    E times the sum, over experts, of load times mean probability.
    Shapes: logits (T, E).
    Source: Switch Transformers, eq. 4. DIFFERS: with k experts a token, load is the
    share of T k assignments, so that even use gives 1 for every k.
    """
    experts, _ = route_topk(logits, k)
    n_experts = logits.shape[-1]
    load = expert_load(experts, n_experts)
    return float(n_experts * np.sum(load * softmax(logits).mean(axis=0)))


def effective_experts(load: np.ndarray) -> float:
    """exp(entropy) of the load: E if all are used alike, 1 if one does everything."""
    used = load[load > 0]
    return float(np.exp(-np.sum(used * np.log(used))))


def count_idle(load: np.ndarray) -> int:
    """Experts with less than a tenth of an equal share."""
    return int(np.sum(load < IDLE_SHARE / len(load)))


class Score(NamedTuple):
    """How well a trained toy does, and how evenly it uses its experts."""

    error: float  # mean squared error
    effective: float  # experts in use
    idle: int  # experts with almost no tokens
    balance: float  # the balance loss


def score(w: Weights, batch: Batch, k: int) -> Score:
    """Measure a layer on tokens, with k experts a token."""
    logits = linear(batch.x, w["gate"])
    experts, weights = route_topk(logits, k)
    load = expert_load(experts, logits.shape[-1])
    error = squared_error(moe(batch.x, w, experts, weights), batch.target)
    balance = balance_loss(logits, k)
    return Score(error, effective_experts(load), count_idle(load), balance)


def weight_by_cluster(
    experts: np.ndarray, weights: np.ndarray, cluster: np.ndarray, n_experts: int
) -> np.ndarray:
    """Mean weight that each expert has in each cluster's tokens.

    Shapes: experts and weights (T, k), cluster (T,) -> (E, C); columns sum to 1 if the
    tokens' weights do. A cluster without tokens has a column of nan.
    """
    n_clusters = int(cluster.max()) + 1
    total = np.zeros((n_experts, n_clusters))
    np.add.at(total, (experts, cluster[:, None]), weights)
    n_tokens = np.bincount(cluster, minlength=n_clusters)
    with np.errstate(invalid="ignore"):
        return total / n_tokens


def best_scale(kept: np.ndarray, whole: np.ndarray) -> float:
    """The one factor s with which s * kept comes closest to whole (least squares)."""
    return float(np.sum(kept * whole) / np.sum(kept * kept))
