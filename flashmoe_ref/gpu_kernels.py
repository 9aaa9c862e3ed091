"""A token's experts in two GPU kernels, written once for CUDA and for Metal.

The FMA form of lesson 05: a group's products with the packed integers are summed first,
scale and bias come in once a group, sum(w x) = scale * sum(q x) + bias * sum(x). A warp
(Metal: a simdgroup) of 32 threads computes ROWS rows of the output, so that each value
of x and each sum(x) serves ROWS rows. The first kernel multiplies by gate and up and
applies SwiGLU; the second multiplies by down and adds the K experts up, best first.
**But:** one token; 2, 4 or 8 bits; the Metal text was never run on hardware.
*Taught in notebooks/13.*

Source: lesson 05's FMA form; `mx.fast.cuda_kernel` and `mx.fast.metal_kernel`.
"""

from functools import cache

import mlx.core as mx

from .mlx_weights import Matrix

ROWS = 4  # of the output, for each warp
WARPS = 4  # in a block
BITS = (2, 4, 8)  # whose values lie whole in a 32-bit word

# What differs between the two languages. MLX declares Metal's position arguments where
# it sees their names in the body, so they stand there and not in a header.
CUDA = {
    "lane": "(int) threadIdx.x",
    "warp": "(int) (blockIdx.y * blockDim.y + threadIdx.y)",
    "pick": "(int) blockIdx.z",
    "word": "unsigned int",
}
METAL = {
    "lane": "(int) thread_index_in_simdgroup",
    "warp": "(int) thread_position_in_grid.y",
    "pick": "(int) thread_position_in_grid.z",
    "word": "uint",
}
CUDA_HEADER = """
__device__ inline float warp_sum(float value) {
    for (int step = 16; step > 0; step /= 2)
        value += __shfl_xor_sync(0xffffffff, value, step);
    return value;
}
"""
METAL_HEADER = """
inline float warp_sum(float value) {
    return simd_sum(value);
}
"""

# Adds to acc[r] this thread's share of row (first_row + r) of one expert's matrix times
# `input`. Wants: slot, first_row, N_ROWS and N_COLUMNS of the matrix.
DOT = """
    {
        const int n_words = N_COLUMNS * BITS / 32, n_groups = N_COLUMNS / GROUP;
        const size_t row_0 = (size_t) slot * N_ROWS + first_row;
        for (int i = lane; i < n_words; i += 32) {
            const int first = i * (32 / BITS), group = first / GROUP;
            float x[32 / BITS], total = 0;
            for (int j = 0; j < 32 / BITS; j++) {
                x[j] = (float) INPUT[first + j];
                total += x[j];
            }
            for (int r = 0; r < ROWS; r++) {
                WORD packed = MATRIX_weight[(row_0 + r) * n_words + i];
                float dot = 0;
                for (int j = 0; j < 32 / BITS; j++) {
                    dot = fma((float) (packed & ((1u << BITS) - 1)), x[j], dot);
                    packed >>= BITS;
                }
                const size_t at = (row_0 + r) * n_groups + group;
                acc[r] = fma((float) MATRIX_scales[at], dot, acc[r]);
                acc[r] = fma((float) MATRIX_biases[at], total, acc[r]);
            }
        }
    }
"""
START = """
    const int lane = LANE, first_row = WARP * ROWS;
"""
GATE_UP = (
    START
    + """
    const int pick = PICK, slot = slots[pick];
    float gate[ROWS], up[ROWS];
    for (int r = 0; r < ROWS; r++) gate[r] = up[r] = 0;
"""
    + DOT.replace("MATRIX", "gate").replace("acc", "gate").replace("INPUT", "h")
    + DOT.replace("MATRIX", "up").replace("acc", "up").replace("INPUT", "h")
    + """
    for (int r = 0; r < ROWS; r++) {
        const float g = warp_sum(gate[r]), u = warp_sum(up[r]);
        if (lane == 0) y[pick * N_ROWS + first_row + r] = g / (1 + exp(-g)) * u;
    }
"""
)
DOWN = (
    START
    + """
    float sum[ROWS];
    for (int r = 0; r < ROWS; r++) sum[r] = 0;
    for (int pick = 0; pick < K; pick++) {
        const int slot = slots[pick];
        float acc[ROWS];
        for (int r = 0; r < ROWS; r++) acc[r] = 0;
"""
    + DOT.replace("MATRIX", "down").replace("INPUT", "(h + pick * N_COLUMNS)")
    + """
        for (int r = 0; r < ROWS; r++)
            sum[r] = fma((float) weights[pick], warp_sum(acc[r]), sum[r]);
    }
    if (lane == 0)
        for (int r = 0; r < ROWS; r++) y[first_row + r] = sum[r];
"""
)
PARTS = ("weight", "scales", "biases")
INPUTS = {
    "gate_up": ["h", "slots", *(f"{m}_{p}" for m in ("gate", "up") for p in PARTS)],
    "down": ["h", "slots", "weights", *(f"down_{p}" for p in PARTS)],
}
BODIES = {"gate_up": GATE_UP, "down": DOWN}


