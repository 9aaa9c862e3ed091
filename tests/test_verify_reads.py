"""Checksums of packed experts: written by pack, compared at each read if asked."""

import json
import os

import numpy as np
import pytest
from tally import count
from tiny import write_tiny

from flashmoe_ref.arrivals import checksum, checksum_path, read_checksums
from flashmoe_ref.engine import load
from flashmoe_ref.errors import CheckpointError, ConfigError, PackError, ReadError
from flashmoe_ref.pack import pack
from flashmoe_ref.verify import verify

N_LAYERS, N_EXPERTS, K = 4, 8, 3
FLASH_MOE_KEYS = {"expert_size", "components", "num_layers", "num_experts"}


def layer_file(folder, layer):
    """The packed experts of a layer."""
    return folder / "packed_experts" / f"layer_{layer:02d}.bin"


def flip(path, at):
    """Change one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def load_verified(folder, **more):
    """Packed and verified."""
    return load(folder, experts="packed", verify_reads=True, **more)


def test_crc_32_of_pieces_is_the_known_one():
    assert checksum([b"123456789"]) == checksum([b"1234", b"", b"56789"]) == 0xCBF43926


def test_each_record_has_its_checksum(packed_tiny):
    for layer in range(N_LAYERS):
        data = layer_file(packed_tiny, layer).read_bytes()
        size = len(data) // N_EXPERTS
        records = [data[e * size : (e + 1) * size] for e in range(N_EXPERTS)]
        found = read_checksums(layer_file(packed_tiny, layer), N_EXPERTS)
        assert found == [checksum([record]) for record in records]


@pytest.mark.parametrize("slots", [None, 4])
def test_verified_reads_change_nothing(engine, packed_tiny, slots):
    ids = list(range(20))
    with (
        load(packed_tiny, experts="packed", **engine) as plain,
        load_verified(packed_tiny, slots=slots, **engine) as model,
    ):
        np.testing.assert_array_equal(model.logits(ids), plain.logits(ids))
        assert model.report().mode["reads"] == "verified"
        assert "reads" not in plain.report().mode


@pytest.mark.parametrize("n_inline", [0, 1 << 30])
def test_a_flipped_bit_is_refused_wherever_it_is(engine, spoiled, n_inline):
    rng = np.random.default_rng(4)
    size = layer_file(spoiled, 0).stat().st_size // N_EXPERTS
    with load_verified(spoiled, slots=K, **engine) as model:
        model.store.inline_bytes = n_inline
        for layer, expert in [(0, 0), (1, 3), (2, 7), (3, 5)]:
            others = [e for e in range(N_EXPERTS) if e != expert][:2]
            path, at = layer_file(spoiled, layer), rng.integers(size)
            flip(path, expert * size + at)
            with pytest.raises(
                ReadError, match=rf"{path.name}: expert {expert} of layer {layer} does"
            ):
                model.store.request(layer, [*others, expert]).wait()
            assert expert not in model.store._caches[layer].slots
            model.store.request(layer, others).wait()
            flip(path, expert * size + at)
            model.store.request(layer, [*others, expert]).wait()
            count("bits flipped in packed experts under verified reads")


def test_a_file_replaced_by_another_model_is_refused(spoiled, tmp_path):
    other = write_tiny(tmp_path / "other", seed=1)
    pack(other, progress=False)
    with load_verified(spoiled, engine="numpy") as model:
        path = layer_file(spoiled, 1)
        path.write_bytes(layer_file(other, 1).read_bytes())  # into the open file
        with pytest.raises(ReadError, match=r"of layer 1 does not match its checksum"):
            model.store.request(1, [0, 1, 2]).wait()
    with load(spoiled, engine="numpy", experts="packed") as model:
        model.logits([1, 2, 3])  # nothing else would notice


def test_a_folder_without_checksums_is_packed_again(spoiled):
    packed = spoiled / "packed_experts"
    for path in packed.glob("*.crc32"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"layer_00.*run 'flashmoe pack' again"):
        load_verified(spoiled)
    load(spoiled, engine="numpy", experts="packed").close()  # as it always could
    before = {p.name: p.read_bytes() for p in packed.glob("layer*")}
    pack(spoiled, progress=False)
    after = {p.name: p.read_bytes() for p in packed.glob("layer*")}
    assert after == before | {
        f"layer_{i:02d}.bin.crc32": after[name]
        for i, name in ((i, f"layer_{i:02d}.bin.crc32") for i in range(N_LAYERS))
    }
    with load_verified(spoiled, engine="numpy") as model:
        model.logits([1, 2, 3])


def test_layers_that_are_whole_are_not_packed_again(spoiled):
    checksum_path(layer_file(spoiled, 2)).unlink()
    before = [layer_file(spoiled, i).stat().st_ino for i in range(N_LAYERS)]
    pack(spoiled, progress=False)
    after = [layer_file(spoiled, i).stat().st_ino for i in range(N_LAYERS)]
    assert [a == b for a, b in zip(after, before, strict=True)] == [1, 1, 0, 1]


def test_flash_moes_own_files_need_none(spoiled):
    """Only what its layout.json holds, and nothing beside the layers."""
    packed = spoiled / "packed_experts"
    for path in packed.iterdir():
        if path.suffix in (".crc32", ".sha256"):
            path.unlink()
    layout = json.loads((packed / "layout.json").read_text())
    theirs = {key: layout[key] for key in FLASH_MOE_KEYS}
    (packed / "layout.json").write_text(json.dumps(theirs))
    with load(spoiled, engine="numpy", experts="packed") as model:
        model.logits([1, 2, 3])
    with pytest.raises(CheckpointError, match="reads cannot be verified"):
        load_verified(spoiled, engine="numpy")


def test_layout_json_is_as_before(packed_tiny):
    layout = json.loads((packed_tiny / "packed_experts" / "layout.json").read_text())
    ours = {"format", "source", "bits", "group_size"}
    assert set(layout) == FLASH_MOE_KEYS | ours and layout["format"] == 1


@pytest.mark.parametrize("experts", ["stream", "resident"])
def test_in_place_there_is_nothing_to_compare_with(packed_tiny, experts):
    with pytest.raises(ConfigError, match=r"only packed .*'flashmoe pack'"):
        load(packed_tiny, experts=experts, verify_reads=True)


@pytest.mark.parametrize(
    "content",
    [b"", b"0badf00d\n" * 7, b"0badf00d\n" * 9, b"x" * 72, b"badf00d\n" * 8, b"\xff"],
)
def test_a_damaged_list_is_refused(spoiled, content):
    path = layer_file(spoiled, 3)
    checksum_path(path).write_bytes(content)
    words = r"layer_03\.bin\.crc32: does not hold 8 checksums"
    with pytest.raises(CheckpointError, match=words):
        load_verified(spoiled, engine="numpy")
    with pytest.raises(CheckpointError, match=words):
        verify(spoiled, progress=False)


def test_verify_finds_a_wrong_checksum(spoiled):
    where = checksum_path(layer_file(spoiled, 1))
    lines = where.read_bytes().splitlines(keepends=True)
    where.write_bytes(b"".join([*lines[:6], b"00000000\n", lines[7]]))
    with pytest.raises(PackError, match=r"layer 1, expert 6: its checksum has changed"):
        verify(spoiled, progress=False)


def test_checksums_are_there_before_the_layer_is(tmp_path, monkeypatch):
    """A run that is cut off right before the last rename leaves no layer behind."""
    folder = write_tiny(tmp_path / "m")
    replace = os.replace

    def cut_off(source, target):
        if str(target).endswith(".bin"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        pack(folder, progress=False)
    assert checksum_path(layer_file(folder, 0)).exists()
    assert not layer_file(folder, 0).exists()
    monkeypatch.undo()
    pack(folder, progress=False)
    with load_verified(folder, engine="numpy") as model:
        model.logits([1, 2, 3])
