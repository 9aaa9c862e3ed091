"""Damaged traces, routing tables, sweeps, settings, sets of prompts and probes."""

import csv
import io
import json
import math
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fuzz import inputs, survive
from mutate import change_bytes, change_json, change_table

from flashmoe_ref import trace_exchange
from flashmoe_ref.errors import ConfigError
from flashmoe_ref.machines import machine, with_probe
from flashmoe_ref.planner_fit import read_published
from flashmoe_ref.quality import cost_in_quality, read_sweep
from flashmoe_ref.recording import KINDS
from flashmoe_ref.relu_model import ReluConfig, ReluModel
from flashmoe_ref.settings import Setting, read_settings
from flashmoe_ref.structured_runs import load_prompts
from flashmoe_ref.sweep import read_table
from flashmoe_ref.trace import Trace
from flashmoe_ref.trace_exchange import read_csv
from flashmoe_ref.trace_format import READ, SPAN, STEP

# NumPy's, of a header with Python 2's numbers, such as 4L
pytestmark = pytest.mark.filterwarnings("ignore:Reading `.npy`")
E, T, L, K = 8, 4, 2, 2
DATA = Path(__file__).parents[1] / "data"

# --- traces ---------------------------------------------------------------------------


def arrays() -> dict[str, np.ndarray]:
    """Of a small trace: a prompt of two tokens, then two more."""
    rng = np.random.default_rng(0)
    picks = np.array([[rng.permutation(E)[:K] for _ in range(L)] for _ in range(T)])
    n = 3
    reads = np.zeros(n, READ)
    reads["expert"], reads["n_bytes"], reads["end_s"] = picks[0, 0, 0], 64, 1.0
    spans = np.zeros(n, SPAN)
    spans["kind"], spans["end_s"] = np.arange(n) % len(KINDS), 2.0
    found = {
        "version": np.array(1),
        "n_experts": np.array(E),
        "picks": picks.astype(np.uint8),
        "steps": np.array([(2, 0), (1, 2), (1, 3)], STEP),
        "about": np.array(json.dumps({"model": "m", "mode": {"k": K}})),
        "ids": np.arange(T, dtype=np.int32),
        "weights": np.full((T, L, K), 0.5, np.float16),
        "spans": spans,
        "reads": reads,
    }
    trace = Trace(found["picks"].astype(np.int32), E, found["steps"])
    return found | {"hits": np.zeros(len(trace.accesses()), bool)}


NUMBERS = (-(2**31), -2, -1, 0, 1, 7, 8, 255, 32_767, 32_768, 2**31 - 1)
ABOUTS = ('{"mode": 1}', "[]", "NaN", "[" * 9000, '{"mode": {"a":', "{}", "x" * 99)
CLAIMS = (  # shapes in an array's header
    *(b"(10000000000000,)", b"(9223372036854775807, 2)", b"(-1,)", b"(0,)", b"()"),
    *(b"(1099511627776, 1099511627776)", b"'x'", b"(" * 3000, b"None", b"(4L,)"),
)
DTYPES = ("u1", "i1", "i2", "u2", "i4", "i8", "u8", "f2", "f4", "f8", "b1", "U3", "S2")


def change_arrays(_: bytes, rng: random.Random) -> bytes:
    """The zip of a trace with one or two arrays changed, or with its bytes changed."""
    found: dict = arrays()
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice([*found])
        found[name] = _changed(found[name], rng)
        if rng.random() < 0.1:
            del found[name]
    file = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, array in found.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), _npy(array, rng))
    data = file.getvalue()
    return change_bytes(data, rng) if rng.random() < 0.3 else data


def _changed(array: np.ndarray, rng: random.Random) -> np.ndarray:
    change, names = rng.randrange(6), array.dtype.names
    array = array.copy()
    with np.errstate(all="ignore"):
        if change == 0 and not names:
            try:
                return array.astype(rng.choice(DTYPES))
            except (ValueError, TypeError):
                return np.array("x")
        if change == 1 and array.ndim:
            parts = (array[:-1], array[None], array[..., 0], array.T, array[:0])
            return rng.choice(parts)
        if change == 2:
            return np.array(rng.choice(ABOUTS))
        if change == 3:
            return np.array([None, {}], object) if rng.random() < 0.3 else array[()]
        target = array[rng.choice(names)] if names else array
        if not target.size or target.dtype.kind in "US":
            return np.array(rng.choice(NUMBERS))
        special = (math.nan, math.inf, -1.0, 1e308) if target.dtype.kind == "f" else ()
        i = rng.randrange(target.size)
        value = np.array(rng.choice((*NUMBERS, *special))).astype(target.dtype)
        target.reshape(-1)[i] = value
        if not names:
            return target
    return array


