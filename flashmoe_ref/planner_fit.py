"""The fit of the cost model to published runs, and its errors on sources it never saw.

`data/published.csv` has a row for each run that somebody published. The fit minimises
absolute errors of the logarithm, so that one strange row pulls no more than any other,
each source counting with the root of its rows; a weak prior keeps coefficients where
physics has them. **But:** the form of the model was chosen with all sources in
view; only the coefficients are held out. *Taught in notebooks/12.*
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np

from .config import PRESETS
from .errors import ConfigError
from .machines import CHIPS, HOST_GB_S, MEMORY_GB
from .planner import (
    Coefficients,
    Run,
    Sizes,
    hit_rate,
    sizes_of_preset,
    tokens_per_second,
)
from .simulator import decode_requests, simulate
from .small_files import parse_table, read_text
from .trace import Trace

DATA = Path(__file__).parents[1] / "data"  # only in a clone
USED = "yes"
GROUP_BYTES = 1 / 16  # for each weight: a 16-bit scale and bias for 64 of them
STATE_GB = 0.2  # recurrent state and short contexts, where nobody said more

# What is likely before any run was seen; a factor WIDTH is one unit of surprise.
NAMES = ("gpu_share", "cpu_share", "sync_s", "disk_share", "copy_share")
LIKELY = np.log([0.4, 0.2, 0.7e-3, 0.6, 0.05])
WIDTH = np.log([2.5, 2.5, 2.5, 2.0, 2.5])
MOST = np.log([1.0, 1.0, 5e-3, 1.0, 1.0])
SCALES = (5e-4, 5.0)  # of hit curves: from very local routing to nearly none
TRACE_SHARES = (0.1, 0.2, 0.3, 0.5, 0.7)  # of all experts
PRIOR = 0.003  # its weight: a hint, not a rule
SMALL = 0.1  # errors below count little: nobody measures better than to 10 %
DELTA, TINY, MAX_STEPS = 1e-4, 1e-5, 60  # of the search, in logarithms


@dataclass(frozen=True)
class Published:
    """The runs that can be compared with the model, as arrays (N,)."""

    rows: list[dict[str, str]]
    run: Run
    tok_s: np.ndarray
    sources: np.ndarray
    classes: np.ndarray

    def take(self, chosen: np.ndarray) -> "Published":
        """Some of them, by a mask."""
        parts = (np.asarray(getattr(self.run, f.name)) for f in fields(Run))
        n = len(self.rows)
        run = Run(*(np.broadcast_to(part, n)[chosen] for part in parts))
        rows = [row for row, keep in zip(self.rows, chosen, strict=True) if keep]
        arrays = (self.tok_s, self.sources, self.classes)
        return Published(rows, run, *(array[chosen] for array in arrays))


def read_rows(name: str, folder: Path = DATA) -> list[dict[str, str]]:
    """Rows of a table in data/. Raises: ConfigError where there is no clone."""
    path = folder / name
    text = read_text(path, ConfigError)
    if text is None:
        raise ConfigError(
            f"{path}: no such file; the published runs are in a clone of the repository"
        )
    return parse_table(text, path, ConfigError)


def read_published(folder: Path = DATA) -> Published:
    """All rows of published.csv that are marked for use.

    Raises: ConfigError naming the row with a value that is none.
    """
    rows, runs = [], []
    for n, row in enumerate(read_rows("published.csv", folder), 1):
        try:
            if row["use"] != USED:
                continue
            run = run_of_row(row, folder)
            sizes = (run.n_layers, run.picked_gb, run.memory_gb, run.disk_gb_s)
            if not all(0 < n < np.inf for n in (*sizes, speed_of_row(row))):
                raise ValueError("a size, rate or speed is none")
            rows.append({name: row[name] for name in ("source", "class")} | row)
            runs.append(run)
        except (ValueError, LookupError, AttributeError, OverflowError) as error:
            # AttributeError: a chip that is not known, where its figures are needed
            where = f"{folder / 'published.csv'}, row {n}"
            raise ConfigError(f"{where}: {error}; see data/README.md") from None
    columns = [np.array([getattr(r, f.name) for r in runs]) for f in fields(Run)]
    return Published(
        rows,
        Run(*columns),
        np.array([speed_of_row(row) for row in rows]),
        np.array([row["source"] for row in rows]),
        np.array([row["class"] for row in rows]),
    )


def speed_of_row(row: dict[str, str]) -> float:
    """Tokens a second; the geometric mean where a range was published."""
    low = float(row["tok_s"])
    return (low * float(row["tok_s_to"] or low)) ** 0.5


def run_of_row(row: dict[str, str], folder: Path = DATA) -> Run:
    """A published run as input of the cost model."""
    sizes = sizes_of_row(row, folder)
    chip = CHIPS.get(row["chip"])
    disk, measured = row["disk_gb_s"], row["disk_how"] == "measured"
    if not disk:
        disk, measured = chip.disk_gb_s, chip.is_measured
    return Run(
        n_layers=sizes.n_layers,
        picked_gb=sizes.bytes_per_token / 1e9,
        routed_gb=sizes.routed_bytes / 1e9,
        read_gb=sizes.read_bytes / 1e9,
        resident_gb=sizes.dense_bytes / 1e9 + STATE_GB,
        memory_gb=float(row["memory_gb"]) * MEMORY_GB,
        memory_gb_s=float(row["memory_gb_s"] or chip.memory_gb_s),
        core_speed=chip.core_speed if chip else CHIPS["pc"].core_speed,
        disk_gb_s=float(disk),
        disk_is_measured=measured,
        on_gpu=row["processor"] == "gpu",
        slots_gb=np.inf if row["slots_gb"] == "max" else float(row["slots_gb"] or 0),
        page_cache=row["page_cache"] == "yes",
        host_gb_s=HOST_GB_S if chip and chip.gpu_memory_gb else np.nan,
    )


def sizes_of_row(row: dict[str, str], folder: Path = DATA) -> Sizes:
    """The model of a published run; expert_mb overrules what its bits would give."""
    k, bits = int(row["k"]), int(row["bits"])
    sizes = sizes_of_published(row["model"], k, bits, folder)
    if not row["expert_mb"]:
        return sizes
    return Sizes(**vars(sizes) | {"expert_bytes": float(row["expert_mb"]) * 1e6})


@cache
def sizes_of_published(
    name: str, k: int | None = None, bits: int = 4, folder: Path = DATA
) -> Sizes:
    """Sizes of a preset, or of another published model, in MLX's affine format."""
    if name in PRESETS:
        return sizes_of_preset(name, k, bits)
    return _other_models(folder)(name, k, bits)


