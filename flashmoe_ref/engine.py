"""load(): a folder of files -> a model that runs, on one of two engines.

The engine is NumPy (compiled for the CPU with Numba) or MLX (Apple GPU, CUDA or CPU);
the experts are resident, streamed in place, or streamed from packed files. On one
engine all of these give the same logits to the bit; the engines agree up to rounding.
*Taught in notebooks/00 and 04.*
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import Self

import numpy as np

from .arrivals import Checks, FindBad, read_checksums
from .caching import Caching, make_caching
from .checkpoint import Checkpoint
from .config import ModelConfig
from .errors import ConfigError, NumericError, ReadError, RoutingError
from .experts import PACKED_FOLDER, ExpertFiles, experts_in_place, packed_experts
from .numpy_model import check_ids
from .report import Meter, Report, make_report
from .routing_cut import RoutingCut, make_cut
from .slots import MakeBank, SlotBank
from .streaming import Counters, ExpertStore

ENGINES = ("auto", "numpy", "mlx")
EXPERTS = ("stream", "packed", "resident")
PREFILL_CHUNK = 512  # tokens of a prompt processed at a time
# One for all models of a process: Numba's plainest pool of threads, which macOS has,
# ends the process when two threads enter it.
_one_at_a_time = RLock()


def load(
    path: str | Path,
    engine: str = "auto",
    experts: str = "stream",
    k: int | None = None,
    slots: int | None = None,
    threads: int = 4,
    compiled: bool = True,
    policy: str = "lru",
    budget: int | None = None,
    pin: int = 0,
    prefetch: str | None = None,
    profile: str | Path | np.ndarray | None = None,
    bypass_page_cache: bool = False,
    kept: str = "renormalized",
    mass: float | None = None,
    output_scale: Sequence[float] | None = None,
    guards: bool = True,
    verify_reads: bool = False,
) -> "Model":
    """Open a model folder for generation.

    engine:   "numpy", "mlx", or "auto": mlx where it has a GPU, else numpy.
    experts:  "stream" reads them in place from the checkpoint's own files, "packed"
              from its packed_experts folder, "resident" keeps all of them in memory.
    k:        experts per token; fewer than trained reads less and answers worse.
    slots:    experts kept in memory for each layer; None keeps none beyond the layer at
              hand and leaves caching to the operating system.
    threads:  threads that read.
    compiled: False runs the numpy engine without Numba: the specification, slowly.
    policy:   which expert goes when a slot is needed: "lru", "lfu", "fifo" or "clock".
    budget:   instead of slots: experts kept in memory for all layers together.
    pin:      experts of each layer (with budget: of all) that always stay, those used
              most in the profile.
    prefetch: read ahead what the next layer may need: "last-token", "frequency",
              "co-occurrence" or "look-ahead"; with a number of experts: "look-ahead:4".
    profile:  a recorded trace (.npz), or picks (T, L, K), to pin and predict by.
    bypass_page_cache: read past the operating system's cache; see `reading.py`.
    kept:     weights of the experts that a smaller k or mass keeps: "renormalized" to
              sum to 1 again, or "as-routed": as they are among the trained number.
    mass:     adaptive k: a token uses the fewest experts whose weights (among the
              trained number) sum to this much, and at most k.
    output_scale: factors (L,) of the routed experts' output in each layer, from
              `calibrate.calibrate_output_scale`; the shared expert is not scaled.
    guards:   refuse weights that hold NaN or infinity: dense ones now, experts as they
              are read. It takes 0.5 % of a token's time on the reduced model.
    verify_reads: compare packed experts with their checksums whenever they are read; a
              thread does 2 GB/s: a token of the reduced model takes a quarter longer.
    Raises: ConfigError, CheckpointError, NumericError or ReadError, in one line that
            says what to do.
    """
    _check_choice("engine", engine, ENGINES)
    _check_choice("experts", experts, EXPERTS)
    _check_switches(
        compiled=compiled,
        bypass_page_cache=bypass_page_cache,
        guards=guards,
        verify_reads=verify_reads,
    )
    checkpoint = replace(Checkpoint.open(path), guards=guards)
    config = checkpoint.config
    if k is not None:
        config = config.with_experts_per_token(k)
    cut = make_cut(
        config.num_experts_per_tok,
        checkpoint.config.num_experts_per_tok,
        config.num_hidden_layers,
        kept,
        mass,
        output_scale,
    )
    caching = make_caching(config, slots, budget, policy, pin, prefetch, profile)
    if experts == "resident":
        if caching.keeps or pin or prefetch or policy != "lru":
            raise ConfigError(
                "slots, budget, policy, pin and prefetch have no meaning with "
                "experts='resident': all are in memory"
            )
        caching = Caching(slots=config.num_experts)
    engine = _choose_engine(engine)
    files, make_bank = _expert_files(checkpoint, experts), _bank_maker(engine)
    checks = Checks(
        _finder(engine, compiled) if guards else None,
        _checksums(files) if verify_reads else None,
    )
    store = ExpertStore(
        files, config, make_bank, caching, threads, bypass_page_cache, checks
    )
    try:
        if experts == "resident":
            store.fill()
        runner = _build(engine, compiled, checkpoint, store, config, cut)
        checkpoint.check_unchanged()
    except BaseException:
        store.close()
        raise
    mode = {
        "engine": engine if compiled or engine == "mlx" else f"{engine}, not compiled",
        "experts": experts,
        "k": config.num_experts_per_tok,
        "trained k": checkpoint.config.num_experts_per_tok,
        **cut.in_words(),
        "bits": _bits(files),
        "slots": _slots_in_words(caching),
        "threads": threads,
    }
    if caching.keeps and experts != "resident":
        mode |= {"policy": policy}
    if pin:
        mode |= {"pinned": pin}
    if prefetch:
        mode |= {"prefetch": prefetch}
    if bypass_page_cache:
        mode |= {"page cache": f"bypassed{', with a copy' if store.copies else ''}"}
    if verify_reads:
        mode |= {"reads": "verified"}
    if not guards:
        mode |= {"guards": "off"}
    return Model(checkpoint, config, runner, store, mode)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(choices)}")


def _check_switches(**switches: bool) -> None:
    for name, value in switches.items():
        if not isinstance(value, bool | np.bool_):  # "off" would count as on
            raise ConfigError(f"{name}={value!r} must be True or False")


def _choose_engine(engine: str) -> str:
    has_mlx = find_spec("mlx") is not None
    if engine == "mlx" and not has_mlx:
        raise ConfigError(
            "engine='mlx': MLX is not installed here; "
            "install it with 'pip install mlx', or use engine='numpy'"
        )
    if engine != "auto":
        return engine
    if has_mlx:
        import mlx.core as mx

        if mx.default_device() == mx.Device(mx.gpu):
            return "mlx"
    return "numpy"


def _slots_in_words(caching: Caching) -> object:
    if caching.is_shared:
        return f"{caching.budget} for all layers"
    return "none (page cache)" if caching.slots is None else caching.slots


def _expert_files(checkpoint: Checkpoint, experts: str) -> ExpertFiles:
    if experts == "packed":
        return packed_experts(checkpoint.path / PACKED_FOLDER, checkpoint.config)
    return experts_in_place(checkpoint)


def _bank_maker(engine: str) -> MakeBank:
    if engine != "mlx":
        return SlotBank
    from .cuda_slots import CudaSlotBank, is_needed
    from .mlx_slots import allocate

    return CudaSlotBank if is_needed() else partial(SlotBank, allocate=allocate)


def _checksums(files: ExpertFiles) -> list[list[int]]:
    """Of every expert, by layer. Raises: ConfigError, CheckpointError."""
    if files.kind != "packed":
        raise ConfigError(
            "verify_reads: only packed experts have checksums; write them with "
            "'flashmoe pack', and use experts='packed' (--experts packed)"
        )
    return [read_checksums(file, files.n_experts) for file in files.files]


def _finder(engine: str, compiled: bool) -> FindBad:
    if engine == "numpy" and not compiled:
        from .arrivals import find_bad
    else:
        from .guard_kernels import find_bad
    return find_bad


def _build(
    engine: str,
    compiled: bool,
    checkpoint: Checkpoint,
    store: ExpertStore,
    config: ModelConfig,
    cut: RoutingCut,
) -> object:
    if engine == "mlx":
        from .mlx_model import MlxModel as Engine
    elif compiled and not cut.is_plain:
        from .compiled_cut import CutModel as Engine
    elif compiled:
        from .compiled_model import CompiledModel as Engine
    else:
        from .numpy_model import NumpyModel as Engine
    runner = Engine(checkpoint, store, config)
    if not cut.is_plain:
        runner.cut = cut
    return runner


def _bits(files: ExpertFiles) -> object:
    """Bits per weight of the experts; a list where layers or projections differ."""
    seen = set()
    for fmt in files.formats:
        widths = {bits for bits, _ in fmt.quantization.values()}
        seen |= widths or {8 * fmt.parts[0].dtype.itemsize}
    return seen.pop() if len(seen) == 1 else sorted(seen)


class Model:
    """A loaded model: its configuration, its engine, its experts and its tokenizer.

    Any number of threads may use one, each with states of its own: an engine computes
    from slots that the next request refills, so the others wait for each call.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        engine: object,
        store: ExpertStore,
        mode: dict[str, object],
    ) -> None:
        self.path = checkpoint.path
        self.checkpoint = checkpoint
        self.config = config  # num_experts_per_tok is the k in use
        self.engine = engine  # NumpyModel, CompiledModel or MlxModel
        self.store = store
        self.mode = mode
        self.meter = Meter()

    @cached_property
    def tokenizer(self):
        """The checkpoint's tokenizer. Raises: TokenizerError if files are missing."""
        from .tokenizer import Tokenizer

        return Tokenizer.from_dir(self.path)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other threads' calls waiting. Raises: ReadError if it is closed."""
        with _one_at_a_time:
            if self.store.is_closed:
                raise ReadError(f"{self.path}: this model is closed: load it again")
            yield

    def new_state(self):
        """The state before the first token."""
        with self.alone():
            return self.engine.new_state()

    def prefill(
        self, ids: Sequence[int], state: object, all_logits: bool = False
    ) -> np.ndarray:
        """Process a prompt in chunks. Returns logits (V,) of the last token, or (T, V).

        Raises: ConfigError for ids that the model cannot take, and for a state that an
        error left in the middle of a step; ReadError, NumericError.
        """
        rows = []
        with self.alone():
            check_ids(ids, state.n_tokens, self.config)  # before any is computed
            self.store.check_unchanged()
            start = time.perf_counter()
            for first in range(0, max(len(ids), 1), PREFILL_CHUNK):
                chunk = ids[first : first + PREFILL_CHUNK]
                rows.append(self._step(chunk, state, all_logits))
            self.meter.prompt_tokens += len(ids)
            self.meter.prefill_s += time.perf_counter() - start
        return np.concatenate(rows) if all_logits else rows[-1]

    def decode(self, token: int, state: object) -> np.ndarray:
        """Process one generated token. Returns logits (V,) of the next.

        Raises: ConfigError, ReadError, NumericError; see `prefill`.
        """
        with self.alone():
            start = time.perf_counter()
            logits = self._step([token], state)
            self.meter.generated_tokens += 1
            self.meter.decode_s += time.perf_counter() - start
        return logits

    def _step(
        self, ids: Sequence[int], state: object, all_logits: bool = False
    ) -> np.ndarray:
        """One forward call. What an error leaves of the state is not used again."""
        if not state.is_whole:
            raise ConfigError(
                "this state is unusable: an error or interrupt ended its last step in "
                "the middle; begin with new_state(), or restore a snapshot"
            )
        state.is_whole = False
        try:
            logits = self.engine.forward(ids, state, all_logits)
        except ConfigError:  # refused, before anything was changed
            state.is_whole = True
            raise
        except RoutingError as error:
            raise self._not_finite(f"{error}", ids, state) from None
        if not np.isfinite(logits).all():
            raise self._not_finite("the logits hold NaN or infinity", ids, state)
        state.is_whole = True
        return logits

    def _not_finite(self, what: str, ids: Sequence[int], state: object) -> NumericError:
        from .first_nan import first_nan, steps

        if self.mode["engine"] == "mlx":
            from .first_nan_mlx import steps
        place = first_nan(self.engine, ids, state, steps)
        found = f"the first is in {place}" if place else "not when computed again"
        return NumericError(
            f"{self.path}: {what} with engine {self.mode['engine']} ({found}); check "
            f"the files with 'flashmoe verify', and try the other engine"
        )

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each token of a text, from a fresh state.

        Shapes: ids (T,) -> (T, V) float32.
        """
        return self.prefill(ids, self.new_state(), all_logits=True)

    def report(self) -> Report:
        """What ran since loading, or since the last reset_report()."""
        return make_report(
            self.mode,
            self.meter,
            self.store.counters,
            self.checkpoint.dense_bytes + self.store.files.n_bytes,
            self.checkpoint.dense_bytes + self.store.n_bytes,
        )

    def reset_report(self) -> None:
        """Start counting afresh."""
        self.meter = Meter()
        self.store.counters = Counters()

    def close(self) -> None:
        """Stop the reading threads and close the files, once no call needs them."""
        with _one_at_a_time:
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
