"""Conversion: equal to mlx-lm's, bounded in memory, careful with what is there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from comparing import assert_close
from safetensors.numpy import load_file, save_file
from tiny import TEXT_CONFIG, write_tiny

from flashmoe_ref import shards, writing
from flashmoe_ref.checkpoint import ZERO_CENTRED, Checkpoint
from flashmoe_ref.convert import convert, target_name
from flashmoe_ref.errors import CheckpointError, ConfigError, PackError
from flashmoe_ref.headers import read_tensor
from flashmoe_ref.quantize import quantize
from flashmoe_ref.requantize import Widths, plan_requantized, requantize

GOLDEN = Path(__file__).parent / "golden"


def all_tensors(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not set(part) & set(tensors)
        tensors |= part
    return tensors


def assert_same_tensors(got: dict, wanted: dict) -> None:
    assert set(got) == set(wanted)
    for name, array in wanted.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


def hf_source(folder: Path, **settings) -> Path:
    source = write_tiny(folder, **{"layout": "hf", "n_shards": 2} | settings)
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text('{"a": 1}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    return source


def mlx_lm_convert(source: Path, target: Path, monkeypatch, **settings) -> dict:
    """What mlx-lm's own convert writes; it needs no tokenizer for the weights."""
    pytest.importorskip("mlx_lm")
    import mlx_lm.utils
    from mlx_lm.convert import convert as theirs

    class NoTokenizer:
        def save_pretrained(self, path):
            pass

    def load(path, **_):
        model, config = mlx_lm.utils.load_model(Path(path), lazy=True)
        return model, NoTokenizer(), config

    monkeypatch.setitem(theirs.__globals__, "load", load)
    monkeypatch.setattr(mlx_lm.utils, "create_model_card", lambda *_: None)
    theirs(str(source), str(target), quantize=True, **settings)
    return all_tensors(target)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bits, group", [(4, 64), (2, 32), (3, 64), (8, 32)])
def test_equals_mlx_lm_convert(tmp_path, monkeypatch, dtype, bits, group):
    numpy_dtype = getattr(ml_dtypes, dtype, None) or getattr(np, dtype)
    source = hf_source(tmp_path / "hf", dtype=np.dtype(numpy_dtype))
    raw = json.loads((source / "config.json").read_text())
    raw["text_config"]["dtype"] = dtype
    raw["vision_config"] = {"depth": 1}
    (source / "config.json").write_text(json.dumps(raw))
    wanted = mlx_lm_convert(
        source, tmp_path / "theirs", monkeypatch, q_bits=bits, q_group_size=group
    )
    ours = convert(source, tmp_path / "ours", bits, group, progress=False)
    assert_same_tensors(all_tensors(ours), wanted)
    config, their_config = (
        json.loads((folder / "config.json").read_text())
        for folder in (ours, tmp_path / "theirs")
    )
    # mlx-lm renames rope_type; everything else is equal.
    rope = their_config["text_config"]["rope_parameters"]
    rope["rope_type"] = rope.pop("type")
    assert config == their_config


def test_equals_mlx_lm_convert_of_qwen3_next(tmp_path, monkeypatch):
    source = tmp_path / "hf"
    shutil.copytree(GOLDEN / "qwen3_next", source)
    ours = convert(source, tmp_path / "ours", group_size=32, progress=False)
    # mlx-lm needs rope_theta at the top level; our config.json says it so.
    config = json.loads((ours / "config.json").read_text())
    del config["quantization"], config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    wanted = mlx_lm_convert(source, tmp_path / "theirs", monkeypatch, q_group_size=32)
    assert_same_tensors(all_tensors(ours), wanted)


@pytest.mark.parametrize("name", ["qwen35_fused", "qwen35_per_expert", "qwen3_next"])
def test_mlx_lm_runs_what_we_convert(tmp_path, name):
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.utils import load_model

    ours = convert(GOLDEN / name, tmp_path / "ours", 4, 32, 8, 150_000, progress=False)
    assert len(list(ours.glob("*.safetensors"))) > 1
    model, _ = load_model(ours)
    logits = model(mx.array([[1, 2, 3, 4]]))
    assert logits.shape[:2] == (1, 4) and mx.isfinite(logits).all()
    checkpoint = Checkpoint.open(ours)
    assert checkpoint.layout == "mlx"
    assert not checkpoint.norms_are_zero_centred


