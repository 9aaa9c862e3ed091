"""Damaged safetensors files: never read where the library refuses, else read alike."""

import json
import struct
from pathlib import Path

import numpy as np
import safetensors
from fuzz import inputs, survive
from mutate import change_bytes, change_json
from safetensors.numpy import save

from flashmoe_ref.headers import DTYPES, read_header, read_tensor

FILE = "model.safetensors"


def small_file() -> bytes:
    """Several dtypes, a scalar, an empty tensor, metadata."""
    tensors = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.float16),
        "empty": np.zeros((0, 3), np.int64),
        "one": np.array(7, np.int32),
        "é words": np.arange(5, dtype=np.uint8),
    }
    return save(tensors, {"format": "pt"})


def parts(data: bytes) -> tuple[bytes, bytes]:
    """The text of a header, and the data."""
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length].rstrip(), data[8 + length :]


def change_header(data: bytes, rng) -> bytes:
    """Change the JSON of the header; its length is right again, mostly."""
    text, body = parts(data)
    text = change_json(text, rng)
    if rng.random() < 0.1:
        body = change_bytes(body, rng)
    length = len(text) + rng.choice((0,) * 19 + (rng.randrange(-9, 10),))
    return struct.pack("<Q", max(0, length)) + text + body


def change_sizes(data: bytes, rng) -> bytes:
    """Change shapes and offsets in ways that may still fit together."""
    text, body = parts(data)
    header = json.loads(text)
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2))):
        entry = header[rng.choice(names)]
        change = rng.randrange(6)
        if change == 0:
            factors = (0, 1, 2, 3, 2**31, 2**32, 2**62, 2**63, 2**64)
            shape, n_more = entry["shape"], rng.choice((1, 1, 1, 1, 70, 10_000))
            i, factor = rng.randrange(len(shape) + 1), rng.choice(factors)
            entry["shape"] = shape[:i] + [factor] * n_more + shape[i:]
        elif change == 1:
            rng.shuffle(entry["shape"])
        elif change == 2:
            entry["dtype"] = rng.choice((*DTYPES, "F4", "F8_E8M0", "C64", "f32", ""))
        elif change == 3:
            other = header[rng.choice(names)]
            ours, theirs = entry["data_offsets"], other["data_offsets"]
            entry["data_offsets"], other["data_offsets"] = theirs, ours
        elif change == 4:
            move = rng.choice((-(2**63), -8, -1, 1, 4, 8, 2**32, 2**63, 2**64))
            entry["data_offsets"] = [n + move for n in entry["data_offsets"]]
        else:
            header[rng.choice((*names, "new"))] = {**entry}
    text = json.dumps(header).encode()
    body += rng.choice((b"", b"", b"", b"\0", b"\0" * 24))
    return struct.pack("<Q", len(text)) + text + body


def check_like_the_library(folder: Path, data: bytes) -> None:
    """Read a file; what we read must be what the library reads."""
    path = folder / FILE
    path.write_bytes(data)
    ours = read_header(path)
    theirs = dict(safetensors.deserialize(data))  # raises for what it refuses
    assert ours.keys() == theirs.keys()
    for name, info in ours.items():
        expected = theirs[name]
        assert DTYPES[expected["dtype"]] == info.dtype
        assert expected["shape"] == list(info.shape)
        array = read_tensor(info)
        assert (array.dtype, array.shape) == (info.dtype, info.shape)
        assert array.tobytes() == bytes(expected["data"])


@inputs({"safetensors header (JSON)": 2500})
def test_headers(tmp_path: Path, kind: str, n: int) -> None:
    def read(data: bytes) -> None:
        check_like_the_library(tmp_path, data)

    n_read, n_refused = survive(kind, n, small_file(), change_header, read, FILE)
    assert n_read > n / 100 and n_refused > n / 2


@inputs({"safetensors header (sizes)": 1500})
def test_sizes(tmp_path: Path, kind: str, n: int) -> None:
    def read(data: bytes) -> None:
        check_like_the_library(tmp_path, data)

    n_read, n_refused = survive(kind, n, small_file(), change_sizes, read, FILE)
    assert n_read > n / 100 and n_refused > n / 2


@inputs({"safetensors file (bytes)": 1500})
def test_bytes(tmp_path: Path, kind: str, n: int) -> None:
    def read(data: bytes) -> None:
        check_like_the_library(tmp_path, data)

    n_read, n_refused = survive(kind, n, small_file(), change_bytes, read, FILE)
    assert n_read > n / 100 and n_refused > n / 2
