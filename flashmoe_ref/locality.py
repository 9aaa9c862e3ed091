"""Routing with the locality of a trained model, for models whose router is random.

A cache that evicts the least recently used expert finds an expert if fewer than its
slots others were used since. So the published share of hits at each size of such a
cache is the distribution of that distance; drawing distances from it gives picks that
any cache of that kind treats as it would the real ones. **But:** only recency is
imitated: which experts are used together, or often, is left to chance.
*Taught in notebooks/13.*
"""

import numpy as np

from .errors import ConfigError

# Share of a layer's experts in slots, and of picks found there, K = 10.
# Source: the LRU curve that boyle published for Qwen3.5-397B-A17B. Its trace was
# short: the last tenth are first uses, drawn here from the deepest places.
QWEN35_397B = (
    (0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.36, 0.45, 0.55, 0.64, 0.75),
    (
        0.415,
        0.500,
        0.582,
        0.651,
        0.703,
        0.755,
        0.795,
        0.828,
        0.861,
        0.882,
        0.892,
        0.894,
    ),
)


def routing_with_locality(
    n_tokens: int,
    n_layers: int,
    n_experts: int,
    k: int,
    curve: tuple[tuple[float, ...], tuple[float, ...]] = QWEN35_397B,
    seed: int = 0,
) -> np.ndarray:
    """Draw the experts of each token and layer.

    Shapes: curve (shares of slots, shares of hits), both rising -> picks (T, L, K) int.
    Raises: ConfigError if k is not in 1..n_experts, or the curve does not rise.
    """
    if not 1 <= k <= n_experts:
        raise ConfigError(f"k={k} is outside 1..{n_experts}")
    shares, hits = (np.array([0, *column, 1.0]) for column in curve)
    if (np.diff(shares) <= 0).any() or (np.diff(hits) < 0).any():
        raise ConfigError("the curve of hits must rise, between 0 and 1")
    rng = np.random.default_rng(seed)
    picks = np.empty((n_tokens, n_layers, k), int)
    for layer in range(n_layers):
        recent = rng.permutation(n_experts).tolist()  # latest first
        for token in range(n_tokens):
            depths = _distinct_depths(rng, shares, hits, n_experts, k)
            chosen = [recent[depth] for depth in depths]
            for depth in sorted(depths, reverse=True):
                del recent[depth]
            recent[:0] = chosen
            picks[token, layer] = chosen
    return picks


def _distinct_depths(
    rng: np.random.Generator, shares: np.ndarray, hits: np.ndarray, n: int, k: int
) -> list[int]:
    """k different places in a list of n, by inverting the curve of hits."""
    depths: dict[int, None] = {}
    while len(depths) < k:
        at = np.interp(rng.random(k), hits, shares) * n
        depths |= dict.fromkeys(np.minimum(at.astype(int), n - 1).tolist())
    return list(depths)[:k]
