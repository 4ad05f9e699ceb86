"""The kernels themselves, compiled by numba for the processor at hand; imported by `loading` alone.

Arguments are addresses of contiguous float32 (or int64) data and sizes: Paddle's tensors cost
0.2 us to hand over so, 6 us as arrays of numpy. Matrix products are those of Paddle's own MKL,
called from within the loops, so that what follows a product finds it in the cache, and rows of a
head are read where they lie, by their stride. Sums run in one fixed order on one thread: the same
input gives the same bits.

Everything stands in one file because numba's cache looks at the file of a function alone: a helper
changed elsewhere would not renew what was compiled with it.

Shapes: T tokens, H hidden size, N query heads, K key/value heads, D head dimension, E experts, R
rows, I expert width, V vocabulary.
"""
# One argument a line would double the file.
# fmt: off

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_ROW_MAJOR, _NO, _YES = 101, 111, 112
F4 = 4  # bytes of a float32
ONE, ZERO = np.float32(1.0), np.float32(0.0)
LANES = 64  # maxima side by side
QUERY_BLOCK = 64  # queries of one head that are scored together
PART = 64  # tokens whose gradients of a weight are summed before others join: that is more exact
_FAST = {"reassoc", "contract", "nsz", "arcp"}  # infinities and NaN keep their meaning

_gemm = types.ExternalFunction(
    "ernie_train_cblas_sgemm",  # `loading` says where it is
    types.void(
        *(types.int32,) * 6, types.float32, types.intp, types.int32, types.intp, types.int32,
        types.float32, types.intp, types.int32,
    ),
)


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    """Return the pointer to `address`."""
    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)
    return types.voidptr(types.intp), codegen

_inline = njit(fastmath=_FAST, error_model="numpy")
kernel = njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")


@_inline
def _floats(address, *shape):
    return carray(_pointer(address), shape, np.float32)


@_inline
def _ints(address, *shape):
    return carray(_pointer(address), shape, np.int64)


@_inline
def _exp(x):
    """Return exp(x) for x <= 88, exp(-87) below -87, by Cephes' polynomial; LLVM makes vectors."""
    x = np.float32(-87.0) if x < np.float32(-87.0) else x  # NaN stays NaN
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + ONE
    return p * np.int32((np.int32(n) + 127) << 23).view(np.float32)  # 2^n by its bits


@_inline
def _sigmoid(x):
    x = np.float32(-87.0) if x < np.float32(-87.0) else x  # exp(87) is finite
    return ONE / (ONE + _exp(-x))


@_inline
def _largest(row, size, lanes):
    """Return the maximum of row[:size]; `lanes` maxima side by side make vectors, one would not."""
    lanes[:] = row[0]
    whole = size - size % LANES
    for first in range(0, whole, LANES):
        for i in range(LANES):
            x = row[first + i]
            lanes[i] = x if x > lanes[i] else lanes[i]
    largest = lanes[0]
    for i in range(LANES):
        largest = max(largest, lanes[i])
    for i in range(whole, size):
        largest = max(largest, row[i])
    return largest


AB, ATB, ABT = (False, False), (True, False), (False, True)


