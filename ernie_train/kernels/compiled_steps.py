"""More kernels: single products, the router, logprobs of sampled tokens.

They stand on the helpers of `compiled`, whose conventions are theirs. `loading` ties their cache to
both files.

Shapes: T tokens, H hidden size, E experts, K experts of a token, R rows, V vocabulary.
"""
# One argument a line would double the file.
# fmt: off

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from ernie_train.kernels import compiled

AB, ABT, ATB, F4, LANES = compiled.AB, compiled.ABT, compiled.ATB, compiled.F4, compiled.LANES
ONE, ZERO, _exp, _floats = compiled.ONE, compiled.ZERO, compiled._exp, compiled._floats
_ints, _largest, _product = compiled._ints, compiled._largest, compiled._product


def kernel(function: Any) -> Any:
    """Compile a kernel, again where either file has changed: numba looks at this one alone."""
    made = compiled.kernel(function)
    helpers, index = os.stat(compiled.__file__), made._cache._cache_file
    index._source_stamp = (*index._source_stamp, helpers.st_mtime, helpers.st_size)
    return made


@kernel
def product(kind, m, n, k, a, b, beta, c):
    """Compute C [m,n] = A B + beta C; kind 1: A^T B, A lies [k,m]; kind 2: A B^T, B lies [n,k]."""
    if kind == 0:
        _product(AB, m, n, k, 1.0, a, k, b, n, beta, c, n)
    elif kind == 1:
        _product(ATB, m, n, k, 1.0, a, m, b, n, beta, c, n)
    else:
        _product(ABT, m, n, k, 1.0, a, k, b, k, beta, c, n)


# ---- router --------------------------------------------------------------------------------------
@kernel
def route(
    x, weight, bias_at, tokens, size, num, choices, norm_min, logits_at, probs_at, ids_at,
    weights_at,
):
    """Choose experts by probability plus bias; weigh them by their share of the probabilities."""
    _product(AB, tokens, num, size, 1.0, x, size, weight, num, 0.0, logits_at, num)
    logits, probs = _floats(logits_at, tokens, num), _floats(probs_at, tokens, num)
    ids, weights = _ints(ids_at, tokens, choices), _floats(weights_at, tokens, choices)
    bias, scores = _floats(bias_at, num), np.empty(num, np.float32)
    lanes = np.empty(LANES, np.float32)
    for t in range(tokens):
        row, p = logits[t], probs[t]
        largest, total = _largest(row, num, lanes), ZERO
        for e in range(num):
            p[e] = _exp(row[e] - largest)
            total += p[e]
        for e in range(num):
            p[e] /= total
            scores[e] = p[e] + bias[e]
        total = ZERO
        for k in range(choices):
            best = -1
            for e in range(num):
                taken = False
                for j in range(k):
                    taken |= ids[t, j] == e
                if not taken and (best < 0 or scores[e] > scores[best]):
                    best = e
            ids[t, k] = best
            total += p[best]
        total = max(total, np.float32(norm_min))
        for k in range(choices):
            weights[t, k] = p[ids[t, k]] / total


@kernel
def sort_pairs(
    ids_at, weights_at, tokens, choices, num, counts_at, token_of_row_at, row_of_pair_at,
    row_weights_at,
):
    """Sort pairs (k, token), k outermost, by expert; within an expert they keep their order."""
    ids, weights = _ints(ids_at, tokens, choices), _floats(weights_at, tokens, choices)
    rows = tokens * choices
    counts, row_of_pair = _ints(counts_at, num), _ints(row_of_pair_at, choices, tokens)
    token_of_row, row_weights = _ints(token_of_row_at, rows), _floats(row_weights_at, rows)
    counts[:] = 0
    for t in range(tokens):
        for k in range(choices):
            counts[ids[t, k]] += 1
    free, start = np.empty(num, np.int64), 0
    for e in range(num):
        free[e] = start
        start += counts[e]
    for k in range(choices):
        for t in range(tokens):
            e = ids[t, k]
            row = free[e]
            free[e] += 1
            token_of_row[row], row_of_pair[k, t], row_weights[row] = t, row, weights[t, k]


