"""When does reading ahead pay? A model of one layer that shares its bandwidth.

A layer computes for c seconds, and what it needs takes the disk d seconds. A predictor
names experts beforehand, so that reading goes on while the layer before computes: a
share r of the needed bytes (its recall), and w as much for nothing, b = r + w in all.
Computing and reading share memory, cores and a controller: each second of reading that
runs beside the computation costs it k seconds (the contention). Predicting takes o.

    serial      c + d
    read ahead  max(c + k b d, b d) + (1 - r) d + o
    it pays     r > max(k b, b - c/d) + o/d

**But:** a layer like every other, a disk that never gets slower by being asked for
more, demanded reads that wait for what was read ahead. *Taught in notebooks/09.*
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """What a layer takes without prediction. Any unit of time, the same for both."""

    compute: float  # c: while nothing is read
    read: float  # d: what it needs, from the disk and nothing else

    def __post_init__(self) -> None:
        if self.compute <= 0 or self.read <= 0:
            raise ValueError(f"{self}: both times must be positive")

    @property
    def serial(self) -> float:
        """One after the other."""
        return self.compute + self.read


@dataclass(frozen=True)
class Ahead:
    """A predictor, by shares of the bytes that a layer needs from the disk."""

    recall: float  # r: read ahead and needed, 0..1
    waste: float  # w: read ahead for nothing, from 0

    def __post_init__(self) -> None:
        if not 0 <= self.recall <= 1 or self.waste < 0:
            raise ValueError(f"{self}: recall is in 0..1, waste is not negative")

    @property
    def share(self) -> float:
        """b = r + w: all that is read ahead."""
        return self.recall + self.waste

    @property
    def precision(self) -> float:
        """r / b: the share of what is read ahead that is needed; 1 of nothing."""
        return self.recall / self.share if self.share else 1.0


def time_ahead(
    layer: Layer, ahead: Ahead, contention: float = 0.0, overhead: float = 0.0
) -> float:
    """A layer's time when the next one's experts are read while it computes.

    contention: k, seconds that computing loses in a second of reading beside it, 0..1.
                1 is what a serial pipeline has: nothing is won by overlap.
    overhead:   o, of predicting and handing reads over; the unit of the layer.
    """
    _check(contention, overhead)
    read_beside = ahead.share * layer.read
    # the computation, stretched; or the disk, if that has more to do than fits into it
    window = max(layer.compute + contention * read_beside, read_beside)
    return window + (1 - ahead.recall) * layer.read + overhead


def speedup(
    layer: Layer, ahead: Ahead, contention: float = 0.0, overhead: float = 0.0
) -> float:
    """Tokens a second with prediction, as a multiple of those without."""
    return layer.serial / time_ahead(layer, ahead, contention, overhead)


def time_overlapped(layer: Layer, window: float, contention: float = 0.0) -> float:
    """A layer's time without prediction: reads beside what does not need them.

    window: of the computing time, what can be done meanwhile, such as the shared
            expert. Every byte is needed, so nothing is wasted.
    Raises: ValueError if the window is larger than the computing time.
    """
    _check(contention, 0.0)
    if not 0 <= window <= layer.compute:
        raise ValueError(f"window={window} is outside 0..{layer.compute}")
    beside = min(layer.read, window / (1 - contention)) if contention < 1 else 0.0
    return layer.serial - (1 - contention) * beside


def needed_recall(
    layer: Layer, share: float, contention: float = 0.0, overhead: float = 0.0
) -> float:
    """The recall that a predictor which reads `share` ahead must beat to pay.

    The inequality of this file: r > max(k b, b - c/d) + o/d. The first term says that
    precision must beat contention, the second that waste must fit into the computation.
    """
    _check(contention, overhead)
    room = layer.compute / layer.read
    return max(contention * share, share - room) + overhead / layer.read


def pays(
    layer: Layer, ahead: Ahead, contention: float = 0.0, overhead: float = 0.0
) -> bool:
    """Whether prediction makes the layer faster."""
    return ahead.recall > needed_recall(layer, ahead.share, contention, overhead)


def best_speedup(ahead: Ahead, contention: float = 0.0) -> float:
    """The most that this predictor can give, on the machine that suits it best.

    That is one where the disk is done with what is read ahead when the computation is:
    with less to read there is less to win, with more the disk decides alone.
    """
    _check(contention, 0.0)
    if not ahead.share or contention >= ahead.precision:
        return 1.0
    read = 1 / (ahead.share * (1 - contention))  # for a computation of 1
    if math.isinf(read):  # a share too small to win anything
        return 1.0
    return speedup(Layer(1.0, read), ahead, contention)


def contention_from(layer: Layer, ahead: Ahead, measured: float) -> float:
    """The contention that makes the model give a measured speed-up.

    Raises: ValueError if none does: the figures do not belong together, or something
            else happened too.
    """
    beside = ahead.share * layer.read
    stretched = layer.serial / measured - (1 - ahead.recall) * layer.read
    found = (stretched - layer.compute) / beside if beside else -1.0
    if not 0 <= found <= 1 or stretched < beside:
        low, high = (speedup(layer, ahead, k) for k in (1.0, 0.0))
        raise ValueError(
            f"no contention gives {measured:.3f}: with this prediction the model goes "
            f"from {low:.3f} to {high:.3f}"
        )
    return found


def contention_of_slowdown(slowdown: float) -> float:
    """From how many times as long a computation takes while something reads beside it.

    It takes s times as long, so of each second beside reads 1 - 1/s is lost.
    """
    if slowdown <= 0:
        raise ValueError(f"slowdown={slowdown} must be positive")
    return max(0.0, 1 - 1 / slowdown)


def _check(contention: float, overhead: float) -> None:
    if not 0 <= contention <= 1 or overhead < 0:
        raise ValueError(
            f"contention={contention} is in 0..1, overhead={overhead} is not negative"
        )


# --- what others measured -------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """One published trial of prediction. Times in milliseconds of a layer."""

    who: str
    layer: Layer
    ahead: Ahead
    change: float  # of tokens a second, as published: -0.18 is 18 % slower
    source: str

    @property
    def measured(self) -> float:
        """The published speed-up."""
        return 1 + self.change


# flash-moe, M3 Max 48 GB, 4-bit, K=4: 4.28 ms a layer, 2.41 of them reading; the four
# experts of the token before, 25.6 % of them right.
FLASH_MOE = Published(
    "flash-moe, M3 Max",
    Layer(4.28 - 2.41, 2.41),
    Ahead(0.256, 1 - 0.256),
    -0.18,
    "danveloper/flash-moe, CLAUDE.md and its paper",
)
# The fork for the M5 Max 128 GB, same predictor: 12.5 -> 16.4 tokens a second of 60
# layers, with 0.87 ms to compute meanwhile. It says that 27 % were right, and that time
# spent on reads went from 0.71 to 0.24 ms; these two are not the same recall.
FORK_LAYER = Layer(0.87, 1000 / 12.5 / 60 - 0.87)
FORK_SOURCE = "gorroai/flash-moe, README and autoresearch/results.tsv, Exp9"
FORK_BY_HITS = Published(
    "fork, M5 Max, by hits", FORK_LAYER, Ahead(0.27, 0.73), 0.31, FORK_SOURCE
)
HIDDEN = 1 - 0.24 / 0.71
FORK_BY_TIME = Published(
    "fork, M5 Max, by time", FORK_LAYER, Ahead(HIDDEN, 1 - HIDDEN), 0.31, FORK_SOURCE
)
# ds4, M4 Max 36 GB: the disk idle for about 30 % of decoding; the next layer's router,
# four guesses: 46 % of the misses, 0.4 wasted reads for each useful one. The gain is
# the author's own A/B of this one change; #840 sums it up with others as +34 to +44 %.
DS4 = Published(
    "ds4, M4 Max",
    Layer(0.30, 0.70),  # shares of a token, not milliseconds
    Ahead(0.46, 0.4 * 0.46),
    0.052,
    "antirez/ds4 #849 and #840",
)
PUBLISHED = (FLASH_MOE, FORK_BY_HITS, FORK_BY_TIME, DS4)
