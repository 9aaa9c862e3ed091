"""One setting of a model, measured: what it reads for a token, and how well it does.

Text: perplexity and agreement with the baseline. Structured output: the stages of
`structured.py`. Speed: a short streamed run. Quality is measured with all experts in
memory where they fit, which gives the same to the bit and sooner.
**But:** speed is of this machine at this moment; all else can be repeated anywhere.
*Taught in notebooks/10.*
"""

import hashlib
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from . import evaluate
from .calibrate import calibrate_output_scale
from .engine import Model, load
from .errors import ConfigError
from .evaluate import TextScore, bootstrap_interval, continuations, diverging_position
from .settings import Setting
from .structured_runs import Outcome, StageRate, load_prompts, run_prompts, summarize
from .writing import reserve, writing_to

PROMPT_TOKENS, CONTINUED = 48, 64  # of a free generation: read, written
SPEED_TOKENS = 64  # decoded, streamed, for speed; the median of their times counts
CALIBRATION_TOKENS = 2048  # of the calibration text, at most
SAMPLING = {"temperature": 0.7, "top_p": 0.95}


@dataclass(frozen=True)
class Tasks:
    """What every setting has to do."""

    texts: tuple[Path, ...]  # files of prose
    sets: tuple[Path, ...] = ()  # of tool-call and JSON prompts
    calibration: Path | None = None  # a text that is not scored, for kept="scaled"
    n_tokens: int | None = None  # scored of each text; None: all
    n_prompts: int | None = None  # of each set; None: all
    n_continued: int = 12  # free generations, over all texts
    seeds: tuple[int, ...] = ()  # of sampled answers; none: greedy ones only
    n_sampled: int = 0  # prompts of each set that are also answered with each seed
    experts: str = "resident"  # for quality; "stream" where they do not fit
    engine: str = "auto"  # as of `load`

    def __post_init__(self) -> None:
        if not self.texts or self.calibration in self.texts:
            raise ConfigError(
                "give at least one text to measure perplexity on, and another to "
                "calibrate on"
            )
        if bool(self.seeds) != bool(self.n_sampled):
            raise ConfigError("sampled answers need seeds and a number of prompts")

    def words(self) -> dict[str, object]:
        """What decides the figures: rows can be compared where these are equal."""
        files = [*self.texts, *self.sets]
        files += [self.calibration] if self.calibration else []
        return {
            "texts": " ".join(path.name for path in self.texts),
            "calibration": self.calibration.name if self.calibration else "",
            "sets": " ".join(path.name for path in self.sets),
            "data_sha256": digest(files),
            "tokens_a_text": self.n_tokens or "all",
            "prompts_a_set": self.n_prompts or "all",
            "continuations": self.n_continued,
            "seeds": " ".join(map(str, self.seeds)),
            "sampled_prompts": self.n_sampled,
            "window": evaluate.WINDOW,
            "stride": evaluate.STRIDE,
        }


def digest(paths: Sequence[Path]) -> str:
    """The first 16 digits of a SHA-256 over the contents of files."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]


# --- the baseline ---------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """The model that all settings are compared with, and what it said."""

    texts: list[tuple[list[int], int]]  # ids and bytes
    log_probabilities: list[np.ndarray]  # (n, V) of each text, on disk
    nats: np.ndarray  # of all texts, one after the other
    prompts: list[list[int]]  # of free generation
    continuations: list[list[int]]


def make_baseline(model_dir: Path, tasks: Tasks, work: Path) -> Baseline:
    """Run the model as it is over the texts; its probabilities go to files in work.

    Units: 4 bytes for each scored token and each token of the vocabulary.
    """
    with load(model_dir, tasks.engine, tasks.experts) as model:
        texts = [
            evaluate.read_text(model, path, tasks.n_tokens) for path in tasks.texts
        ]
        _check_length(tasks, texts)
        kept, nats = [], []
        for number, (ids, n_bytes) in enumerate(texts):
            shape = (len(ids) - 1, model.config.vocab_size)
            file = work / f"baseline_{number}.npy"
            with writing_to(file):
                array = np.lib.format.open_memmap(file, "w+", np.float32, shape)
            reserve(file, array.offset, array.nbytes)
            nats.append(evaluate.score_ids(model, ids, n_bytes, keep=array).nats)
            kept.append(array)
        prompts = _prompts(texts, tasks.n_continued)
        theirs = continuations(model, prompts, CONTINUED)
    return Baseline(texts, kept, np.concatenate(nats), prompts, theirs)


def _check_length(tasks: Tasks, texts: list[tuple[list[int], int]]) -> None:
    for path, (ids, _) in zip(tasks.texts, texts, strict=True):
        if len(ids) <= PROMPT_TOKENS:
            raise ConfigError(
                f"{path}: {len(ids)} tokens are too few to score; take more than "
                f"{PROMPT_TOKENS}"
            )


def _prompts(texts: list[tuple[list[int], int]], n: int) -> list[list[int]]:
    """Beginnings of free generations, evenly spread over the texts."""
    prompts = []
    for number in range(n):
        ids = texts[number % len(texts)][0]
        at = number // len(texts) * (len(ids) - PROMPT_TOKENS) // -(-n // len(texts))
        prompts.append(ids[at : at + PROMPT_TOKENS])
    return prompts


# --- one setting ----------------------------------------------------------------------


def measure(
    folder: Path, setting: Setting, tasks: Tasks, baseline: Baseline
) -> tuple[dict[str, object], list[tuple[str, Outcome]]]:
    """Measure one setting on a folder that holds its weights.

    Returns the row of a table, and (set, outcome) of every answer that is wrong.
    """
    begun = time.perf_counter()
    with open_setting(folder, setting, tasks) as model:
        score = _score_texts(model, baseline)
        mean_k = model.report().mean_k
        row = _of_model(model, mean_k) | _of_text(score, baseline)
        row |= _of_continuations(model, baseline)
        found, wrong = _of_sets(model, tasks)
        row |= found
    row["tok_s"] = speed(folder, setting, tasks, baseline.texts[0][0][:PROMPT_TOKENS])
    row["row_s"] = round(time.perf_counter() - begun, 1)
    return row, wrong


@contextmanager
def open_setting(
    folder: Path, setting: Setting, tasks: Tasks, experts: str | None = None
) -> Iterator[Model]:
    """Load a folder with a setting's routing; `scaled` measures its factors first."""
    routing, experts = dict(setting.routing), experts or tasks.experts
    if setting.kept == "scaled":
        routing["output_scale"] = _output_scale(folder, setting.k, tasks)
    with load(folder, tasks.engine, experts, **routing) as model:
        yield model