@kernel
def route_backward(
    probs_at, ids_at, row_of_pair_at, drow_weights_at, extra_at, tokens, num, choices, norm_min,
    dlogits_at,
):
    """Return the gradient of the logits; `extra_at`: what else they have, an address of 0: none."""
    probs, dlogits = _floats(probs_at, tokens, num), _floats(dlogits_at, tokens, num)
    ids, row_of_pair = _ints(ids_at, tokens, choices), _ints(row_of_pair_at, choices, tokens)
    drows, least = _floats(drow_weights_at, tokens * choices), np.float32(norm_min)
    for t in range(tokens):
        p, d = probs[t], dlogits[t]
        total, dot = ZERO, ZERO
        for k in range(choices):
            chosen = p[ids[t, k]]
            total += chosen
            dot += drows[row_of_pair[k, t]] * chosen
        # w_k = p_k / max(sum of p, least): below the least the sum has no gradient.
        scale = ONE / max(total, least)
        shift = dot * scale * scale if total > least else ZERO
        mean = ZERO
        for k in range(choices):
            mean += (drows[row_of_pair[k, t]] * scale - shift) * p[ids[t, k]]
        for e in range(num):
            d[e] = -p[e] * mean
        for k in range(choices):
            e = ids[t, k]
            d[e] += p[e] * (drows[row_of_pair[k, t]] * scale - shift)
    if extra_at != 0:
        extra = _floats(extra_at, tokens, num)
        for t in range(tokens):
            for e in range(num):
                dlogits[t, e] += extra[t, e]


# ---- logprobs ------------------------------------------------------------------------------------
@kernel
def token_logprobs(
    hidden, head, ids_at, inverse_temperature, tokens, size, vocab, chunk, logits, logprobs_at,
    entropies_at, log_sums_at,
):
    """Return the first token that is none, -1 if there is none; `entropies_at` 0: not wanted.

    What is left in `logits` of the last chunk are probabilities.
    """
    lanes, exps = np.empty(LANES, np.float32), np.empty(vocab, np.float32)
    ids = _ints(ids_at, tokens)
    logprobs, log_sums = _floats(logprobs_at, tokens), _floats(log_sums_at, tokens)
    for t in range(tokens):
        if ids[t] < 0 or ids[t] >= vocab:
            return t
    for first in range(0, tokens, chunk):
        n, h = min(chunk, tokens - first), hidden + F4 * first * size
        _product(ABT, n, vocab, size, inverse_temperature, h, size, head, size, 0.0, logits, vocab)
        rows = _floats(logits, n, vocab)
        for t in range(n):
            row = rows[t]
            largest, total, chosen = _largest(row, vocab, lanes), ZERO, row[ids[first + t]]
            for j in range(vocab):
                exps[j] = _exp(row[j] - largest)
                total += exps[j]
            log_total, scale = np.float32(math.log(total)), ONE / total
            log_sums[first + t] = largest + log_total
            logprobs[first + t] = (chosen - largest) - log_total
            if entropies_at != 0:  # log(sum of e^c) - sum of p c, with c <= 0: no digits cancel
                weighted = ZERO
                for j in range(vocab):
                    weighted += exps[j] * (row[j] - largest)
                _floats(entropies_at, tokens)[first + t] = log_total - weighted * scale
            for j in range(vocab):
                row[j] = exps[j] * scale
    return -1


@kernel
def token_logprobs_backward(
    hidden, head, ids_at, inverse_temperature, log_sums_at, dlogprobs_at, entropies_at,
    dentropies_at, kept, tokens, size, vocab, chunk, logits, dhidden, dhead,
):
    """Compute gradients; addresses of 0: none wanted, and none given for `dentropies_at`.

    kept: `logits` holds the probabilities of all tokens, which are not computed again.
    """
    ids, log_sums = _ints(ids_at, tokens), _floats(log_sums_at, tokens)
    dlogprobs = _floats(dlogprobs_at, tokens)
    scale = np.float32(inverse_temperature)
    for first in range(0, tokens, chunk):
        n, at = min(chunk, tokens - first), F4 * first * size
        h, beta = hidden + at, 0.0 if first == 0 else 1.0
        if not kept:
            _product(ABT, n, vocab, size, scale, h, size, head, size, 0.0, logits, vocab)
        rows = _floats(logits, n, vocab)
        for t in range(n):
            row, g, log_sum = rows[t], dlogprobs[first + t] * scale, log_sums[first + t]
            if kept:
                for j in range(vocab):
                    row[j] *= -g
            elif dentropies_at == 0:
                for j in range(vocab):
                    row[j] = _exp(row[j] - log_sum) * -g
            else:
                # d entropy / dx = -p (log p + entropy)
                dentropy = _floats(dentropies_at, tokens)[first + t] * scale
                shift = g + dentropy * _floats(entropies_at, tokens)[first + t]
                for j in range(vocab):
                    log_p = row[j] - log_sum
                    row[j] = -_exp(log_p) * (shift + dentropy * log_p)
            row[ids[first + t]] += g
        if dhidden != 0:
            _product(AB, n, size, vocab, 1.0, logits, vocab, head, size, 0.0, dhidden + at, size)
        if dhead != 0:
            _product(ATB, vocab, size, n, 1.0, logits, vocab, h, size, beta, dhead, size)