def _npy(array: np.ndarray, rng: random.Random) -> bytes:
    """As NumPy writes it; now and then with a header that claims something else."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array))
    data = file.getvalue()
    if rng.random() < 0.15:
        wanted = rng.choice(CLAIMS)
        start, end = data.find(b"(", 10), data.find(b")", 10) + 1
        text = data[10:start] + wanted + data[end : data.find(b"\n")]
        text += b" " * (-len(text) - 11 % 64) + b"\n"
        data = data[:8] + len(text).to_bytes(2, "little") + text + data[-array.nbytes :]
    return data


def check_trace(trace: Trace) -> None:
    """What `first_fault` promises, told in other words; and its views work."""
    assert trace.picks.dtype == np.int32 and trace.picks.ndim == 3
    assert trace.picks.min(initial=0) >= -1
    assert trace.picks.max(initial=0) < trace.n_experts <= 32_768
    for row in trace.picks.reshape(-1, trace.k):
        kept = row[row >= 0].tolist()
        assert len(set(kept)) == len(kept) >= 1
    assert trace.steps["n_tokens"].sum() == trace.n_tokens
    assert trace.weights is None or np.isfinite(trace.weights).all()
    assert isinstance(str(trace), str)
    if trace.spans is not None and trace.reads is not None:
        assert all(np.isfinite(s).all() for s in trace.breakdown().values())
        json.dumps([*trace_exchange.chrome_events(trace)], allow_nan=False)


@inputs({"trace (.npz)": 1000})
def test_traces(tmp_path: Path, kind: str, n: int) -> None:
    path = tmp_path / "t.npz"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        trace = Trace.load(path)
        check_trace(trace)
        with np.load(path) as file:  # the library's own reading
            for name in ("picks", "steps", "ids", "weights", "hits", "spans", "reads"):
                if name in file.files:
                    np.testing.assert_array_equal(getattr(trace, name), file[name])

    n_read, n_refused = survive(kind, n, b"", change_arrays, read, path.name)
    assert n_read > n / 50 and n_refused > n / 4


# --- routing tables -------------------------------------------------------------------


def routing_csv() -> bytes:
    """Three tokens, two layers, two experts, in the plain order."""
    lines = ["token,layer,expert,weight"]
    for token in range(3):
        for layer in (0, 3):
            for rank in range(2):
                expert = (token + layer + 2 * rank) % 5
                lines.append(f"{token},{layer},{expert},{0.75 - rank / 2}")
    return "\n".join(lines).encode()


def check_routing(trace: Trace, text: str) -> None:
    """The picks are those of the rows, by Python's own reader."""
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if any(row)]
    names = [name.strip().lower() for name in rows[0]]
    if "token" in names:
        columns = [names.index(name) for name in ("token", "layer", "expert")]
        rows = rows[1:]
    else:
        columns = [0, 1, 2]
    found: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        token, layer, expert = (int(row[column]) for column in columns)
        found.setdefault((token, layer), []).append(expert)
    assert [found[key] for key in sorted(found)] == [
        picks.tolist() for picks in trace.picks.reshape(-1, trace.k)
    ]


@inputs({"routing table (.csv)": 1500})
def test_routing(tmp_path: Path, monkeypatch, kind: str, n: int) -> None:
    path = tmp_path / "t.csv"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        trace = read_csv(path)
        check_trace(trace)
        check_routing(trace, data.decode("utf-8-sig"))
        with monkeypatch.context() as only:  # the slow reader agrees with the fast one
            only.setattr(trace_exchange, "_load", lambda path: None)
            slow = read_csv(path)
        np.testing.assert_array_equal(slow.picks, trace.picks)
        np.testing.assert_array_equal(slow.weights, trace.weights)

    n_read, n_refused = survive(kind, n, routing_csv(), change_table, read, path.name)
    assert n_read > n / 50 and n_refused > n / 4


# --- tables of results ----------------------------------------------------------------


def head_of(path: Path, n: int) -> bytes:
    """The first lines of a table in data/."""
    return b"".join(path.read_bytes().splitlines(keepends=True)[:n])


def check_rows(rows: list[dict], data: bytes) -> None:
    text = data.decode("utf-8-sig")
    assert rows == [*csv.DictReader(io.StringIO(text, newline=""))]


@inputs({"sweep (.csv)": 600})
def test_sweeps(tmp_path: Path, kind: str, n: int) -> None:
    path = tmp_path / "sweep.csv"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        check_rows(read_table(path), data[: data.rfind(b"\n") + 1])
        rows = read_sweep(path)
        check_rows(rows, data)
        for k, bits in ((8, 4), (10, 4), (4, 4)):
            text = cost_in_quality(rows, k, bits, 10)
            assert text is None or "nan" not in text

    source = head_of(DATA / "results" / "sweep.csv", 5)
    n_read, n_refused = survive(kind, n, source, change_table, read)
    assert n_read > n / 50 and n_refused > n / 10


@inputs({"settings (.csv)": 600})
def test_settings(tmp_path: Path, kind: str, n: int) -> None:
    path = tmp_path / "settings.csv"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = read_settings(path)
        assert found and all(isinstance(setting, Setting) for setting in found)
        text = data.decode("utf-8-sig")
        wanted = [r.get("k") for r in csv.DictReader(io.StringIO(text, newline=""))]
        wanted = {int(k) if (k or "").strip() else None for k in wanted}
        assert {setting.k for setting in found} == wanted

    source = (
        b"k,bits,rule,group_size,mass\n4,,,,\n8,2,minmax,32,\n,3,mlx,,0.9\n10,,,,0.5\n"
    )
    n_read, n_refused = survive(kind, n, source, change_table, read)
    assert n_read > n / 50 and n_refused > n / 10


