"""How well a model predicts a text, and how far it departs from another setting of it.

Perplexity and bits per byte over a text file, with an interval; agreement with a
baseline on the same text: the likeliest token, the divergence of the distributions, and
where its own text would first part from the baseline's. A text is read in windows that
overlap, so that every token but the first is scored once, with enough before it.
**But:** one text at a time; what a model writes is judged in `structured.py`.
*Taught in notebooks/10.*
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .engine import PREFILL_CHUNK, Model
from .errors import ConfigError
from .generation import generate_ids

WINDOW = 512  # tokens that a window reads
STRIDE = 384  # of which the last so many are scored: 128 before each, at least
LOGITS_BYTES = 1 << 28  # of logits at a time: 270 tokens of 248,320 float32
BLOCK = 128  # tokens drawn together in a bootstrap: neighbours are alike
DRAWS = 2000  # of a bootstrap


# --- windows --------------------------------------------------------------------------


def windows(n: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Cut a text of n tokens: (first token read, first token scored, end).

    Every token but the first is scored once. From the second window on, each has at
    least window - stride tokens before it.
    Raises: ConfigError if a window would score a token with nothing before it.
    """
    if not 1 <= stride < window:
        raise ConfigError(
            f"window={window}, stride={stride}: the stride must be at least 1, and "
            f"smaller than the window"
        )
    first, scored = 0, 1
    while scored < n:
        end = min(first + window, n)
        yield first, scored, end
        first, scored = end - (window - stride), end


