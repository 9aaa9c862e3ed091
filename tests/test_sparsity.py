"""Neurons on disk give what the dense model gives; window and pool hold their rows."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_ref.errors import CheckpointError, ConfigError, ReadError
from flashmoe_ref.flash_model import (
    FlashModel,
    Rung,
    expected_bytes,
    expected_of_text,
    ladder,
    resident_neurons,
    trunk_of,
    write_trunk,
)
from flashmoe_ref.headers import read_header
from flashmoe_ref.layers import rms_norm
from flashmoe_ref.neuron_store import (
    NeuronReader,
    Pool,
    Reader,
    Rebuilt,
    layer_files,
    time_reads,
    write_neurons,
    write_stored,
)
from flashmoe_ref.relu_model import (
    ReluConfig,
    ReluModel,
    active_neurons,
    mean_nats,
    read_rounded,
)
from flashmoe_ref.sparsity import Predictor, Window, kept, loads, masked

CONFIG = ReluConfig(16, 40, 3, 2, 50, 1e4, 1e-6)
IDS = [3, 7, 7, 1, 40, 22, 3, 9, 12, 49, 0, 5]
N = 12  # neurons of the properties below
WANTED = st.lists(st.sets(st.integers(0, N - 1)), max_size=12)


class Oracle(Predictor):
    """Knows who will be active, because it computes it."""

    def __init__(self, model: ReluModel) -> None:
        super().__init__([], [], [], "attention")
        self.model = model

    def choose(self, layer: int, x: np.ndarray, after: np.ndarray) -> np.ndarray:
        w = self.model.layers[layer]
        h = rms_norm(after, w.norm_ffn, self.model.config.rms_norm_eps)
        return h @ w.up.T > 0


@pytest.fixture(scope="module")
def model() -> ReluModel:
    return ReluModel.random(CONFIG)


@pytest.fixture(scope="module")
def folder(model: ReluModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("neurons")
    n_values = CONFIG.num_hidden_layers * CONFIG.intermediate_size * 2 * 16
    for bundled in (False, True):
        assert write_neurons(model, folder, bundled) == 4 * n_values
    assert write_trunk(model, folder) == trunk_of(model).nbytes
    return folder


def ids_to_mask(ids: set[int]) -> np.ndarray:
    mask = np.zeros(N, bool)
    mask[list(ids)] = True
    return mask


# --- the dense model ------------------------------------------------------------------


def test_a_layer_by_hand() -> None:
    config = ReluConfig(2, 3, 1, 1, 4, 1e4, 1e-6)
    model = ReluModel.random(config)
    w = model.layers[0]
    w.up[:] = [[1, 0], [0, 1], [-1, 0]]
    w.down[:] = [[1, 1], [10, 0], [100, 100]]
    h = np.array([[2.0, -3.0]], np.float32)  # only neuron 0 is active
    np.testing.assert_array_equal(model.dense(0, h, h, h), [[2.0, 2.0]])


def test_token_by_token_equals_all_at_once(model: ReluModel) -> None:
    whole, state = model.forward(IDS, model.new_state()), model.new_state()
    steps = [model.forward([token], state)[0] for token in IDS]
    np.testing.assert_allclose(steps, whole, atol=2e-5)
    assert whole.shape == (len(IDS), CONFIG.vocab_size)
    with pytest.raises(ConfigError, match=r"0\.\.49"):
        model.forward([50], model.new_state())


def test_torch_would_say_the_same() -> None:
    """The trainer's model, where torch is installed."""
    torch = pytest.importorskip("torch")
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "build"))
    from relu_model import Model

    sizes = {k: getattr(CONFIG, k) for k in CONFIG.__dataclass_fields__}
    twin, ours = Model(sizes).eval(), ReluModel.random(CONFIG)
    values = {"embedding.weight": ours.embedding, "norm.weight": ours.norm}
    for i, w in enumerate(ours.layers):
        values |= {
            f"layers.{i}.norm_attention.weight": w.norm_attention,
            f"layers.{i}.attention.qkv.weight": w.qkv,
            f"layers.{i}.attention.out.weight": w.out,
            f"layers.{i}.norm_ffn.weight": w.norm_ffn,
            f"layers.{i}.up.weight": w.up,
            f"layers.{i}.down.weight": w.down.T.copy(),
        }
    twin.load_state_dict({k: torch.from_numpy(v) for k, v in values.items()})
    with torch.no_grad():
        wanted, activations = twin(torch.tensor([IDS]))
    got = ours.forward(IDS, ours.new_state())
    np.testing.assert_allclose(got, wanted[0].numpy(), atol=1e-4)
    seen = torch.stack(activations)[:, 0].numpy() > 0
    assert (active_neurons(ours, IDS) == seen).mean() > 0.999


