"""Damaged config.json, index, quantization overrides and packed experts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fuzz import inputs, survive
from mutate import change_bytes, change_json
from tiny import write_tiny

from flashmoe_ref.checkpoint import FLOATS, INDEX_NAME, Checkpoint
from flashmoe_ref.config import LAYER_TYPES, ModelConfig, read_json
from flashmoe_ref.errors import ConfigError
from flashmoe_ref.experts import LAYOUT_NAME, packed_experts
from flashmoe_ref.mlx_config import converted_config
from flashmoe_ref.pack import pack
from flashmoe_ref.verify import verify

CONFIG = "config.json"
SMALL = {
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "eos_token_id": [3, 5],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint of two layers in two shards; nobody changes it."""
    folder = write_tiny(tmp_path_factory.mktemp("fuzz") / "m", n_shards=2, **SMALL)
    pack(folder, progress=False)
    return folder


def linked(whole: Path, folder: Path, *replaced: str) -> Path:
    """A folder like another, but for the files that a test writes itself."""
    folder.mkdir()
    for path in whole.iterdir():
        if path.name not in replaced:
            (folder / path.name).symlink_to(path)
    return folder


def without_file(info: dict) -> dict:
    """Places of tensors, whatever folder they lie in."""
    return {n: (i.file.name, i.offset, i.dtype, i.shape) for n, i in info.items()}


# --- config.json ----------------------------------------------------------------------


def check_config(config: ModelConfig, text: str) -> None:
    """Every value is the one that the file gives."""
    raw = json.loads(text)
    inner = raw.get("text_config", raw)
    for name, value in vars(config).items():
        if name in inner and name.startswith(("num_", "hid", "head", "moe", "linear_")):
            assert type(inner[name]) is int and value == inner[name] >= 1
    rope = inner.get("rope_parameters") or inner.get("rope_scaling") or {}
    rope = {**inner, **rope}
    assert config.rope_theta == rope["rope_theta"] > 0
    assert 0 < config.partial_rotary_factor == rope["partial_rotary_factor"] <= 1
    assert 2 <= config.rotary_dim <= config.head_dim
    assert 0 < config.rms_norm_eps < np.inf
    assert len(config.layer_types) == config.num_hidden_layers
    assert set(config.layer_types) <= set(LAYER_TYPES)
    tied = raw.get("tie_word_embeddings", inner.get("tie_word_embeddings"))
    assert tied in (None, config.tie_word_embeddings) and type(tied) is not int
    assert all(type(i) is int and i >= 0 for i in config.eos_token_ids)


@inputs({"config.json": 1200})
def test_config(whole: Path, tmp_path: Path, kind: str, n: int) -> None:
    folder = linked(whole, tmp_path / "m", CONFIG)
    expected = Checkpoint.open(whole)

    def read(data: bytes) -> None:
        (folder / CONFIG).write_bytes(data)
        found = Checkpoint.open(folder)
        check_config(found.config, data.decode("utf-8-sig"))
        # The shapes in the files hold: a config that contradicts them is refused.
        assert found.config.hidden_size == expected.config.hidden_size
        assert found.config.vocab_size == expected.config.vocab_size
        assert found.config.num_experts == expected.config.num_experts
        assert found.quantization == expected.quantization

    n_read, n_refused = survive(
        kind, n, (whole / CONFIG).read_bytes(), change_json, read
    )
    assert n_read > n / 50 and n_refused > n / 4


@inputs({"config.json (flat, alone)": 1000})
def test_flat_config(tmp_path: Path, kind: str, n: int) -> None:
    raw = json.loads((write_tiny(tmp_path / "m", **SMALL) / CONFIG).read_text())
    flat = raw["text_config"] | raw["text_config"].pop("rope_parameters")
    flat |= {"model_type": "qwen3_next", "layer_types": [*LAYER_TYPES]}

    def read(data: bytes) -> None:
        (tmp_path / CONFIG).write_bytes(data)
        config = ModelConfig.from_json(tmp_path / CONFIG)
        check_config(config, data.decode("utf-8-sig"))

    source = json.dumps(flat).encode()
    n_read, n_refused = survive(kind, n, source, change_json, read, CONFIG)
    assert n_read > n / 50 and n_refused > n / 4


@inputs({"config.json (convert)": 600, "generation_config.json (convert)": 300})
def test_converted_config(tmp_path: Path, kind: str, n: int) -> None:
    """What `convert` writes for another engine says the same, and can be read."""
    folder, name = write_tiny(tmp_path / "m", "hf", **SMALL), kind.split()[0]
    generation = json.dumps({"eos_token_id": [7, 9], "top_k": 3}).encode()
    (folder / "generation_config.json").write_bytes(generation)

    def read(data: bytes) -> None:
        (folder / name).write_bytes(data)
        checkpoint = Checkpoint.open(folder)
        made = converted_config(checkpoint, read_json(folder / CONFIG))
        try:
            found = ModelConfig.from_dict(json.loads(json.dumps(made)))
        except ConfigError as error:
            raise AssertionError(f"written, it could not be read: {error}") from error
        kept = {"model_type": found.model_type, "eos_token_ids": found.eos_token_ids}
        assert replace(checkpoint.config, **kept) == found

    source = (folder / name).read_bytes()
    n_read, n_refused = survive(kind, n, source, change_json, read)
    assert n_read > n / 50 and n_refused > n / 10


