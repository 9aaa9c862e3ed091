"""What several test files share: golden checkpoints, and one that mlx-lm made."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from tiny import write_tiny

from flashmoe_ref.pack import pack

# An example has no time limit: other processes take the core for longer than that.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NAMES = ("qwen35_fused", "qwen35_per_expert", "qwen3_next")

# The engines are compared in float32, which MLX's engine uses on the CPU only.
ENGINES = {
    "numpy": {"engine": "numpy", "compiled": False},
    "compiled": {"engine": "numpy", "compiled": True},
    "mlx": {"engine": "mlx"},
}


@pytest.fixture(params=GOLDEN_NAMES, scope="module")
def golden(request: pytest.FixtureRequest) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint folder, and what transformers computes with it in float32."""
    return GOLDEN / request.param, read_golden(request.param)


def read_golden(name: str) -> dict[str, np.ndarray]:
    """The arrays that golden/make_golden.py lists in its docstring."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(params=ENGINES, scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[dict]:
    """Arguments of load() that choose an engine; MLX computes on the CPU meanwhile."""
    if request.param != "mlx":
        yield ENGINES[request.param]
        return
    mx = pytest.importorskip("mlx.core")
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield ENGINES[request.param]
    mx.set_default_device(device)


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory, where the system has such: no disk to wait for."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path_factory.mktemp("memory")
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def tokenized_golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden Qwen3.5 with fused experts, and a tokenizer: mlx-lm insists on one."""
    folder = tmp_path_factory.mktemp("golden") / "hf"
    shutil.copytree(GOLDEN / "qwen35_fused", folder)
    write_tokenizer(folder)
    return folder


END, END_ID = "<|endoftext|>", 119  # the name that transformers gives Qwen's


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of 120 ids: printable ASCII, some pairs of letters, an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # In byte-level BPE, G and C with a dot stand for the space and the line feed.
    letters = [chr(i) for i in range(33, 127)] + ["\u0120", "\u010a"]
    pairs = (
        "th he in er an re on at en nd ti es or te of ed is it al ar st to nt".split()
    )
    words = [*letters, *pairs]
    assert len(words) == END_ID
    vocabulary = {word: i for i, word in enumerate(words)}
    model = models.BPE(vocabulary, [(a, b) for a, b in pairs])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


@pytest.fixture(scope="session")
def mlx4(tokenized_golden: Path) -> Path:
    """The same model quantized by mlx-lm's own convert: 4 bits, 8 for the gates."""
    convert = pytest.importorskip("mlx_lm.convert").convert
    folder = tokenized_golden.parent / "mlx4"
    convert(str(tokenized_golden), str(folder), quantize=True, q_bits=4)
    return folder


@pytest.fixture(scope="module")
def packed_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny quantized model, with packed experts beside its own."""
    folder = write_tiny(tmp_path_factory.mktemp("m"))
    pack(folder, progress=False)
    return folder


@pytest.fixture
def spoiled(packed_tiny: Path, tmp_path: Path) -> Path:
    """A copy of that model, which a test may spoil."""
    return shutil.copytree(packed_tiny, tmp_path / "m")