def test_mean_nats_by_hand() -> None:
    logits = np.array([[0.0, 0.0], [0.0, np.log(3.0)], [9.0, 9.0]])
    assert mean_nats(logits, [0, 1, 1]) == pytest.approx(
        (np.log(2) + np.log(4 / 3)) / 2
    )


# --- window ---------------------------------------------------------------------------


def test_window_by_hand() -> None:
    window = Window(2, N)
    moves = [window.advance(ids_to_mask(ids)) for ids in ({1, 2}, {2, 3}, {3}, {1})]
    told = [(load.tolist(), drop.tolist()) for load, drop in moves]
    assert told[0] == ([1, 2], []) and told[1] == ([3], [])
    assert told[2] == ([], [1])  # 1 was wanted two tokens ago
    assert told[3] == ([1], [2]) and window.resident.tolist() == [1, 3]


@given(WANTED, st.integers(0, 5))
def test_window_holds_what_the_last_tokens_wanted(texts: list[set], k: int) -> None:
    window, held = Window(k, N), set()
    chosen = np.array([ids_to_mask(ids) for ids in texts]).reshape(len(texts), N)
    for t, ids in enumerate(texts):
        load, drop = window.advance(ids_to_mask(ids))
        held = held - set(drop.tolist()) | set(load.tolist())
        wanted = set().union(*texts[max(0, t + 1 - max(k, 1)) : t + 1])
        before = set().union(*texts[max(0, t - k) : t])
        assert held == set(window.resident.tolist()) == wanted
        assert set(load.tolist()) == ids - before
        assert loads(chosen, k)[t] == len(load)
        assert set(np.flatnonzero(kept(chosen, k)[t]).tolist()) == held


def test_a_longer_window_never_reads_more() -> None:
    chosen = np.random.default_rng(0).random((3, 40, N)) < 0.3
    totals = [loads(chosen, k).sum() for k in range(8)]
    assert totals == sorted(totals, reverse=True) and totals[0] == chosen.sum()
    with pytest.raises(ConfigError, match="window of -1"):
        Window(-1, N)


# --- pool -----------------------------------------------------------------------------


def test_pool_by_hand() -> None:
    pool = Pool(N, 2)
    pool.append(np.array([5, 6, 7, 8]))[:] = [[5, 5], [6, 6], [7, 7], [8, 8]]
    pool.delete(np.array([5, 7]))  # 8 moves into the first hole, 6 stays
    assert pool.neurons.tolist() == [8, 6]
    assert pool.rows.tolist() == [[8, 8], [6, 6]]
    with pytest.raises(ConfigError, match="2 rows, not 3"):
        Pool(N, 2, capacity=2).append(np.array([1, 2, 3]))


def _some_of(ids: set[int]) -> st.SearchStrategy[list[int]]:
    if not ids:
        return st.just([])
    return st.lists(st.sampled_from(sorted(ids)), unique=True)


@pytest.mark.parametrize("make", [Pool, Rebuilt])
@given(data=st.data())
@settings(max_examples=60)
def test_every_row_is_the_right_one(make: type, data: st.DataObject) -> None:
    """After any deletions and additions, in any order."""
    rows, held = make(N, 3), set()
    for _ in range(data.draw(st.integers(0, 10))):
        drop = set(data.draw(_some_of(held)))
        rows.delete(np.array(sorted(drop), np.int64))
        held -= drop
        new = data.draw(_some_of(set(range(N)) - held))
        rows.append(np.array(new, np.int64))[:] = np.array(new)[:, None]
        held |= set(new)
        assert sorted(rows.neurons.tolist()) == sorted(held) and rows.n == len(held)
        np.testing.assert_array_equal(rows.rows, np.repeat(rows.neurons[:, None], 3, 1))


