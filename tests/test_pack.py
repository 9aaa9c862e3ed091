"""Packed files: flash-moe's layout to the byte; verify finds any flipped byte."""

import json
import random
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tiny import write_tiny

from flashmoe_ref import writing
from flashmoe_ref.checkpoint import Checkpoint
from flashmoe_ref.config import preset
from flashmoe_ref.convert import convert
from flashmoe_ref.errors import CheckpointError, PackError
from flashmoe_ref.experts import experts_in_place, packed_experts
from flashmoe_ref.pack import pack
from flashmoe_ref.requantize import requantize
from flashmoe_ref.verify import Verified, verify

N_EXPERTS = 8  # of the tiny model
N_LAYERS = 4
ORDER = [
    f"{projection}_proj.{kind}"
    for projection in ("gate", "up", "down")
    for kind in ("weight", "scales", "biases")
]


def tensor_bytes(folder: Path) -> dict[str, tuple[bytes, dict]]:
    """Read safetensors files by hand, knowing nothing but the format."""
    found = {}
    for path in folder.glob("*.safetensors"):
        blob = path.read_bytes()
        (n_header,) = struct.unpack("<Q", blob[:8])
        header = json.loads(blob[8 : 8 + n_header])
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = (8 + n_header + n for n in entry["data_offsets"])
                found[name] = blob[first:last], entry
    return found


@pytest.mark.parametrize("bits, group", [(4, 32), (3, 64), (2, 64), (8, 32)])
def test_every_byte_is_where_flash_moe_looks_for_it(tmp_path, bits, group):
    settings = {"bits": bits, "group_size": group, "n_shards": 3}
    model = write_tiny(tmp_path / "m", shared_expert_intermediate_size=64, **settings)
    folder = pack(model, progress=False)
    assert folder == model / "packed_experts"
    tensors = tensor_bytes(model)
    layout = json.loads((folder / "layout.json").read_text())
    assert (layout["num_layers"], layout["num_experts"]) == (N_LAYERS, N_EXPERTS)
    assert [c["name"] for c in layout["components"]] == ORDER
    d = f = 64  # hidden and expert width
    words, groups = d * bits // 32 * 4, d // group * 2  # bytes a row: uint32, bf16
    expert_size = 2 * f * (words + 2 * groups) + d * (words + 2 * groups)
    assert layout["expert_size"] == expert_size
    for layer in range(N_LAYERS):
        blob = (folder / f"layer_{layer:02d}.bin").read_bytes()
        assert len(blob) == expert_size * N_EXPERTS
        stem = f"language_model.model.layers.{layer}.mlp.switch_mlp."
        for expert in range(N_EXPERTS):
            at = expert * expert_size
            for component in layout["components"]:
                data, entry = tensors[stem + component["name"]]
                size = len(data) // N_EXPERTS
                wanted = data[expert * size : (expert + 1) * size]
                assert component["size"] == size
                assert component["offset"] == at - expert * expert_size
                assert component["shape"] == entry["shape"][1:]
                assert component["dtype"] == entry["dtype"]
                assert blob[at : at + size] == wanted
                at += size
    assert (layout["bits"], layout["group_size"]) == (bits, group)
    assert str(tmp_path) not in (folder / "layout.json").read_text()


