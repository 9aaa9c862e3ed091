"""Checkpoints: three layouts mean the same weights; every fault is one clear line."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import write_tiny

from flashmoe_ref.checkpoint import INDEX_NAME, Checkpoint
from flashmoe_ref.errors import CheckpointError, ConfigError, FlashMoeError
from flashmoe_ref.headers import read_header
from flashmoe_ref.quantize import QuantizedMatrix

FILE = "model.safetensors"
ROUTER = "language_model.model.layers.0.mlp.gate"


@pytest.fixture
def tiny(tmp_path):
    return write_tiny(tmp_path / "m")


def change_tensors(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def change_config(folder, change):
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


def write_header(path, header, data=b"\0" * 64):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# --- what is read ---------------------------------------------------------------------


def test_three_layouts_hold_the_same_weights(tmp_path):
    fused = Checkpoint.open(write_tiny(tmp_path / "a", "hf", dtype=np.float32))
    split = Checkpoint.open(
        write_tiny(tmp_path / "b", "hf-per-expert", dtype=np.float32, n_shards=3)
    )
    assert (fused.layout, split.layout) == ("hf", "hf-per-expert")
    for name in ("embed_tokens", "lm_head", "layers.0.linear_attn.in_proj_qkv"):
        np.testing.assert_array_equal(fused.module(name), split.module(name))
    assert fused.n_bytes == split.n_bytes


def test_norms_are_plain_factors_in_every_layout(tmp_path):
    mlx = Checkpoint.open(write_tiny(tmp_path / "a", "mlx", dtype=np.float32))
    hf = Checkpoint.open(write_tiny(tmp_path / "b", "hf", dtype=np.float32))
    assert (mlx.norms_are_zero_centred, hf.norms_are_zero_centred) == (False, True)
    for name in (
        "norm",
        "layers.0.input_layernorm",
        "layers.2.post_attention_layernorm",
        "layers.3.self_attn.q_norm",
        "layers.3.self_attn.k_norm",
        "layers.0.linear_attn.norm",
        "layers.0.linear_attn.A_log",
    ):
        np.testing.assert_allclose(mlx.vector(name), hf.vector(name), atol=1e-6)
    conv = "layers.1.linear_attn.conv1d"
    np.testing.assert_array_equal(mlx.module(conv), hf.module(conv))


def test_bits_are_inferred_per_module(tmp_path):
    path = write_tiny(tmp_path / "m", bits=3, dense_bits=6, group_size=32)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.quantization["layers.1.mlp.experts.up_proj"] == (3, 32)
    assert checkpoint.quantization["layers.1.mlp.gate"] == (6, 32)
    router = checkpoint.module("layers.1.mlp.gate")
    assert isinstance(router, QuantizedMatrix)
    assert (router.shape, router.bits) == ((8, 64), 6)


def test_an_absent_override_does_not_hide_an_eight_bit_router(tiny):
    change_config(tiny, lambda raw: raw["quantization"].pop(ROUTER))
    assert Checkpoint.open(tiny).quantization["layers.0.mlp.gate"] == (8, 32)


def test_vision_and_prediction_head_are_skipped(tiny):
    extra = np.zeros(3, np.float32)

    def add(tensors):
        tensors["vision_tower.blocks.0.norm1.weight"] = extra
        tensors["model.visual.merger.norm.weight"] = extra
        tensors["mtp.fc.weight"] = extra

    before = Checkpoint.open(tiny).tensors.keys()
    change_tensors(tiny, add)
    assert Checkpoint.open(tiny).tensors.keys() == before


def test_tied_embeddings_need_no_lm_head(tmp_path):
    path = write_tiny(tmp_path / "m", tie_word_embeddings=True)
    checkpoint = Checkpoint.open(path)
    assert "lm_head.weight" not in checkpoint.tensors
    assert checkpoint.module("embed_tokens").shape == (96, 64)


def test_offsets_are_absolute(tiny):
    expected = load_file(tiny / FILE)
    data = (tiny / FILE).read_bytes()
    for info in read_header(tiny / FILE).values():
        raw = np.frombuffer(data[info.offset : info.offset + info.n_bytes], info.dtype)
        np.testing.assert_array_equal(raw.reshape(info.shape), expected[info.name])


# --- what is refused: each message names the file and says what to do -----------------


def refused(folder, *words):
    with pytest.raises(FlashMoeError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    for word in words:
        assert word in message
    assert isinstance(caught.value, CheckpointError | ConfigError)


def test_no_folder_and_no_config(tmp_path):
    refused(tmp_path / "nowhere", "not a folder")
    refused(tmp_path, "config.json", "no such file")


def test_no_weights(tiny):
    (tiny / FILE).unlink()
    refused(tiny, "no .safetensors file", "download")


def test_git_lfs_pointer(tiny):
    (tiny / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    refused(tiny, "Git-LFS pointer", "git lfs pull")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 5000, -1, -4096])
def test_truncated_file(tiny, keep):
    data = (tiny / FILE).read_bytes()
    (tiny / FILE).write_bytes(data[:keep])
    refused(tiny, FILE, "fetch it again")


def test_trailing_bytes(tiny):
    with open(tiny / FILE, "ab") as file:
        file.write(b"junk")
    refused(tiny, "belong to no tensor")


def test_header_longer_than_the_file(tiny):
    data = bytearray((tiny / FILE).read_bytes())
    data[:8] = struct.pack("<Q", 1 << 50)  # must not allocate a petabyte
    (tiny / FILE).write_bytes(data)
    refused(tiny, "its header claims")


GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
BAD_HEADERS = {
    "not json": b"{",
    "not an object": b"[]",
    "not utf-8": b'{"\xff": 1}',
    "deep": b"{" + b'"a":{' * 50_000,
    "entry is no object": {"a": 7},
    "field is missing": {"a": {"dtype": "F32", "shape": [4]}},
    "dtype is unknown": {"a": GOOD | {"dtype": "F13"}},
    "dtype is a list": {"a": GOOD | {"dtype": ["F32"]}},
    "shape is negative": {"a": GOOD | {"shape": [-4]}},
    "shape is huge": {"a": GOOD | {"shape": [1 << 62, 1 << 62]}},
    "shape is huge but empty": {"a": GOOD | {"shape": [1 << 40, 1 << 40, 0]}},
    "shape has too many axes": {"a": GOOD | {"shape": [1] * 64 + [4]}},
    "size is minus zero": b'{"a": {"dtype": "F32", "shape": [4], '
    b'"data_offsets": [-0, 16]}}',
    "number of 5000 digits": b'{"a": %s}' % (b"9" * 5000),
    "half a character": b'{"\\ud800": %s}' % json.dumps(GOOD).encode(),
    "shape is a float": {"a": GOOD | {"shape": [4.0]}},
    "shape is true": {"a": GOOD | {"shape": [True]}},
    "offsets go back": {"a": GOOD | {"data_offsets": [16, 0]}},
    "offsets are three": {"a": GOOD | {"data_offsets": [0, 16, 32]}},
    "size is wrong": {"a": GOOD | {"shape": [5]}},
    "overlap": {"a": GOOD, "b": GOOD | {"data_offsets": [8, 24]}},
    "hole": {"a": GOOD, "b": GOOD | {"data_offsets": [32, 48]}},
    "out of range": {"a": GOOD | {"shape": [100], "data_offsets": [0, 400]}},
    "metadata": {"__metadata__": {"a": 1}, "a": GOOD},
    "twice": b'{"a": %s, "a": %s}' % ((json.dumps(GOOD).encode(),) * 2),
}


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_bad_headers(tmp_path, kind):
    path = tmp_path / FILE
    write_header(path, BAD_HEADERS[kind])
    with pytest.raises(CheckpointError, match=FILE):
        read_header(path)


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_the_safetensors_library_refuses_them_too(tmp_path, kind):
    if kind in ("shape is true", "shape has too many axes"):
        pytest.skip("we are stricter here")
    path = tmp_path / FILE
    write_header(path, BAD_HEADERS[kind])
    with pytest.raises(Exception):  # noqa: B017 - the library's own error classes
        load_file(path)


def test_missing_tensor(tiny):
    change_tensors(tiny, lambda t: t.pop(f"{ROUTER}.weight"))
    refused(tiny, "no weight beside it")
    change_tensors(
        tiny, lambda t: [t.pop(f"{ROUTER}.{k}") for k in ("scales", "biases")]
    )
    change_config(tiny, lambda raw: raw["quantization"].pop(ROUTER))
    refused(tiny, "layers.0.mlp.gate", "missing")


def test_missing_biases_mean_another_mode(tiny):
    change_tensors(tiny, lambda t: t.pop(f"{ROUTER}.biases"))
    refused(tiny, "only supported")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers.0.linear_attn.A_log", np.zeros(7, np.float32)),
        ("layers.0.linear_attn.A_log", np.zeros(6, np.int32)),
        ("layers.0.input_layernorm.weight", np.zeros((64, 1), np.float32)),
        ("layers.0.mlp.gate.weight", np.zeros((8, 17), np.uint32)),
        ("layers.0.mlp.gate.weight", np.zeros((9, 16), np.uint32)),
        ("layers.0.mlp.gate.weight", np.zeros((8, 16), np.float32)),
        ("layers.0.mlp.gate.scales", np.zeros((8, 3), ml_dtypes.bfloat16)),
        ("layers.0.mlp.gate.scales", np.zeros((8, 2), np.int16)),
        ("layers.3.mlp.switch_mlp.up_proj.scales", np.zeros((7, 64, 2), np.float32)),
    ],
)
def test_misshapen_tensor(tiny, name, value):
    full = f"language_model.model.{name}"
    change_tensors(tiny, lambda t: t.update({full: value}))
    refused(tiny, name.rsplit(".", 1)[0])


def test_unknown_tensor(tiny):
    change_tensors(
        tiny, lambda t: t.update({"model.layers.0.hyper.weight": np.zeros(2, np.uint8)})
    )
    refused(tiny, "hyper", "no supported architecture")


def test_dense_model(tiny):
    def drop(tensors):
        for name in [n for n in tensors if "switch_mlp" in n]:
            del tensors[name]

    change_tensors(tiny, drop)
    refused(tiny, "no routed experts")


def test_config_of_another_model(tiny):
    change_config(tiny, lambda raw: raw["text_config"].update(num_hidden_layers=8))
    refused(tiny, "layers.4", "missing")


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ({"bits": 4, "group_size": 32}, "declares 4 bits"),
        ({"bits": 8, "group_size": 64}, "group 64"),
        ({"bits": 8, "group_size": 32, "mode": "mxfp8"}, "mxfp8"),
        (False, "not quantized"),
    ],
)
def test_overrides_are_checked_against_shapes(tiny, override, word):
    change_config(tiny, lambda raw: raw["quantization"].update({ROUTER: override}))
    refused(tiny, "config.json", word)


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_other_quantization_modes_are_refused(tiny, key):
    def change(raw):
        raw.pop("quantization", None)
        raw[key] = {"mode": "nvfp4", "group_size": 16, "bits": 4}

    change_config(tiny, change)
    refused(tiny, "nvfp4")


# --- shards ---------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    return write_tiny(tmp_path / "m", n_shards=3)


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, "1 of 3 shards", "model-00002-of-00003")


def test_index_and_shard_disagree(sharded):
    index = sharded / INDEX_NAME
    raw = json.loads(index.read_text())
    name = next(n for n, f in raw["weight_map"].items() if "00001" in f)
    raw["weight_map"][name] = "model-00002-of-00003.safetensors"
    index.write_text(json.dumps(raw))
    refused(sharded, name, "not in the file")


@pytest.mark.parametrize("content", ["{}", "{", '{"weight_map": {"a": "../b"}}'])
def test_bad_index(sharded, content):
    (sharded / INDEX_NAME).write_text(content)
    refused(sharded, INDEX_NAME)


def test_duplicate_tensor_in_two_files(sharded):
    (sharded / INDEX_NAME).unlink()
    first = sharded / "model-00001-of-00003.safetensors"
    (sharded / "copy.safetensors").write_bytes(first.read_bytes())
    refused(sharded, "is also in")


def test_an_index_names_files_that_can_be(sharded):
    for name in ("x" * 300, "..", "a/b.safetensors", "a\nb.safetensors", "\0"):
        index = json.loads((sharded / INDEX_NAME).read_text())
        index["weight_map"]["mtp.x"] = name
        (sharded / INDEX_NAME).write_text(json.dumps(index))
        refused(sharded, "is in no plain file")


def test_an_index_that_is_a_broken_link_is_not_taken_for_none(sharded):
    (sharded / INDEX_NAME).unlink()
    (sharded / INDEX_NAME).symlink_to(sharded / INDEX_NAME)
    refused(sharded, INDEX_NAME, "cannot be read")
