"""Kernels for a whole prompt, compiled: each weight is decoded once for many tokens.

Some rows of a matrix are decoded into a buffer that stays in the cache and multiplied
with all tokens, four rows by three tokens at a time, so that a loaded value is used
three or four times. Threads share the rows of a dense matrix, the experts of a layer,
or the heads of a mixer. BLAS is not used: it has no quantized weights, and its threads
wait for each other by spinning, which a busy machine punishes.
**But:** float32 only. *Taught in notebooks/05.*

Results depend neither on the number of threads nor on the slot an expert lies in: each
output is one chain of operations in one thread.
"""

import numpy as np
from numba import prange
from numba.extending import overload

from .compiled import compiled, serial_and_parallel
from .kernels import DECODERS, WIDTHS, Parts, one_of, prepare, widen
from .quantize import QuantizedMatrix
from .steps import delta_rule_parallel, delta_rule_serial, pick_experts
from .vectors import exp, load8, multiply_add8, silu, store_sums4, zero8

TILE_TOKENS, TILE_ROWS = 3, 4  # multiplied at a time, see `multiply_buffer`
BUFFER_ROWS = 16  # rows decoded at a time: 256 KB at 4096 columns, within the L2 cache
QUERIES = 48  # tokens whose scores are held at a time, for one head
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

    Takes multiples of TILE_TOKENS, of TILE_ROWS and of eight columns. Twelve sums of
    eight lanes, three tokens and a row fill the sixteen vector registers of AVX2: one
    more, and sums would travel to memory and back.
    """
    for t in range(0, x.shape[0], TILE_TOKENS):
        for r in range(0, w.shape[0], TILE_ROWS):
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = zero8()
            for i in range(0, x.shape[1], 8):
                a, b, c = load8(x[t], i), load8(x[t + 1], i), load8(x[t + 2], i)
                v = load8(w[r], i)
                a0, b0 = multiply_add8(a, v, a0), multiply_add8(b, v, b0)
                c0, v = multiply_add8(c, v, c0), load8(w[r + 1], i)
                a1, b1 = multiply_add8(a, v, a1), multiply_add8(b, v, b1)
                c1, v = multiply_add8(c, v, c1), load8(w[r + 2], i)
                a2, b2 = multiply_add8(a, v, a2), multiply_add8(b, v, b2)
                c2, v = multiply_add8(c, v, c2), load8(w[r + 3], i)
                a3, b3 = multiply_add8(a, v, a3), multiply_add8(b, v, b3)
                c3 = multiply_add8(c, v, c3)
            store_sums4(out[t], first + r, a0, a1, a2, a3)
            store_sums4(out[t + 1], first + r, b0, b1, b2, b3)
            store_sums4(out[t + 2], first + r, c0, c1, c2, c3)


@compiled
def padded(n, step):
    """The next multiple of step."""
    return (n + step - 1) // step * step


@compiled
def multiply_rows(matrix, x, start, stop, out):
    """out[:, start:stop] = x times those rows.

    x (T, D) and out (T, rows) are padded: T and rows to whole tiles, D to eights.
    """
    buffer = np.zeros((BUFFER_ROWS, x.shape[1]), f32)
    for first in range(start, stop, BUFFER_ROWS):
        last = min(first + BUFFER_ROWS, stop)
        decode_rows(matrix, first, last, buffer)
        # Rows beyond the last hold old values; what they give lands in the padding.
        multiply_buffer(x, buffer[: padded(last - first, TILE_ROWS)], out, first)


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
    x_padded = np.zeros((padded(len(x), TILE_TOKENS), padded(x.shape[1], 8)), f32)
    x_padded[: len(x), : x.shape[1]] = x
    out = np.empty((len(x_padded), padded(n_rows, TILE_ROWS)), f32)
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
    raised = np.empty((x.shape[0], padded(n_f, TILE_ROWS)), f32)
    multiply_rows(gate, x, 0, n_f, hidden)
    multiply_rows(up, x, 0, n_f, raised)
    for t in range(x.shape[0]):
        for f in range(n_f):
            hidden[t, f] = silu(hidden[t, f]) * raised[t, f]
        hidden[t, n_f:] = f32(0)
    y = np.empty((x.shape[0], padded(n_d, TILE_ROWS)), f32)
    multiply_rows(down, hidden, 0, n_d, y)
    return y


@serial_and_parallel
def _experts(gate, up, down, slots, starts, tokens, shares, x, products):
    d = x.shape[1]
    for i in prange(slots.size):
        mine = tokens[starts[i] : starts[i + 1]]
        gathered = np.zeros((padded(mine.size, TILE_TOKENS), padded(d, 8)), f32)
        for j in range(mine.size):
            gathered[j, :d] = x[mine[j]]
        slot = slots[i]
        y = _expert(one_of(gate, slot), one_of(up, slot), one_of(down, slot), gathered)
        for j in range(mine.size):
            weighted, share = products[starts[i] + j], shares[starts[i] + j]
            for column in range(d):
                weighted[column] = share * y[j, column]


@compiled
def _add_rows(products, tokens, out):
    for j in range(tokens.size):
        row, product = out[tokens[j]], products[j]
        for d in range(row.size):
            row[d] += product[d]


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


# ---- attention over a prompt ---------------------------------------------------------


@compiled
def _softmax_of_past(scores, n_before):
    """Row i becomes weights of its n_before + i + 1 past positions, and zeros."""
    for i in range(scores.shape[0]):
        row = scores[i]
        seen = min(n_before + i + 1, row.size)
        largest, total = row[:seen].max(), f32(0)
        for t in range(seen):  # apart from the sum, so that it becomes vectors
            row[t] = exp(row[t] - largest)
        for t in range(seen):
            total += row[t]
        for t in range(seen):
            row[t] /= total
        row[seen:] = f32(0)


@serial_and_parallel
def _attend(q, k, v, out):
    n, n_kv, dh = k.shape
    n_tokens, n_heads, _ = q.shape
    scale = f32(1 / np.sqrt(dh))
    for head in prange(n_heads):
        kv = head * n_kv // n_heads
        keys = np.zeros((padded(n, 8), padded(dh, 8)), f32)
        values = np.zeros((padded(dh, TILE_ROWS), padded(n, 8)), f32)
        for t in range(n):
            for d in range(dh):
                keys[t, d], values[d, t] = k[t, kv, d], v[t, kv, d]
        for start in range(0, n_tokens, QUERIES):
            size = min(QUERIES, n_tokens - start)
            queries = np.zeros((padded(size, TILE_TOKENS), keys.shape[1]), f32)
            for i in range(size):
                for d in range(dh):
                    queries[i, d] = q[start + i, head, d] * scale
            n_before = n - n_tokens + start
            past = keys[: padded(n_before + size, 8)]
            scores = np.empty((len(queries), len(past)), f32)
            multiply_buffer(queries, past, scores, 0)
            _softmax_of_past(scores, n_before)
            mixed = np.empty((len(queries), len(values)), f32)
            multiply_buffer(scores, values, mixed, 0)
            for i in range(size):
                out[start + i, head] = mixed[i, :dh]


attend_serial, attend_parallel = _attend


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """`layers.attend`: two matrix products a head, some queries at a time.

    Shapes: as there, q (T, H, Dh), k and v (n, Hkv, Dh) -> (T, H, Dh).
    """
    out = np.empty(q.shape, f32)
    run = attend_parallel if 2 * q.size * len(k) >= PARALLEL_WORK else attend_serial
    run(q, k, v, out)
    return out


# ---- the delta rule over a prompt ----------------------------------------------------


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
    # Each operation waits for the one before: seven times a matrix product's cost.
    work = 7 * 3 * len(q) * s.size
    run = delta_rule_parallel if work >= PARALLEL_WORK else delta_rule_serial
    q, k, v = (np.ascontiguousarray(x) for x in (q, k, v))
    run(s, q, k, v, np.exp(log_decay), beta, out)
    return out, s
