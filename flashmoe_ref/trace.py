"""A recorded run: what the router picked, what was read, where the time went.

    with record(model) as trace:
        for piece in generate(model, "Once upon a time"):
            ...
    trace.save("run.npz")

A step is one forward call: one token of decoding, or a chunk of a prompt. A trace has
the picks always; weights, ids, hits and times are None where they were not recorded.
`trace_format.py` has its file, `trace_exchange.py` other forms. **But:** times are seen
from this process, not inside the disk or the GPU. *Taught in notebooks/07.*
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import __version__
from .engine import Model
from .errors import ConfigError, TraceError
from .recording import BEGIN, KINDS, SILENT, Recorder
from .trace_format import (
    OPTIONAL,
    READ,
    SPAN,
    STEP,
    first_fault,
    read_arrays,
    write_arrays,
)

DECIMALS = 9  # of seconds: a nanosecond


@dataclass
class Trace:
    """One run. T tokens in S steps, L layers, K experts a token, N accesses."""

    picks: np.ndarray  # (T, L, K) int32, best first; -1 where adaptive K dropped one
    n_experts: int  # of each layer
    steps: np.ndarray  # (S,) STEP
    ids: np.ndarray | None = None  # (T,) int32, the tokens that went in
    weights: np.ndarray | None = None  # (T, L, K) float16, as the experts were mixed
    hits: np.ndarray | None = None  # (N,) bool, in the order of accesses()
    spans: np.ndarray | None = None  # (n,) SPAN: the computing thread, without gaps
    reads: np.ndarray | None = None  # (n,) READ, by start
    about: dict = field(default_factory=dict)  # JSON: model, mode, what was run

    @property
    def n_tokens(self) -> int:
        """Tokens of all steps."""
        return self.picks.shape[0]

    @property
    def n_layers(self) -> int:
        """Layers with experts."""
        return self.picks.shape[1]

    @property
    def k(self) -> int:
        """Experts a token."""
        return self.picks.shape[2]

    @property
    def mean_k(self) -> float:
        """Experts that a token used in a layer, on average."""
        return float((self.picks >= 0).sum(axis=2).mean()) if self.n_tokens else self.k

    @property
    def is_decode(self) -> np.ndarray:
        """Which steps took one token. Shapes: (S,) bool."""
        return self.steps["n_tokens"] == 1

    def accesses(self, layer: int | None = None) -> np.ndarray:
        """What the store was asked for, in order: rows of step, layer, expert.

        A decoded token asks for its picks, best first; a chunk of a prompt for each of
        its experts once, in ascending order. Rows of one step and layer are needed at
        the same time.
        Shapes: -> (N, 3) int32.
        """
        first = np.cumsum(self.steps["n_tokens"]) - self.steps["n_tokens"]
        single = np.flatnonzero(self.is_decode)
        parts = [_rows(single, self.picks[first[single]])]
        for step in np.flatnonzero(~self.is_decode):
            last = first[step] + self.steps["n_tokens"][step]
            for i in range(self.n_layers):
                chosen = np.unique(self.picks[first[step] : last, i])
                chosen = chosen[chosen >= 0]
                parts.append(_rows(np.array([step]), chosen[None, None], i))
        rows = np.concatenate(parts)
        if len(parts) > 1:
            rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        return rows if layer is None else rows[rows[:, 1] == layer]

    def hit_rate(self, layer: int | None = None) -> float:
        """Share of accesses that found their expert in a slot; 1 if there were none.

        Raises: TraceError where hits were not recorded.
        """
        hits = self.need("hits")
        if layer is not None:
            hits = hits[self.accesses()[:, 1] == layer]
        return float(hits.mean()) if len(hits) else 1.0

    def breakdown(self) -> dict[str, np.ndarray]:
        """Seconds of each step by what the computing thread did; together the step.

        Shapes: kind of `recording.KINDS` -> (S,). "wait" is what reads cost.
        Raises: TraceError where times were not recorded.
        """
        spans, n_steps = self.need("spans"), len(self.steps)
        seconds = spans["end_s"] - spans["start_s"]
        found = {}
        for kind, name in enumerate(KINDS):
            mine = spans["kind"] == kind
            found[name] = np.bincount(spans["step"][mine], seconds[mine], n_steps)
        return found

    def reading_s(self) -> np.ndarray:
        """Seconds inside reads that began in each step, all threads together.

        Shapes: -> (S,). Raises: TraceError where times were not recorded.
        """
        reads = self.need("reads")
        seconds = reads["end_s"] - reads["start_s"]
        return np.bincount(reads["step"], seconds, len(self.steps))

    def need(self, name: str) -> np.ndarray:
        """An array. Raises: TraceError if it was not recorded."""
        found = getattr(self, name)
        if found is None:
            raise TraceError(
                f"this trace has no {name}: record the run with record(model)"
            )
        return found

    def save(self, path: str | Path) -> None:
        """Write a compressed .npz, to exactly this path."""
        self._check("this trace")
        arrays = {"n_experts": np.array(self.n_experts)} | self._arrays()
        write_arrays(path, arrays, self.about)

    @staticmethod
    def load(path: str | Path) -> "Trace":
        """Read what `save` wrote.

        Raises: TraceError, in one line, for a file that is none, or is not whole.
        """
        arrays, about = read_arrays(path)
        n_experts = int(arrays.pop("n_experts"))
        trace = Trace(n_experts=n_experts, about=about, **arrays)
        trace._check(path)
        trace.picks = trace.picks.astype(np.int32)
        return trace

    def _arrays(self) -> dict[str, np.ndarray]:
        """Those that there are, by name."""
        found = {name: getattr(self, name) for name in ("picks", "steps", *OPTIONAL)}
        return {name: array for name, array in found.items() if array is not None}

    def _check(self, where: object) -> None:
        fault = first_fault(self._arrays(), self.n_experts)
        if fault is None and self.hits is not None:
            fault = first_fault(self._arrays(), self.n_experts, len(self.accesses()))
        if fault is not None:
            raise TraceError(f"{where}: {fault}")

    def __str__(self) -> str:
        mode, source = self.about.get("mode", {}), self.about.get("imported from", "")
        n_decoded = int(self.is_decode.sum())
        lines = {
            "mode": ", ".join(f"{key} {value}" for key, value in mode.items()),
            "source": source,
            "tokens": f"{self.n_tokens:,} in {len(self.steps):,} steps, "
            f"{n_decoded:,} of them one by one",
            "experts": f"{self.k} of {self.n_experts} a layer, {self.n_layers} layers",
        }
        if self.mean_k < self.k:
            lines["experts"] += f"; {self.mean_k:.2f} a token and layer on average"
        if self.hits is not None:
            lines["found"] = f"{self.hit_rate():.1%} of {len(self.hits):,} in a slot"
        if self.spans is not None and n_decoded:
            took = {n: 1e3 * s[self.is_decode] for n, s in self.breakdown().items()}
            kinds = (f"{name} {np.median(ms):.3f}" for name, ms in took.items())
            total = np.median(sum(took.values()))
            lines["decode"] = f"{total:.3f} ms a token (median): {', '.join(kinds)}"
        return "\n".join(f"{name:8}{text}" for name, text in lines.items() if text)


def _rows(steps: np.ndarray, experts: np.ndarray, layer: int = 0) -> np.ndarray:
    """Rows of accesses. Shapes: steps (S,), experts (S, L, K) -> (S L K, 3)."""
    n_steps, n_layers, k = experts.shape
    rows = np.empty((n_steps, n_layers, k, 3), np.int32)
    rows[..., 0] = steps[:, None, None]
    rows[..., 1] = layer + np.arange(n_layers)[:, None]
    rows[..., 2] = experts
    return rows[experts >= 0]


# --- recording ------------------------------------------------------------------------


@contextmanager
def record(model: Model, times: bool = True, **about: object) -> Iterator[Trace]:
    """Record what a model does inside the block; the trace is empty until it ends.

    times: also spans and reads, which take some 100 bytes each while they are recorded.
    about: what else the trace should say of itself, as JSON values.
    Results stay the same to the bit. A step that an error ends is not kept.
    Raises: ConfigError if the model is being recorded already.
    """
    if model.store.recorder is not SILENT:
        raise ConfigError("this model is being recorded already: end that block first")
    recorder = Recorder(
        model.config.num_hidden_layers, model.config.num_experts_per_tok, times
    )
    trace = _trace_of(recorder, model, about)
    model.store.recorder = recorder
    try:
        yield trace
    finally:
        model.store.recorder = SILENT
        vars(trace).update(vars(_trace_of(recorder, model, about)))


def _trace_of(recorder: Recorder, model: Model, about: dict) -> Trace:
    """Make arrays of what a recorder has kept."""
    recorder.drop_unfinished()
    files = model.store.files
    known = {
        "model": model.path.resolve().name,
        "mode": model.mode,
        "expert_bytes": [fmt.n_bytes for fmt in files.formats],
        "flashmoe": __version__,
    }
    trace = Trace(
        picks=recorder.by_token(recorder.picks, np.int64).astype(np.int32),
        n_experts=model.config.num_experts,
        steps=np.array(recorder.steps, STEP),
        ids=np.array(recorder.ids, np.int32),
        weights=recorder.by_token(recorder.weights, np.float32).astype(np.float16),
        hits=np.frombuffer(bytes(recorder.hits), bool),
        about=json.loads(json.dumps(known | about)),
    )
    if recorder.times:
        begun_s = [seconds for kind, _, seconds in recorder.laps if kind == BEGIN]
        trace.spans = _spans(recorder, begun_s)
        trace.reads = _reads(recorder, begun_s, known["expert_bytes"])
    return trace


def _spans(recorder: Recorder, begun_s: list[float]) -> np.ndarray:
    """A span for each lap but those that begin a step."""
    kinds, layers, ends = _columns(recorder.laps, 3)
    ends = _since(ends, begun_s)
    rows = np.flatnonzero(kinds != BEGIN)
    spans = np.empty(len(rows), SPAN)
    spans["step"] = (np.cumsum(kinds == BEGIN) - 1)[rows]
    spans["layer"], spans["kind"] = layers[rows], kinds[rows]
    spans["start_s"], spans["end_s"] = ends[rows - 1], ends[rows]
    return spans


def _reads(
    recorder: Recorder, begun_s: list[float], expert_bytes: list[int]
) -> np.ndarray:
    """By start; those outside of all steps left out, threads numbered."""
    threads = {recorder.thread: 0}
    numbered = [
        (layer, expert, threads.setdefault(thread, len(threads)), start, end)
        for layer, thread, jobs, first, ends in recorder.reads
        for (expert, _), start, end in zip(jobs, [first, *ends[:-1]], ends, strict=True)
        if begun_s and start >= begun_s[0]
    ]
    numbered.sort(key=lambda read: read[3])
    reads = np.empty(len(numbered), READ)
    layers, experts, thread, starts, ends = _columns(numbered, 5)
    reads["step"] = np.searchsorted(begun_s, starts, "right") - 1
    reads["layer"], reads["expert"], reads["thread"] = layers, experts, thread
    reads["n_bytes"] = np.array(expert_bytes)[layers.astype(int)]
    reads["start_s"], reads["end_s"] = _since(starts, begun_s), _since(ends, begun_s)
    return reads


def _columns(rows: list[tuple], n: int) -> np.ndarray:
    """Shapes: -> (n, rows) float64."""
    return np.array(rows, np.float64).reshape(-1, n).T


def _since(seconds: np.ndarray, begun_s: list[float]) -> np.ndarray:
    """Seconds since the first step began, without digits that no clock has."""
    return np.round(seconds - begun_s[0], DECIMALS) if begun_s else seconds
