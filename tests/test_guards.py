"""NaN and infinity never pass for numbers: in weights, in experts read, in logits."""

import re
import shutil
from math import prod

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tally import count
from tiny import write_tiny

from flashmoe_ref import guard_kernels
from flashmoe_ref.arrivals import Floats, find_bad
from flashmoe_ref.checkpoint import Checkpoint
from flashmoe_ref.engine import load
from flashmoe_ref.errors import NumericError, RoutingError
from flashmoe_ref.experts import KINDS, PROJECTIONS, Part, experts_in_place
from flashmoe_ref.guards import EXPONENTS, check_routing, first_bad
from flashmoe_ref.mapped import load_mapped
from flashmoe_ref.numpy_model import NumpyModel

N_LAYERS, N_EXPERTS, K = 4, 8, 3
DTYPES = [np.dtype(name) for name in ("float16", "float32", ml_dtypes.bfloat16)]
BAD = [np.nan, -np.nan, np.inf, -np.inf]
IDS = np.random.default_rng(2).integers(0, 96, 20).tolist()


def write_value(path, offset, value, dtype):
    """Overwrite one number of a file, or several."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(np.array(value, dtype).tobytes())


def spoil(folder, name, value=np.nan, at=None):
    """Overwrite number `at` of a tensor, or all of it, by its canonical name."""
    info = Checkpoint.open(folder).tensors[name]
    if at is None:
        write_value(info.file, info.offset, np.full(info.shape, value), info.dtype)
    else:
        offset = info.offset + at * info.dtype.itemsize
        write_value(info.file, offset, value, info.dtype)


# --- the bits -------------------------------------------------------------------------


@given(dtype=st.sampled_from(DTYPES), bits=st.binary(min_size=4, max_size=400))
@settings(derandomize=True)
def test_the_exponent_tells_what_numpy_tells(dtype, bits):
    values = np.frombuffer(bits[: len(bits) // 4 * 4], dtype)
    bad = np.flatnonzero(~np.isfinite(values.astype(np.float64)))
    assert first_bad(values) == (bad[0] if bad.size else None)
    count("weights, numbers with random bits", values.size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bad_value_among_many_is_found(dtype):
    values = np.zeros((7, 30_000), dtype)  # several blocks
    assert first_bad(values) is None
    values[:] = np.finfo(dtype).max if dtype.kind == "f" else ml_dtypes.finfo(dtype).max
    assert first_bad(values) is first_bad(-values) is None
    for value in BAD:
        for at in (0, 65_535, 65_536, values.size - 1):
            values.flat[at] = value
            assert first_bad(values) == at
            values.flat[at] = -1


def test_what_is_no_float_has_no_nan():
    assert first_bad(np.full(9, 0xFFFF_FFFF, np.uint32)) is None


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    dtypes=st.lists(st.sampled_from([*DTYPES, np.dtype(np.uint32)]), min_size=1),
    sizes=st.integers(1, 40),
    n_bad=st.integers(0, 2),
    rng=st.randoms(use_true_random=False),
)
def test_compiled_and_plain_find_the_same_in_slots(dtypes, sizes, n_bad, rng):
    n_slots = 5
    parts = [Part("p", (sizes + i,), d, 0) for i, d in enumerate(dtypes)]
    memory = [
        np.frombuffer(rng.randbytes(n_slots * prod(p.shape) * 4), np.uint8)
        .reshape(n_slots, -1)[:, : p.shape[0] * p.dtype.itemsize]
        .copy()
        for p in parts
    ]
    for part, block in zip(parts, memory, strict=True):
        if part.dtype.name in EXPONENTS:  # clear the lowest bit of each exponent
            mask, integer = EXPONENTS[part.dtype.name]
            block.view(integer)[:] &= integer(~(mask & -mask) & np.iinfo(integer).max)
    floats = Floats(parts, memory)
    slots = rng.sample(range(n_slots), 3)
    finders = (find_bad, guard_kernels.find_bad)
    assert [find(floats, slots) for find in finders] == [None, None]
    wanted = set()
    for _ in range(n_bad * bool(floats.numbers)):
        number, slot = rng.choice(floats.numbers), rng.randrange(n_slots)
        values = memory[number][slot].view(parts[number].dtype)
        values[rng.randrange(values.size)] = rng.choice(BAD)
        if slot in slots:
            wanted.add((slots.index(slot), number))
    for find in finders:
        found = find(floats, slots)
        assert found in wanted if wanted else found is None
    count("experts in slots, with or without NaN")


# --- dense weights, at load -----------------------------------------------------------

LAYOUTS = {
    "mlx": {},
    "float32": {"dtype": np.float32},
    "hf": {"layout": "hf"},
    "float16": {"layout": "hf-per-expert", "dtype": np.float16},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dense_tensor_is_looked_at(layout, tmp_path):
    folder = write_tiny(tmp_path / "m", **LAYOUTS[layout])
    rng, checkpoint = np.random.default_rng(3), Checkpoint.open(folder)
    names = [
        name
        for name, info in checkpoint.tensors.items()
        if ".mlp.experts." not in name and info.dtype.name in EXPONENTS
    ]
    assert len(names) > 50
    names = names if layout in ("mlx", "hf") else names[::4]  # to save time
    for i, name in enumerate(names):
        info = checkpoint.tensors[name]
        at, value = int(rng.integers(prod(info.shape))), BAD[i % len(BAD)]
        place = info.offset + at * info.dtype.itemsize
        before = np.fromfile(info.file, info.dtype, 1, offset=place)
        write_value(info.file, place, value, info.dtype)
        index = np.unravel_index(at, info.shape)
        with pytest.raises(NumericError) as caught:
            NumpyModel(checkpoint, None, checkpoint.config)
        text = str(caught.value)
        assert text.startswith(f"{info.file}: ") and f"{info.name!r}" in text
        assert f"value {tuple(map(int, index))} is {np.array(value, info.dtype)}" in (
            text
        )
        if name.startswith("layers."):
            _, layer, module = name.split(".", 2)
            assert f"layer {layer}, {module}: " in text
        write_value(info.file, place, before[0], info.dtype)
        count("weights, tensors with NaN or infinity")
    NumpyModel(checkpoint, None, checkpoint.config)


@pytest.mark.parametrize(
    "name",
    [
        "embed_tokens.biases",
        "layers.2.linear_attn.conv1d.weight",
        "layers.1.mlp.gate.scales",
        "layers.3.self_attn.k_norm.weight",
        "norm.weight",
    ],
)
def test_load_refuses_them_on_every_engine(engine, spoiled, name):
    spoil(spoiled, name, -np.inf, at=5)
    module = re.escape(name.split(".", 2)[-1] if name.startswith("layers") else name)
    with pytest.raises(NumericError, match=rf"\.safetensors: .*{module}.* is -inf"):
        load(spoiled, **engine)
    with load(spoiled, guards=False, **engine) as model:
        assert model.report().mode["guards"] == "off"


def test_mapped_experts_do_not_spare_dense_weights(spoiled):
    spoil(spoiled, "lm_head.scales")
    with pytest.raises(NumericError, match="lm_head"):
        load_mapped(spoiled)


# --- experts, on arrival --------------------------------------------------------------


def spoil_expert(folder, source, layer, expert, part, at=0, value=np.nan):
    """Overwrite number `at` of a part of an expert; returns the file and the offset."""
    checkpoint = Checkpoint.open(folder)
    if source == "packed":
        from flashmoe_ref.experts import packed_experts

        files = packed_experts(folder / "packed_experts", checkpoint.config)
    else:
        files = experts_in_place(checkpoint)
    parts = files.formats[layer].parts
    number = [p.name for p in parts].index(part)
    run = next(r for r in files.runs[layer] if r.first <= number < r.last)
    file, offset = run.places[expert]
    start = offset + sum(p.n_bytes for p in parts[run.first : number])
    dtype = parts[number].dtype
    write_value(files.files[file], start + at * dtype.itemsize, value, dtype)
    return files.files[file], start


@pytest.mark.parametrize("source", ["stream", "packed"])
@pytest.mark.parametrize("n_inline", [0, 1 << 30])
def test_an_expert_with_nan_is_never_served(engine, spoiled, source, n_inline):
    parts = [f"{p}.{kind}" for p in PROJECTIONS for kind in KINDS[1:]]
    originals = {p: p.read_bytes() for p in spoiled.rglob("*") if p.is_file()}
    with load(spoiled, experts=source, slots=K, **engine) as model:
        store = model.store
        store.inline_bytes = n_inline
        for i, part in enumerate(parts):
            args = spoiled, source, 2, 5, part
            file, start = spoil_expert(*args, i * 7, BAD[i % 4])
            with pytest.raises(NumericError) as caught:
                store.request(2, [1, 5, 0]).wait()
            text = str(caught.value)
            assert f"{file}: NaN or infinity in {part} of expert 5 of layer 2" in text
            assert f"bytes from {start:,};" in text
            kept = set(store._caches[2].slots)
            assert 5 not in kept  # nor is what came along with it trusted
            with pytest.raises(NumericError):  # also when asked again
                store.request(2, [5]).wait()
            store.request(2, [1, 0, 3]).wait()  # the others are as good as before
            file.write_bytes(originals[file])
            count("experts with NaN or infinity")
        store.request(2, [1, 5, 0]).wait()


@pytest.mark.parametrize("layout", ["hf", "hf-per-expert"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_matrices_are_looked_at_where_not_quantized(tmp_path, layout, dtype):
    folder = write_tiny(tmp_path / "m", layout=layout, dtype=dtype)
    file, start = spoil_expert(
        folder, "stream", 1, 6, "up_proj.weight", 64 * 64 - 1, np.inf
    )
    with load(folder, engine="numpy") as model:
        model.store.request(1, [0, 1, 2]).wait()
        words = f"up_proj.weight of expert 6 of layer 1, in the .* from {start:,}"
        with pytest.raises(NumericError, match=f"{re.escape(str(file))}.*{words}"):
            model.store.request(1, [6, 0, 1]).wait()


@pytest.mark.parametrize("more", [{"experts": "resident"}, {"slots": 5, "pin": 1}])
def test_experts_that_stay_are_refused_at_load(spoiled, more):
    picks = np.full((4, N_LAYERS, K), 5)
    profile = {"profile": picks} if "pin" in more else {}
    spoil_expert(spoiled, "stream", 3, 5, "gate_proj.biases")
    with pytest.raises(NumericError, match="expert 5 of layer 3"):
        load(spoiled, engine="numpy", **more, **profile)
    load(spoiled, engine="numpy", guards=False, **more, **profile).close()


def test_an_expert_read_ahead_with_nan_is_refused_when_it_is_needed(spoiled):
    spoil_expert(spoiled, "packed", 1, 4, "down_proj.scales")
    options = {"experts": "packed", "slots": 5, "prefetch": "last-token"}
    with load(spoiled, engine="numpy", **options) as model:
        store = model.store
        store.predictor.after = lambda *_: [4, 5, 6]
        store.prefetch(0, [0, 1, 2])
        store.request(2, [0, 1, 2]).wait()  # nobody needs it here
        with pytest.raises(NumericError, match="expert 4 of layer 1"):
            store.request(1, [4, 5, 6]).wait()


def test_experts_read_together_are_each_looked_at(tmp_path, monkeypatch):
    """As many at once as the cache holds; the last of several rounds too."""
    monkeypatch.setattr("flashmoe_ref.slots.CACHE_BYTES", 40_000)
    folder = write_tiny(tmp_path / "m", num_experts_per_tok=8)
    for expert in range(N_EXPERTS):
        copy = shutil.copytree(folder, tmp_path / f"{expert}")
        spoil_expert(copy, "stream", 0, expert, "up_proj.scales", 3)
        with load(copy, engine="numpy") as model:
            assert model.store.bank(0).n_at_once == 5
            with pytest.raises(NumericError, match=f"expert {expert} of layer 0"):
                model.store.request(0, range(8)).wait()


def test_without_guards_nothing_is_looked_at(engine, spoiled):
    for expert in range(N_EXPERTS):
        spoil_expert(spoiled, "stream", 1, expert, "up_proj.scales")
    with load(spoiled, guards=False, **engine) as model:
        model.store.request(1, [0, 1, 2]).wait()
        with pytest.raises(NumericError, match=r"logits|router"):  # but never data
            model.logits(IDS)


# --- activations ----------------------------------------------------------------------

ORIGINS = {
    "embed_tokens.biases": "embed_tokens",
    "layers.1.input_layernorm.weight": "layer 1, norm (input_layernorm)",
    "layers.2.linear_attn.out_proj.scales": "layer 2, mixer (linear_attn)",
    "layers.0.linear_attn.A_log": "layer 0, mixer (linear_attn)",
    "layers.3.self_attn.q_proj.biases": "layer 3, mixer (self_attn)",
    "layers.1.post_attention_layernorm.weight": (
        "layer 1, norm (post_attention_layernorm)"
    ),
    "layers.3.mlp.gate.scales": "layer 3, router (mlp.gate)",
    "layers.2.mlp.shared_expert.down_proj.scales": (
        "layer 2, shared expert (mlp.shared_expert)"
    ),
    "norm.weight": "the last norm",
    "lm_head.biases": "lm_head",
}


def fails_in(model, place):
    """A prompt, a prompt of one token, and a token: all name this place."""
    words = re.escape(f"(the first is in {place}") if isinstance(place, str) else place
    for ids in (IDS, IDS[:1]):
        with pytest.raises(NumericError, match=words):
            model.prefill(ids, model.new_state())
    with pytest.raises(NumericError, match=words):
        model.decode(7, model.new_state())
    count("models whose activations turn NaN or infinite")


@pytest.mark.parametrize("name", ORIGINS)
def test_the_module_where_nan_begins_is_named(engine, spoiled, name):
    spoil(spoiled, name)
    with load(spoiled, guards=False, **engine) as model:
        fails_in(model, ORIGINS[name])


def test_it_is_named_where_no_expert_is_asked_for(engine, spoiled):
    """With all experts resident, MLX routes a token without Python."""
    name = "layers.3.mlp.gate.scales"
    spoil(spoiled, name)
    with load(spoiled, guards=False, experts="resident", **engine) as model:
        fails_in(model, ORIGINS[name])


def test_the_expert_where_nan_begins_is_named(engine, spoiled):
    for expert in range(N_EXPERTS):
        spoil_expert(spoiled, "stream", 2, expert, "down_proj.scales")
    with load(spoiled, guards=False, **engine) as model:
        fails_in(model, re.compile(r"in layer 2, expert \d \(mlp.experts\)"))


def test_too_large_weights_are_found_where_they_overflow(engine, spoiled):
    """Finite, so no guard at load can know."""
    spoil(spoiled, "layers.1.mlp.shared_expert.up_proj.scales", 3e38)
    with load(spoiled, **engine) as model:
        fails_in(model, "layer 1, shared expert (mlp.shared_expert)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 5])
@pytest.mark.parametrize("cut", [{}, {"k": 2, "kept": "as-routed"}, {"mass": 0.6}])
@pytest.mark.parametrize("compiled", [False, True])
def test_scores_that_are_no_numbers_pick_no_experts(
    packed_tiny, compiled, value, row, cut
):
    """One score of one expert, by a router in memory."""
    with load(packed_tiny, engine="numpy", compiled=compiled, **cut) as model:
        runner, asked = model.engine, []
        gate, at = runner.layers[2]["gate"], (slice(row, row + 1), slice(None))
        gate.scales[at] = gate.biases[at] = 0
        gate.biases[row, 0] = value
        request = model.store.request

        def watched(layer, experts):
            asked.append(layer)
            return request(layer, experts)

        model.store.request = watched
        for ids in (IDS[:1], IDS[:6]):
            asked.clear()
            try:
                logits = runner.forward(ids, model.new_state())
                assert not np.isnan(value)
                assert np.isfinite(logits).all()  # minus infinity: never among the best
                count("routers with a score of minus infinity")
            except RoutingError as error:
                assert "router of layer 2" in str(error)
                assert 2 not in asked
                with pytest.raises(NumericError, match=r"in layer 2, router \(mlp"):
                    model.prefill(ids, model.new_state())
                count("routers with scores that are no numbers")


def test_routing_is_checked_for_every_token():
    weights = np.full((6, K), 1 / K, np.float32)
    check_routing(4, weights)
    check_routing(4, weights[0])
    weights[5] = np.nan
    for bad in (weights, weights[5]):
        with pytest.raises(RoutingError, match="router of layer 4"):
            check_routing(4, bad)


def test_mlx_reads_no_experts_for_scores_that_are_no_numbers(spoiled):
    pytest.importorskip("mlx")
    spoil(spoiled, "layers.2.mlp.gate.biases")
    with load(spoiled, engine="mlx", guards=False) as model:
        for ids in (IDS, IDS[:1]):
            with pytest.raises(RoutingError, match="router of layer 2"):
                model.engine.forward(ids, model.new_state())
