"""One token through the blocks of a layer, each compiled into a single call.

The same mathematics as `layers.py`, block by block, for one token and with the residual
additions inside: at the size of the reduced model a call from Python costs as much as a
small matrix, so a layer makes four calls instead of sixty.
    mix     delta_net_step or attention_step          x += mixer(norm(x))
    route   route_step                                -> h, the K experts, their weights
    shared  shared_expert_step, while experts are read           x += shared(h)
    experts `kernels.experts_step`                               x += sum of experts
**But:** float32 activations and states; a prompt goes through `prompt_kernels.py`.
*Taught in notebooks/05.*

Matrices are passed as `kernels.prepare` returns them, all else as float32 arrays.
Results do not depend on the number of threads.
"""

import numpy as np
from numba import prange

from .compiled import compiled, serial_and_parallel
from .kernels import PARALLEL_BYTES, dot, multiply
from .vectors import (
    exp,
    load8,
    multiply_add8,
    silu,
    splat8,
    store8,
    sum8,
    zero8,
)

f32 = np.float32
L2_EPS = f32(1e-6)  # as in layers.py, which imports NumPy alone


@compiled
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return f32(1) / (f32(1) + exp(-x))


@compiled
def normalized(x, weight, eps):
    """`layers.rms_norm` of one vector."""
    factor = f32(1) / np.sqrt(dot(x, x) / f32(x.size) + f32(eps))
    out = np.empty(x.size, f32)
    for i in range(x.size):
        out[i] = x[i] * factor * weight[i]
    return out


@compiled
def product(matrix, x, n_out):
    """A new vector of n_out values: the matrix times x."""
    out = np.empty(n_out, f32)
    multiply(matrix, x, out)
    return out


# ---- Gated DeltaNet ------------------------------------------------------------------


@compiled
def _recall_and_write(memory, query, key, g, value, beta, out):
    """One head, one token. Shapes: memory (Dv Dk,), in place; value and out (Dv,)."""
    dk = key.size
    vectors = dk - dk % 8
    decay = splat8(g)
    for row in range(value.size):
        at = row * dk
        recalled8, tail = zero8(), f32(0)
        for i in range(0, vectors, 8):
            recalled8 = multiply_add8(load8(memory, at + i), load8(key, i), recalled8)
        for i in range(vectors, dk):
            tail += memory[at + i] * key[i]
        correction = (value[row] - g * (sum8(recalled8) + tail)) * beta
        correction8, read8, tail = splat8(correction), zero8(), f32(0)
        for i in range(0, vectors, 8):
            kept = multiply_add8(load8(memory, at + i), decay, zero8())
            new = multiply_add8(correction8, load8(key, i), kept)
            store8(memory, at + i, new)
            read8 = multiply_add8(new, load8(query, i), read8)
        for i in range(vectors, dk):
            memory[at + i] = g * memory[at + i] + correction * key[i]
            tail += memory[at + i] * query[i]
        out[row] = sum8(read8) + tail


