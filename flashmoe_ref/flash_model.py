"""Decoding with the feed-forward neurons on disk: every step of the paper's ladder.

A `Rung` says what is resident, predicted, kept, bundled and pooled; `FlashModel` runs
it for real and says what each token took: reads and bytes as the reader counted them,
seconds of reading, of arranging memory, and of computing.
Follows arXiv 2312.11514, section 3 and table 2. **But:** decoding, one token at a time
(the paper's prompt is processed densely too), and nothing is read ahead.
*Taught in notebooks/11.*
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import ConfigError
from .layers import AttentionState
from .neuron_store import (
    THREADS,
    NeuronReader,
    Pool,
    Reader,
    Rebuilt,
    allocate,
    write_stored,
)
from .relu_model import ReluModel, neurons_add
from .sparsity import Predictor, Window, loads, masked

TRUNK = "trunk.bin"  # embedding, attention and norms: what the naive rung reads too


@dataclass(frozen=True)
class Rung:
    """One way of running. The fields are the paper's steps, in its order."""

    name: str
    resident: float = 0.0  # share of the model in memory, while nothing is predicted
    predicts: bool = False  # read only neurons that the predictor names
    window: int = 0  # keep those of the last so many tokens
    bundled: bool = False  # row and column in one read
    pooled: bool = False  # one block of memory, delete by swap


def ladder(k: int = 5) -> tuple[Rung, ...]:
    """The steps of table 2, and the pool of section 3.3."""
    return (
        Rung("naive"),
        Rung("hybrid", resident=0.5),
        Rung("predictor", predicts=True),
        Rung("windowing", predicts=True, window=k),
        Rung("bundling", predicts=True, window=k, bundled=True),
        Rung("pool", predicts=True, window=k, bundled=True, pooled=True),
    )


@dataclass(frozen=True)
class TokenCost:
    """What one token took. Seconds; reads and bytes as the reader counted them."""

    reads: int
    bytes_read: int
    read_s: float
    memory_s: float  # window, deleting, making room
    compute_s: float  # all the rest
    resident: int  # neurons in memory afterwards, all layers


class WholeLayers:
    """Naive and hybrid: all neurons of every layer, the first of them resident."""

    def __init__(self, model: ReluModel, reader: NeuronReader, first: int) -> None:
        F, D = model.config.intermediate_size, model.config.hidden_size
        self.model, self.reader, self.first = model, reader, first
        self.read_in = allocate(F - first, D), allocate(F - first, D)
        self.memory_s = 0.0
        self.resident = first * model.config.num_hidden_layers

    def __call__(
        self, layer: int, x: np.ndarray, after: np.ndarray, h: np.ndarray
    ) -> np.ndarray:
        """Read the rest of the layer, then compute all of it."""
        w, first = self.model.layers[layer], self.first
        self.reader.tail(layer, first, self.read_in)
        there = neurons_add(h, w.up[:first], w.down[:first])
        return there + neurons_add(h, *self.read_in)


class PredictedNeurons:
    """Read what the predictor names and the window has not."""

    def __init__(
        self, model: ReluModel, reader: NeuronReader, predictor: Predictor, rung: Rung
    ) -> None:
        c = model.config
        self.reader, self.predictor, self.D = reader, predictor, c.hidden_size
        sizes = (c.intermediate_size, 2 * c.hidden_size)
        make = Pool if rung.pooled else Rebuilt
        self.rows = [make(*sizes) for _ in model.layers]
        self.windows = [Window(rung.window, sizes[0]) for _ in model.layers]
        self.memory_s = 0.0

    @property
    def resident(self) -> int:
        """Neurons in memory, all layers."""
        return sum(rows.n for rows in self.rows)

    def __call__(
        self, layer: int, x: np.ndarray, after: np.ndarray, h: np.ndarray
    ) -> np.ndarray:
        """Predict, evict, read, and compute with everything that is in memory."""
        wanted, rows = self.predictor.choose(layer, x, after)[0], self.rows[layer]
        start = time.perf_counter()
        load, drop = self.windows[layer].advance(wanted)
        rows.delete(drop)
        new = rows.append(load)
        self.memory_s += time.perf_counter() - start
        self.reader.neurons(layer, load, new)
        return neurons_add(h, rows.rows[:, : self.D], rows.rows[:, self.D :])


