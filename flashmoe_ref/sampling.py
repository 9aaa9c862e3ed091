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
from .ranges import is_number, is_whole

WHOLE = ("top_k", "seed")
LIMITS = {  # setting -> what is allowed, in code and in words
    "temperature": (lambda x: x >= 0, "a number of at least 0"),
    "top_k": (lambda x: x >= 0, "a whole number of at least 0"),
    "top_p": (lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "a number between 0 and 1"),
    # further out, scores overflow
    "repetition_penalty": (lambda x: 1e-3 <= x <= 1e3, "a number in 0.001..1000"),
    "presence_penalty": (lambda x: True, "a finite number"),
    "seed": (lambda x: x >= 0, "a whole number of at least 0"),
}


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
        for name, (is_good, allowed) in LIMITS.items():
            value = getattr(self, name)
            is_kind = is_whole(value, 0) if name in WHOLE else is_number(value)
            if not is_kind or not is_good(value):
                raise ConfigError(f"{name}={value!r} must be {allowed}")


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
            with np.errstate(over="ignore"):  # infinitely far below the best is fine
                scaled = (logits - logits.max()) / s.temperature
            p = filter_probabilities(softmax(scaled), s)
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