def test_size_of_a_real_expert():
    """4-bit, group 64, hidden 4096, width 1024: flash-moe's 7,077,888 bytes."""
    config = preset("qwen3.5-397b-a17b")
    d, f = config.hidden_size, config.moe_intermediate_size
    sizes = [n for n in (f * d // 2, f * d // 64 * 2, f * d // 64 * 2) for _ in "gud"]
    assert sum(sizes) == 7_077_888
    assert sorted(set(sizes)) == [131_072, 2_097_152]


@pytest.mark.parametrize("layout", ["hf", "hf-per-expert"])
def test_packs_float_experts(tmp_path, layout):
    model = write_tiny(tmp_path / "m", layout=layout, num_experts=5)
    folder = pack(model, tmp_path / "packed", progress=False)
    content = json.loads((folder / "layout.json").read_text())
    assert [c["name"] for c in content["components"]] == ORDER[::3]
    assert {c["dtype"] for c in content["components"]} == {"BF16"}
    assert content["bits"] is None
    same = write_tiny(tmp_path / "same", layout="hf", num_experts=5)
    tensors = tensor_bytes(same)
    for layer in range(N_LAYERS):
        stem = f"model.language_model.layers.{layer}.mlp.experts."
        shape = (5, 3, 64, 64)  # experts; gate, up, down; rows; columns
        got = np.fromfile(folder / f"layer_{layer:02d}.bin", ml_dtypes.bfloat16)
        gate_up = np.frombuffer(tensors[stem + "gate_up_proj"][0], ml_dtypes.bfloat16)
        down = np.frombuffer(tensors[stem + "down_proj"][0], ml_dtypes.bfloat16)
        assert np.array_equal(got.reshape(shape)[:, :2], gate_up.reshape(5, 2, 64, 64))
        assert np.array_equal(got.reshape(shape)[:, 2], down.reshape(5, 64, 64))
    assert verify(model, folder, progress=False).n_unchecked > 0  # the shards


def test_packs_what_requantize_wrote(tmp_path):
    model = write_tiny(tmp_path / "m")
    small = requantize(model, tmp_path / "m2", 2, progress=False)
    folder = pack(small, progress=False)
    layout = json.loads((folder / "layout.json").read_text())
    assert layout["bits"] == 2
    experts = packed_experts(folder, Checkpoint.open(model).config)
    assert experts.formats[0].quantization["up_proj"] == (2, 32)


def test_the_same_experts_packed_twice_are_the_same_bytes(tmp_path):
    model = write_tiny(tmp_path / "m", n_shards=2)
    one, two = (pack(model, tmp_path / n, progress=False) for n in ("one", "two"))
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()
    moved = shutil.copytree(model, tmp_path / "moved")
    pack(moved, one, progress=False)  # the same model in another place


def test_refuses_another_model_in_the_same_folder(tmp_path):
    folder = pack(write_tiny(tmp_path / "m"), tmp_path / "packed", progress=False)
    with pytest.raises(PackError, match="source differ"):
        pack(write_tiny(tmp_path / "n", seed=1), folder, progress=False)
    with pytest.raises(PackError, match="differ"):
        pack(write_tiny(tmp_path / "o", bits=2), folder, progress=False)


def test_refuses_a_foreign_folder_and_a_full_disk(tmp_path, monkeypatch):
    model = write_tiny(tmp_path / "m")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "layer_00.bin").write_bytes(b"mine")
    with pytest.raises(PackError, match="not empty"):
        pack(model, tmp_path / "foreign", progress=False)
    assert (tmp_path / "foreign" / "layer_00.bin").read_bytes() == b"mine"
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(PackError, match="free some space") as error:
        pack(model, progress=False)
    assert "\n" not in str(error.value)
    assert not (model / "packed_experts").exists()


def test_packs_layers_of_different_formats(tmp_path):
    """Each layer's file has records of its own size; flash-moe's layout has one."""
    model = write_tiny(tmp_path / "m", bits=4)
    mixed = tmp_path / "mixed"
    requantize(model, mixed, 2, down_bits=3, layer_bits={2: 4}, progress=False)
    folder = pack(mixed, progress=False)
    layout = json.loads((folder / "layout.json").read_text())
    assert not {"expert_size", "components"} & set(layout)
    assert layout["layers"] == [0, 0, 1, 0]
    assert [kind["bits"] for kind in layout["formats"]] == [[2, 2, 3], 4]
    assert [kind["group_size"] for kind in layout["formats"]] == [32, 32]
    sizes = [kind["expert_size"] for kind in layout["formats"]]
    weights, groups = 64 * 64, 64 * 64 // 32 * 2 * 2  # scales and biases in bf16
    assert sizes == [7 * weights // 8 + 3 * groups, 12 * weights // 8 + 3 * groups]
    checkpoint = Checkpoint.open(mixed)
    packed = packed_experts(folder, checkpoint.config)
    assert packed.formats == experts_in_place(checkpoint).formats
    for layer, number in enumerate(layout["layers"]):
        path = folder / f"layer_{layer:02d}.bin"
        assert path.stat().st_size == N_EXPERTS * sizes[number]
    assert verify(mixed, progress=False).n_unchecked == 0
    flip(folder / "layer_02.bin", 5 * sizes[1] + 7)
    for target in (mixed, folder):
        with pytest.raises(PackError, match="layer 2, expert 5 "):
            verify(target, progress=False)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [0, 0, 1]},
        {"layers": [0, 0, 2, 0]},
        {"layers": [0, 0, "1", 0]},
        {"layers": None},
        {"formats": {}},
        {"formats": [1, 2]},
        {"num_layers": 3},
        {"num_layers": "4"},
        {"num_layers": 10**12},
        {"format": 3},
    ],
)
def test_a_damaged_layout_by_layers_is_one_clear_error(mixed_packed, change):
    folder, config, layout = mixed_packed
    (folder / "layout.json").write_text(json.dumps(layout | change))
    for check in (
        lambda: packed_experts(folder, config),
        lambda: verify(folder, progress=False),
    ):
        with pytest.raises(CheckpointError, match=r"layout\.json") as error:
            check()
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def mixed_packed(tmp_path_factory):
    """Packed experts of two sizes: their folder, the model's config, the layout."""
    root = tmp_path_factory.mktemp("mixed")
    model = write_tiny(root / "m", bits=4)
    requantize(model, root / "mixed", 4, layer_bits={2: 2}, progress=False)
    folder = pack(root / "mixed", progress=False)
    layout = json.loads((folder / "layout.json").read_text())
    return folder, Checkpoint.open(model).config, layout