def _output_scale(folder: Path, k: int | None, tasks: Tasks) -> np.ndarray:
    """Factors (L,), from a text that is not scored."""
    if tasks.calibration is None:
        raise ConfigError("kept='scaled' needs a text to calibrate on")
    with load(folder, tasks.engine, tasks.experts) as model:
        k = model.config.num_experts_per_tok if k is None else k
        ids, _ = evaluate.read_text(model, tasks.calibration, CALIBRATION_TOKENS)
        return calibrate_output_scale(model, ids, k)


def _score_texts(model: Model, baseline: Baseline) -> TextScore:
    scores = [
        evaluate.score_ids(model, ids, n_bytes, kept)
        for (ids, n_bytes), kept in zip(
            baseline.texts, baseline.log_probabilities, strict=True
        )
    ]
    return TextScore(
        np.concatenate([score.nats for score in scores]),
        np.concatenate([score.best for score in scores]),
        sum(score.n_bytes for score in scores),
        np.concatenate([score.agrees for score in scores]),
        np.concatenate([score.divergence for score in scores]),
    )


def _of_model(model: Model, mean_k: float) -> dict[str, object]:
    """What is read and kept. A token that finds nothing in memory reads this much."""
    formats = model.store.files.formats
    bits = model.mode["bits"]
    of_layers = sum(fmt.n_bytes for fmt in formats)
    return {
        "k_used": model.config.num_experts_per_tok,
        "mean_k": round(mean_k, 4),
        "expert_bits": "/".join(map(str, bits)) if isinstance(bits, list) else bits,
        "bytes_per_token": round(mean_k * of_layers),
        "experts_bytes": model.store.files.n_bytes,
        "dense_bytes": model.checkpoint.dense_bytes,
    }


def _of_text(score: TextScore, baseline: Baseline) -> dict[str, object]:
    cost = score.nats - baseline.nats
    low, high = score.perplexity_interval
    cost_low, cost_high = bootstrap_interval(cost)
    return {
        "tokens": len(score.nats),
        "perplexity": round(score.perplexity, 4),
        "perplexity_low": round(low, 4),
        "perplexity_high": round(high, 4),
        "bits_per_byte": round(score.bits_per_byte, 5),
        "cost_nats": round(float(cost.mean()), 5),
        "cost_low": round(cost_low, 5),
        "cost_high": round(cost_high, 5),
        "agreement": round(float(score.agrees.mean()), 4),
        "divergence": round(float(score.divergence.mean()), 5),
    }


def _of_continuations(model: Model, baseline: Baseline) -> dict[str, object]:
    pairs = zip(baseline.prompts, baseline.continuations, strict=True)
    places = [diverging_position(model, *pair) for pair in pairs]
    return {"first_difference_median": statistics.median(places)} if places else {}


def _of_sets(
    model: Model, tasks: Tasks
) -> tuple[dict[str, object], list[tuple[str, Outcome]]]:
    row, wrong = {}, []
    for path in tasks.sets:
        prompts, name = _read_set(path), path.stem
        greedy = list(run_prompts(model, prompts, tasks.n_prompts))
        row |= _rates(summarize(greedy), name)
        wrong += [(name, outcome) for outcome in greedy if not outcome.score.is_right]
        if tasks.seeds:
            drawn = run_prompts(
                *(model, prompts, tasks.n_sampled, tasks.seeds),
                **SAMPLING,
                explain=False,
            )
            row |= _rates(summarize(drawn), f"{name}_sampled")
    return row, wrong


@cache
def _read_set(path: Path) -> list:
    return load_prompts(path)


def _rates(rates: list[StageRate], name: str) -> dict[str, object]:
    """Columns of a set: the number of prompts, and the share that passed each stage.

    A set of several kinds has its kinds in the names; groups are left out.
    """
    rates = [rate for rate in rates if rate.group == "all"]
    kinds = {rate.kind for rate in rates}
    row = {}
    for rate in rates:
        stem = name if len(kinds) == 1 else f"{name}_{rate.kind}"
        row[f"{stem}_n"] = rate.n
        row[f"{stem}_{rate.stage}"] = round(rate.share, 4)
        if rate.stage == "right":
            row[f"{stem}_right_low"] = round(rate.low, 4)
            row[f"{stem}_right_high"] = round(rate.high, 4)
    return row


def speed(folder: Path, setting: Setting, tasks: Tasks, prompt: Sequence[int]) -> float:
    """Tokens a second of a streamed decode, experts from the page cache."""
    with open_setting(folder, setting, tasks, "stream") as model:
        state, seconds = model.new_state(), []
        token = int(model.prefill(prompt, state).argmax())
        for _ in range(SPEED_TOKENS):
            start = time.perf_counter()
            token = int(model.decode(token, state).argmax())
            seconds.append(time.perf_counter() - start)
    return round(1 / statistics.median(seconds), 1)