@serial_and_parallel
def _delta_rule(s, q, k, v, decay, beta, out):
    ratio = s.shape[0] // q.shape[1]
    for head in prange(s.shape[0]):
        memory = s[head].reshape(s[head].size)
        for t in range(q.shape[0]):
            _recall_and_write(
                memory,
                q[t, head // ratio],
                k[t, head // ratio],
                decay[t, head],
                v[t, head],
                beta[t, head],
                out[t, head],
            )


delta_rule_serial, delta_rule_parallel = _delta_rule


@compiled
def delta_step(s, q, k, v, decay, beta):
    """One token of the gated delta rule: forget, correct, write, read; s in place.

    Shapes: s (Hv, Dv, Dk), q and k (1, Hk, Dk), v (1, Hv, Dv), decay and beta (1, Hv)
    -> o (1, Hv, Dv). Value head j reads key head j // (Hv / Hk).
    Source: Gated Delta Networks (arXiv 2412.06464), eq. 10.
    """
    o = np.empty(v.shape, f32)
    if s.size * 4 < PARALLEL_BYTES:
        delta_rule_serial(s, q, k, v, decay, beta, o)
    else:
        delta_rule_parallel(s, q, k, v, decay, beta, o)
    return o


@compiled
def _convolve(new, kernel, tail):
    """silu of the causal convolution at the newest token; moves the tail on."""
    width = kernel.shape[1]
    mixed = np.empty(new.size, f32)
    for c in range(new.size):
        mixed[c] = new[c] * kernel[c, width - 1]
    for i in range(width - 1):
        for c in range(new.size):
            mixed[c] += tail[i, c] * kernel[c, i]
    for i in range(width - 2):
        tail[i] = tail[i + 1]
    tail[width - 2] = new
    for c in range(new.size):
        mixed[c] = silu(mixed[c])
    return mixed


@compiled
def _unit_rows(x, scale):
    """Every row at length `scale`, in place."""
    for row in x:
        factor = f32(scale) / np.sqrt(dot(row, row) + L2_EPS)
        for i in range(row.size):
            row[i] *= factor


@compiled
def delta_net_step(
    x, norm, qkv, z, b, a, out, conv1d, a_log, dt_bias, head_norm, tail, s, n_keys, eps
):
    """x += gated_delta_net(rms_norm(x)); x, tail and s in place.

    Shapes: x and norm (D,); qkv (C, D), z (Hv Dv, D), b and a (Hv, D), out (D, Hv Dv)
    prepared; conv1d (C, width), a_log and dt_bias (Hv,), head_norm (Dv,); state tail
    (width - 1, C) and s (Hv, Dv, Dk); n_keys = Hk key heads.
    """
    h = normalized(x, norm, eps)
    n_heads, dv, dk = s.shape
    mixed = _convolve(product(qkv, h, conv1d.shape[0]), conv1d, tail)
    q = mixed[: n_keys * dk].reshape(n_keys, dk)
    k = mixed[n_keys * dk : 2 * n_keys * dk].reshape(n_keys, dk)
    v = mixed[2 * n_keys * dk :].reshape(n_heads, dv)
    _unit_rows(q, 1 / np.sqrt(dk))
    _unit_rows(k, 1.0)
    beta, decay = product(b, h, n_heads), product(a, h, n_heads)
    for j in range(n_heads):
        beta[j] = sigmoid(beta[j])
        raised = decay[j] + dt_bias[j]
        softplus = max(raised, f32(0)) + np.log1p(np.exp(-abs(raised)))
        decay[j] = np.exp(-np.exp(a_log[j]) * softplus)
    o = delta_step(
        s,
        q.reshape(1, n_keys, dk),
        k.reshape(1, n_keys, dk),
        v.reshape(1, n_heads, dv),
        decay.reshape(1, n_heads),
        beta.reshape(1, n_heads),
    )[0]
    gate = product(z, h, n_heads * dv)
    for j in range(n_heads):
        head = normalized(o[j], head_norm, eps)  # norm first, then the gate
        for i in range(dv):
            gate[j * dv + i] = head[i] * silu(gate[j * dv + i])
    _add(x, product(out, gate, x.size), f32(1))


@compiled
def _add(x, y, factor):
    for i in range(x.size):
        x[i] += factor * y[i]


# ---- gated attention -----------------------------------------------------------------


@compiled
def _norm_and_rotate(head, weight, cos, sin, eps):
    """Norm of a query or key head, then the rotation of its first dimensions."""
    u = normalized(head, weight, eps)
    half = cos.size
    for i in range(half):
        low, high = u[i], u[half + i]
        u[i] = low * cos[i] - high * sin[i]
        u[half + i] = high * cos[i] + low * sin[i]
    return u


@serial_and_parallel
def _attend(q, k, v, o):
    n, n_kv, dh = k.shape
    n_heads = q.shape[0]
    scale = f32(1 / np.sqrt(dh))
    for head in prange(n_heads):
        kv = head * n_kv // n_heads
        scores, largest, total = np.empty(n, f32), f32(-np.inf), f32(0)
        for t in range(n):
            scores[t] = dot(q[head], k[t, kv]) * scale
            largest = max(largest, scores[t])
        for t in range(n):  # apart from the sum, so that it becomes vectors
            scores[t] = exp(scores[t] - largest)
        o[head] = f32(0)
        for t in range(n):
            total += scores[t]
            _add(o[head], v[t, kv], scores[t])
        for i in range(dh):
            o[head, i] /= total


_attend_serial, _attend_parallel = _attend


@compiled
def attention_step(
    x, norm, q_proj, k_proj, v_proj, o_proj, q_norm, k_norm, keys, values, n, freqs, eps
):
    """x += gated_attention(rms_norm(x)); writes position n of keys and values.

    Shapes: x and norm (D,); q_proj (2 H Dh, D), k_proj and v_proj (Hkv Dh, D), o_proj
    (D, H Dh) prepared; q_norm and k_norm (Dh,); keys and values (capacity, Hkv, Dh),
    with room for position n, the number of tokens before this one; freqs
    (rotary / 2,): radians a position.
    """
    if n >= keys.shape[0]:
        raise IndexError("the key-value cache is full: make room before the step")
    _, n_kv, dh = keys.shape
    n_heads = q_norm_heads(q_proj, dh)
    h = normalized(x, norm, eps)
    cos, sin = np.cos(f32(n) * freqs), np.sin(f32(n) * freqs)
    q_and_gate = product(q_proj, h, 2 * n_heads * dh).reshape(n_heads, 2, dh)
    k_new = product(k_proj, h, n_kv * dh).reshape(n_kv, dh)
    values[n] = product(v_proj, h, n_kv * dh).reshape(n_kv, dh)
    q = np.empty((n_heads, dh), f32)
    for head in range(n_heads):
        q[head] = _norm_and_rotate(q_and_gate[head, 0], q_norm, cos, sin, eps)
    for head in range(n_kv):
        keys[n, head] = _norm_and_rotate(k_new[head], k_norm, cos, sin, eps)
    o = np.empty((n_heads, dh), f32)
    if (n + 1) * n_kv * dh * 8 < PARALLEL_BYTES:
        _attend_serial(q, keys[: n + 1], values[: n + 1], o)
    else:
        _attend_parallel(q, keys[: n + 1], values[: n + 1], o)
    for head in range(n_heads):
        for i in range(dh):
            o[head, i] *= sigmoid(q_and_gate[head, 1, i])
    _add(x, product(o_proj, o.reshape(n_heads * dh), x.size), f32(1))


@compiled
def q_norm_heads(q_proj, dh):
    """Query heads: q_proj has Dh rows of query and Dh of gate for each."""
    return q_proj[0].shape[0] // (2 * dh)


# ---- router, shared expert, logits ---------------------------------------------------


@compiled
def pick_experts(p, experts, weights):
    """`layers.route_topk` of one token; overwrites its router logits p (E,)."""
    largest = p.max()
    for e in range(p.size):
        p[e] = exp(p[e] - largest)
    for i in range(experts.size):
        best = 0
        for e in range(p.size):
            if p[e] > p[best]:
                best = e
        experts[i], weights[i] = best, p[best]
        p[best] = f32(-1)  # below every probability: not picked again
    # Dividing by the sum over all experts would cancel out here.
    weights /= weights.sum()


@compiled
def route_step(x, norm, gate, k, eps):
    """Normalize x and pick its k experts.

    Shapes: x and norm (D,), gate (E, D) prepared -> h (D,), experts (k,) int64 best
    first, weights (k,). Ties go to the lower id; weights sum to 1.
    """
    h = normalized(x, norm, eps)
    experts, weights = np.empty(k, np.int64), np.empty(k, f32)
    pick_experts(product(gate, h, gate[0].shape[0]), experts, weights)
    return h, experts, weights


@compiled
def shared_expert_step(x, h, gate, up, down, scalar_gate):
    """x += sigmoid(scalar_gate h) * expert(h); x in place.

    Shapes: x and h (D,); gate and up (F, D), down (D, F), scalar_gate (1, D) prepared.
    """
    hidden = product(gate, h, gate[0].shape[0])
    raised = product(up, h, hidden.size)
    for f in range(hidden.size):
        hidden[f] = silu(hidden[f]) * raised[f]
    share = sigmoid(product(scalar_gate, h, 1)[0])
    _add(x, product(down, hidden, x.size), share)


@compiled
def logits_step(x, norm, lm_head, eps):
    """Scores of the next token. Shapes: x and norm (D,), lm_head (V, D) -> (V,)."""
    return product(lm_head, normalized(x, norm, eps), lm_head[0].shape[0])