@inputs({"quantization overrides": 1000})
def test_overrides(whole: Path, tmp_path: Path, kind: str, n: int) -> None:
    folder = linked(whole, tmp_path / "m", CONFIG)
    expected = Checkpoint.open(whole)
    raw = json.loads((whole / CONFIG).read_text())
    quantization = json.dumps(raw.pop("quantization"))
    head = json.dumps(raw)[:-1]

    def read(data: bytes) -> None:
        text = f'{head},"quantization":'.encode() + data + b"}"
        (folder / CONFIG).write_bytes(text)
        found = Checkpoint.open(folder)
        assert found.quantization == expected.quantization  # of the shapes, always
        declared = json.loads(text).get("quantization") or {}
        for name, value in declared.items():
            if "." in name and isinstance(value, dict):
                module = name.removeprefix("language_model.").removeprefix("model.")
                bits, group = found.quantization[module]
                assert value.get("bits") in (None, bits)
                assert value.get("group_size") in (None, group)

    n_read, n_refused = survive(kind, n, quantization.encode(), change_json, read)
    assert n_read > n / 50 and n_refused > n / 4


@inputs({"model.safetensors.index.json": 1000})
def test_index(whole: Path, tmp_path: Path, kind: str, n: int) -> None:
    folder = linked(whole, tmp_path / "m", INDEX_NAME)
    expected = without_file(Checkpoint.open(whole).tensors)

    def read(data: bytes) -> None:
        (folder / INDEX_NAME).write_bytes(data)
        assert without_file(Checkpoint.open(folder).tensors) == expected

    source = (whole / INDEX_NAME).read_bytes()
    n_read, n_refused = survive(kind, n, source, change_json, read, str(folder))
    assert n_read > n / 100 and n_refused > n / 4


# --- packed experts -------------------------------------------------------------------


def check_layout(folder: Path, config: ModelConfig, whole: Path) -> None:
    """The parts are those that were packed, unless the file names another float."""
    found, expected = packed_experts(folder, config), packed_experts(whole, config)
    assert len(found.formats) == len(expected.formats)
    for fmt, right in zip(found.formats, expected.formats, strict=True):
        assert fmt.quantization == right.quantization
        for part, packed in zip(fmt.parts, right.parts, strict=True):
            assert (part.name, part.shape) == (packed.name, packed.shape)
            assert part.n_bytes == packed.n_bytes
            assert part.dtype == packed.dtype or part.dtype.name in FLOATS
    assert found.runs == expected.runs


def layouts() -> dict[str, Callable[[dict], dict]]:
    """Of one kind of record, as flash-moe knows it, and with a list of them."""

    def by_layer(layout: dict) -> dict:
        fmt = {name: layout.pop(name) for name in ("expert_size", "components", "bits")}
        layout["formats"] = [fmt, fmt]
        return layout | {"layers": [0, 1], "format": 2}

    return {"layout.json": lambda layout: layout, "layout.json by layer": by_layer}


@inputs({"layout.json": 1200, "layout.json by layer": 600})
def test_layout(whole: Path, tmp_path: Path, kind: str, n: int) -> None:
    packed = whole / "packed_experts"
    folder = linked(packed, tmp_path / "packed", LAYOUT_NAME)
    config = Checkpoint.open(whole).config
    source = layouts()[kind](json.loads((packed / LAYOUT_NAME).read_text()))

    def read(data: bytes) -> None:
        (folder / LAYOUT_NAME).write_bytes(data)
        check_layout(folder, config, packed)

    text = json.dumps(source).encode()
    n_read, n_refused = survive(kind, n, text, change_json, read, str(folder))
    assert n_read > n / 50 and n_refused > n / 4


@inputs({"layout.json without its model": 500})
def test_layout_alone(whole: Path, tmp_path: Path, kind: str, n: int) -> None:
    packed = whole / "packed_experts"
    folder = linked(packed, tmp_path / "packed", LAYOUT_NAME)
    n_bytes = sum(path.stat().st_size for path in packed.glob("*.bin"))

    def read(data: bytes) -> None:
        (folder / LAYOUT_NAME).write_bytes(data)
        found = verify(folder, progress=False)  # compares digests of all experts
        assert found.n_bytes <= n_bytes and found.n_unchecked == 0

    source = (packed / LAYOUT_NAME).read_bytes()
    n_read, n_refused = survive(kind, n, source, change_json, read, str(folder))
    assert n_read > n / 50 and n_refused > n / 10


@inputs({"packed experts (bytes)": 500, "list of digests": 500})
def test_files_of_packed_experts(
    whole: Path, tmp_path: Path, kind: str, n: int
) -> None:
    """No changed byte passes `verify`, in the file or in its list of digests."""
    packed = whole / "packed_experts"
    name = "layer_01.bin" + ".sha256" * (kind == "list of digests")
    folder = linked(packed, tmp_path / "packed", name)
    source = (packed / name).read_bytes()

    def read(data: bytes) -> None:
        (folder / name).write_bytes(data)
        verify(folder, progress=False)
        # Line ends of another system mean the same.
        assert data.decode().splitlines() == source.decode().splitlines()

    n_read, _ = survive(kind, n, source, change_bytes, read, str(folder))
    assert n_read <= n / 50