@cache
def _other_models(folder: Path) -> Callable[..., Sizes]:
    table = {row["model"]: row for row in read_rows("published_models.csv", folder)}

    def sizes(name: str, k: int | None, bits: int) -> Sizes:
        if name not in table:
            raise ConfigError(f"{name!r} is not in data/published_models.csv")
        row = {key: value for key, value in table[name].items() if key != "source"}
        number = {key: float(value) for key, value in row.items() if key != "model"}
        dense = max(bits, 4) / 8 + GROUP_BYTES
        return Sizes(
            name=name,
            n_layers=int(number["moe_layers"]),
            n_experts=int(number["experts"]),
            k=k or int(number["k"]),
            trained_k=int(number["k"]),
            expert_bytes=number["expert_params"] * (bits / 8 + GROUP_BYTES),
            dense_bytes=number["dense_params"] * dense,
            read_bytes=(number["dense_params"] - number["embed_params"]) * dense,
        )

    return sizes


# --- fitting --------------------------------------------------------------------------


def fit_hits(folder: Path = DATA, without: str | None = None) -> float:
    """The bend of the hit curve, from published curves: hit_scale."""
    rows = [
        r for r in read_rows("published_hits.csv", folder) if r["source"] != without
    ]
    fraction, hits = (
        np.array([float(r[key]) for r in rows]) for key in ("fraction", "hit_rate")
    )
    k = np.array([_working_set(row, folder) for row in rows])
    weights = _weights([row["source"] + row["model"] for row in rows])
    return _best_scale(fraction, k, hits, weights)


def scale_of_trace(trace: Trace, n_tokens: int | None = None) -> float:
    """The same from a recorded run: what the least recently used policy would hit."""
    picks = trace.picks[:n_tokens]
    _t, n_layers, k = picks.shape
    requests = decode_requests(picks, trace.n_experts)
    shares = np.array([s for s in TRACE_SHARES if s * trace.n_experts > k])
    slots = (shares * n_layers * trace.n_experts).astype(int)
    hits = [simulate(requests, "lru", int(n), shared=True).hit_rate for n in slots]
    working_set = np.full(len(shares), k / trace.n_experts)
    return _best_scale(shares, working_set, np.array(hits), np.ones(len(shares)))


def _best_scale(
    fraction: np.ndarray, k: np.ndarray, hits: np.ndarray, weights: np.ndarray
) -> float:
    scales = np.geomspace(*SCALES, 500)
    errors = [weights @ abs(hit_rate(fraction, k, s) - hits) for s in scales]
    return float(scales[int(np.argmin(errors))])