def source(name: str, language: str) -> tuple[str, str]:
    """Header and body of a kernel: "gate_up" or "down", in "cuda" or "metal"."""
    words = CUDA if language == "cuda" else METAL
    body = BODIES[name]
    for key, text in words.items():
        body = body.replace(key.upper(), text)
    return (CUDA_HEADER if language == "cuda" else METAL_HEADER), body


@cache
def kernel(name: str, language: str):
    """The kernel, which MLX compiles at its first call for each set of sizes."""
    make = mx.fast.cuda_kernel if language == "cuda" else mx.fast.metal_kernel
    header, body = source(name, language)
    return make(
        name=f"flashmoe_{name}",
        input_names=INPUTS[name],
        output_names=["y"],
        source=body,
        header=header,
    )


def language() -> str | None:
    """What the default device compiles: "cuda", "metal", or None on the CPU."""
    if mx.default_device() != mx.Device(mx.gpu):
        return None
    return "cuda" if mx.cuda.is_available() else "metal"


def are_faster(experts: dict[str, Matrix]) -> bool:
    """Whether to use them: on CUDA, as measured, for experts that fit.

    What fits: bits of BITS, the same in all three, and whole blocks of rows.
    """
    widths = {(m.bits, m.group_size) for m in experts.values()}
    whole = all(m.weight.shape[-2] % (ROWS * WARPS) == 0 for m in experts.values())
    fit = whole and len(widths) == 1 and widths.pop()[0] in BITS
    return fit and language() == "cuda"


def expert_sum(
    h: mx.array, experts: dict[str, Matrix], slots: mx.array, weights: mx.array
) -> mx.array:
    """Weighted sum of a token's experts, best first.

    Shapes: h (1, D), slots (K,), weights (1, K) float32 -> (1, D) float32; experts has
    gate_proj, up_proj and down_proj (slots, out, in), all quantized alike.
    """
    gate, up, down = (experts[f"{name}_proj"] for name in ("gate", "up", "down"))
    k = slots.size
    y = run("gate_up", [h, slots, *gate.arrays, *up.arrays], gate, (k, k))
    y = run("down", [y, slots, weights, *down.arrays], down, (1, k))
    return y


def run(
    name: str, inputs: list[mx.array], matrix: Matrix, picks: tuple[int, int]
) -> mx.array:
    """Start a kernel: picks are the grid's depth, and K."""
    n_rows, n_words = matrix.weight.shape[-2:]
    sizes = {"N_ROWS": n_rows, "N_COLUMNS": n_words * 32 // matrix.bits}
    sizes |= {"BITS": matrix.bits, "GROUP": matrix.group_size, "ROWS": ROWS}
    depth, k = picks
    (y,) = kernel(name, language())(
        inputs=inputs,
        template=[*sizes.items(), *([("K", k)] if name == "down" else [])],
        grid=(32, n_rows // ROWS, depth),
        threadgroup=(32, WARPS, 1),
        output_shapes=[(depth, n_rows)],
        output_dtypes=[mx.float32],
    )
    return y
