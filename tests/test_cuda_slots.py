"""Slots on a GPU, with a stand-in for CUDA: the CPU's memory plays the GPU's.

With the real thing, `python -m tests.benchmarks gpu` asks the same.
"""

import ctypes
import gc
import threading
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny

from flashmoe_ref import load
from flashmoe_ref.errors import ConfigError, ReadError

cuda_slots = pytest.importorskip("flashmoe_ref.cuda_slots")
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


class Runtime:
    """Does at once what CUDA does later; counts what is held."""

    def __init__(self) -> None:
        self.buffers, self.streams, self.copies = {}, 0, 0
        self.fails: str | None = None

    def cudaHostAlloc(self, pointer, size, flags) -> int:
        buffer = ctypes.create_string_buffer(size.value)
        pointer._obj.value = ctypes.addressof(buffer)
        self.buffers[pointer._obj.value] = buffer
        return 2 if self.fails == "memory" else 0

    def cudaStreamCreateWithFlags(self, pointer, flags) -> int:
        assert flags == 1
        self.streams += 1
        pointer._obj.value = self.streams
        return 0

    def cudaMemcpyAsync(self, target, source, n, kind, stream) -> int:
        assert kind == 1 and stream.value
        ctypes.memmove(target.value, source.value, n.value)
        self.copies += 1
        return 700 if self.fails == "copy" else 0

    def cudaStreamSynchronize(self, stream) -> int:
        return 0

    def cudaFreeHost(self, pointer) -> int:
        del self.buffers[pointer.value]
        return 0

    def cudaStreamDestroy(self, stream) -> int:
        self.streams -= 1
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    fake = Runtime()
    monkeypatch.setattr(cuda_slots, "runtime", lambda: fake)
    monkeypatch.setattr(cuda_slots, "is_needed", lambda: True)
    on_cpu = lambda array: np.array(array.view(cuda_slots.mx.uint8), copy=False)  # noqa: E731
    monkeypatch.setattr(cuda_slots, "device_address", lambda a: on_cpu(a).ctypes.data)
    return fake


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("cuda") / "model", "mlx")


@pytest.mark.parametrize("options", [{}, {"slots": 5}, {"slots": 6, "threads": 2}])
def test_streamed_equals_resident(
    options: dict, folder: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(folder, engine="mlx", **options) as model:
        model.store.inline_bytes = 0  # so that threads read
        assert isinstance(model.store.bank(0), cuda_slots.CudaSlotBank)
        streamed = model.logits(IDS)
    assert runtime.copies
    monkeypatch.setattr(cuda_slots, "is_needed", lambda: False)
    with load(folder, engine="mlx", experts="resident") as model:
        np.testing.assert_array_equal(model.logits(IDS), streamed)


def test_pinned_memory_is_one_record_a_thread_and_given_back(
    folder: Path, runtime: Runtime
) -> None:
    def use_two_threads() -> None:
        with load(folder, engine="mlx", slots=5) as model:
            staging = model.store.bank(0).views
            first, seen = staging.own(), []
            assert staging.own() is first
            thread = threading.Thread(target=lambda: seen.append(staging.own()))
            thread.start()
            thread.join()
            assert seen[0] is not first
            sizes = [part.n_bytes for part in model.store.bank(0).format.parts]
            assert [len(view) for view in staging[3]] == sizes
            assert len(runtime.buffers) == runtime.streams == 2

    use_two_threads()
    gc.collect()
    assert not runtime.buffers and not runtime.streams


@pytest.mark.parametrize("what", ["memory", "copy"])
def test_what_cuda_refuses_is_one_line(
    what: str, folder: Path, runtime: Runtime
) -> None:
    runtime.fails = what
    with load(folder, engine="mlx", slots=5) as model:
        with pytest.raises(ReadError, match=r"CUDA error \d+\); use fewer slots"):
            model.logits(IDS)
        runtime.fails = None
        assert np.isfinite(model.logits(IDS)).all()  # nothing half is kept


def test_without_the_runtime_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_slots, "LIBRARIES", ("libno-such.so",))
    with pytest.raises(ConfigError, match="can be loaded, which slots on a GPU need"):
        cuda_slots.runtime()