def _working_set(row: dict[str, str], folder: Path) -> float:
    sizes = sizes_of_published(row["model"], int(row["k"]), folder=folder)
    return sizes.k / sizes.n_experts


def fit(published: Published, hit_scale: float) -> Coefficients:
    """The coefficients that predict these runs best: reweighted least squares.

    Each step solves for the errors of the logarithm, linearised, where a run counts the
    less the further off it is; steps that do not help are halved.
    """
    target, weights = np.log(published.tok_s), _weights(published.sources)

    def errors(x: np.ndarray) -> np.ndarray:
        predicted = tokens_per_second(published.run, _coefficients(x, hit_scale))
        return np.log(predicted) - target

    def cost(x: np.ndarray) -> float:
        surprise = np.sum(((x - LIKELY) / WIDTH) ** 2)
        return float(np.sum(weights * np.hypot(errors(x), SMALL)) + PRIOR * surprise)

    x = LIKELY
    for _ in range(MAX_STEPS):
        step = _newton_step(x, errors, weights)
        while cost(np.minimum(x + step, MOST)) > cost(x) and abs(step).max() > TINY:
            step = step / 2
        x = np.minimum(x + step, MOST)
        if abs(step).max() <= TINY:
            break
    return _coefficients(x, hit_scale)


def _newton_step(
    x: np.ndarray, errors: Callable[[np.ndarray], np.ndarray], weights: np.ndarray
) -> np.ndarray:
    now, n = errors(x), len(x)
    slopes = [(errors(x + DELTA * axis) - now) / DELTA for axis in np.eye(n)]
    jacobian = np.stack(slopes, axis=1)  # (N, n)
    each = weights / np.hypot(now, SMALL)
    gradient = jacobian.T @ (each * now) + 2 * PRIOR * (x - LIKELY) / WIDTH**2
    curvature = (jacobian.T * each) @ jacobian + np.diag(2 * PRIOR / WIDTH**2)
    return -np.linalg.solve(curvature, gradient)


def _coefficients(x: np.ndarray, hit_scale: float) -> Coefficients:
    return Coefficients(*np.exp(x).tolist(), hit_scale)


def _weights(sources: Sequence[str]) -> np.ndarray:
    """A source with n rows counts as root n, each of its rows alike. Sum to 1."""
    names, counts = np.unique(sources, return_counts=True)
    weight = dict(zip(names.tolist(), counts**-0.5, strict=True))
    weights = np.array([weight[name] for name in sources])
    return weights / weights.sum()


# --- errors on held-out sources -------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """Each run predicted by a fit that saw nothing of its source."""

    published: Published
    predicted: np.ndarray  # (N,) tok/s
    spread: tuple[float, float]  # 10 % and 90 % quantiles of published over predicted

    @property
    def errors(self) -> np.ndarray:
        """Relative: 0.25 is a quarter too fast. Shapes: (N,)."""
        return self.predicted / self.published.tok_s - 1

    def median_error(self, kind: str | None = None) -> float:
        """Median of the absolute errors, of all or of one class of machine."""
        chosen = np.ones(len(self.errors), bool)
        if kind is not None:
            chosen = self.published.classes == kind
        return float(np.median(abs(self.errors[chosen])))

    def median_interval(self, n_draws: int = 2000) -> tuple[float, float]:
        """Where the median error lies for other sources of this kind: 90 % of draws.

        Sources, not rows, are drawn with replacement: rows of a source go together.
        """
        rng, sources = np.random.default_rng(0), self.published.sources
        groups = [abs(self.errors[sources == name]) for name in np.unique(sources)]
        draws = rng.integers(0, len(groups), (n_draws, len(groups)))
        medians = [np.median(np.concatenate([groups[i] for i in d])) for d in draws]
        low, high = np.quantile(medians, [0.05, 0.95])
        return float(low), float(high)


@cache
def held_out(folder: Path = DATA) -> HeldOut:
    """Leave one source out at a time: fit on all others, predict it."""
    published = read_published(folder)
    predicted = np.empty(len(published.tok_s))
    for source in np.unique(published.sources):
        mine = published.sources == source
        scale = fit_hits(folder, without=source)
        c = fit(published.take(~mine), scale)
        predicted[mine] = tokens_per_second(published.take(mine).run, c)
    low, high = np.quantile(published.tok_s / predicted, [0.1, 0.9])
    return HeldOut(published, predicted, (float(low), float(high)))