def test_layout_of_the_source_makes_no_difference(tmp_path):
    for layout in ("hf", "hf-per-expert"):
        hf_source(tmp_path / layout, layout=layout)
        convert(tmp_path / layout, tmp_path / f"{layout}-4bit", progress=False)
    one, other = tmp_path / "hf-4bit", tmp_path / "hf-per-expert-4bit"
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in set(names) - {"conversion.json"}:  # which names the source's tensors
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_dense_bits_are_declared_module_by_module(tmp_path):
    source = hf_source(tmp_path / "hf")
    ours = convert(source, tmp_path / "ours", 4, 32, dense_bits=6, progress=False)
    config = json.loads((ours / "config.json").read_text())
    quantization = config["quantization"]
    assert quantization == config["quantization_config"]
    settings = {k: quantization.pop(k) for k in ("bits", "group_size", "mode")}
    assert settings == {"bits": 4, "group_size": 32, "mode": "affine"}
    checkpoint = Checkpoint.open(ours)  # which checks declared against real widths
    for module, (bits, group) in checkpoint.quantization.items():
        path = checkpoint.tensors[f"{module}.weight"].name.removesuffix(".weight")
        if ".experts." in module:
            assert (bits, group) == (4, 32) and path not in quantization
        else:
            gate = module.endswith(("mlp.gate", "shared_expert_gate"))
            assert (bits, group) == ((8, 64) if gate else (6, 32))
            assert quantization.pop(path) == {"group_size": group, "bits": bits}
    assert not quantization
    assert checkpoint.quantization["layers.0.mlp.shared_expert.down_proj"] == (6, 32)


