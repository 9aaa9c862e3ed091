"""Experts mapped into memory: no reads, no slots, pages come when they are touched.

The other way to trust the page cache, and what engines that `mmap` a model do. Each
projection of a layer is one array over the file; the kernel that multiplies by an
expert waits for its pages, 4 KB or a read-ahead window at a time. For comparison with
`streaming.py`, whose interface the store has. **But:** NumPy engine and stacked experts
only; a vanished file ends the process (SIGBUS) where a read gives an error.
*Taught in notebooks/08.*
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .checkpoint import Checkpoint
from .compiled_model import CompiledModel
from .config import ModelConfig
from .engine import Model
from .errors import ConfigError, ReadError
from .experts import ExpertFiles, ExpertFormat, experts_in_place
from .headers import stamp
from .quantize import QuantizedMatrix
from .recording import SILENT
from .streaming import Counters, Ticket


class MappedBank:
    """All experts of a layer: arrays over the file instead of memory that is filled."""

    def __init__(self, files: ExpertFiles, layer: int) -> None:
        self.format: ExpertFormat = files.formats[layer]
        self.arrays = {}
        for run in files.runs[layer]:
            part, (file, first) = self.format.parts[run.first], run.places[0]
            stacked = tuple(
                (file, first + e * run.n_bytes) for e in range(files.n_experts)
            )
            if run.last != run.first + 1 or run.places != stacked:
                raise ConfigError(
                    f"{files.files[file]}: the experts of layer {layer} are not "
                    f"stacked, so they cannot be mapped; 'flashmoe convert' stacks them"
                )
            # Copy-on-write, so that kernels take it as any array; nothing is written.
            self.arrays[part.name] = np.memmap(
                files.files[file],
                part.dtype,
                "c",
                first,
                (files.n_experts, *part.shape),
            )

    def matrix(self, projection: str) -> np.ndarray | QuantizedMatrix:
        """A projection of all experts. Shapes: (E, out, in), perhaps quantized."""
        return self.format.matrix(self.arrays, projection)


class MappedStore:
    """An `ExpertStore` in which expert e is always in slot e, and nothing is read."""

    def __init__(self, files: ExpertFiles, config: ModelConfig) -> None:
        self.files = files
        self.capacity = config.num_experts
        self.n_bytes = 0  # of our own memory
        self.counters = Counters()
        self.recorder = SILENT
        self.predictor = None  # nothing is read ahead
        self.is_closed = False
        self._stamps = {path: stamp(path, path) for path in files.files}
        n_layers = range(config.num_hidden_layers)
        self._banks = [MappedBank(files, layer) for layer in n_layers]

    def bank(self, layer: int) -> MappedBank:
        """A layer's experts."""
        return self._banks[layer]

    def request(self, layer: int, experts: Sequence[int]) -> Ticket:
        """Nothing to do: pages come when the kernel touches them."""
        self.recorder.requested(experts, [])
        return Ticket(list(experts))

    def check_unchanged(self) -> None:
        """Raises: ReadError if a file was replaced or written to since it was mapped.

        DIFFERS: an `ExpertStore` may let its files be replaced, it has them open.
        """
        for path, before in self._stamps.items():
            if not path.exists() or stamp(path, path) != before:
                raise ReadError(
                    f"{path}: was changed while it was mapped; load the model again"
                )

    def close(self) -> None:
        """Forget the mapping; memory is unmapped when the last array is gone."""
        self.is_closed = True
        self._banks = []


def load_mapped(path: str | Path, k: int | None = None) -> Model:
    """Open a model folder with its experts mapped; numpy engine.

    Raises: ConfigError where experts are not stacked; else as `engine.load`.
    """
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    if k is not None:
        config = config.with_experts_per_token(k)
    store = MappedStore(experts_in_place(checkpoint), config)
    mode = {
        "engine": "numpy",
        "experts": "mapped",
        "k": config.num_experts_per_tok,
        "trained k": checkpoint.config.num_experts_per_tok,
    }
    runner = CompiledModel(checkpoint, store, config)
    return Model(checkpoint, config, runner, store, mode)
