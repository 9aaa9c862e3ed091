"""The mathematics of Qwen3.5-MoE in NumPy, one function a block: the specification.

Follows `modeling_qwen3_5_moe.py` of Hugging Face transformers. Every other path of the
package is tested against this one. **But:** batch size is one, text only (the
multi-modal rotary embedding equals the plain one there), no training.
*Taught in notebooks/01 (routing, experts), 02 (attention), 03 (Gated DeltaNet).*

Axes: T tokens, D model width, H heads, Dh head width, E experts, K experts per token,
F expert width, C convolution channels. Weight matrices are (out, in), as files have
them. A block takes `linear`, which applies a weight matrix: here `x @ w.T`; an engine
passes its own to compute from quantized weights, and its own `attend`, `delta_rule`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

L2_EPS = 1e-6  # added to the SUM of squares of a query or key, not to their mean
DELTA_CHUNK = 64  # tokens per chunk of the chunked delta rule, as in transformers

Linear = Callable[[np.ndarray, np.ndarray], np.ndarray]
Attend = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
DeltaRule = Callable[..., tuple[np.ndarray, np.ndarray]]


def linear(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Apply a weight matrix. Shapes: x (..., in), w (out, in) -> (..., out)."""
    return x @ w.T


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Scale each row to unit root mean square, then by weight.

    Shapes: x (..., n), weight (n,) -> (..., n).
    Source: Qwen3.5 `RMSNorm`. DIFFERS: weight is the plain factor; Hugging Face files
    store weight - 1, which `checkpoint.py` undoes.
    """
    return (
        x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps)) * weight
    )


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function, by tanh so that no exponential can overflow."""
    half = x.dtype.type(0.5)
    return half * np.tanh(half * x) + half


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x), Qwen's activation function."""
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)), without overflow."""
    return np.logaddexp(x.dtype.type(0), x)


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# --- gated attention ------------------------------------------------------------------


@dataclass
class AttentionState:
    """Keys and values of the tokens so far. Grows by doubling; n tokens are filled."""

    k: np.ndarray  # (capacity, Hkv, Dh), after norm and rotation
    v: np.ndarray  # (capacity, Hkv, Dh)
    n: int = 0

    @classmethod
    def empty(cls, n_kv_heads: int, head_dim: int) -> "AttentionState":
        """A cache for no tokens yet."""
        shape = (0, n_kv_heads, head_dim)
        return cls(np.zeros(shape, np.float32), np.zeros(shape, np.float32))

    @property
    def n_bytes(self) -> int:
        """Bytes of memory that the cache occupies."""
        return self.k.nbytes + self.v.nbytes

    def reserve(self, n: int) -> None:
        """Make room for n tokens in all."""
        if n > len(self.k):
            capacity = max(256, 2 * len(self.k), n)
            self.k, self.v = (_grown(a, capacity, self.n) for a in (self.k, self.v))

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        """Add T tokens. Shapes: k, v (T, Hkv, Dh)."""
        n = self.n + len(k)
        self.reserve(n)
        self.k[self.n : n], self.v[self.n : n] = k, v
        self.n = n

    def copy(self) -> "AttentionState":
        """An independent copy, trimmed to the filled part."""
        return AttentionState(self.k[: self.n].copy(), self.v[: self.n].copy(), self.n)


def _grown(old: np.ndarray, capacity: int, n: int) -> np.ndarray:
    new = np.empty((capacity, *old.shape[1:]), old.dtype)
    new[:n] = old[:n]
    return new


def rope_angles(
    positions: np.ndarray, rotary_dim: int, theta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the rotary embedding.

    Shapes: positions (T,) -> cos, sin (T, rotary_dim / 2).
    Source: RoFormer (arXiv 2104.09864), eq. 15; angle = position * theta^(-2i/d).
    """
    frequencies = rope_frequencies(rotary_dim, theta)
    angles = positions.astype(np.float32)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)