class FlashModel:
    """A ReLU model that decodes with its neurons on disk, one rung of the ladder.

    folder: where `write_neurons` and `write_trunk` have written.
    """

    def __init__(
        self,
        model: ReluModel,
        folder: str | Path,
        rung: Rung,
        predictor: Predictor | None = None,
        threads: int = THREADS,
        bypass_page_cache: bool = False,
    ) -> None:
        if rung.predicts != (predictor is not None):
            raise ConfigError(f"{rung.name}: predicts={rung.predicts}")
        self.model, self.rung = model, rung
        how = (threads, bypass_page_cache)
        self.neurons = NeuronReader(folder, model.config, rung.bundled, *how)
        self.trunk: Reader | None = None
        if rung.predicts:
            self.feed_forward = PredictedNeurons(model, self.neurons, predictor, rung)
        else:
            first = resident_neurons(model, rung.resident)
            self.feed_forward = WholeLayers(model, self.neurons, first)
        if not rung.predicts and rung.resident == 0:
            self.trunk = Reader([Path(folder) / TRUNK], *how)
            self.trunk_bytes = allocate(1, len(trunk_of(model)))
        self.state: list[AttentionState] = model.new_state()

    def step(self, token: int) -> tuple[np.ndarray, TokenCost]:
        """Decode one token. Shapes: -> logits (V,), and what it took."""
        before, memory_s = self._counted(), self.feed_forward.memory_s
        start = time.perf_counter()
        if self.trunk:
            self.trunk.read_range(0, 0, self.trunk_bytes)
        logits = self.model.forward([token], self.state, self.feed_forward)[0]
        total_s = time.perf_counter() - start
        reads, n_bytes, read_s = self._counted() - before
        memory_s = self.feed_forward.memory_s - memory_s
        rest_s = total_s - read_s - memory_s
        sizes = (int(reads), int(n_bytes), float(read_s), memory_s, float(rest_s))
        return logits, TokenCost(*sizes, self.feed_forward.resident)

    def _counted(self) -> np.ndarray:
        """Reads, bytes and seconds of both readers so far."""
        readers = [self.neurons.reader, *([self.trunk] if self.trunk else [])]
        rows = [
            (c.reads, c.bytes_read, c.read_s) for c in (r.counters for r in readers)
        ]
        return np.sum(rows, axis=0, dtype=np.float64)

    def evict(self) -> bool:
        """Drop what the system has cached of the files; whether nothing is left."""
        gone = self.neurons.reader.evict()
        return (self.trunk is None or self.trunk.evict()) and gone

    def close(self) -> None:
        """Close all files."""
        self.neurons.reader.close()
        if self.trunk:
            self.trunk.close()


def trunk_of(model: ReluModel) -> np.ndarray:
    """All weights but the neurons, end to end. Shapes: -> (values,) float32."""
    parts = [model.embedding, model.norm]
    for w in model.layers:
        parts += [w.norm_attention, w.qkv, w.out, w.norm_ffn]
    return np.concatenate([part.ravel() for part in parts])


def write_trunk(model: ReluModel, folder: str | Path) -> int:
    """Write what the naive rung reads beside the neurons. Returns the bytes."""
    return write_stored(Path(folder) / TRUNK, trunk_of(model))


def resident_neurons(model: ReluModel, share: float) -> int:
    """Neurons of each layer that are resident, so that `share` of the model is.

    The trunk comes first: all of it is needed for every token.
    """
    parts = model.parts()
    rest = share * sum(parts.values()) - (sum(parts.values()) - parts["feed-forward"])
    n_layers, F = len(model.layers), model.config.intermediate_size
    return int(np.clip(rest // (n_layers * model.config.neuron_bytes), 0, F))


def expected_bytes(model: ReluModel, rung: Rung, chosen: np.ndarray) -> np.ndarray:
    """The formula that stands beside the reader's count. Shapes: (L, T, F) -> (T,)."""
    parts, n_tokens = model.parts(), chosen.shape[1]
    if rung.predicts:
        return loads(chosen, rung.window).sum(axis=0) * model.config.neuron_bytes
    first = resident_neurons(model, rung.resident)
    rest = parts["feed-forward"] - first * len(model.layers) * model.config.neuron_bytes
    trunk = 0 if rung.resident else sum(parts.values()) - parts["feed-forward"]
    return np.full(n_tokens, rest + trunk)


def expected_of_text(
    model: ReluModel, rung: Rung, ids: Sequence[int], predictor: Predictor
) -> np.ndarray:
    """The same for a text, whose masks are found by running it in memory.

    Shapes: ids (T,) -> (T,).
    """
    feed_forward, log = masked(model, predictor, rung.window)
    model.forward(ids, model.new_state(), feed_forward)
    return expected_bytes(model, rung, np.array([chosen for chosen, _ in log]))