def test_flat_config_becomes_nested(tmp_path):
    source = hf_source(tmp_path / "hf")
    flat = TEXT_CONFIG | {"partial_rotary_factor": 0.25, "rope_theta": 1e7}
    del flat["rope_parameters"], flat["full_attention_interval"]
    flat["layer_types"] = ["linear_attention"] * 3 + ["full_attention"]
    flat["eos_token_id"] = 3
    (source / "config.json").write_text(json.dumps(flat))
    ours = convert(source, tmp_path / "ours", group_size=32, progress=False)
    config = json.loads((ours / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_moe"
    assert config["eos_token_id"] == [5, 7]  # of generation_config, as mlx-lm does
    text = config["text_config"]
    assert text["model_type"] == "qwen3_5_moe_text"
    assert text["full_attention_interval"] == 4
    assert text["rope_parameters"]["rope_theta"] == 1e7
    assert text["rope_parameters"]["partial_rotary_factor"] == 0.25
    Checkpoint.open(ours)


def test_copies_the_tokenizer_and_skips_vision_and_prediction_head(tmp_path):
    source = hf_source(tmp_path / "hf", n_shards=1)
    tensors = load_file(source / "model.safetensors")
    tensors["model.visual.blocks.0.attn.qkv.weight"] = np.ones((4, 4), np.float32)
    tensors["mtp.fc.weight"] = np.ones((4, 4), np.float32)
    save_file(tensors, source / "model.safetensors")
    ours = convert(source, tmp_path / "ours", progress=False)
    assert not any("visual" in n or "mtp" in n for n in all_tensors(ours))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (ours / name).read_bytes() == (source / name).read_bytes()
    assert not list(ours.glob(".*"))


def test_tied_embeddings_have_no_lm_head(tmp_path):
    source = hf_source(tmp_path / "hf", n_shards=1, tie_word_embeddings=True)
    ours = convert(source, tmp_path / "ours", progress=False)
    assert not any("lm_head" in name for name in all_tensors(ours))
    config = json.loads((ours / "config.json").read_text())
    assert config["text_config"]["tie_word_embeddings"] is True
    Checkpoint.open(ours)


@pytest.mark.parametrize("shard_bytes", [1, 30_000, 200_000])
def test_shards_keep_below_the_limit(tmp_path, shard_bytes):
    source = hf_source(tmp_path / "hf")
    ours = convert(source, tmp_path / "o", shard_bytes=shard_bytes, progress=False)
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    shards = sorted(ours.glob("*.safetensors"))
    assert [s.name for s in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    n_bytes = 0
    for shard in shards:
        tensors = load_file(shard)
        n_bytes += sum(array.nbytes for array in tensors.values())
        assert all(index["weight_map"][name] == shard.name for name in tensors)
        modules = {name.rpartition(".")[0] for name in tensors}
        assert shard.stat().st_size <= shard_bytes or len(modules) == 1
        n_header = int.from_bytes(shard.read_bytes()[:8], "little")
        assert n_header % 8 == 0
    assert index["metadata"]["total_size"] == n_bytes
    assert len(index["weight_map"]) == len(all_tensors(ours))


def test_float_checkpoint_in_mlx_layout(tmp_path):
    """What `mlx_lm.convert` writes without quantizing: norms are folded already."""
    source = hf_source(tmp_path / "hf", n_shards=1)
    wanted = all_tensors(convert(source, tmp_path / "wanted", progress=False))
    checkpoint = Checkpoint.open(source)
    tensors = {}
    for name, info in checkpoint.tensors.items():
        path = target_name(checkpoint.config, name)
        array = read_tensor(info)
        if name.endswith("conv1d.weight"):
            array = np.moveaxis(array, 2, 1).copy()
        elif ZERO_CENTRED.search(name.removesuffix(".weight")):
            array = array + array.dtype.type(1)
        if name.endswith("gate_up_proj"):
            stem = path.removesuffix("gate_up_proj")
            half = array.shape[1] // 2
            tensors[f"{stem}gate_proj.weight"] = array[:, :half].copy()
            tensors[f"{stem}up_proj.weight"] = array[:, half:].copy()
        else:
            suffix = ".weight" if name.endswith("experts.down_proj") else ""
            tensors[path + suffix] = array
    save_file(tensors, source / "model.safetensors")
    ours = convert(source, tmp_path / "ours", progress=False)
    assert_same_tensors(all_tensors(ours), wanted)


# ---- requantize ----------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mlx", "minmax", "least_squares"])
def test_requantize_changes_the_experts_and_nothing_else(tmp_path, rule):
    source = write_tiny(tmp_path / "m", bits=4, dense_bits=8, n_shards=2)
    ours = requantize(source, tmp_path / "m2", 2, rule=rule, progress=False)
    before, after = all_tensors(source), all_tensors(ours)
    assert set(before) == set(after)
    for name, array in before.items():
        if ".switch_mlp." not in name:
            assert after[name].tobytes() == array.tobytes(), name
    from flashmoe_ref.quantize import requantize as in_memory

    old, new = Checkpoint.open(source), Checkpoint.open(ours)
    for module, width in old.quantization.items():
        expert = ".experts." in module
        assert new.quantization[module] == ((2, 32) if expert else width)
        if expert:
            wanted = in_memory(old.module(module), 2, rule=rule)
            got = new.module(module)
            for kind in ("weight", "scales", "biases"):
                assert getattr(got, kind).tobytes() == getattr(wanted, kind).tobytes()
    quantization = json.loads((ours / "config.json").read_text())["quantization"]
    assert (quantization["bits"], quantization["group_size"]) == (2, 32)


@pytest.mark.parametrize("n_experts", [1, 3])
def test_experts_worked_on_together_change_nothing(tmp_path, monkeypatch, n_experts):
    source = write_tiny(tmp_path / "m", bits=4, dense_bits=8)
    want = all_tensors(requantize(source, tmp_path / "all", 2, progress=False))
    checkpoint = Checkpoint.open(source)
    info = checkpoint.tensors["layers.0.mlp.experts.gate_proj.weight"]
    n_bytes = n_experts * info.n_bytes // info.shape[0]
    monkeypatch.setattr("flashmoe_ref.requantize.BLOCK_BYTES", n_bytes)
    got = all_tensors(requantize(source, tmp_path / "some", 2, progress=False))
    assert {n: a.tobytes() for n, a in got.items()} == {
        n: a.tobytes() for n, a in want.items()
    }


def test_requantized_runs_in_mlx_lm(tmp_path):
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.utils import load_model

    source = write_tiny(tmp_path / "m", bits=4, dense_bits=8)
    ours = requantize(source, tmp_path / "m3", 3, 64, progress=False)
    model, _ = load_model(ours)
    layer = model.language_model.model.layers[0]
    assert layer.mlp.switch_mlp.up_proj.bits == 3
    assert layer.mlp.switch_mlp.up_proj.group_size == 64
    assert layer.linear_attn.out_proj.bits == 8
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()


def test_requantize_can_differ_by_layer_and_projection(tmp_path):
    checkpoint = Checkpoint.open(write_tiny(tmp_path / "m", bits=4))

    widths = Widths(2, 32, down_bits=4, layer_bits={1: 4})
    modules, widths = plan_requantized(checkpoint, widths.of, "mlx")
    stem = "language_model.model.layers.{}.mlp.switch_mlp.{}"
    assert widths[stem.format(0, "up_proj")] == (2, 32)
    assert widths[stem.format(0, "down_proj")] == (4, 32)
    assert widths[stem.format(1, "up_proj")] == (4, 32)
    n_kept = sum(module.n_bytes for module in modules)
    assert n_kept < checkpoint.n_bytes


@pytest.mark.parametrize("rule", ["mlx", "minmax"])
def test_requantize_everything_but_the_gates_and_then_the_gates(tmp_path, rule):
    from flashmoe_ref.quantize import requantize as in_memory

    source = write_tiny(tmp_path / "m", bits=4, dense_bits=8, n_shards=2)
    target = tmp_path / "new"
    widths = {"dense_bits": 5, "router_bits": 6, "rule": rule}
    new = Checkpoint.open(requantize(source, target, 4, progress=False, **widths))
    old = Checkpoint.open(source)
    assert set(new.tensors) == set(old.tensors)
    for module, (bits, _) in old.quantization.items():
        is_gate = module.endswith((".gate", "shared_expert_gate"))
        wanted_bits = 4 if ".experts." in module else 6 if is_gate else 5
        assert new.quantization[module][0] == wanted_bits, module
        wanted, got = old.module(module), new.module(module)
        if wanted_bits != bits:
            wanted = in_memory(wanted, wanted_bits, rule=rule)
        for kind in ("weight", "scales", "biases"):
            assert getattr(got, kind).tobytes() == getattr(wanted, kind).tobytes()


def test_rows_worked_on_apart_change_nothing(tmp_path, monkeypatch):
    source = write_tiny(tmp_path / "m", bits=4, dense_bits=8)
    options = {"dense_bits": 3, "progress": False}
    want = all_tensors(requantize(source, tmp_path / "all", 4, **options))
    monkeypatch.setattr("flashmoe_ref.convert.BLOCK_BYTES", 1000)
    got = all_tensors(requantize(source, tmp_path / "some", 4, **options))
    assert {n: a.tobytes() for n, a in got.items()} == {
        n: a.tobytes() for n, a in want.items()
    }


def test_mixed_bits_run_in_mlx_lm(tmp_path):
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.utils import load_model

    from flashmoe_ref.engine import load

    source = write_tiny(tmp_path / "m", bits=4, dense_bits=8)
    mixed = {"down_bits": 3, "dense_bits": 4, "router_bits": 4, "layer_bits": {1: 8}}
    ours = requantize(source, tmp_path / "mixed", 2, progress=False, **mixed)
    model, _ = load_model(ours)
    experts = [layer.mlp.switch_mlp for layer in model.language_model.model.layers]
    assert [e.up_proj.bits for e in experts] == [2, 8, 2, 2]
    assert [e.down_proj.bits for e in experts] == [3, 8, 3, 3]
    model.set_dtype(mx.float32)
    ids = [1, 2, 3, 50, 90]
    with load(ours, engine="numpy", compiled=False) as whole:
        assert_close(whole.logits(ids), np.array(model(mx.array([ids]))[0]), "mlx-lm")


# ---- refusals ------------------------------------------------------------------------


def test_refuses_bad_settings(tmp_path):
    hf = hf_source(tmp_path / "hf")
    mlx = write_tiny(tmp_path / "mlx")
    cases = [
        lambda t: convert(hf, t, bits=7),
        lambda t: convert(hf, t, dense_bits=1),
        lambda t: convert(hf, t, dense_bits=0),
        lambda t: convert(hf, t, group_size=48),
        lambda t: convert(hf, t, group_size=128),
        lambda t: convert(hf, t, shard_bytes=0),
        lambda t: convert(mlx, t),
        lambda t: requantize(hf, t, 2),
        lambda t: requantize(mlx, t, 7),
        lambda t: requantize(mlx, t, 2, group_size=0),
        lambda t: requantize(mlx, t, 2, rule="best"),
        lambda t: requantize(mlx, t, 2, down_bits=7),
        lambda t: requantize(mlx, t, 2, dense_bits=0),
        lambda t: requantize(mlx, t, 2, router_bits=16),
        lambda t: requantize(mlx, t, 2, layer_bits={0: 9}),
        lambda t: requantize(mlx, t, 2, layer_bits={4: 4}),
        lambda t: requantize(mlx, t, 4, group_size=128, dense_bits=4),
        lambda t: requantize(mlx, t, 2, group_size=128),
    ]
    for case in cases:
        with pytest.raises(ConfigError) as error:
            case(tmp_path / "out")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()


def test_a_tensor_with_nan_is_named(tmp_path):
    source = hf_source(tmp_path / "hf", n_shards=1)
    tensors = load_file(source / "model.safetensors")
    name = "model.language_model.layers.2.mlp.experts.down_proj"
    tensors[name][5, 3, 3] = np.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers.2.*down_proj.* of expert 5"):
        convert(source, tmp_path / "out", progress=False)


def test_a_folder_is_no_model_before_all_of_it_is_there(tmp_path, monkeypatch):
    source = hf_source(tmp_path / "hf")
    monkeypatch.setattr(shards, "write_shards", lambda *_: 1 / 0)  # as a kill would
    with pytest.raises(ZeroDivisionError):
        convert(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.undo()
    convert(source, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "config.json").exists()


def test_refuses_what_it_did_not_make(tmp_path):
    source = hf_source(tmp_path / "hf")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(PackError, match="not empty"):
        convert(source, foreign, progress=False)
    assert [path.name for path in foreign.iterdir()] == ["notes.txt"]
    with pytest.raises(PackError, match="is a file"):
        convert(source, foreign / "notes.txt", progress=False)
    with pytest.raises(PackError, match="source itself"):
        convert(source, source, progress=False)


def test_refuses_to_mix_sources_or_settings(tmp_path):
    source = hf_source(tmp_path / "hf")
    other = hf_source(tmp_path / "other", seed=1)  # same names, sizes and places
    target = convert(source, tmp_path / "out", progress=False)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    with pytest.raises(PackError, match=r"other settings \(settings differ"):
        convert(source, target, bits=2, progress=False)
    with pytest.raises(PackError, match=r"other settings \(settings differ"):
        convert(source, target, shard_bytes=10_000, progress=False)
    with pytest.raises(PackError, match=r"other settings \(source differ"):
        convert(other, target, progress=False)
    convert(source, target, progress=False)  # the same again is no error
    assert before == {p.name: p.read_bytes() for p in target.iterdir()}


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 3},
        {"group_size": 64},
        {"rule": "minmax"},
        {"shard_bytes": 10_000},
        {"down_bits": 3},
        {"layer_bits": {0: 4}},
    ],
)
def test_requantize_refuses_to_mix_settings(tmp_path, change):
    source = write_tiny(tmp_path / "m")
    requantize(source, tmp_path / "m2", 2, progress=False)
    with pytest.raises(PackError, match="settings differ"):
        requantize(source, tmp_path / "m2", **{"bits": 2} | change, progress=False)


def test_needs_space(tmp_path, monkeypatch):
    source = hf_source(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000_000)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(PackError, match=r"needs 0\.1 GB, the disk has 0\.1 GB free"):
        convert(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    source = hf_source(tmp_path / "hf")

    def full(self, name, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing.PartsFile, "write", full)
        with pytest.raises(PackError, match="No space left on device"):
            convert(source, tmp_path / "out", progress=False)
    assert not [p for p in (tmp_path / "out").iterdir() if ".partial" in p.name]
    convert(source, tmp_path / "out", progress=False)
    Checkpoint.open(tmp_path / "out")


HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_write_to_one_folder(tmp_path):
    source = hf_source(tmp_path / "hf")
    target = tmp_path / "out"
    target.mkdir()
    command = [sys.executable, "-c", HOLD, str(target / writing.LOCK_NAME)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(PackError, match="another process"):
            convert(source, target, progress=False)
        holder.stdin.close()
    convert(source, target, progress=False)
    assert not (target / writing.LOCK_NAME).exists()


# ---- memory --------------------------------------------------------------------------

MEASURE = """
import re, sys
from flashmoe_ref import shards
from flashmoe_ref.convert import convert
shards.N_WORKERS = 2  # each holds a block or two
# Not ru_maxrss: that starts from what the parent process had.
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = peak()
convert(sys.argv[1], sys.argv[2], progress=False)
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded(tmp_path):
    """270 MB, of which one tensor has 134 MB: in a small part of that."""
    source = tmp_path / "big"
    wide = {
        "num_hidden_layers": 1,
        "num_experts": 256,
        "hidden_size": 512,
        "moe_intermediate_size": 256,
        "vocab_size": 65_536,
        "tie_word_embeddings": True,
    }
    _write_big(source, TEXT_CONFIG | wide)
    n_bytes = Checkpoint.open(source).n_bytes
    assert n_bytes > 250e6
    command = [sys.executable, "-c", MEASURE, source, tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 80e6, f"{int(result.stdout) / 1e6:.0f} MB"


def _write_big(folder: Path, text: dict) -> None:
    """Weights that repeat one random megabyte: quick to make."""
    from flashmoe_ref.accounting import module_shapes
    from flashmoe_ref.config import ModelConfig

    folder.mkdir()
    raw = {"model_type": "qwen3_5_moe", "text_config": text}
    (folder / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_dict(raw)
    noise = np.random.default_rng(0).standard_normal(1 << 19)
    noise = noise.astype(ml_dtypes.bfloat16)
    tensors = {}
    shapes = {k: s for g in module_shapes(config).values() for k, s in g.items()}
    for name, shape in shapes.items():
        if name.endswith(".gate_proj") and ".experts." in name:
            name = name.replace("gate_proj", "gate_up_proj")
            shape = (shape[0], 2 * shape[1], shape[2])
        elif name.endswith(".up_proj") and ".experts." in name:
            continue
        elif not name.endswith(("A_log", "dt_bias")) and ".experts." not in name:
            name += ".weight"
        if name.endswith("conv1d.weight"):
            shape = (shape[0], 1, shape[1])
        tensors[f"model.language_model.{name}"] = np.resize(noise, shape)
    save_file(tensors, folder / "model.safetensors")


def test_quantize_is_called_on_the_source_dtype(tmp_path):
    source = hf_source(tmp_path / "hf", dtype=np.dtype(np.float32))
    ours = all_tensors(convert(source, tmp_path / "ours", 5, 32, progress=False))
    hf = all_tensors(source)
    name = "layers.1.mlp.experts.down_proj"
    wanted = quantize(hf[f"model.language_model.{name}"], 5, 32)
    path = f"language_model.model.{name}".replace(".experts.", ".switch_mlp.")
    assert ours[f"{path}.weight"].tobytes() == wanted.weight.tobytes()
    assert ours[f"{path}.scales"].dtype == np.float32


def test_stop_ids_that_are_none_are_refused_before_the_work(tmp_path):
    source = hf_source(tmp_path / "m")
    (source / "generation_config.json").write_text('{"eos_token_id": [5, "x"]}')
    with pytest.raises(
        ConfigError, match=r"generation_config\.json: eos_token_id must"
    ):
        convert(source, tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()
