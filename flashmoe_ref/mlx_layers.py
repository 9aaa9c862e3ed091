"""The blocks of Qwen3.5-MoE in MLX: `layers.py` again, for Apple GPU, CUDA and CPU.

The functions have the names and the order of `layers.py`, which says what each computes
and where it comes from; comments here say only how the two differ. Activations have
one dtype, x.dtype: float32 on the CPU, bfloat16 on a GPU. What must not lose bits is
float32 everywhere: norms, decay, delta states, router.
**But:** MLX is lazy, so nothing here computes anything until `mlx_model.py` evaluates.
*Taught in notebooks/04.*
"""

from copy import copy
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from .layers import L2_EPS
from .mlx_weights import Matrix, linear, linears

KV_STEP = 256  # tokens by which a cache of keys and values grows, as in mlx-lm


@partial(mx.compile, shapeless=True)
def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Scale each row to unit root mean square, then by weight (n,) float32."""
    return mx.fast.rms_norm(x.astype(mx.float32), weight, eps).astype(x.dtype)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return x * mx.sigmoid(x)


def softplus(x: mx.array) -> mx.array:
    """log(1 + exp(x)), without overflow."""
    return mx.logaddexp(x, 0.0)


# --- gated attention ------------------------------------------------------------------


@dataclass
class AttentionState:
    """Keys and values of the tokens so far. Grows by KV_STEP; n tokens are filled."""

    k: mx.array  # (1, Hkv, capacity, Dh): heads before tokens, as MLX wants them
    v: mx.array
    n: int = 0

    @classmethod
    def empty(cls, n_kv_heads: int, head_dim: int, dtype: mx.Dtype) -> "AttentionState":
        """A cache for no tokens yet."""
        shape = (1, n_kv_heads, 0, head_dim)
        return cls(mx.zeros(shape, dtype), mx.zeros(shape, dtype))

    @property
    def n_bytes(self) -> int:
        """Bytes of memory that the cache occupies."""
        return self.k.nbytes + self.v.nbytes

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be evaluated before another thread may use the state."""
        return [self.k, self.v]

    def append(self, k: mx.array, v: mx.array) -> None:
        """Add T tokens. Shapes: k, v (1, Hkv, T, Dh)."""
        n = self.n + k.shape[2]
        if n > self.k.shape[2]:
            capacity = -(-n // KV_STEP) * KV_STEP  # rounded up
            self.k, self.v = (_grown(a, capacity, self.n) for a in (self.k, self.v))
        # In place where nothing else refers to the old array, a copy where a snapshot
        # does: MLX sees to that.
        self.k[..., self.n : n, :] = k
        self.v[..., self.n : n, :] = v
        self.n = n

    def copy(self) -> "AttentionState":
        """An independent copy; memory is shared until one of the two goes on."""
        # copy() makes a second name for the same evaluated memory, not a lazy copy.
        return AttentionState(copy(self.k), copy(self.v), self.n)


def _grown(old: mx.array, capacity: int, n: int) -> mx.array:
    _, n_heads, _, width = old.shape
    rest = mx.zeros((1, n_heads, capacity - n, width), old.dtype)
    return mx.concatenate([old[..., :n, :], rest], axis=2)


def rope_periods(rotary_dim: int, theta: float) -> mx.array:
    """theta^(2i/d), the reciprocals of the frequencies of `layers.rope_angles`.

    NOTE: with base=theta MLX would round them otherwise, which shows at long distance.
    """
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return mx.array((np.float32(theta) ** exponents).astype(np.float32))


def rotate(u: mx.array, periods: mx.array, offset: int) -> mx.array:
    """Rotate the first dimensions of each head. Shapes: u (1, H, T, Dh), same out."""
    dims = 2 * periods.size
    return mx.fast.rope(
        u, dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=periods
    )


def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Causal grouped-query attention of the newest T tokens over all n.

    Shapes: q (1, H, T, Dh), k and v (1, Hkv, n, Dh) -> (1, H, T, Dh).
    """
    mask = "causal" if q.shape[2] > 1 else None
    scale = q.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def gated_attention(
    h: mx.array, w: dict, state: AttentionState, periods: mx.array, eps: float
) -> mx.array:
    """Attention whose output is gated by a sigmoid. Shapes: h (T, D) -> (T, D).

    w: qkv_proj (a Stack of q_proj, k_proj, v_proj), o_proj, q_norm, k_norm.
    """
    t, (_, n_kv, _, dh) = len(h), state.k.shape
    q, k, v = linears(h, w["qkv_proj"])
    q, gate = mx.split(q.reshape(t, -1, 2 * dh), 2, axis=-1)
    q = rms_norm(q, w["q_norm"], eps)
    k = rms_norm(k.reshape(t, n_kv, dh), w["k_norm"], eps)
    # (T, H, Dh) -> (1, H, T, Dh)
    q, k, v = (x.swapaxes(0, 1)[None] for x in (q, k, v.reshape(t, n_kv, dh)))
    q, k = rotate(q, periods, state.n), rotate(k, periods, state.n)
    state.append(k, v)
    mixed = attend(q, state.k[..., : state.n, :], state.v[..., : state.n, :])
    mixed = mixed[0].swapaxes(0, 1)  # (T, H, Dh)
    return linear((mixed * mx.sigmoid(gate)).reshape(t, -1), w["o_proj"])


# --- Gated DeltaNet -------------------------------------------------------------------


@dataclass
class DeltaState:
    """What a Gated DeltaNet layer remembers. Its arrays are replaced, never written."""

    conv: mx.array  # (kernel - 1, C), in the dtype of activations
    s: mx.array  # (1, Hv, Dv, Dk) float32

    @classmethod
    def empty(
        cls, kernel: int, channels: int, n_heads: int, dv: int, dk: int, dtype: mx.Dtype
    ) -> "DeltaState":
        """The state before the first token: all zeros."""
        conv = mx.zeros((kernel - 1, channels), dtype)
        return cls(conv, mx.zeros((1, n_heads, dv, dk), mx.float32))

    @property
    def n_bytes(self) -> int:
        """Bytes of memory that the state occupies."""
        return self.conv.nbytes + self.s.nbytes

    @property
    def arrays(self) -> list[mx.array]:
        """What has to be evaluated before another thread may use the state."""
        return [self.conv, self.s]

    def copy(self) -> "DeltaState":
        """An independent copy; the arrays can be shared, since none is written to."""
        return DeltaState(self.conv, self.s)


def causal_conv(
    x: mx.array, kernel: mx.array, tail: mx.array
) -> tuple[mx.array, mx.array]:
    """Depthwise causal convolution, in float32.

    Shapes: x (T, C), kernel (width, C), tail (width - 1, C) -> y (T, C), new tail.
    DIFFERS: the kernel is transposed at load, so that a row is a tap.
    """
    t, width = len(x), len(kernel)
    padded = mx.concatenate([tail, x])  # (width - 1 + T, C)
    if t == 1:
        y = (padded * kernel).sum(axis=0, keepdims=True)
    else:
        y = sum(padded[i : i + t] * kernel[i] for i in range(width))
    return y, padded[t:]


def l2_normalize(x: mx.array) -> mx.array:
    """Scale each row to unit length.

    The fused norm divides by sqrt(mean + eps); with n values in a row, mean is sum / n.
    """
    n = x.shape[-1]
    return mx.fast.rms_norm(x, None, L2_EPS / n) * n**-0.5


def delta_rule(
    s: mx.array, q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array
) -> tuple[mx.array, mx.array]:
    """The gated delta rule over T tokens, fused by MLX; all in float32.

    Shapes: s (1, Hv, Dv, Dk), q and k (T, Hk, Dk), v (T, Hv, Dv), decay and beta
    (T, Hv) -> o (T, Hv, Dv), new s. DIFFERS: takes the decay itself, not its log, and
    lets value head j read key head j // ratio by itself.
    """
    batch = (x[None] for x in (q, k, v, decay, beta))
    o, s = mx.fast.gated_delta_update(*batch, s)
    return o[0], s


def gated_delta_net(
    h: mx.array, w: dict, state: DeltaState, n_key_heads: int, eps: float
) -> mx.array:
    """Linear attention with a corrected, decaying memory. Shapes: h (T, D) -> (T, D).

    w: in_proj (a Stack of in_proj_qkv, _z, _b, _a), conv1d (width, C), A (Hv,) with
    A = -exp(A_log), dt_bias, norm, out_proj. Replaces the arrays of state.
    """
    t, (_, n_heads, dv, dk) = len(h), state.s.shape
    qkv, z, b, a = linears(h, w["in_proj"])
    mixed, state.conv = causal_conv(qkv, w["conv1d"], state.conv)
    key_dim = n_key_heads * dk
    q, k, v = mx.split(silu(mixed), [key_dim, 2 * key_dim], axis=-1)
    q = l2_normalize(q.reshape(t, n_key_heads, dk)) * dk**-0.5
    k = l2_normalize(k.reshape(t, n_key_heads, dk))
    beta = mx.sigmoid(b.astype(mx.float32))
    decay = mx.exp(w["A"] * softplus(a.astype(mx.float32) + w["dt_bias"]))
    v = v.reshape(t, n_heads, dv)
    o, state.s = delta_rule(state.s, q, k, v, decay, beta)
    z = z.reshape(t, n_heads, dv).astype(mx.float32)
    gated = rms_norm(o, w["norm"], eps) * silu(z)
    return linear(gated.reshape(t, -1).astype(h.dtype), w["out_proj"])


# --- Mixture of Experts ---------------------------------------------------------------


def route_topk(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Pick each token's k best experts and their mixing weights; all in float32.

    Shapes: logits (T, E) -> experts (T, k) uint32, best first, weights (T, k).
    """
    probabilities = mx.softmax(logits, axis=-1)
    experts = mx.argsort(-probabilities, axis=-1)[:, :k]
    weights = mx.take_along_axis(probabilities, experts, axis=-1)
    return experts, weights / weights.sum(axis=-1, keepdims=True)


def expert_mlp(
    x: mx.array, experts: dict[str, Matrix], slots: mx.array, is_sorted: bool = False
) -> mx.array:
    """For each row, the expert in its slot.

    Shapes: x (1, 1, D) or (R, 1, D), slots (R,) uint32 -> (R, D) in x.dtype; experts
    has gate_proj, up_proj and down_proj (slots, out, in).
    """
    gate = gather_linear(x, experts["gate_proj"], slots, is_sorted)  # (R, 1, F)
    up = gather_linear(x, experts["up_proj"], slots, is_sorted)
    y = gather_linear(silu(gate) * up, experts["down_proj"], slots, is_sorted)
    return y.squeeze(1)


def gather_linear(
    x: mx.array, bank: Matrix, slots: mx.array, is_sorted: bool
) -> mx.array:
    """Multiply each row by the matrix in its slot.

    Shapes: x (R, 1, in), bank (slots, out, in), slots (R,) -> (R, 1, out). is_sorted
    promises ascending slots, which GPUs make use of.
    NOTE: MLX checks no bounds: a wrong slot gives numbers, not an error.
    """
    order = {"rhs_indices": slots, "sorted_indices": is_sorted}
    if bank.scales is None:
        weight = bank.weight.astype(x.dtype).swapaxes(-1, -2)
        return mx.gather_mm(x, weight, **order)
    arrays = (bank.weight, bank.scales, bank.biases)
    return mx.gather_qmm(x, *arrays, **order, **bank.widths).astype(x.dtype)


def shared_expert(x: mx.array, w: dict) -> mx.array:
    """The expert that every token uses. Shapes: x (T, D) -> (T, D).

    w: shared (a Stack of gate_proj, up_proj, shared_expert_gate), shared_down_proj.
    """
    gate, up, own_gate = linears(x, w["shared"])
    return mx.sigmoid(own_gate) * linear(silu(gate) * up, w["shared_down_proj"])
