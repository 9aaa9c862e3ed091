"""Decode and prefill with a random checkpoint, and say how near the limit that came.

The limit of a token is the time that its bytes need: every dense weight, and every
expert that it uses, through a matrix-vector product at the rate measured in this run,
plus the missed experts from the disk at the rate measured in this run, one after the
other. Routing is replayed, since the router of random weights has no locality.
**But:** a token's time also holds attention, norms and the state, which are not in the
limit; and reading while something is computed can beat it. *Taught in notebooks/13.*
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import MethodType

import numpy as np

from .accounting import module_shapes
from .engine import Model
from .errors import ConfigError
from .hardware import MEMORY_BYTES, matvec_rates
from .probe_disk import measure, spans_of_files
from .streaming import ExpertStore, Ticket

READ_PROBE_BYTES, READ_PROBE_S = 1 << 30, 5.0  # at most


@dataclass(frozen=True)
class Rates:
    """What this machine does, measured beside the run. GB/s, GB = 1e9."""

    matvec_gb_s: float  # packed weights through a matrix-vector product
    disk_gb_s: float  # records of an expert's size, by as many threads as read


def measure_rates(
    model: Model,
    n_files: int,
    threads: int = 4,
    mode: str = "direct",
    matvec_bytes: int = MEMORY_BYTES,
) -> Rates:
    """Measure this machine with the model's own engine, and records of its experts.

    n_files: of the first layers; a folded checkpoint's others are links to them.
    mode: how the probe reads: "direct", past the page cache; "cold" or "warm" with it.
    matvec_bytes: weights to multiply; fewer than a processor's cache holds look fast.
    Raises: ConfigError if the files have not a record for each thread.
    """
    engine = model.mode["engine"]
    products = matvec_rates(matvec_bytes, [engine.split(",")[0]])[0].values()
    size = model.store.files.formats[0].n_bytes
    size -= size % 4096
    with spans_of_files(model.store.files.files[:n_files], READ_PROBE_BYTES) as spans:
        found = measure(spans, mode, size, threads, READ_PROBE_S)
    if found is None:
        raise ConfigError("this disk gave no record to measure; use fewer --threads")
    return Rates(max(products), found.rate_gb_s)


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal measured. Bytes and seconds are of one decoded token."""

    mode: dict[str, object]
    n_tokens: int
    token_s: float  # the median
    fastest_s: float
    slowest_s: float
    prefill_tok_s: float
    dense_bytes: int  # that a token multiplies, without experts
    used_bytes: float  # of experts that a token multiplies
    read_bytes: float  # of experts that were missed
    hit_rate: float
    wait_s: float
    rates: Rates
    resident_bytes: int

    @property
    def compute_limit_s(self) -> float:
        """Dense weights and experts through the matrix-vector product."""
        return (self.dense_bytes + self.used_bytes) / self.rates.matvec_gb_s / 1e9

    @property
    def read_limit_s(self) -> float:
        """Missed experts from the disk."""
        return self.read_bytes / self.rates.disk_gb_s / 1e9

    @property
    def limit_s(self) -> float:
        """Both, one after the other."""
        return self.compute_limit_s + self.read_limit_s

    @property
    def times_limit(self) -> float:
        """How many times as long as its limit a token took."""
        return self.token_s / self.limit_s

    def as_dict(self) -> dict:
        """For JSON: everything, the derived figures too."""
        derived = ("compute_limit_s", "read_limit_s", "limit_s", "times_limit")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def rehearse(
    model: Model,
    picks: np.ndarray | None,
    prompt: Sequence[int],
    n_tokens: int,
    rates: Rates,
    step: Callable[[], object] = lambda: None,
    n_warm: int = 0,
) -> Rehearsal:
    """Prefill a prompt, decode n_tokens, and set their times beside their limit.

    picks (T, L, K) of `locality.py` or of a trace are replayed while decoding; None
    leaves routing to the router. n_warm tokens fill the slots and are not counted.
    Raises: ConfigError for picks that do not fit the model.
    """
    state = model.new_state()
    model.reset_report()
    logits = model.prefill(prompt, state)
    prefill_tok_s = model.report().prefill_tok_s
    seconds = []
    with replay(model.store, model.config.num_experts_per_tok, picks):
        for number in range(n_warm + n_tokens):
            if number == n_warm:
                model.reset_report()
            start = time.perf_counter()
            logits = model.decode(int(np.argmax(logits)), state)
            seconds.append(time.perf_counter() - start)
            step()
    report, seconds = model.report(), seconds[n_warm:]
    return Rehearsal(
        mode=report.mode,
        n_tokens=n_tokens,
        token_s=statistics.median(seconds),
        fastest_s=min(seconds),
        slowest_s=max(seconds),
        prefill_tok_s=prefill_tok_s,
        dense_bytes=multiplied_bytes(model),
        used_bytes=report.mean_k * sum(f.n_bytes for f in model.store.files.formats),
        read_bytes=report.bytes_read / n_tokens,
        hit_rate=report.hit_rate,
        wait_s=report.wait_s / n_tokens,
        rates=rates,
        resident_bytes=report.resident_bytes,
    )


def multiplied_bytes(model: Model) -> int:
    """Dense weights that every token goes through: all but the table of embeddings.

    Tied embeddings are the output matrix too, so then they count.
    """
    tensors, config = model.checkpoint.tensors, model.config
    skipped = () if config.tie_word_embeddings else module_shapes(config)["embeddings"]
    table = sum(
        info.n_bytes
        for name, info in tensors.items()
        if any(name == s or name.startswith(f"{s}.") for s in skipped)
    )
    return model.checkpoint.dense_bytes - table


@contextmanager
def replay(store: ExpertStore, k: int, picks: np.ndarray | None) -> Iterator[None]:
    """Let requests of single tokens name the recorded experts instead of the router's.

    The weights stay the router's, the experts' bytes come from where the recorded ones
    lie: all that a cache and a disk see is as recorded. After the last token of the
    record the first comes again.
    Raises: ConfigError for picks that do not fit the model.
    """
    if picks is None:
        yield
        return
    fits = picks.ndim == 3 and picks.shape[1] == store.n_layers and picks.shape[2] >= k
    if not fits or not 0 <= picks.min() <= picks.max() < store.files.n_experts:
        raise ConfigError(
            f"picks of shape {picks.shape} do not fit {store.n_layers} layers with "
            f"{store.files.n_experts} experts, {k} for a token; give another trace"
        )
    rows, token = picks[:, :, :k].tolist(), -1
    request, prefetch = store.request, store.prefetch

    def replayed_request(_self, layer: int, experts: Sequence[int]) -> Ticket:
        nonlocal token
        token = (token + (layer == 0)) % len(rows)
        return request(layer, rows[token][layer][: len(experts)])

    def replayed_prefetch(_self, layer: int, experts: Sequence[int], *scores) -> None:
        prefetch(layer, rows[token][layer][: len(experts)], *scores)

    store.request = MethodType(replayed_request, store)
    store.prefetch = MethodType(replayed_prefetch, store)
    try:
        yield
    finally:
        del store.request, store.prefetch