@inputs({"published runs (.csv)": 600})
def test_published(tmp_path: Path, kind: str, n: int) -> None:
    for name in ("published_models.csv", "published_hits.csv"):
        (tmp_path / name).write_bytes((DATA / name).read_bytes())

    def read(data: bytes) -> None:
        (tmp_path / "published.csv").write_bytes(data)
        found = read_published(tmp_path)
        assert (found.tok_s > 0).all() and np.isfinite(found.tok_s).all()
        for name in ("memory_gb", "memory_gb_s", "disk_gb_s", "picked_gb", "n_layers"):
            values = np.asarray(getattr(found.run, name), float)
            assert np.isfinite(values).all() and (values > 0).all(), name

    source = head_of(DATA / "published.csv", 6)
    n_read, n_refused = survive(kind, n, source, change_table, read)
    assert n_read > n / 50 and n_refused > n / 10


# --- JSON -----------------------------------------------------------------------------


@inputs({"set of prompts (.jsonl)": 700})
def test_prompts(tmp_path: Path, kind: str, n: int) -> None:
    path = tmp_path / "set.jsonl"
    good = (DATA / "eval" / "tool.jsonl").read_bytes().split(b"\n")[0]

    def read(data: bytes) -> None:
        path.write_bytes(data + b"\n" + good + b"\n")
        *found, last = load_prompts(path)
        assert last.id == json.loads(good)["id"]
        for prompt in found:
            assert all(isinstance(message, dict) for message in prompt.messages)
            assert isinstance(prompt.tools, list) and isinstance(prompt.schema, dict)

    n_read, n_refused = survive(kind, n, good, change_json, read, path.name)
    assert n_read > n / 50 and n_refused > n / 10


PROBE = {
    "format": 1,
    "machine": "Linux x86_64",
    "n_cores": 2,
    "memory_gb_s": {"1 thread": 9.5, "all 2 threads": 14.0},
    "matvec_gb_s": {"numpy, compiled": 5.5, "mlx on the cpu": 3},
    "disk": {
        "what": "a file of its own",
        "n_bytes": 134217728,
        "rates": [
            {"mode": "cold", "n_bytes": 7077888, "depth": 4, "rate_gb_s": 1.5},
            {"mode": "warm", "n_bytes": 7077888, "depth": 4, "rate_gb_s": 8.0},
            {"mode": "direct", "n_bytes": 65536, "depth": 16, "rate_gb_s": 0.5},
        ],
        "notes": [],
    },
    "notes": [],
}


@inputs({"probe (.json)": 500})
def test_probes(tmp_path: Path, kind: str, n: int) -> None:
    path, known = tmp_path / "probe.json", machine("pc-32")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = with_probe(known, path)
        for value in (found.memory_gb_s, found.disk_gb_s):
            assert type(value) in (int, float) and 0 < value < math.inf
        for value in (found.matvec_gb_s, found.copy_gb_s):
            assert value is None or 0 < value < math.inf

    source = json.dumps(PROBE).encode()
    n_read, n_refused = survive(kind, n, source, change_json, read, path.name)
    assert n_read > n / 50 and n_refused > n / 10


@pytest.fixture(scope="module")
def relu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model of that kind, with its weights."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("relu")
    config = ReluConfig(8, 12, 1, 2, 16, 1e4, 1e-6)
    model = ReluModel.random(config)
    (layer,) = model.layers
    tensors = {"embedding.weight": model.embedding, "norm.weight": model.norm}
    for name, field in (
        *(("norm_attention", "norm_attention"), ("attention.qkv", "qkv")),
        *(("attention.out", "out"), ("norm_ffn", "norm_ffn"), ("up", "up")),
        ("down", "down"),
    ):
        tensors[f"layers.0.{name}.weight"] = getattr(layer, field)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(vars(config)))
    return folder


@inputs({"config.json (ReLU model)": 500})
def test_relu_config(relu: Path, tmp_path: Path, kind: str, n: int) -> None:
    source = (relu / "config.json").read_bytes()
    (tmp_path / "model.safetensors").symlink_to(relu / "model.safetensors")

    def read(data: bytes) -> None:
        (tmp_path / "config.json").write_bytes(data)
        model = ReluModel.load(tmp_path)
        logits = model.forward([1, 2], model.new_state())
        assert logits.shape == (2, model.config.vocab_size)

    n_read, n_refused = survive(kind, n, source, change_json, read)
    assert n_read > n / 50 and n_refused > n / 4


def test_a_sweep_takes_no_figure_that_is_none() -> None:
    """As `flashmoe doctor` would say it."""
    rows = [{"k": "", "bits": "", "rule": "mlx", "kept": "renormalized"}]
    rows[0] |= {"k_used": "ten", "perplexity": "1"}
    with pytest.raises(ConfigError, match="column k_used: 'ten' is no number"):
        cost_in_quality(rows, 4, 4, 10)