@_inline
def _product(transposes, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
    """Compute C [m,n] = alpha A B + beta C; `transposes`: whether A and B lie transposed."""
    _gemm(
        _ROW_MAJOR, _YES if transposes[0] else _NO, _YES if transposes[1] else _NO, m, n, k,
        np.float32(alpha), a, lda, b, ldb, np.float32(beta), c, ldc,
    )


# ---- norm, rotary embedding, SwiGLU --------------------------------------------------------------
@kernel
def rms_norm(x_at, weight_at, eps, tokens, size, y_at, inverse_at):
    x, y = _floats(x_at, tokens, size), _floats(y_at, tokens, size)
    weight, inverse = _floats(weight_at, size), _floats(inverse_at, tokens)
    for t in range(tokens):
        total = ZERO
        for i in range(size):
            total += x[t, i] * x[t, i]
        scale = ONE / np.sqrt(total / np.float32(size) + np.float32(eps))
        inverse[t] = scale
        for i in range(size):
            y[t, i] = x[t, i] * scale * weight[i]


@kernel
def rms_norm_backward(x_at, weight_at, inverse_at, grad_at, tokens, size, dx_at, dweight_at, sums):
    x, grad = _floats(x_at, tokens, size), _floats(grad_at, tokens, size)
    dx, inverse = _floats(dx_at, tokens, size), _floats(inverse_at, tokens)
    weight, dweight = _floats(weight_at, size), _floats(dweight_at, size)
    part = _floats(sums, size)
    dweight[:] = ZERO
    for first in range(0, tokens, PART):
        part[:] = ZERO
        for t in range(first, min(first + PART, tokens)):
            scale, total = inverse[t], ZERO
            for i in range(size):
                total += grad[t, i] * weight[i] * x[t, i]
            mean = total * scale * scale / np.float32(size)
            for i in range(size):
                part[i] += grad[t, i] * x[t, i] * scale
                dx[t, i] = (grad[t, i] * weight[i] - x[t, i] * mean) * scale
        for i in range(size):
            dweight[i] += part[i]


@kernel
def rope(x_at, cos_at, sin_at, sign, tokens, heads, dim, y_at):
    x, y = _floats(x_at, tokens, heads, dim), _floats(y_at, tokens, heads, dim)
    cos, sin = _floats(cos_at, tokens, dim), _floats(sin_at, tokens, dim)
    sign = np.float32(sign)
    for t in range(tokens):
        for n in range(heads):
            for i in range(0, dim, 2):
                even, odd = x[t, n, i], x[t, n, i + 1]
                c, s = cos[t, i], sin[t, i] * sign
                y[t, n, i] = even * c - odd * s
                y[t, n, i + 1] = odd * c + even * s


@kernel
def swiglu(gate_at, up_at, size, y_at):
    gate, up, y = _floats(gate_at, size), _floats(up_at, size), _floats(y_at, size)
    for i in range(size):
        y[i] = gate[i] * _sigmoid(gate[i]) * up[i]


@kernel
def swiglu_backward(gate_at, up_at, grad_at, size, dgate_at, dup_at):
    gate, up, grad = _floats(gate_at, size), _floats(up_at, size), _floats(grad_at, size)
    dgate, dup = _floats(dgate_at, size), _floats(dup_at, size)
    for i in range(size):
        sigmoid = _sigmoid(gate[i])
        silu = gate[i] * sigmoid
        dup[i] = grad[i] * silu
        dgate[i] = grad[i] * up[i] * (sigmoid + silu * (ONE - sigmoid))


# ---- tokens to experts and back ------------------------------------------------------------------
@kernel
def gather_rows(x_at, index_at, rows, tokens, size, y_at):
    x, y, index = _floats(x_at, tokens, size), _floats(y_at, rows, size), _ints(index_at, rows)
    for r in range(rows):
        t = index[r]
        for i in range(size):
            y[r, i] = x[t, i]


@kernel
def sum_pairs(rows_at, index_at, rows, choices, tokens, size, y_at):
    """Sum the rows of each token; an index of `rows` or more is a row that was dropped."""
    x, y = _floats(rows_at, rows, size), _floats(y_at, tokens, size)
    index = _ints(index_at, choices, tokens)
    for t in range(tokens):
        y[t, :] = ZERO
        for k in range(choices):
            r = index[k, t]
            if r < rows:
                for i in range(size):
                    y[t, i] += x[r, i]


# ---- experts -------------------------------------------------------------------------------------
@kernel
def experts(x, weights_at, gate, up, down, counts_at, num, hidden, width, g_at, u_at, y, inner_at):
    counts, start = _ints(counts_at, num), 0
    for e in range(num):
        n, at = counts[e], F4 * e * hidden * width
        if n == 0:
            continue
        x_e, y_e = x + F4 * start * hidden, y + F4 * start * hidden
        g_e, u_e = g_at + F4 * start * width, u_at + F4 * start * width
        _product(AB, n, width, hidden, 1.0, x_e, hidden, gate + at, width, 0.0, g_e, width)
        _product(AB, n, width, hidden, 1.0, x_e, hidden, up + at, width, 0.0, u_e, width)
        g, u = _floats(g_e, n, width), _floats(u_e, n, width)
        inner, weights = _floats(inner_at, n, width), _floats(weights_at + F4 * start, n)
        for r in range(n):
            w = weights[r]
            for i in range(width):
                inner[r, i] = g[r, i] * _sigmoid(g[r, i]) * u[r, i] * w
        _product(AB, n, hidden, width, 1.0, inner_at, width, down + at, hidden, 0.0, y_e, hidden)
        start += n


@kernel
def experts_backward(
    x, weights_at, gate, up, down, counts_at, num, hidden, width, g_at, u_at, grad,
    dx, dweights_at, dgate, dup, ddown, scratch, most,
):
    """Take addresses of 0 for `dgate`, `dup`, `ddown` of frozen stacks; scratch [4,most,I]."""
    counts, start = _ints(counts_at, num), 0
    step, din_at = F4 * most * width, scratch
    dg_at, du_at, inner_at = scratch + step, scratch + 2 * step, scratch + 3 * step
    for e in range(num):
        n, at = counts[e], F4 * e * hidden * width
        if n == 0:
            for stack in (dgate, dup, ddown):
                if stack != 0:
                    _floats(stack + at, hidden * width)[:] = ZERO
            continue
        rows, inner_rows = F4 * start * hidden, F4 * start * width
        x_e, grad_e, dx_e = x + rows, grad + rows, dx + rows
        _product(ABT, n, width, hidden, 1.0, grad_e, hidden, down + at, hidden, 0.0, din_at, width)
        g, u = _floats(g_at + inner_rows, n, width), _floats(u_at + inner_rows, n, width)
        din, dg = _floats(din_at, n, width), _floats(dg_at, n, width)
        du, inner = _floats(du_at, n, width), _floats(inner_at, n, width)
        weights = _floats(weights_at + F4 * start, n)
        dweights = _floats(dweights_at + F4 * start, n)
        for r in range(n):
            w, total = weights[r], ZERO
            for i in range(width):
                sigmoid = _sigmoid(g[r, i])
                silu = g[r, i] * sigmoid
                total += din[r, i] * silu * u[r, i]  # no division by a weight of 0
                inner[r, i] = silu * u[r, i] * w
                du[r, i] = din[r, i] * w * silu
                dg[r, i] = din[r, i] * w * u[r, i] * (sigmoid + silu * (ONE - sigmoid))
            dweights[r] = total
        for made, m, k, left, right in (
            (ddown, width, hidden, inner_at, grad_e),
            (dgate, hidden, width, x_e, dg_at),
            (dup, hidden, width, x_e, du_at),
        ):
            if made != 0:
                _product(ATB, m, k, n, 1.0, left, m, right, k, 0.0, made + at, k)
        _product(ABT, n, hidden, width, 1.0, dg_at, width, gate + at, width, 0.0, dx_e, hidden)
        _product(ABT, n, hidden, width, 1.0, du_at, width, up + at, width, 1.0, dx_e, hidden)
        start += n


# ---- attention -----------------------------------------------------------------------------------
# Documents [n,4]: first token, tokens, first token and tokens of what it continues (0 if nothing).
@_inline
def _scores(q, row, k, own, prior, past, m, seen, dim, key_row, alpha, s):
    """Score m queries, `row` floats apart: columns are `past` keys, then `seen` of their own."""
    width = past + seen
    if past:
        _product(ABT, m, past, dim, alpha, q, row, k + prior, key_row, 0.0, s, width)
    _product(ABT, m, seen, dim, alpha, q, row, k + own, key_row, 0.0, s + F4 * past, width)


@kernel
def attention(q, k, v, documents_at, num, heads, key_heads, dim, scale, y, log_sums_at, s):
    documents = _ints(documents_at, num, 4)
    row, key_row = heads * dim, key_heads * dim
    totals, lanes = np.empty(QUERY_BLOCK, np.float32), np.empty(LANES, np.float32)
    for d in range(num):
        first, tokens, before, past = documents[d]
        for h in range(heads):
            key = F4 * (h // (heads // key_heads)) * dim
            own, prior = key + F4 * first * key_row, key + F4 * before * key_row
            for query in range(first, first + tokens, QUERY_BLOCK):
                m = min(QUERY_BLOCK, first + tokens - query)
                seen, at = query - first + m, F4 * (query * row + h * dim)
                width = past + seen
                _scores(q + at, row, k, own, prior, past, m, seen, dim, key_row, scale, s)
                scores = _floats(s, m, width)
                for i in range(m):
                    visible, p = width - m + i + 1, scores[i]
                    largest, total = _largest(p, visible, lanes), ZERO
                    for j in range(visible):
                        p[j] = _exp(p[j] - largest)
                        total += p[j]
                    p[visible:] = ZERO
                    totals[i] = total
                    log_sum = _floats(log_sums_at + F4 * ((query + i) * heads + h), 1)
                    log_sum[0] = largest + math.log(total)
                out, beta = y + at, 0.0
                if past:
                    _product(AB, m, dim, past, 1.0, s, width, v + prior, key_row, beta, out, row)
                    beta = 1.0
                s_own = s + F4 * past
                _product(AB, m, dim, seen, 1.0, s_own, width, v + own, key_row, beta, out, row)
                for i in range(m):
                    sums, inverse = _floats(out + F4 * i * row, dim), ONE / totals[i]
                    for j in range(dim):
                        sums[j] *= inverse


@kernel
def attention_backward(
    q, k, v, documents_at, num, heads, key_heads, dim, scale, y, sums_at, grad, dq, dk, dv, s, ds,
):
    """Accumulate into dk and dv, which are zero before; the probabilities are computed again."""
    documents = _ints(documents_at, num, 4)
    row, key_row = heads * dim, key_heads * dim
    for d in range(num):
        first, tokens, before, past = documents[d]
        for h in range(heads):
            key = F4 * (h // (heads // key_heads)) * dim
            own, prior = key + F4 * first * key_row, key + F4 * before * key_row
            for query in range(first, first + tokens, QUERY_BLOCK):
                m = min(QUERY_BLOCK, first + tokens - query)
                seen, at = query - first + m, F4 * (query * row + h * dim)
                width, q_at, dq_at, g = past + seen, q + at, dq + at, grad + at
                _scores(q_at, row, k, own, prior, past, m, seen, dim, key_row, scale, s)
                _scores(g, row, v, own, prior, past, m, seen, dim, key_row, 1.0, ds)
                scores, dscores = _floats(s, m, width), _floats(ds, m, width)
                for i in range(m):
                    visible, p, dp = width - m + i + 1, scores[i], dscores[i]
                    log_sum = _floats(sums_at + F4 * ((query + i) * heads + h), 1)[0]
                    g_i = _floats(g + F4 * i * row, dim)
                    y_i, delta = _floats(y + at + F4 * i * row, dim), ZERO
                    for j in range(dim):
                        delta += g_i[j] * y_i[j]
                    for j in range(visible):
                        p[j] = _exp(p[j] - log_sum)
                        dp[j] = p[j] * (dp[j] - delta)
                    p[visible:] = ZERO
                    dp[visible:] = ZERO
                # The keys of the own document, then those of what it continues.
                for n, at_keys, column in ((seen, own, F4 * past), (past, prior, 0)):
                    if n == 0:
                        continue
                    p_at, dp_at, beta = s + column, ds + column, 0.0 if at_keys == own else 1.0
                    k_at, dk_at, dv_at = k + at_keys, dk + at_keys, dv + at_keys
                    _product(AB, m, dim, n, scale, dp_at, width, k_at, key_row, beta, dq_at, row)
                    _product(ATB, n, dim, m, scale, dp_at, width, q_at, row, 1.0, dk_at, key_row)
                    _product(ATB, n, dim, m, 1.0, p_at, width, g, row, 1.0, dv_at, key_row)


# ---- cross-entropy -------------------------------------------------------------------------------
@kernel
def linear_cross_entropy(
    hidden, head, labels_at, weights_at, tokens, size, vocab, chunk, logits, losses_at,
    dhidden, dhead,
):
    """Return the first token whose label is no token, -1 if none; addresses of 0: no gradient."""
    lanes, labels = np.empty(LANES, np.float32), _ints(labels_at, tokens)
    weights, losses = _floats(weights_at, tokens), _floats(losses_at, tokens)
    for t in range(tokens):
        if labels[t] < 0 or labels[t] >= vocab:
            return t
    for first in range(0, tokens, chunk):
        n, at = min(chunk, tokens - first), F4 * first * size
        h, beta = hidden + at, 0.0 if first == 0 else 1.0
        _product(ABT, n, vocab, size, 1.0, h, size, head, size, 0.0, logits, vocab)
        rows = _floats(logits, n, vocab)
        for t in range(n):
            row, label, weight = rows[t], labels[first + t], weights[first + t]
            largest, total, chosen = _largest(row, vocab, lanes), ZERO, row[label]
            for j in range(vocab):
                row[j] = _exp(row[j] - largest)
                total += row[j]
            losses[first + t] = largest + math.log(total) - chosen
            scale = weight / total
            for j in range(vocab):
                row[j] *= scale
            row[label] -= weight
        if dhidden != 0:
            _product(AB, n, size, vocab, 1.0, logits, vocab, head, size, 0.0, dhidden + at, size)
        if dhead != 0:
            _product(ATB, vocab, size, n, 1.0, logits, vocab, h, size, beta, dhead, size)
    return -1
