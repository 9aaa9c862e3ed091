"""How long a sweep will take, from a sample of a few seconds measured before it.

Three rates are measured on the model as it is: reading a prompt, writing a token,
requantizing an expert. Fewer experts or bits run somewhat sooner, so the estimate errs
on the long side. **But:** a machine that gets busier later is not foreseen.
*Used by `flashmoe evaluate`.*
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import evaluate, quantize
from .engine import Model, load
from .experts import PROJECTIONS
from .measures import CONTINUED, PROMPT_TOKENS, SPEED_TOKENS, Tasks
from .settings import Setting, check_experts
from .structured_runs import choose_prompts, count_tokens, load_prompts

SAMPLE_READ, SAMPLE_WRITTEN = 256, 16  # tokens


@dataclass(frozen=True)
class Estimate:
    """What was measured, and what follows. Seconds."""

    read_s: float  # a token of a prompt
    written_s: float  # a token
    load_s: float
    requantize_s: float  # all experts, with other bits
    n_read: int  # tokens of prompts, for one setting
    n_written: int
    n_settings: int
    n_requantized: int  # times that the experts are written

    @property
    def seconds_a_setting(self) -> float:
        """Of those that the model's own files give."""
        return (
            self.n_read * self.read_s
            + self.n_written * self.written_s
            + 2 * self.load_s
        )

    @property
    def seconds(self) -> float:
        """Of the whole sweep; the baseline is run once more than it has a row."""
        n = self.n_settings + 1
        return n * self.seconds_a_setting + self.n_requantized * self.requantize_s

    def __str__(self) -> str:
        return (
            f"{self.n_settings} settings, {in_words(self.seconds)} in all: each reads "
            f"{self.n_read:,} tokens and writes {self.n_written:,} "
            f"({in_words(self.seconds_a_setting)})"
            + f", and {self.n_requantized} need other weights written "
            f"({in_words(self.requantize_s)} each)" * bool(self.n_requantized)
        )


def in_words(seconds: float) -> str:
    """A duration, roughly: 'about 40 s', 'about 12 min', 'about 3.5 h'."""
    if seconds < 100:
        return f"about {max(1, round(seconds))} s"
    if seconds < 100 * 60:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"


def estimate(
    model_dir: str | Path, settings: Sequence[Setting], tasks: Tasks
) -> Estimate:
    """Measure a sample, and count what there is to do."""
    start = time.perf_counter()
    with load(model_dir, tasks.engine, tasks.experts) as model:
        load_s = time.perf_counter() - start
        check_experts(settings, model.checkpoint.config)
        texts = [
            evaluate.read_text(model, path, tasks.n_tokens)[0] for path in tasks.texts
        ]
        read_s, written_s = _rates(model, texts[0])
        n_read, n_written = _work(model, texts, tasks)
        weights = {setting.weights for setting in settings if not setting.is_stored}
        requantize_s = _requantize_s(model, [*weights])
    return Estimate(
        *(read_s, written_s, load_s, requantize_s),
        *(n_read, n_written, len(settings), len(weights)),
    )


def _rates(model: Model, ids: Sequence[int]) -> tuple[float, float]:
    """Seconds a token, read and written; kernels are compiled before."""
    ids = (list(ids) * SAMPLE_READ)[:SAMPLE_READ]
    model.prefill(ids[:32], state := model.new_state())
    model.decode(ids[0], state)
    start = time.perf_counter()
    model.prefill(ids, state := model.new_state(), all_logits=True)
    middle = time.perf_counter()
    for token in ids[:SAMPLE_WRITTEN]:
        model.decode(token, state)
    end = time.perf_counter()
    return (middle - start) / SAMPLE_READ, (end - middle) / SAMPLE_WRITTEN


def _work(model: Model, texts: list[list[int]], tasks: Tasks) -> tuple[int, int]:
    """Tokens that a setting reads and writes."""
    n_read, n_written = tasks.n_continued * (PROMPT_TOKENS + CONTINUED), SPEED_TOKENS
    for ids in texts:
        windows = evaluate.windows(len(ids), evaluate.WINDOW, evaluate.STRIDE)
        n_read += sum(end - first for first, _, end in windows)
    for path in tasks.sets:
        prompts = load_prompts(path)
        once = count_tokens(model, choose_prompts(prompts, tasks.n_prompts))
        n_read, n_written = n_read + sum(once), n_written + once[1]
        if tasks.seeds:
            drawn = count_tokens(model, choose_prompts(prompts, tasks.n_sampled))
            n_read += drawn[0]
            n_written += drawn[1] * len(tasks.seeds)
    return n_read, n_written


def _requantize_s(model: Model, settings: Sequence[Setting]) -> float:
    """Seconds to decode and encode all experts, from one matrix of their shape."""
    slowest = 0.0
    c, rng = model.config, np.random.default_rng(0)
    w = rng.normal(size=(c.moe_intermediate_size, c.hidden_size)).astype(np.float32)
    matrix = quantize.quantize(w, 4, 64)
    for rule in {setting.rule for setting in settings}:
        start = time.perf_counter()
        quantize.requantize(matrix, 2, 64, rule)
        slowest = max(slowest, time.perf_counter() - start)
    return slowest * c.num_hidden_layers * c.num_experts * len(PROJECTIONS)
