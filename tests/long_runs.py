"""Long runs of the reduced model: what grows, and whether the text stays the same.

Used by `test_long_runs.py` with small numbers, and by `make soak` with large ones.
"""

import ctypes
import gc
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashmoe_ref import chat, load
from flashmoe_ref.engine import Model
from flashmoe_ref.generation import generate_ids
from flashmoe_ref.resident_set import resident_set_bytes

ROOT = Path(__file__).parents[1]
REDUCED = ROOT / "data" / "reduced"
POSITIONS = 32_768  # more than trained, which makes noise, not errors
BUDGET = 70  # experts in memory: with the dense weights below a quarter of the model
N_SAMPLES = 8  # of a run
FLAT_BYTES = 12 << 20  # what an allocator may keep; a lost token's states are 3 MB
PROMPT = "Once upon a time there was a man who had three sons"
SAYINGS = ("Who are you?", "Tell me a story.", "What is {n} + {n}?", "And then?")


@dataclass(frozen=True)
class Sample:
    """What the process has at some moment."""

    at: int  # tokens or turns
    own_bytes: int  # of memory, without the state of the text
    n_files: int
    n_threads: int


@dataclass
class Run:
    """What was written, and what it took."""

    written: list
    samples: list[Sample]
    seconds: float

    def __str__(self) -> str:
        first, middle, last = (
            f"{self.samples[i].own_bytes / 1e6:.1f} MB" for i in (0, N_SAMPLES // 2, -1)
        )
        ends = self.samples[0], self.samples[-1]
        files, threads = (
            " -> ".join(str(getattr(s, name)) for s in ends)
            for name in ("n_files", "n_threads")
        )
        return (
            f"{len(self.written)} in {self.seconds:.0f} s; memory {first}, {middle}, "
            f"{last}; files {files}; threads {threads}"
        )


def write_long_model(folder: Path) -> Path:
    """The reduced model, by links, with room for long texts."""
    folder.mkdir()
    for path in REDUCED.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    raw = json.loads((REDUCED / "config.json").read_text())
    raw["text_config"]["max_position_embeddings"] = POSITIONS
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def open_streaming(folder: Path, engine: str) -> Model:
    """With dense weights and slots in less than a quarter of the model's bytes."""
    model = load(folder, engine=engine, budget=BUDGET)
    report = model.report()
    assert report.resident_bytes <= report.model_bytes / 4, report
    return model


def sample(at: int, state_bytes: int) -> Sample:
    """What this process has now."""
    _give_back()
    folder = Path("/proc/self/fd")
    n_files = len(os.listdir(folder)) if folder.exists() else 0
    own_bytes = resident_set_bytes() - state_bytes
    return Sample(at, own_bytes, n_files, threading.active_count())


def _give_back() -> None:
    """Let the C library return what is free: it keeps some of it, the more the larger.

    Else copies of a state that grows leave holes, which look like a leak.
    """
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(0)


def decode(model: Model, n_tokens: int) -> Run:
    """Write n_tokens after a short prompt, from a state that grows with them."""
    tokenizer, state = model.tokenizer, model.new_state()
    tokenizer.stop_ids = frozenset()
    ids = tokenizer.encode(PROMPT)
    tokens, samples, start = [], [], time.monotonic()
    settings = {"temperature": 0.8, "seed": 5}
    for token in generate_ids(model, ids, n_tokens, state, **settings):
        tokens.append(token)
        if len(tokens) % (n_tokens // N_SAMPLES) == 0:
            samples.append(sample(len(tokens), state.n_bytes))
    return Run(tokens, samples, time.monotonic() - start)


def prompts(model: Model, n_tokens: int, n: int) -> Iterator[list[int]]:
    """Prompts of n_tokens each, out of the lessons' own words."""
    texts = sorted((ROOT / "notebooks").glob("*.ipynb"))[:n]
    for path in texts:
        ids = model.tokenizer.encode_plain(path.read_text("utf-8")[: 8 * n_tokens])
        yield (ids * (1 + n_tokens // len(ids)))[:n_tokens]


def logits_of_prompts(model: Model, n_tokens: int, n: int) -> list[np.ndarray]:
    """Logits after each prompt."""
    found = prompts(model, n_tokens, n)
    return [model.prefill(ids, model.new_state()) for ids in found]


def converse(model: Model, n_turns: int, checked: Sequence[int]) -> tuple[Run, Run]:
    """Hold a conversation; say the same in the checked turns to one without a past.

    Returns the answers of both: of the second (which reads all messages anew each time)
    only those of the checked turns.
    """
    session = chat(model, enable_thinking=False)
    answers, again, samples, start = [], [], [], time.monotonic()
    for turn in range(n_turns):
        text = SAYINGS[turn % len(SAYINGS)].format(n=turn)
        before = session.messages
        answers.append("".join(session.say(text, 16)))
        assert turn == 0 or session.n_reused > 0, "the past was read again"
        if turn in checked:
            fresh = chat(model, enable_thinking=False)
            fresh.messages = before
            again.append("".join(fresh.say(text, 16)))
            assert fresh.n_reused == 0
            del fresh
        if (turn + 1) % (n_turns // N_SAMPLES) == 0:
            held = session._state.n_bytes + session._before_answer[1].n_bytes
            samples.append(sample(turn + 1, held))
    run = Run(answers, samples, time.monotonic() - start)
    return run, Run(again, samples, run.seconds)


def assert_flat(run: Run) -> None:
    """Nothing grew in the second half, memory beyond the text's own state included."""
    later = run.samples[N_SAMPLES // 2 :]
    first = later[0]
    for moment in later:
        assert moment.n_files <= first.n_files, f"open files: {run}"
        assert moment.n_threads <= first.n_threads, f"threads: {run}"
        assert moment.own_bytes <= first.own_bytes + FLAT_BYTES, f"memory: {run}"
