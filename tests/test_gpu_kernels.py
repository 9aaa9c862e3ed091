"""The GPU kernels: their text always, their numbers where there is a GPU.

Nothing here runs the Metal text on hardware; the C++ compiler runs the CUDA text's body
on the CPU, a warp as 32 turns of a loop.
"""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from flashmoe_ref.quantize import QuantizedMatrix, dequantize, quantize

gpu_kernels = pytest.importorskip("flashmoe_ref.gpu_kernels")
mx = pytest.importorskip("mlx.core")
LANGUAGES = ("cuda", "metal")
D, F, N_SLOTS, GROUP = 128, 64, 5, 64
SLOTS, WEIGHTS = (3, 0, 4), np.array([[0.5, 0.3, 0.2]], np.float32)


@pytest.mark.parametrize("name", gpu_kernels.BODIES)
def test_both_languages_say_the_same(name: str) -> None:
    """Only the words that differ differ."""
    texts = []
    for language in LANGUAGES:
        words = gpu_kernels.CUDA if language == "cuda" else gpu_kernels.METAL
        _, text = gpu_kernels.source(name, language)
        for key, word in words.items():
            assert word in text or key == "pick"
            text = text.replace(word, key.upper())
        texts.append(text)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", gpu_kernels.BODIES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_text_is_whole(name: str, language: str) -> None:
    header, body = gpu_kernels.source(name, language)
    for left, right in ("()", "{}", "[]"):
        assert (header + body).count(left) == (header + body).count(right)
    assert "warp_sum" in header
    for word in ("LANE", "WARP", "PICK", "WORD", "MATRIX", "INPUT"):
        assert not re.search(rf"\b{word}\b", body)
    for given in gpu_kernels.INPUTS[name]:
        assert re.search(rf"\b{given}\b", body), given


def test_metal_declares_positions_where_mlx_looks_for_them() -> None:
    """MLX adds these arguments if it finds their names in the body, not the header."""
    for name in gpu_kernels.BODIES:
        header, body = gpu_kernels.source(name, "metal")
        assert "thread_index_in_simdgroup" in body and "threadIdx" not in body
        assert "thread_position_in_grid" in body and "thread_" not in header


def test_who_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = {name: matrix for name, (_, matrix) in make_experts(4).items()}
    assert not gpu_kernels.are_faster(experts)  # on the CPU
    monkeypatch.setattr(gpu_kernels, "language", lambda: "cuda")
    assert gpu_kernels.are_faster(experts)
    odd = {name: matrix for name, (_, matrix) in make_experts(3).items()}
    assert not gpu_kernels.are_faster(odd)
    assert not gpu_kernels.are_faster(experts | {"up_proj": odd["up_proj"]})
    monkeypatch.setattr(gpu_kernels, "language", lambda: "metal")
    assert not gpu_kernels.are_faster(experts)  # nobody has measured it there


def make_experts(bits: int) -> dict[str, tuple[QuantizedMatrix, object]]:
    """Each projection of all slots, for NumPy and for MLX."""
    from flashmoe_ref.mlx_weights import to_matrix

    rng = np.random.default_rng(bits)
    shapes = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    found = {}
    for name, shape in shapes.items():
        w = rng.standard_normal((N_SLOTS, *shape)).astype(np.float32)
        stored = quantize(w / shape[1] ** 0.5, bits, GROUP)
        found[name] = stored, to_matrix(stored)
    return found


def expected(h: np.ndarray, experts: dict) -> np.ndarray:
    """Weighted sum of the experts in SLOTS, in float64."""
    gate, up, down = (
        dequantize(stored).astype(float) for stored, _ in experts.values()
    )
    total = np.zeros((1, D))
    for slot, weight in zip(SLOTS, WEIGHTS[0], strict=True):
        g, u = h @ gate[slot].T, h @ up[slot].T
        total += weight * (g / (1 + np.exp(-g)) * u) @ down[slot].T
    return total


HARNESS = """
#include <cmath>
#include <cstdio>
#include <vector>
using std::fma; using std::exp;
struct Index { int x, y, z; };
static Index threadIdx, blockIdx, blockDim;
// All lanes run up to a sum, one after the other; then again with the sums known.
static std::vector<float> given, sums;
static int at; static bool known;
static float warp_sum(float value) {
    if (known) return sums[at++];
    if (at == (int) given.size()) given.push_back(0);
    given[at++] += value;
    return 0;
}
template <typename T> std::vector<T> load(FILE* file, size_t n) {
    std::vector<T> values(n);
    if (fread(values.data(), sizeof(T), n, file) != n) throw 1;
    return values;
}
"""


