"""The MLX engine: its blocks against layers.py, and what only it can get wrong.

Golden logits, mlx-lm and the gate (streamed equals resident) are tested for every
engine in test_golden.py, test_peer_mlx_lm.py and test_streaming.py.
"""

import mmap
import threading
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from comparing import assert_close, in_steps
from tiny import write_tiny

from flashmoe_ref import layers, numpy_model, quantize
from flashmoe_ref.checkpoint import Checkpoint
from flashmoe_ref.engine import Model, load
from flashmoe_ref.errors import ConfigError
from flashmoe_ref.trace import record

mx = pytest.importorskip("mlx.core")
from flashmoe_ref import mlx_layers, mlx_model, mlx_slots, mlx_weights  # noqa: E402

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 96, 50).tolist()
N_LAYERS, N_EXPERTS, K = 4, 8, 3
# With random weights a few tokens magnify rounding: against the same model in float64
# each engine is off by up to 7e-5, and by 3e-6 in the mean. A fault costs far more.
SEEDED_LIMIT = 5e-4


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu() -> Iterator[None]:
    """Float32 is compared, which the engine uses on the CPU only."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, eight experts of which three answer, 4 and 8 bits."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def open_mlx(folder: Path, **options: object) -> Model:
    return load(folder, engine="mlx", **options)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32)


def assert_same(got: mx.array, wanted: np.ndarray, limit: float = 2e-6) -> None:
    """Limit: a few roundings of numbers near 1; sums of hundreds take more."""
    got = np.array(got)
    assert got.shape == wanted.shape
    difference = np.abs(got - wanted)
    assert difference.max() <= limit, (
        f"max |difference| {difference.max():.2g}, mean {difference.mean():.2g}, "
        f"first at {np.unravel_index(np.argmax(difference > limit), got.shape)}"
    )


# --- blocks against the specification -------------------------------------------------


def test_rms_norm_and_l2_norm() -> None:
    x, weight = normal(5, 64), normal(64)
    x[1] *= 1e-4  # here the small constants show
    got = mlx_layers.rms_norm(mx.array(x), mx.array(weight), 1e-6)
    assert_same(got, layers.rms_norm(x, weight, 1e-6), 4e-6)
    assert_same(mlx_layers.l2_normalize(mx.array(x)), layers.l2_normalize(x))


def test_softplus_does_not_overflow() -> None:
    x = np.array([-200, -1, 0, 1, 200], np.float32)
    assert_same(mlx_layers.softplus(mx.array(x)), layers.softplus(x))


@pytest.mark.parametrize("offset", [0, 7, 200_000])
def test_rotate(offset: int) -> None:
    """Far out an angle in float32 is coarse: the engines must round it alike."""
    u = normal(3, 2, 32)  # (T, H, Dh)
    cos, sin = layers.rope_angles(np.arange(offset, offset + 3), 8, 1e7)
    periods = mlx_layers.rope_periods(8, 1e7)
    got = mlx_layers.rotate(mx.array(u.swapaxes(0, 1)[None]), periods, offset)
    assert_same(got[0].swapaxes(0, 1), layers.rotate(u, cos, sin))


@pytest.mark.parametrize(("t", "n"), [(1, 1), (1, 9), (4, 4), (4, 9)])
def test_attend(t: int, n: int) -> None:
    q, k, v = normal(t, 6, 16), normal(n, 2, 16), normal(n, 2, 16)
    got = mlx_layers.attend(*(mx.array(x.swapaxes(0, 1)[None]) for x in (q, k, v)))
    assert_same(got[0].swapaxes(0, 1), layers.attend(q, k, v))


def test_cache_of_keys_grows_and_copies() -> None:
    state = mlx_layers.AttentionState.empty(2, 4, mx.float32)
    k = normal(1, 2, 600, 4)
    for start, stop in ((0, 1), (1, 255), (255, 300), (300, 600)):
        part = mx.array(k[:, :, start:stop])
        state.append(part, 2 * part)
        if stop == 255:
            old = state.copy()
    assert state.k.shape[2] % mlx_layers.KV_STEP == 0
    assert_same(state.k[..., :600, :], k, 0)
    assert_same(state.v[..., :600, :], 2 * k, 0)
    old.append(mx.zeros((1, 2, 1, 4)), mx.zeros((1, 2, 1, 4)))
    assert old.n == 256
    assert_same(old.k[..., :255, :], k[:, :, :255], 0)
    assert_same(state.k[..., 255:256, :], k[:, :, 255:256], 0)


@pytest.mark.parametrize("t", [1, 2, 7])
def test_causal_conv(t: int) -> None:
    x, kernel, tail = normal(t, 10), normal(10, 4), normal(3, 10)
    got = mlx_layers.causal_conv(mx.array(x), mx.array(kernel.T), mx.array(tail))
    for ours, wanted in zip(got, layers.causal_conv(x, kernel, tail), strict=True):
        assert_same(ours, wanted)


@pytest.mark.parametrize("t", [1, 2, 70])
def test_delta_rule(t: int) -> None:
    hk, hv, d = 2, 6, 32
    s, v = normal(hv, d, d), normal(t, hv, d)
    q, k = (layers.l2_normalize(normal(t, hk, d)) for _ in range(2))
    log_decay, beta = -np.abs(normal(t, hv)), RNG.random((t, hv), np.float32)
    repeated = [np.repeat(x, hv // hk, axis=1) for x in (q, k)]
    wanted = layers.delta_rule(s, *repeated, v, log_decay, beta)
    arrays = [mx.array(x) for x in (s[None], q, k, v, np.exp(log_decay), beta)]
    o, new_s = mlx_layers.delta_rule(*arrays)
    assert_same(o, wanted[0], 2e-5)
    assert_same(new_s[0], wanted[1], 2e-5)


# --- weights --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, None])
@pytest.mark.parametrize("t", [1, mlx_weights.MANY_ROWS])
def test_linear(monkeypatch, bits: int | None, dtype: np.dtype, t: int) -> None:
    monkeypatch.setattr(mlx_weights, "BLOCK_VALUES", 128 * 5)  # blocks of five rows
    x, w = normal(t, 128), (normal(24, 128) / 8).astype(dtype)
    stored = w if bits is None else quantize.quantize(w, bits, 64)
    plain = w.astype(np.float32) if bits is None else quantize.dequantize(stored)
    matrix = mlx_weights.to_matrix(stored)
    assert_same(mlx_weights.widen(matrix, mx.float32), plain, 0)
    assert_same(mlx_weights.linear(mx.array(x), matrix), x @ plain.T, 1e-5)


def test_a_stack_gives_the_same_bits_and_merges_what_is_stored_alike() -> None:
    widths = [(8, 24), (8, 8), (4, 16), (4, 16), (None, 3)]
    parts = []
    for bits, rows in widths:
        w = normal(rows, 64)
        parts.append(w if bits is None else quantize.quantize(w, bits, 64))
    stack = mlx_weights.to_stack(parts)
    assert len(stack.matrices) == 3
    for t in (1, 20):
        x = mx.array(normal(t, 64))
        for got, part in zip(mlx_weights.linears(x, stack), parts, strict=True):
            wanted = mlx_weights.linear(x, mlx_weights.to_matrix(part))
            assert_same(got, np.array(wanted), 0)


def test_route_topk() -> None:
    logits = normal(5, 24)
    experts, weights = mlx_layers.route_topk(mx.array(logits), 6)
    wanted = layers.route_topk(logits, 6)
    np.testing.assert_array_equal(np.array(experts), wanted[0])
    assert_same(weights, wanted[1])


def test_equal_scores_go_to_the_lower_expert() -> None:
    experts, _ = mlx_layers.route_topk(mx.array([[0.0, 2.0, 0.0, 2.0, 0.0]]), 4)
    assert experts.tolist() == [[1, 3, 0, 2]]


def test_short_rows_are_decoded_first_on_cuda(monkeypatch) -> None:
    """MLX 0.32.4 multiplies them wrongly there, where there are several."""
    x, w = normal(3, 64), normal(24, 64)
    stored = quantize.quantize(w, 8, 64)
    matrix = mlx_weights.to_matrix(stored)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "quantized_matmul", lambda *_, **__: 1 / 0)
    got = mlx_weights.linear(mx.array(x), matrix)
    assert_same(got, x @ quantize.dequantize(stored).T, 1e-5)
    with pytest.raises(ZeroDivisionError):  # long rows, and a single one, are right
        mlx_weights.linear(mx.array(x[:1]), matrix)


# --- memory that threads read into ----------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint32, np.float32, np.float16, "bfloat16"])
def test_allocated_memory_is_shared(dtype: object) -> None:
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    array, view = mlx_slots.allocate((5, 3, 8), dtype)
    assert view.shape == (5, 24 * dtype.itemsize)
    assert not view.any()
    assert view.ctypes.data % mmap.PAGESIZE == 0  # copies out of the cache are fast
    values = (np.arange(120) % 100).astype(dtype).reshape(5, 3, 8)
    view[:] = values.reshape(5, -1).view(np.uint8)
    got = np.array(array.astype(mx.float32))
    np.testing.assert_array_equal(got, values.astype(np.float32))


def test_memory_that_is_not_shared_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(mlx_slots.np, "array", lambda a, copy: np.asarray(a).copy())
    with pytest.raises(ConfigError, match="use engine='numpy'"):
        mlx_slots.allocate((2, 8), np.dtype(np.float32))


# --- side by side ---------------------------------------------------------------------


def names_of(owner: object) -> list[str]:
    """Functions in the order of the source."""
    return [name for name, value in vars(owner).items() if callable(value)]


@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        (mlx_layers, layers),
        (mlx_model.MlxModel, numpy_model.NumpyModel),
        (mlx_layers.AttentionState, layers.AttentionState),
    ],
)
def test_same_functions_in_the_same_order(ours: object, reference: object) -> None:
    """The two engines read side by side."""
    own, theirs = names_of(ours), names_of(reference)
    common = [name for name in own if name in theirs and name[0] != "_"]
    assert common == [name for name in theirs if name in common]
    assert len(common) >= 2


# --- the model ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["mlx", "hf", "hf-per-expert"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_numpy(tmp_path: Path, layout: str, dtype: np.dtype, tied: bool) -> None:
    folder = write_tiny(tmp_path, layout, dtype=dtype, tie_word_embeddings=tied)
    with load(folder, engine="numpy", compiled=False) as model:
        wanted = model.logits(IDS)
    for slots in (None, N_EXPERTS):
        with open_mlx(folder, slots=slots) as model:
            for sizes in ([50], [7, 20] + [1] * 23):
                got = in_steps(model, IDS, sizes)
                assert_close(got, wanted, f"{sizes}", SEEDED_LIMIT)
                assert np.abs(got - wanted).mean() < 1e-5


@pytest.mark.parametrize("layout", ["mlx", "hf"])
@pytest.mark.parametrize("limit", ["COPY_BYTES", "BLOCK_BYTES"])
def test_bits_do_not_depend_on_copies_and_blocks(
    tmp_path: Path, monkeypatch, layout: str, limit: str
) -> None:
    folder = write_tiny(tmp_path, layout)
    sizes = [30] + [1] * 20
    with open_mlx(folder, experts="resident") as model:
        wanted = in_steps(model, IDS, sizes)
    monkeypatch.setattr(mlx_model, limit, 0)
    for slots in (None, K, 5, N_EXPERTS):
        with open_mlx(folder, slots=slots) as model:
            np.testing.assert_array_equal(in_steps(model, IDS, sizes), wanted)


def test_blocks_cover_all_rows_and_keep_slots_together(monkeypatch) -> None:
    monkeypatch.setattr(mlx_model, "BLOCK_BYTES", 100)
    for _ in range(50):
        slots = np.sort(RNG.integers(0, 12, RNG.integers(1, 40)))
        parts = list(mlx_model.blocks(slots, row_bytes=9, slot_bytes=11))
        assert [i for part in parts for i in range(len(slots))[part]] == list(
            range(len(slots))
        )
        for part in parts:
            own = slots[part]
            n_bytes = 9 * len(own) + 11 * (own[-1] - own[0] + 1)
            assert n_bytes <= 100 or own[0] == own[-1]
        for left, right in pairwise(parts):
            assert slots[left.stop - 1] < slots[right.start]


def test_one_wait_a_layer_and_one_for_the_logits(tiny: Path) -> None:
    with open_mlx(tiny) as model:
        state = model.new_state()
        model.prefill(IDS[:5], state)
        model.engine.n_syncs = 0
        for token in IDS[5:15]:
            model.decode(token, state)
        assert model.engine.n_syncs == 10 * (N_LAYERS + 1)


def test_resident_experts_need_one_wait_a_token(tiny: Path) -> None:
    with open_mlx(tiny, experts="resident") as model:
        state = model.new_state()
        model.prefill(IDS[:5], state)
        model.engine.n_syncs = 0
        model.reset_report()
        for token in IDS[5:15]:
            model.decode(token, state)
        assert model.engine.n_syncs == 10
        assert model.store.counters.hits == 10 * N_LAYERS * K
        assert model.store.counters.misses == 0


def test_resident_experts_give_the_same_bits_with_and_without_waits(tiny: Path) -> None:
    with open_mlx(tiny, experts="resident") as model:
        quick = in_steps(model, IDS, [1] * len(IDS))
        with record(model, times=False) as trace:  # Python needs the picks: it waits
            waiting = in_steps(model, IDS, [1] * len(IDS))
    np.testing.assert_array_equal(quick, waiting)
    assert trace.picks.shape == (len(IDS), N_LAYERS, K)


def test_resident_experts_after_an_interrupt(tiny: Path) -> None:
    """A cache that was cleared gives slots anew, so an expert may be in another."""
    with open_mlx(tiny, experts="resident") as model:
        wanted = in_steps(model, IDS, [1] * len(IDS))
        store = model.store
        store._changing = 1  # as an interrupt inside a request leaves it
        store.request(1, [5, 2, 7][:K]).wait()
        assert not store.is_resident
        np.testing.assert_array_equal(in_steps(model, IDS, [1] * len(IDS)), wanted)


def test_a_model_frees_its_memory_at_once(tiny: Path) -> None:
    with open_mlx(tiny) as model:
        model.decode(IDS[0], model.new_state())
        engine = weakref.ref(model.engine)
    del model
    assert engine() is None  # without the help of gc.collect()


def test_a_prompt_waits_between_waves_only(tiny: Path) -> None:
    for slots, n_waves in ((N_EXPERTS, 1), (4, 2), (K, 3)):
        with open_mlx(tiny, slots=slots) as model:
            model.prefill(IDS, model.new_state())
            assert model.store.counters.misses == N_LAYERS * N_EXPERTS
            assert model.engine.n_syncs == N_LAYERS * n_waves + 1


def test_no_pending_graph_refers_to_a_slot_that_is_refilled(tiny: Path) -> None:
    """Spoil every slot of the shared bank as soon as the store may refill it."""
    sizes = [30] + [1] * 20
    with open_mlx(tiny, experts="resident") as model:
        wanted = in_steps(model, IDS, sizes)
    with open_mlx(tiny) as model:
        store, request = model.store, model.store.request

        def spoil_and_request(layer: int, experts: list[int]) -> object:
            for views in store.bank(layer).views:
                for view in views:
                    view[:] = b"\xee" * len(view)
            return request(layer, experts)

        store.request = spoil_and_request
        np.testing.assert_array_equal(in_steps(model, IDS, sizes), wanted)


def test_snapshot_and_restore(tiny: Path) -> None:
    with open_mlx(tiny) as model:
        state = model.new_state()
        model.prefill(IDS[:20], state)
        snapshot, n_bytes = state.snapshot(), state.n_bytes
        first = [model.decode(token, state) for token in IDS[20:30]]
        for _ in range(2):  # a snapshot can be used again
            state.restore(snapshot)
            assert (state.n_tokens, state.n_bytes) == (20, n_bytes)
            again = [model.decode(token, state) for token in IDS[20:30]]
            np.testing.assert_array_equal(again, first)
        assert snapshot.n_tokens == 20


def test_bytes_of_a_state(tiny: Path) -> None:
    with open_mlx(tiny) as model:
        state, c = model.new_state(), Checkpoint.open(tiny).config
        delta = 3 * c.conv_dim + 6 * 32 * 32
        assert state.n_bytes == 4 * 3 * delta
        model.prefill(IDS, state)
        assert state.n_bytes == 4 * (3 * delta + 2 * mlx_layers.KV_STEP * 2 * 32)


def in_thread(function: Callable) -> object:
    """The result of a call in a new thread; raises what it raises."""
    result = []

    def call() -> None:
        try:
            result.append((function(), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    value, error = result[0]
    if error is not None:
        raise error
    return value


def test_any_thread_may_make_the_next_call(tiny: Path) -> None:
    with open_mlx(tiny) as model:
        wanted = in_steps(model, IDS, [10, 20] + [1] * 20)
    model = in_thread(lambda: open_mlx(tiny, slots=5))
    state = in_thread(model.new_state)
    rows = [model.engine.forward(IDS[:10], state, all_logits=True)]
    chunk = IDS[10:30]
    rows.append(in_thread(lambda: model.engine.forward(chunk, state, all_logits=True)))
    for i, token in enumerate(IDS[30:]):
        if i % 2:
            rows.append(model.decode(token, state)[None])
        else:
            snapshot = in_thread(state.snapshot)
            rows.append(in_thread(lambda t=token: model.decode(t, state))[None])
            state.restore(snapshot)
            rows[-1] = model.decode(token, state)[None]
    model.close()
    np.testing.assert_array_equal(np.concatenate(rows), wanted)


def test_a_gpu_would_compute_in_bfloat16(tiny: Path) -> None:
    """The same code with 16-bit activations, slowly on the CPU: dtypes stay in place.

    Limit: MLX sums in 16 bits on the CPU, and some tokens get other experts.
    """
    with open_mlx(tiny) as model:
        wanted = model.logits(IDS)
        model.engine.dtype = mx.bfloat16
        state = model.new_state()
        got = [model.engine.forward(IDS[:30], state, all_logits=True)]
        got += [model.decode(token, state)[None] for token in IDS[30:]]
        for layer in state.layers:
            is_delta = isinstance(layer, mlx_layers.DeltaState)
            dtypes = [array.dtype for array in layer.arrays]
            assert dtypes == [mx.bfloat16, mx.float32 if is_delta else mx.bfloat16]
        assert model.engine.layer(
            0, model.engine.embed(np.array([1])), state
        ).dtype == (mx.bfloat16)
    got = np.concatenate(got)
    assert got.dtype == np.float32
    assert np.abs(got - wanted).mean() < 0.3