def rope_frequencies(rotary_dim: int, theta: float) -> np.ndarray:
    """Radians per position of each pair. Shapes: -> (rotary_dim / 2,)."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


def rotate(u: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate the first dimensions of each head, in pairs (i, i + half).

    Shapes: u (T, H, Dh), cos and sin (T, half) -> (T, H, Dh); the rest passes through.
    Source: Qwen3.5 `apply_rotary_pos_emb` (partial, "rotate half").
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]  # (T, 1, half): same for every head
    lo, hi, rest = u[..., :half], u[..., half : 2 * half], u[..., 2 * half :]
    return np.concatenate([lo * cos - hi * sin, hi * cos + lo * sin, rest], axis=-1)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal grouped-query attention of the newest T tokens over all n.

    Shapes: q (T, H, Dh), k and v (n, Hkv, Dh) with n >= T -> (T, H, Dh).
    Query head h reads key head h // (H / Hkv).
    Source: Attention Is All You Need, eq. 1; grouped queries: arXiv 2305.13245.
    """
    t, n_heads, dh = q.shape
    n, n_kv, _ = k.shape
    # (T, H, Dh) -> (Hkv, G*T, Dh): one matrix product per key head
    grouped = q.reshape(t, n_kv, -1, dh).transpose(1, 2, 0, 3).reshape(n_kv, -1, dh)
    scores = grouped @ k.transpose(1, 2, 0) * q.dtype.type(dh**-0.5)  # (Hkv, G*T, n)
    if t > 1:
        future = np.arange(n) > np.arange(n - t, n)[:, None]  # (T, n)
        scores.reshape(n_kv, -1, t, n)[:, :, future] = -np.inf
    mixed = softmax(scores) @ v.transpose(1, 0, 2)  # (Hkv, G*T, Dh)
    return mixed.reshape(n_kv, -1, t, dh).transpose(2, 0, 1, 3).reshape(t, n_heads, dh)


def gated_attention(
    h: np.ndarray,
    w: dict[str, np.ndarray],
    state: AttentionState,
    rotary_dim: int,
    rope_theta: float,
    eps: float,
    linear: Linear = linear,
    attend: Attend = attend,
) -> np.ndarray:
    """Attention whose output is gated, element by element, by a sigmoid.

    Shapes: h (T, D) -> (T, D); w: q_proj (2 H Dh, D), k_proj and v_proj (Hkv Dh, D),
    o_proj (D, H Dh), q_norm and k_norm (Dh,). Appends T tokens to state.
    Source: Qwen3.5 `Qwen3_5MoeAttention.forward`.
    """
    t, (_, n_kv, dh) = len(h), state.k.shape
    # q_proj holds, head by head, Dh rows of query and Dh rows of gate
    q, gate = np.split(linear(h, w["q_proj"]).reshape(t, -1, 2 * dh), 2, axis=-1)
    k = linear(h, w["k_proj"]).reshape(t, n_kv, dh)
    v = linear(h, w["v_proj"]).reshape(t, n_kv, dh)
    cos, sin = rope_angles(np.arange(state.n, state.n + t), rotary_dim, rope_theta)
    q = rotate(rms_norm(q, w["q_norm"], eps), cos, sin)
    k = rotate(rms_norm(k, w["k_norm"], eps), cos, sin)
    state.append(k, v)
    mixed = attend(q, state.k[: state.n], state.v[: state.n])  # (T, H, Dh)
    return linear((mixed * sigmoid(gate)).reshape(t, -1), w["o_proj"])


# --- Gated DeltaNet -------------------------------------------------------------------


@dataclass
class DeltaState:
    """What a Gated DeltaNet layer remembers: constant in size, and not rewindable."""

    conv: np.ndarray  # (kernel - 1, C): the last inputs of the convolution
    s: np.ndarray  # (Hv, Dv, Dk) float32: the memory; bf16 would decay on long texts

    @classmethod
    def empty(
        cls, kernel: int, channels: int, n_heads: int, dv: int, dk: int
    ) -> "DeltaState":
        """The state before the first token: all zeros."""
        conv = np.zeros((kernel - 1, channels), np.float32)
        return cls(conv, np.zeros((n_heads, dv, dk), np.float32))

    @property
    def n_bytes(self) -> int:
        """Bytes of memory that the state occupies."""
        return self.conv.nbytes + self.s.nbytes

    def copy(self) -> "DeltaState":
        """An independent copy."""
        return DeltaState(self.conv.copy(), self.s.copy())