@given(WANTED, st.integers(0, 4))
def test_window_and_pool_together(texts: list[set], k: int) -> None:
    window, pool = Window(k, N), Pool(N, 2)
    for ids in texts:
        load, drop = window.advance(ids_to_mask(ids))
        pool.delete(drop)
        pool.append(load)[:] = load[:, None]
        assert sorted(pool.neurons.tolist()) == window.resident.tolist()
        assert (pool.rows == pool.neurons[:, None]).all()
        rows = pool.row_of[pool.neurons]
        assert rows.tolist() == list(range(pool.n))
        assert (pool.row_of >= 0).sum() == pool.n


# --- reading --------------------------------------------------------------------------


@pytest.mark.parametrize("bundled", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_neurons_come_as_they_are(
    model: ReluModel, folder: Path, bundled: bool, threads: int
) -> None:
    reader = NeuronReader(folder, CONFIG, bundled, threads)
    wanted, rows = np.array([39, 0, 7, 8]), np.zeros((4, 32), np.float32)
    for layer, w in enumerate(model.layers):
        reader.neurons(layer, wanted, rows)
        np.testing.assert_array_equal(rows, np.hstack([w.up, w.down])[wanted])
    counters = reader.reader.counters
    assert counters.reads == 3 * 4 * (1 if bundled else 2)
    assert counters.bytes_read == 3 * 4 * CONFIG.neuron_bytes
    reader.reader.close()


def test_large_ranges_come_as_they_are(tmp_path: Path) -> None:
    values = np.arange(700_000, dtype=np.float32)  # 2.8 MB: two large reads and a rest
    write_stored(tmp_path / "a", values)
    reader, out = Reader([tmp_path / "a"], 2), np.zeros(699_990, np.float32)
    reader.read_range(0, 40, out)
    np.testing.assert_array_equal(out, values[10:])
    assert reader.counters.reads == 3 and reader.counters.bytes_read == out.nbytes
    reader.close()
    assert 0 < time_reads(tmp_path / "a", 20, 4096, False) < 10


def test_direct_reads_that_are_not_aligned(model: ReluModel, folder: Path) -> None:
    """Rows of 128 bytes: shorter than any block, so through a buffer."""
    try:
        reader = NeuronReader(folder, CONFIG, True, 2, bypass_page_cache=True)
    except ConfigError:
        pytest.skip("this file system offers no way past its cache")
    rows = np.zeros((3, 32), np.float32)
    reader.neurons(1, np.array([1, 2, 39]), rows)
    w = model.layers[1]
    np.testing.assert_array_equal(rows, np.hstack([w.up, w.down])[[1, 2, 39]])
    reader.reader.close()


def test_a_short_file_is_an_error(model: ReluModel, tmp_path: Path) -> None:
    write_neurons(model, tmp_path, bundled=True)
    (name,) = layer_files(1, bundled=True)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-4])
    reader = NeuronReader(tmp_path, CONFIG, True, 2)
    with pytest.raises(ReadError, match=f"{name}: reading 128 bytes at 4992"):
        reader.neurons(1, np.array([0, 39]), np.zeros((2, 32), np.float32))
    reader.reader.close()
    with pytest.raises(ReadError, match="cannot be opened"):
        NeuronReader(tmp_path, CONFIG, bundled=False)
    with pytest.raises(ConfigError, match="at least one thread"):
        NeuronReader(tmp_path, CONFIG, True, threads=0)


# --- the ladder -----------------------------------------------------------------------


RUNGS = (*ladder(3), Rung("more resident", resident=0.8))


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.name)
def test_every_rung_equals_the_dense_model(
    model: ReluModel, folder: Path, rung: Rung
) -> None:
    """With a perfect predictor; and it reads what the formula says."""
    flash = FlashModel(model, folder, rung, Oracle(model) if rung.predicts else None)
    dense, state = model.forward(IDS, model.new_state()), model.new_state()
    steps = [flash.step(token) for token in IDS]
    flash.close()
    for token, (logits, _) in zip(IDS, steps, strict=True):
        # sums in another order: a few last bits of float32
        np.testing.assert_allclose(logits, model.forward([token], state)[0], atol=2e-5)
    np.testing.assert_allclose([logits for logits, _ in steps], dense, atol=5e-5)
    read = [cost.bytes_read for _, cost in steps]
    chosen = active_neurons(model, IDS)
    assert read == expected_bytes(model, rung, chosen).tolist()
    if rung.predicts:
        n_pieces = 1 if rung.bundled else 2
        reads = loads(chosen, rung.window).sum(0) * n_pieces
        assert [cost.reads for _, cost in steps] == reads.tolist()
        resident = kept(chosen, rung.window).sum((0, 2))
        assert [cost.resident for _, cost in steps] == resident.tolist()
    assert all(cost.read_s >= 0 and cost.compute_s > 0 for _, cost in steps)