def test_progress_bar_is_off_in_automated_runs(tmp_path, monkeypatch, capfd):
    model = write_tiny(tmp_path / "m")
    monkeypatch.setenv("FLASHMOE_PROFILE", "ci")
    pack(model, tmp_path / "silent")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FLASHMOE_PROFILE", "laptop")
    pack(model, tmp_path / "shown")
    assert "shown" in capfd.readouterr().err


# ---- verify --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verified_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    source = write_tiny(folder / "hf", layout="hf")
    model = convert(source, folder / "m", 4, 32, 8, 100_000, progress=False)
    pack(model, progress=False)
    return model


@pytest.fixture
def model(verified_model, tmp_path) -> Path:
    return shutil.copytree(verified_model, tmp_path / "m")


def flip(path: Path, at: int) -> None:
    blob = bytearray(path.read_bytes())
    blob[at] ^= 1 << (at % 8)
    path.write_bytes(blob)


def test_verify_accepts_what_was_written(model):
    n_bytes = sum(p.stat().st_size for p in model.rglob("*.safetensors"))
    n_bytes += sum(p.stat().st_size for p in model.rglob("*.bin"))
    n_shards = len(list(model.glob("*.safetensors")))
    assert verify(model, progress=False) == Verified(n_shards + N_LAYERS, n_bytes, 0)
    packed = verify(model / "packed_experts", progress=False)
    assert packed.n_files == N_LAYERS and packed.n_unchecked == 0


def test_verify_finds_any_flipped_byte_of_packed_files(model):
    """With the source at hand, without digests, and by the digests alone."""
    folder = model / "packed_experts"
    size = json.loads((folder / "layout.json").read_text())["expert_size"]
    rng = random.Random(0)
    for _ in range(6):
        layer, at = rng.randrange(N_LAYERS), rng.randrange(size * N_EXPERTS)
        path = folder / f"layer_{layer:02d}.bin"
        where = rf"layer_{layer:02d}\.bin: layer {layer}, expert {at // size} "
        flip(path, at)
        for target in (model, folder):
            with pytest.raises(PackError, match=where) as error:
                verify(target, progress=False)
            assert "\n" not in str(error.value)
        digests = writing.digest_path(path)
        digests.rename(folder / "away")
        with pytest.raises(PackError, match=where + "differs from the checkpoint"):
            verify(model, progress=False)
        (folder / "away").rename(digests)
        flip(path, at)
    verify(model, progress=False)


def test_verify_finds_any_flipped_byte_of_shards(model):
    rng = random.Random(1)
    shards = sorted(model.glob("*.safetensors"))
    for _ in range(10):
        shard = rng.choice(shards)
        at = rng.randrange(shard.stat().st_size)
        flip(shard, at)
        # In the header, it may be no header any more.
        with pytest.raises((PackError, CheckpointError), match=shard.name):
            verify(model, progress=False)
        flip(shard, at)
    verify(model, progress=False)


