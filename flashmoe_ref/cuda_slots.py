"""Slots in the memory of an NVIDIA GPU: read into pinned memory, then copied over.

MLX hands out an array's memory to NumPy only after moving it into managed memory, whose
pages then travel one by one whenever the other side touches them. So nothing here asks
NumPy: a kernel of one line says where an array lies on the GPU, a thread reads a record
into its own pinned memory, and CUDA copies it from there to the slot. Threads call the
CUDA runtime, never MLX. **But:** one GPU. *Taught in notebooks/13.*

Source: CUDA runtime API, `cudaHostAlloc`, `cudaMemcpyAsync`.
"""

import ctypes
import threading
from collections.abc import Sequence
from math import gcd

import mlx.core as mx
import numpy as np

from .arrivals import FindBad, Floats
from .errors import ConfigError, ReadError
from .experts import ExpertFormat, Part
from .mlx_slots import DTYPES
from .slots import SlotBank

LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
HOST_TO_DEVICE = 1  # cudaMemcpyKind
NON_BLOCKING = 1  # cudaStreamNonBlocking: waits for no other stream
PAGE_BYTES = 4096  # what reads past the page cache may want offsets to divide by


class CudaSlotBank(SlotBank):
    """Memory for n_slots experts of one format on the GPU."""

    n_at_once = 1  # a record goes to its slot before this thread reads another

    def __init__(self, fmt: ExpertFormat, n_slots: int) -> None:
        self.format, self.n_slots = fmt, n_slots
        self.arrays = {
            part.name: mx.zeros((n_slots, *part.shape), DTYPES[part.dtype.name])
            for part in fmt.parts
        }
        mx.eval(self.arrays)
        self.addresses = [device_address(array) for array in self.arrays.values()]
        self.views = Staging(fmt)
        self.granules = self.views.granules

    def find_bad(self, find: FindBad, slots: Sequence[int]) -> tuple[int, int] | None:
        """NaN or infinity in the record that this thread has just read."""
        return find(self.views.own().floats, [0])

    def arrived(self, slot: int) -> None:
        """Copy what this thread has read to its slot, and wait until it is there.

        Raises: ReadError if CUDA refuses.
        """
        own = self.views.own()
        for address, part, view in zip(
            self.addresses, self.format.parts, own.addresses, strict=True
        ):
            own.copy(address + slot * part.n_bytes, view, part.n_bytes)
        own.wait()


class Staging:
    """Pinned memory for one record a thread; any slot's views are the thread's own."""

    def __init__(self, fmt: ExpertFormat) -> None:
        self._parts, sizes = fmt.parts, [part.n_bytes for part in fmt.parts]
        starts = np.cumsum([0, *sizes[:-1]])
        self.granules = [
            gcd(PAGE_BYTES, int(start), size)
            for start, size in zip(starts, sizes, strict=True)
        ]
        self._threads = threading.local()

    def own(self) -> "Pinned":
        """This thread's memory, made when first asked for."""
        if not hasattr(self._threads, "pinned"):
            self._threads.pinned = Pinned(self._parts)
        return self._threads.pinned

    def __getitem__(self, slot: int) -> list[memoryview]:
        """Where this thread reads the parts of a record to."""
        return self.own().views


class Pinned:
    """One record's pinned memory and a stream to copy it with."""

    def __init__(self, parts: Sequence[Part]) -> None:
        sizes = [part.n_bytes for part in parts]
        self._cuda, n_bytes = runtime(), sum(sizes)
        self._memory, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        _check(
            self._cuda.cudaHostAlloc(
                ctypes.byref(self._memory), ctypes.c_size_t(n_bytes), 0
            ),
            f"{n_bytes:,} bytes of pinned memory cannot be had",
        )
        _check(
            self._cuda.cudaStreamCreateWithFlags(
                ctypes.byref(self._stream), NON_BLOCKING
            ),
            "a stream cannot be made",
        )
        start = self._memory.value
        whole = memoryview((ctypes.c_uint8 * n_bytes).from_address(start)).cast("B")
        self.views, self.addresses, at = [], [], 0
        for size in sizes:
            self.views.append(whole[at : at + size])
            self.addresses.append(start + at)
            at += size
        memory = [np.frombuffer(view, np.uint8)[None] for view in self.views]
        self.floats = Floats(parts, memory)  # of one slot

    def copy(self, target: int, source: int, n_bytes: int) -> None:
        """Start to copy pinned bytes to an address on the GPU."""
        error = self._cuda.cudaMemcpyAsync(
            ctypes.c_void_p(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(n_bytes),
            HOST_TO_DEVICE,
            self._stream,
        )
        _check(error, "an expert cannot be copied to the GPU")

    def wait(self) -> None:
        """Until all copies are done."""
        error = self._cuda.cudaStreamSynchronize(self._stream)
        _check(error, "an expert did not reach the GPU")

    def __del__(self) -> None:
        if self._memory:
            self._cuda.cudaFreeHost(self._memory)
        if self._stream:
            self._cuda.cudaStreamDestroy(self._stream)


def _check(error: int, what: str) -> None:
    if error:
        raise ReadError(f"{what} (CUDA error {error}); use fewer slots or threads")


def runtime() -> ctypes.CDLL:
    """The CUDA runtime that MLX has loaded. Raises: ConfigError if there is none."""
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ConfigError(
        f"none of {', '.join(LIBRARIES)} can be loaded, which slots on a GPU need; "
        f"install mlx[cuda13], or use engine='numpy'"
    )


def device_address(array: mx.array) -> int:
    """Where an evaluated array lies in the GPU's memory.

    A kernel gets the address as its argument and writes it down; asking NumPy would
    move the array into managed memory.
    """
    kernel = mx.fast.cuda_kernel(
        name="address_of",
        input_names=["array"],
        output_names=["address"],
        source="address[0] = (unsigned long long) array;",
    )
    one = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
    (address,) = kernel(
        inputs=[array], output_shapes=[(1,)], output_dtypes=[mx.uint64], **one
    )
    return address.item()


def is_needed() -> bool:
    """Whether MLX computes on a GPU with memory of its own."""
    return mx.default_device() == mx.gpu and mx.cuda.is_available()