def causal_conv(
    x: np.ndarray, kernel: np.ndarray, tail: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Depthwise causal convolution; each channel mixes its last few inputs.

    Shapes: x (T, C), kernel (C, width), tail (width - 1, C) -> y (T, C), new tail.
    The last column of kernel multiplies the newest token. No bias, no activation.
    Source: Qwen3.5 `Qwen3_5MoeGatedDeltaNet` (conv1d).
    """
    padded = np.concatenate([tail, x])  # (width - 1 + T, C)
    y = sum(padded[i : i + len(x)] * kernel[:, i] for i in range(kernel.shape[1]))
    return y, padded[len(padded) - len(tail) :]


def l2_normalize(x: np.ndarray) -> np.ndarray:
    """Scale each row to unit length. Source: Qwen3.5 `l2norm`."""
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + x.dtype.type(L2_EPS))


def delta_rule_step(
    s: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    decay: np.ndarray,
    beta: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """One token of the gated delta rule: forget, correct, write, read.

    Shapes: s (H, Dv, Dk), q and k (H, Dk), v (H, Dv), decay and beta (H,)
    -> o (H, Dv), new s.
    Source: Gated Delta Networks (arXiv 2412.06464), eq. 10.
    """
    s = s * decay[:, None, None]
    recalled = np.einsum("hvk,hk->hv", s, k)  # what the memory answers to this key
    correction = (v - recalled) * beta[:, None]
    s = s + correction[:, :, None] * k[:, None, :]
    return np.einsum("hvk,hk->hv", s, q), s


def delta_rule_chunk(
    s: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray,
    beta: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """A chunk of tokens of the gated delta rule, by matrix products.

    Shapes: s (H, Dv, Dk), q and k (H, T, Dk), v (H, T, Dv), log_decay and beta (H, T)
    -> o (H, T, Dv), new s. Equal to T steps of `delta_rule_step` up to rounding.
    Source: Gated Delta Networks (arXiv 2412.06464), section 3.3 (WY form).
    """
    t = q.shape[1]
    c = np.cumsum(log_decay, axis=-1)  # (H, T): log of the decay since the chunk began
    lower = np.tri(t, dtype=bool)
    # Mask before exp: above the diagonal the difference is positive and may overflow.
    d = np.exp(np.where(lower, c[:, :, None] - c[:, None, :], -np.inf))  # (H, T, T)
    # Token i corrects against what tokens j < i wrote: a triangular system.
    a = np.tril(beta[:, :, None] * (k @ k.transpose(0, 2, 1)) * d, -1)
    right = np.concatenate([v, k * np.exp(c)[:, :, None]], axis=-1) * beta[:, :, None]
    solved = np.linalg.solve(np.eye(t, dtype=q.dtype) + a, right)
    u, w = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    written = u - w @ s.transpose(0, 2, 1)  # (H, T, Dv)
    o = (q * np.exp(c)[:, :, None]) @ s.transpose(0, 2, 1)
    o += (q @ k.transpose(0, 2, 1) * d) @ written
    left = np.exp(c[:, -1:] - c)[:, :, None]  # decay from each token to the chunk's end
    s = s * np.exp(c[:, -1])[:, None, None] + written.transpose(0, 2, 1) @ (k * left)
    return o, s


def delta_rule(
    s: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray,
    beta: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The gated delta rule over T tokens: a step for one, chunks for more.

    Shapes: s (Hv, Dv, Dk), q and k (T, Hk, Dk), v (T, Hv, Dv), log_decay and beta
    (T, Hv) -> o (T, Hv, Dv), new s. Value head j uses key head j // (Hv / Hk).
    """
    q, k = (np.repeat(x, v.shape[1] // q.shape[1], axis=1) for x in (q, k))
    if len(q) == 1:
        o, s = delta_rule_step(s, q[0], k[0], v[0], np.exp(log_decay[0]), beta[0])
        return o[None], s
    heads_first = [np.swapaxes(x, 0, 1) for x in (q, k, v, log_decay, beta)]
    outputs = []
    for start in range(0, len(q), DELTA_CHUNK):
        chunk = (x[:, start : start + DELTA_CHUNK] for x in heads_first)
        o, s = delta_rule_chunk(s, *chunk)
        outputs.append(o)
    return np.swapaxes(np.concatenate(outputs, axis=1), 0, 1), s


def gated_delta_net(
    h: np.ndarray,
    w: dict[str, np.ndarray],
    state: DeltaState,
    n_key_heads: int,
    eps: float,
    linear: Linear = linear,
    delta_rule: DeltaRule = delta_rule,
) -> np.ndarray:
    """Linear attention with a corrected, decaying memory.

    Shapes: h (T, D) -> (T, D); w: in_proj_qkv (C, D), in_proj_z (Hv Dv, D), in_proj_b
    and in_proj_a (Hv, D), conv1d (C, width), A_log and dt_bias (Hv,), norm (Dv,),
    out_proj (D, Hv Dv), with C = 2 Hk Dk + Hv Dv. Replaces the contents of state.
    Source: Qwen3.5 `Qwen3_5MoeGatedDeltaNet.forward`.
    """
    t, (n_heads, dv, dk) = len(h), state.s.shape
    mixed, state.conv = causal_conv(
        linear(h, w["in_proj_qkv"]), w["conv1d"], state.conv
    )
    key_dim = n_key_heads * dk
    q, k, v = np.split(silu(mixed), [key_dim, 2 * key_dim], axis=-1)
    q = l2_normalize(q.reshape(t, n_key_heads, dk)) * h.dtype.type(dk**-0.5)
    k = l2_normalize(k.reshape(t, n_key_heads, dk))
    beta = sigmoid(linear(h, w["in_proj_b"]))  # (T, Hv): how much of the error to write
    a = linear(h, w["in_proj_a"])
    log_decay = -np.exp(w["A_log"]) * softplus(a + w["dt_bias"])  # (T, Hv), <= 0
    v = v.reshape(t, n_heads, dv)
    o, state.s = delta_rule(state.s, q, k, v, log_decay, beta)
    z = linear(h, w["in_proj_z"]).reshape(t, n_heads, dv)
    gated = rms_norm(o, w["norm"], eps) * silu(z)  # norm first, then the gate
    return linear(gated.reshape(t, -1), w["out_proj"])


# --- Mixture of Experts ---------------------------------------------------------------


def route_topk(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Pick each token's k best experts and their mixing weights.

    Shapes: logits (T, E) -> experts (T, k) int, weights (T, k), rows sum to 1.
    Order:  best first; ties go to the lower expert id.
    Raises: ValueError if k is not in 1..E.
    Source: Qwen3.5 `Qwen3_5MoeTopKRouter`: softmax over all experts, then the best k,
    renormalised. A reduced k renormalises over the experts that are kept.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(
            f"k={k} is not in 1..{logits.shape[-1]}, the number of experts"
        )
    probabilities = softmax(logits)
    experts = np.argsort(-probabilities, axis=-1, kind="stable")[:, :k]
    weights = np.take_along_axis(probabilities, experts, axis=-1)
    return experts, weights / weights.sum(axis=-1, keepdims=True)


def expert_mlp(
    x: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    linear: Linear = linear,
) -> np.ndarray:
    """One expert: a gated feed-forward block (SwiGLU).

    Shapes: x (T, D), gate and up (F, D), down (D, F) -> (T, D).
    Source: GLU Variants Improve Transformer (arXiv 2002.05202).
    """
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def shared_expert(
    x: np.ndarray, w: dict[str, np.ndarray], linear: Linear = linear
) -> np.ndarray:
    """The expert that every token uses, scaled by its own sigmoid gate.

    Shapes: x (T, D) -> (T, D); w: shared_gate_proj and shared_up_proj (F, D),
    shared_down_proj (D, F), shared_expert_gate (1, D).
    Source: Qwen3.5 `Qwen3_5MoeSparseMoeBlock.forward`.
    """
    names = ("shared_gate_proj", "shared_up_proj", "shared_down_proj")
    y = expert_mlp(x, *(w[name] for name in names), linear)
    return sigmoid(linear(x, w["shared_expert_gate"])) * y  # (T, 1) * (T, D)