def on_the_cpu(
    name: str, sizes: dict, inputs: dict, n_out: int, grid: tuple, tmp: Path
):
    """Run a CUDA body: every lane of a warp twice, see HARNESS. Returns y (n_out,)."""
    _, body = gpu_kernels.source(name, "cuda")
    types = {"uint32": "unsigned int", "float32": "float"}
    loads, arguments, call = [], [], []
    with open(tmp / "in", "wb") as file:
        for key, array in inputs.items():
            kind = types[array.dtype.name]
            loads.append(f"auto {key} = load<{kind}>(file, {array.size});")
            arguments.append(f"const {kind}* {key}")
            call.append(f"{key}.data()")
            file.write(np.ascontiguousarray(array).tobytes())
    constants = "".join(f"const int {k} = {v};" for k, v in sizes.items())
    warps, depth = grid
    (tmp / "run.cpp").write_text(
        HARNESS
        + constants
        + f"void kernel({', '.join(arguments)}, float* y) {{ {body} }}\n"
        + f'int main() {{ FILE* file = fopen("{tmp}/in", "rb"); {" ".join(loads)}'
        + f"std::vector<float> y({n_out}); blockDim = {{32, 1, 1}};"
        + f"for (int z = 0; z < {depth}; z++) for (int w = 0; w < {warps}; w++) {{"
        + "given.clear(); for (int pass = 0; pass < 2; pass++) { known = pass;"
        + "sums = given; for (int lane = 0; lane < 32; lane++) { at = 0;"
        + "threadIdx = {lane, 0, 0}; blockIdx = {0, w, z};"
        + f"kernel({', '.join(call)}, y.data()); }} }} }}"
        + f'FILE* out = fopen("{tmp}/out", "wb");'
        + "fwrite(y.data(), 4, y.size(), out); fclose(out); }\n"
    )
    command = ["g++", "-O1", "-o", tmp / "run", tmp / "run.cpp"]
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run([tmp / "run"], check=True)
    return np.fromfile(tmp / "out", np.float32)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_body_computes_the_experts(bits: int, tmp_path: Path) -> None:
    experts = make_experts(bits)
    h = np.random.default_rng(1).standard_normal((1, D)).astype(np.float32)
    slots, k = np.array(SLOTS, np.uint32), len(SLOTS)
    common = {"BITS": bits, "GROUP": GROUP, "ROWS": gpu_kernels.ROWS}
    inputs = {"h": h, "slots": slots} | arrays(experts, "gate", "up")
    sizes = {"N_ROWS": F, "N_COLUMNS": D} | common
    grid = F // gpu_kernels.ROWS, k
    y = on_the_cpu("gate_up", sizes, inputs, k * F, grid, tmp_path)
    inputs = {"h": y, "slots": slots, "weights": WEIGHTS} | arrays(experts, "down")
    sizes = {"N_ROWS": D, "N_COLUMNS": F, "K": k} | common
    grid = D // gpu_kernels.ROWS, 1
    got = on_the_cpu("down", sizes, inputs, D, grid, tmp_path)
    np.testing.assert_allclose(got, expected(h, experts)[0], rtol=0, atol=2e-6)


def arrays(experts: dict, *names: str) -> dict[str, np.ndarray]:
    """Weights, scales and biases under the kernels' names; scales as float32."""
    found = {}
    for name in names:
        stored, _ = experts[f"{name}_proj"]
        found[f"{name}_weight"] = stored.weight
        found[f"{name}_scales"] = stored.scales.astype(np.float32)
        found[f"{name}_biases"] = stored.biases.astype(np.float32)
    return found


@pytest.mark.skipif(gpu_kernels.language() != "cuda", reason="there is no NVIDIA GPU")
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_on_a_gpu(bits: int) -> None:
    experts = make_experts(bits)
    h = np.random.default_rng(1).standard_normal((1, D)).astype(np.float32)
    matrices = {name: matrix for name, (_, matrix) in experts.items()}
    slots = mx.array(SLOTS, mx.uint32)
    got = gpu_kernels.expert_sum(mx.array(h), matrices, slots, mx.array(WEIGHTS))
    np.testing.assert_allclose(np.array(got), expected(h, experts), rtol=0, atol=2e-6)
