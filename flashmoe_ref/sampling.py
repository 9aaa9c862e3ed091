"""Choosing the next token from logits: greedy, or drawn after penalties and cut-offs.

The order is that of Hugging Face transformers and mlx-lm: penalties, temperature, then
top-k, top-p and min-p on what is left. **But:** one sequence at a time, no beams.
*Taught in notebooks/04.*
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import ConfigError
from .layers import softmax


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. The defaults are greedy: always the most likely one."""

    temperature: float = 0.0  # 0 is greedy; 1 draws from the model's own distribution
    top_k: int = 0  # keep the k most likely; 0 keeps all
    top_p: float = 1.0  # keep the fewest most likely that hold this probability
    min_p: float = 0.0  # keep those at least this likely, relative to the best
    repetition_penalty: float = 1.0  # divides the logits of tokens seen so far
    presence_penalty: float = 0.0  # is subtracted for tokens generated so far
    seed: int = 0  # same seed, same text

    def __post_init__(self) -> None:
        limits = (
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            (
                "repetition_penalty",
                0 < self.repetition_penalty < float("inf"),
                "above 0",
            ),
            ("presence_penalty", abs(self.presence_penalty) < float("inf"), "finite"),
            ("seed", self.seed >= 0, "at least 0"),
        )
        for name, is_good, allowed in limits:
            if not is_good:
                raise ConfigError(f"{name}={getattr(self, name)} must be {allowed}")


class Sampler:
    """Draws tokens; remembers the random state and the tokens that penalties need."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], n_real: int) -> None:
        self.sampling = sampling
        self.n_real = n_real  # rows of the vocabulary beyond are padding
        self.prompt = np.unique(np.asarray(prompt, np.int64))
        self.generated: set[int] = set()
        self.rng = np.random.default_rng(sampling.seed)

    def sample(self, logits: np.ndarray) -> int:
        """Choose the next token. Shapes: logits (V,)."""
        s = self.sampling
        logits = self._penalize(logits[: self.n_real])
        if s.temperature == 0:
            token = int(np.argmax(logits))
        else:
            p = filter_probabilities(softmax(logits / s.temperature), s)
            token = int(self.rng.choice(len(p), p=p))
        self.generated.add(token)
        return token

    def _penalize(self, logits: np.ndarray) -> np.ndarray:
        """Source: CTRL (arXiv 1909.05858), section 4.1, for the repetition penalty."""
        s = self.sampling
        logits = logits.astype(np.float64)
        generated = np.fromiter(self.generated, np.int64)
        if s.repetition_penalty != 1:
            seen = np.union1d(self.prompt, generated)
            kept = logits[seen]
            shrunk = np.where(
                kept > 0, kept / s.repetition_penalty, kept * s.repetition_penalty
            )
            logits[seen] = shrunk
        if s.presence_penalty:
            logits[generated] -= s.presence_penalty
        return logits


def filter_probabilities(p: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Cut unlikely tokens off and renormalise; the most likely one always stays.

    Shapes: p (V,) -> (V,), sums to 1.
    Source: top-p: arXiv 1904.09751; min-p: arXiv 2407.01082.
    """
    order = np.argsort(-p, kind="stable")  # ties go to the lower token id
    ranked = p[order]
    keep = np.ones(len(p), bool)
    if sampling.top_k:
        keep[sampling.top_k :] = False
    # A token stays if the mass before it has not reached top_p yet.
    keep[1:] &= np.cumsum(ranked)[:-1] < sampling.top_p
    keep &= ranked >= sampling.min_p * ranked[0]
    keep[0] = True
    cut = np.zeros_like(p)
    cut[order[keep]] = ranked[keep]
    return cut / cut.sum()