def test_verify_names_the_tensor_of_a_shard(model):
    checkpoint = Checkpoint.open(model)
    info = checkpoint.tensors["layers.3.mlp.experts.up_proj.scales"]
    flip(info.file, info.offset + 7)
    with pytest.raises(PackError, match=r"layers\.3\.mlp\.switch_mlp\.up_proj\.scales"):
        verify(model, progress=False)


def test_verify_counts_every_problem(model):
    folder = model / "packed_experts"
    for layer in range(3):
        flip(folder / f"layer_{layer:02d}.bin", 5)
    with pytest.raises(PackError, match=r"layer 0, expert 0 .*and 2 more"):
        verify(model, progress=False)


def test_verify_finds_packed_experts_of_another_model(model, tmp_path):
    source = write_tiny(tmp_path / "hf", layout="hf", seed=9)
    other = convert(source, tmp_path / "o", 4, 32, 8, progress=False)
    shutil.copytree(model / "packed_experts", other / "packed_experts")
    with pytest.raises(PackError, match="differs from the checkpoint"):
        verify(other, progress=False)


def test_verify_takes_fewer_bits_by_their_digests(model, tmp_path):
    small = requantize(model, tmp_path / "small", 2, progress=False)
    folder = pack(small, progress=False)
    assert verify(model, folder, progress=False).n_unchecked == 0
    flip(folder / "layer_01.bin", 2000)
    with pytest.raises(PackError, match="layer 1, expert "):
        verify(model, folder, progress=False)


def test_verify_refuses_files_of_the_wrong_size(model):
    folder = model / "packed_experts"
    path = folder / "layer_02.bin"
    path.write_bytes(path.read_bytes()[:-1])
    for target in (model, folder):
        with pytest.raises(CheckpointError, match=r"layer_02\.bin"):
            verify(target, progress=False)
    path.unlink()
    for target in (model, folder):
        with pytest.raises(CheckpointError, match=r"layer_02\.bin"):
            verify(target, progress=False)


def test_verify_says_that_a_list_of_digests_is_damaged(model):
    path = model / "packed_experts" / "layer_00.bin.sha256"
    path.write_text(path.read_text().replace("expert 3", "expert 2"))
    with pytest.raises(PackError, match=r"layer_00\.bin\.sha256"):
        verify(model, progress=False)


def test_flash_moe_layout_without_our_keys_is_verified(model):
    folder = model / "packed_experts"
    layout = json.loads((folder / "layout.json").read_text())
    for key in ("format", "bits", "group_size", "source"):
        del layout[key]
    for component in layout["components"]:
        del component["dtype"]
    (folder / "layout.json").write_text(json.dumps(layout))
    for path in folder.glob("*.sha256"):
        path.unlink()
    assert verify(model, progress=False).n_unchecked == 0
    assert verify(folder, progress=False).n_unchecked == N_LAYERS
    with pytest.raises(PackError, match="differ"):
        pack(model, progress=False)  # not ours to go on with


def components(layout, **changes):
    """The layout with another first pair of words and scales."""
    first, second, *rest = layout["components"]
    return layout | {"components": [first, second | changes, *rest]}


@pytest.mark.parametrize(
    "change",
    [
        lambda layout: layout | {"bits": 8},
        lambda layout: layout | {"group_size": [32, 32, 64]},
        lambda layout: layout | {"format": 3},
        lambda layout: components(layout, shape=[64, 4]),
        lambda layout: components(layout, dtype="I16"),  # read as numbers, not scales
        lambda layout: components(layout, dtype=["BF16"]),
        lambda layout: components(layout, name=["up_proj.scales"]),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(model, change):
    path = model / "packed_experts" / "layout.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=r"layout\.json"):
        packed_experts(path.parent, Checkpoint.open(model).config)


def test_an_empty_list_of_digests_is_damaged(model):
    path = model / "packed_experts" / "layer_00.bin.sha256"
    path.write_text("")
    with pytest.raises(PackError, match=r"layer_00\.bin\.sha256: is damaged"):
        verify(path.parent, progress=False)


def test_a_file_must_have_a_name():
    with pytest.raises(PackError, match="names no file"):
        writing.write_small(Path(), b"")
