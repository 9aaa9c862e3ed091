"""Kernels for a whole prompt, compiled: each weight is decoded once for many tokens.

Some rows of a matrix are decoded into a buffer that stays in the cache and multiplied
with all tokens, four rows by four tokens at a time, so that a loaded value is used four
times. Threads share the rows of a dense matrix, the experts of a layer, or the heads of
a delta rule. BLAS is not used: it has no quantized weights, and its threads wait for
each other by spinning, which a busy machine punishes.
**But:** float32 only. *Taught in notebooks/05.*

Results depend neither on the number of threads nor on the slot an expert lies in: each
output is one chain of operations in one thread.
"""

import numpy as np
from numba import prange
from numba.extending import overload

from .compiled import compiled, serial_and_parallel
from .kernels import DECODERS, WIDTHS, Parts, dot, one_of, prepare, widen
from .quantize import QuantizedMatrix
from .steps import pick_experts
from .vectors import load8, multiply_add8, silu, sum8, zero8

BUFFER_ROWS = 16  # rows decoded at a time: 256 KB at 4096 columns, within the L2 cache
# Waking a thread takes microseconds, but milliseconds where another program holds its
# core (see kernels.py); a prompt makes few such calls, so they may be smaller here.
PARALLEL_WORK = 1 << 25  # multiply-adds that are worth a second thread: about 1 ms

f32 = np.float32


# ---- decoded rows times tokens -------------------------------------------------------


def decode_rows(matrix, start, stop, out):
    """out[: stop - start] = those rows of a prepared matrix, in float32."""


@overload(decode_rows)
def _decode_rows(matrix, start, stop, out):
    if len(matrix) == 1:
        return lambda matrix, start, stop, out: _widen_rows(matrix[0], start, stop, out)
    decode = DECODERS[WIDTHS[matrix[0].dtype.name]]
    return lambda matrix, start, stop, out: decode(
        matrix[0][start:stop],
        matrix[1][start:stop],
        matrix[2][start:stop],
        out[: stop - start],
    )


@compiled
def _widen_rows(weight, start, stop, out):
    for row in range(start, stop):
        for i in range(weight.shape[1]):
            out[row - start, i] = widen(weight[row, i])


@compiled
def multiply_buffer(x, w, out, first):
    """out[t, first + r] = x[t] . w[r].

    Takes multiples of four tokens and rows, and of eight columns: sixteen sums of eight
    lanes stay in registers.
    """
    for t in range(0, x.shape[0], 4):
        for r in range(0, w.shape[0], 4):
            a00 = a01 = a02 = a03 = a10 = a11 = a12 = a13 = zero8()
            a20 = a21 = a22 = a23 = a30 = a31 = a32 = a33 = zero8()
            for i in range(0, x.shape[1], 8):
                w0, w1 = load8(w[r], i), load8(w[r + 1], i)
                w2, w3 = load8(w[r + 2], i), load8(w[r + 3], i)
                v = load8(x[t], i)
                a00, a01 = multiply_add8(v, w0, a00), multiply_add8(v, w1, a01)
                a02, a03 = multiply_add8(v, w2, a02), multiply_add8(v, w3, a03)
                v = load8(x[t + 1], i)
                a10, a11 = multiply_add8(v, w0, a10), multiply_add8(v, w1, a11)
                a12, a13 = multiply_add8(v, w2, a12), multiply_add8(v, w3, a13)
                v = load8(x[t + 2], i)
                a20, a21 = multiply_add8(v, w0, a20), multiply_add8(v, w1, a21)
                a22, a23 = multiply_add8(v, w2, a22), multiply_add8(v, w3, a23)
                v = load8(x[t + 3], i)
                a30, a31 = multiply_add8(v, w0, a30), multiply_add8(v, w1, a31)
                a32, a33 = multiply_add8(v, w2, a32), multiply_add8(v, w3, a33)
            _store4(out[t], first + r, a00, a01, a02, a03)
            _store4(out[t + 1], first + r, a10, a11, a12, a13)
            _store4(out[t + 2], first + r, a20, a21, a22, a23)
            _store4(out[t + 3], first + r, a30, a31, a32, a33)


@compiled
def _store4(out, at, a, b, c, d):
    out[at], out[at + 1], out[at + 2], out[at + 3] = sum8(a), sum8(b), sum8(c), sum8(d)


@compiled
def padded(n, step):
    """The next multiple of step."""
    return (n + step - 1) // step * step


@compiled
def multiply_rows(matrix, x, start, stop, out):
    """out[:, start:stop] = x times those rows.

    x (T, D) and out (T, rows) are padded: T and rows to fours, D to eights.
    """
    buffer = np.zeros((BUFFER_ROWS, x.shape[1]), f32)
    for first in range(start, stop, BUFFER_ROWS):
        last = min(first + BUFFER_ROWS, stop)
        decode_rows(matrix, first, last, buffer)
        # Rows beyond the last hold old values; what they give lands in the padding.
        multiply_buffer(x, buffer[: padded(last - first, 4)], out, first)