def log_probabilities(
    model: Model, ids: Sequence[int], window: int = WINDOW, stride: int = STRIDE
) -> Iterator[tuple[slice, np.ndarray]]:
    """What a model thinks of each next token of a text, block by block.

    Yields (rows, values): values (n, V) float32 are log-probabilities for the tokens
    ids[1:][rows]. A block has at most LOGITS_BYTES.
    """
    ids = [int(token) for token in ids]
    most = max(1, min(LOGITS_BYTES // (4 * model.config.vocab_size), PREFILL_CHUNK))
    for first, scored, end in windows(len(ids), window, stride):
        state = model.new_state()
        if scored - 1 > first:  # context only
            model.prefill(ids[first : scored - 1], state)
        for start in range(scored - 1, end - 1, most):
            stop = min(start + most, end - 1)
            logits = model.prefill(ids[start:stop], state, all_logits=True)
            yield slice(start, stop), log_softmax(logits)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logits -> log-probabilities. Shapes: (n, V) -> (n, V) float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    return shifted - np.log(total).astype(np.float32)


# --- scores ---------------------------------------------------------------------------


@dataclass(frozen=True)
class TextScore:
    """A text, scored: one value for each token but the first."""

    nats: np.ndarray  # (n,) minus the log-probability of the token that came
    best: np.ndarray  # (n,) int, the likeliest token
    n_bytes: int  # of text that these tokens make
    agrees: np.ndarray | None = None  # (n,) bool: likeliest as in the baseline
    divergence: np.ndarray | None = None  # (n,) KL(baseline, this), nats

    @property
    def perplexity(self) -> float:
        """The exponential of the mean of nats: 1 is certainty, V is guessing."""
        return float(np.exp(self.nats.mean()))

    @property
    def bits_per_byte(self) -> float:
        """Bits to store a byte of this text with the model: comparable between
        tokenizers, which perplexity is not."""
        return float(self.nats.sum() / np.log(2) / self.n_bytes)

    @property
    def perplexity_interval(self) -> tuple[float, float]:
        """95 % interval by block bootstrap: if other text of this kind came."""
        low, high = bootstrap_interval(self.nats)
        return float(np.exp(low)), float(np.exp(high))


def score_ids(
    model: Model,
    ids: Sequence[int],
    n_bytes: int,
    baseline: Model | np.ndarray | None = None,
    keep: np.ndarray | None = None,
    window: int = WINDOW,
    stride: int = STRIDE,
) -> TextScore:
    """Score token ids that make n_bytes of text.

    baseline: another model of the same vocabulary, run beside this one; or its
              log-probabilities (len(ids) - 1, V), which `keep` received before: an
              array, or a memory-mapped file where that is too large.
    Raises: ConfigError if there are not two tokens, or the vocabularies differ.
    """
    n = len(ids) - 1
    if n < 1:
        raise ConfigError("a text needs at least 2 tokens to be scored")
    targets, others = np.asarray(ids)[1:], _blocks_of(baseline, ids, window, stride)
    nats, best = np.empty(n, np.float64), np.empty(n, np.int64)
    agrees = divergence = None
    if baseline is not None:
        agrees, divergence = np.empty(n, bool), np.empty(n, np.float64)
    for rows, values in log_probabilities(model, ids, window, stride):
        nats[rows] = -values[np.arange(len(values)), targets[rows]]
        best[rows] = values.argmax(axis=-1)
        if keep is not None:
            keep[rows] = values
        if baseline is not None:
            other = others(rows)
            _check_vocabulary(values, other)
            agrees[rows] = best[rows] == other.argmax(axis=-1)
            divergence[rows] = kl_divergence(other, values)
    return TextScore(nats, best, n_bytes, agrees, divergence)


def _blocks_of(baseline, ids, window, stride):
    """A function from rows to the baseline's log-probabilities of them."""
    if isinstance(baseline, Model):
        blocks = log_probabilities(baseline, ids, window, stride)
        return lambda rows: next(blocks)[1]
    return lambda rows: baseline[rows]


def _check_vocabulary(values: np.ndarray, other: np.ndarray) -> None:
    if values.shape != other.shape:
        raise ConfigError(
            f"the baseline has {other.shape[-1]:,} tokens, the model "
            f"{values.shape[-1]:,}, or it scored another text: compare settings of one "
            f"model on one text"
        )


def kl_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p, q): what it costs to expect q where p is true, in nats.

    Shapes: log-probabilities (n, V), (n, V) -> (n,), never below 0.
    """
    terms = np.exp(p) * (p - q)
    return np.maximum(terms.sum(axis=-1, dtype=np.float64), 0)


def read_text(
    model: Model, path: str | Path, n_tokens: int | None = None
) -> tuple[list[int], int]:
    """A text file's first tokens (all by default), and the bytes of those scored.

    The first token is never scored, so its bytes do not count.
    Raises: ConfigError if the file is not UTF-8 text.
    """
    try:
        text = Path(path).read_text("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    ids = model.tokenizer.encode_plain(text)[:n_tokens]
    return ids, sum(len(model.tokenizer.token_bytes(token)) for token in ids[1:])


def score_file(
    model: Model,
    path: str | Path,
    n_tokens: int | None = None,
    baseline: Model | np.ndarray | None = None,
    window: int = WINDOW,
    stride: int = STRIDE,
) -> TextScore:
    """Score a text file, or its first n_tokens. Arguments as `score_ids`."""
    ids, n_bytes = read_text(model, path, n_tokens)
    return score_ids(model, ids, n_bytes, baseline, None, window, stride)


# --- how sure -------------------------------------------------------------------------


def bootstrap_interval(
    values: np.ndarray, block: int = BLOCK, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a mean of values that depend on their neighbours.

    Draws runs of `block` neighbours, the end joined to the beginning, until there are
    as many values as before; DRAWS times. Of the difference of two scores of one text
    it gives a far narrower interval than of either: the text is the same.
    Shapes: values (n,).
    """
    n = len(values)
    block = max(1, min(block, n // 8))
    n_blocks = -(-n // block)
    rng = np.random.default_rng(seed)
    sums = np.cumsum(np.concatenate([[0], values, values[:block]], dtype=np.float64))
    of_block = sums[block : block + n] - sums[:n]  # of the block that begins at i
    drawn = of_block[rng.integers(0, n, (DRAWS, n_blocks))].sum(axis=1)
    low, high = np.quantile(drawn / (n_blocks * block), (0.025, 0.975))
    return float(low), float(high)


# --- free generation ------------------------------------------------------------------


def continuations(
    model: Model, prompts: Iterable[Sequence[int]], n_tokens: int
) -> list[list[int]]:
    """Greedy continuations of prompts, as ids without a stop token."""
    return [list(generate_ids(model, prompt, n_tokens)) for prompt in prompts]


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first place at which two sequences differ; None if they are equal.

    Where one only goes on longer, its first token more is the difference.
    """
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def diverging_position(
    model: Model, prompt: Sequence[int], continuation: Sequence[int]
) -> int:
    """Where a model's own greedy text would first part from another's; its length, if
    nowhere.

    Up to there both have read the same, so nothing need be generated: the first token
    of the continuation that is not the model's likeliest is the place. One pass.
    """
    if not continuation:
        return 0
    ids, n = [*prompt, *continuation], len(continuation)
    state = model.new_state()
    if len(prompt) > 1:
        model.prefill(ids[: len(prompt) - 1], state)
    logits = model.prefill(ids[len(prompt) - 1 : -1], state, all_logits=True)
    n_real = model.tokenizer.n_real_ids  # ids beyond it are never generated
    wrong = logits[:, :n_real].argmax(axis=-1) != np.asarray(continuation)
    return int(wrong.argmax()) if wrong.any() else n