def test_naive_reads_the_whole_model(model: ReluModel, folder: Path) -> None:
    flash = FlashModel(model, folder, Rung("naive"))
    _, cost = flash.step(3)
    assert cost.bytes_read == sum(model.parts().values())
    assert flash.evict() in (True, False)
    flash.close()
    n = resident_neurons(model, 0.8)
    resident = n * 3 * CONFIG.neuron_bytes + trunk_of(model).nbytes
    assert 0 <= 0.8 * sum(model.parts().values()) - resident < 3 * CONFIG.neuron_bytes
    with pytest.raises(ConfigError, match="predicts=True"):
        FlashModel(model, folder, ladder()[-1])


# --- predictor ------------------------------------------------------------------------


def test_masked_text_equals_reading_neurons(model: ReluModel, folder: Path) -> None:
    """The same predictor, once over the whole text, once with the neurons on disk."""
    rng = np.random.default_rng(1)
    shapes = ((16, 4), (4, 40), (40,))
    parts = ([rng.standard_normal(s).astype(np.float32) for _ in "abc"] for s in shapes)
    predictor = Predictor(*parts, "previous", 0.6)
    feed_forward, log = masked(model, predictor, 2)
    whole = model.forward(IDS, model.new_state(), feed_forward)
    rung = Rung("pool", predicts=True, window=2, bundled=True, pooled=True)
    flash = FlashModel(model, folder, rung, predictor)
    steps = [flash.step(token) for token in IDS]
    flash.close()
    np.testing.assert_allclose([logits for logits, _ in steps], whole, atol=5e-5)
    chosen = np.array([chosen for chosen, _ in log])
    read = [cost.bytes_read for _, cost in steps]
    assert read == expected_bytes(model, rung, chosen).tolist()
    assert read == expected_of_text(model, rung, IDS, predictor).tolist()
    everyone = predictor.at(1e-9)
    assert everyone.choose(0, *np.ones((2, 1, 16), np.float32)).mean() > 0.9
    with pytest.raises(ConfigError, match="threshold=1"):
        predictor.at(1.5)


def test_files_of_weights(tmp_path: Path, model: ReluModel) -> None:
    """As the trainer writes them: 8 bits with a scale a row, A turned around."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(2)
    parts = {
        "previous.0.a": rng.integers(-9, 9, (4, 16), np.int8),
        "previous.0.a.scale": rng.random(4, np.float32),
        "previous.0.b": rng.integers(-9, 9, (4, 40), np.int8),
        "previous.0.b.scale": rng.random(4, np.float32),
        "previous.0.bias": rng.random(40, np.float32),
    }
    save_file(parts, tmp_path / "predictors.safetensors")
    p = Predictor.load(tmp_path, "previous", rank=2, threshold=0.3)
    a = (parts["previous.0.a"] * parts["previous.0.a.scale"][:, None])[:2]
    b = (parts["previous.0.b"] * parts["previous.0.b.scale"][:, None])[:2]
    x = rng.standard_normal((5, 16)).astype(np.float32)
    normed = x / np.sqrt((x * x).mean(1, keepdims=True))
    wanted = normed @ a.T @ b + parts["previous.0.bias"]
    np.testing.assert_allclose(p.scores(0, x, 0 * x), wanted, rtol=1e-4, atol=1e-4)
    assert p.n_bytes == 4 * (16 * 2 + 2 * 40 + 40)
    chances = 1 / (1 + np.exp(-wanted))
    np.testing.assert_array_equal(p.choose(0, x, x), chances > 0.3)
    with pytest.raises(CheckpointError, match="no tensor 'z'"):
        read_rounded({}, "z")
    infos = read_header(tmp_path / "predictors.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json gives \(16, 4\)"):
        read_rounded(infos, "previous.0.a", (16, 4))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4}))
    with pytest.raises(ConfigError, match="not the config of a ReLU model"):
        ReluConfig.from_json(tmp_path / "config.json")