@serial_and_parallel
def _matmul(matrix, x, out):
    n_rows = matrix[0].shape[0]
    for block in prange((n_rows + BUFFER_ROWS - 1) // BUFFER_ROWS):
        start = block * BUFFER_ROWS
        multiply_rows(matrix, x, start, min(start + BUFFER_ROWS, n_rows), out)


matmul_serial, matmul_parallel = _matmul


def matmul(matrix: Parts | QuantizedMatrix | np.ndarray, x: np.ndarray) -> np.ndarray:
    """Multiply many tokens by a stored matrix.

    Shapes: matrix (out, in), best as `prepare` returned it; x (T, in) float32
    -> (T, out).
    """
    parts = matrix if isinstance(matrix, tuple) else prepare(matrix)
    n_rows = parts[0].shape[0]
    x_padded = np.zeros((padded(len(x), 4), padded(x.shape[1], 8)), f32)
    x_padded[: len(x), : x.shape[1]] = x
    out = np.empty((len(x_padded), padded(n_rows, 4)), f32)
    big = out.size * x.shape[1] >= PARALLEL_WORK
    (matmul_parallel if big else matmul_serial)(parts, x_padded, out)
    return out[: len(x), :n_rows]


# ---- routing -------------------------------------------------------------------------


@compiled
def _route(logits, experts, weights):
    for t in range(len(logits)):
        pick_experts(logits[t], experts[t], weights[t])


def route_topk(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`layers.route_topk`: k passes over a token's experts instead of a sort.

    Shapes: logits (T, E) -> experts (T, k) int64 best first, weights (T, k).
    """
    experts = np.empty((len(logits), k), np.int64)
    weights = np.empty(experts.shape, f32)
    _route(logits.copy(), experts, weights)
    return experts, weights


# ---- the experts of a prompt ---------------------------------------------------------


@compiled
def _expert(gate, up, down, x):
    """One expert for its tokens. Shapes: x padded (n, D) -> (n, D), padded."""
    n_f, n_d = gate[0].shape[0], down[0].shape[0]
    hidden = np.zeros((x.shape[0], padded(n_f, 8)), f32)
    raised = np.empty((x.shape[0], padded(n_f, 4)), f32)
    multiply_rows(gate, x, 0, n_f, hidden)
    multiply_rows(up, x, 0, n_f, raised)
    for t in range(x.shape[0]):
        for f in range(n_f):
            hidden[t, f] = silu(hidden[t, f]) * raised[t, f]
        hidden[t, n_f:] = f32(0)
    y = np.empty((x.shape[0], padded(n_d, 4)), f32)
    multiply_rows(down, hidden, 0, n_d, y)
    return y


@serial_and_parallel
def _experts(gate, up, down, slots, starts, tokens, shares, x, products):
    d = x.shape[1]
    for i in prange(slots.size):
        mine = tokens[starts[i] : starts[i + 1]]
        gathered = np.zeros((padded(mine.size, 4), padded(d, 8)), f32)
        for j in range(mine.size):
            gathered[j, :d] = x[mine[j]]
        slot = slots[i]
        y = _expert(one_of(gate, slot), one_of(up, slot), one_of(down, slot), gathered)
        for j in range(mine.size):
            for column in range(d):
                products[starts[i] + j, column] = shares[starts[i] + j] * y[j, column]


@compiled
def _add_rows(products, tokens, out):
    for j in range(tokens.size):
        for d in range(out.shape[1]):
            out[tokens[j], d] += products[j, d]


experts_serial, experts_parallel = _experts


def experts_of_prompt(
    bank: tuple[Parts, Parts, Parts],
    slots: np.ndarray,
    starts: np.ndarray,
    tokens: np.ndarray,
    shares: np.ndarray,
    x: np.ndarray,
    out: np.ndarray,
) -> None:
    """Add some experts' weighted outputs for the tokens that chose them to out.

    Shapes: bank as for `kernels.experts_step`; slots (n,) integers; tokens and shares
    (m,): those of slot i are [starts[i]:starts[i + 1]]; x and out (T, D) float32. Adds
    in the order of slots.
    """
    products = np.empty((len(tokens), x.shape[1]), f32)
    work = 3 * len(tokens) * bank[0][0].shape[1] * x.shape[1]
    run = experts_parallel if work >= PARALLEL_WORK else experts_serial
    run(*bank, slots, starts, tokens, shares, x, products)
    _add_rows(products, tokens, out)


# ---- the delta rule over a prompt ----------------------------------------------------


@serial_and_parallel
def _delta_rule(s, q, k, v, decay, beta, out):
    ratio = s.shape[0] // q.shape[1]
    for head in prange(s.shape[0]):
        for t in range(q.shape[0]):
            query, key = q[t, head // ratio], k[t, head // ratio]
            g, write = decay[t, head], beta[t, head]
            for row in range(s.shape[1]):
                memory = s[head, row]  # (Dk,)
                recalled = g * dot(memory, key)
                correction = (v[t, head, row] - recalled) * write
                for i in range(memory.size):
                    memory[i] = g * memory[i] + correction * key[i]
                out[t, head, row] = dot(memory, query)


delta_rule_serial, delta_rule_parallel = _delta_rule


def delta_rule(
    s: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray,
    beta: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """`layers.delta_rule`, token by token: a head's memory stays in the cache.

    Shapes and result: as there, but q and k (T, Hk, Dk) are not repeated for the value
    heads that share them.
    """
    s = s.copy()
    out = np.empty(v.shape, f32)
    work = 3 * len(q) * s.size
    run = delta_rule_parallel if work >= PARALLEL_WORK else delta_rule_serial
    run(s, q, k, np.ascontiguousarray(v), np.exp(log_decay), beta, out)
    return out, s
