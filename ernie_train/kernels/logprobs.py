"""Logprobs of sampled tokens by a fused LM head.

Shapes: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle
from paddle import Tensor

from ernie_train.kernels.call import addresses, module, room, whole
from ernie_train.kernels.rows import CHUNK_ELEMENTS, LEAST_ROWS


@dataclass(frozen=True)
class LogprobsState:
    """Holds what the backward pass of `token_logprobs` needs of the forward pass.

    probs [T,V] where they fit into one chunk; else they are computed again.
    """

    log_sums: Tensor
    entropies: Tensor | None
    probs: Tensor | None


def token_logprobs(
    hidden: Tensor, head: Tensor, ids: Tensor, temperature: float, *, with_entropy: bool
) -> tuple[Tensor, LogprobsState]:
    """Return logprobs [T] of ids [T] under softmax(hidden head^T / temperature), and the rest.

    hidden [T,H], head [V,H]. Raises `ValueError` for an id outside the vocabulary.
    """
    ids = ids if ids.dtype == paddle.int64 else ids.astype("int64")
    hidden, head, ids = whole(hidden, head, ids)
    (tokens, size), vocab = hidden.shape, head.shape[0]
    logprobs, log_sums = room(tokens), room(tokens)
    entropies = room(tokens) if with_entropy else None
    rows = _rows(tokens, vocab)
    logits = room(rows, vocab)
    bad = module().token_logprobs(
        *addresses(hidden, head, ids), 1.0 / temperature, tokens, size, vocab, rows,
        *addresses(logits, logprobs), 0 if entropies is None else entropies.data_ptr(),
        log_sums.data_ptr(),
    )  # fmt: skip
    if bad >= 0:
        raise ValueError(f"id {int(ids[bad])} of token {bad} is outside {vocab} tokens")
    return logprobs, LogprobsState(log_sums, entropies, logits if rows >= tokens else None)


def token_logprobs_backward(
    hidden: Tensor,
    head: Tensor,
    ids: Tensor,
    temperature: float,
    state: LogprobsState,
    grads: tuple[Tensor, Tensor | None],
    trains: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of hidden and head; grads: of the logprobs, and of the entropies.

    It uses `state.probs` up.
    """
    ids = ids if ids.dtype == paddle.int64 else ids.astype("int64")
    hidden, head, ids, dlogprobs = whole(hidden, head, ids, grads[0])
    (tokens, size), vocab = hidden.shape, head.shape[0]
    dhidden = room(tokens, size) if trains[0] else None
    dhead = room(vocab, size) if trains[1] else None
    rows = _rows(tokens, vocab)
    kept = state.probs is not None and grads[1] is None
    logits = state.probs if kept and state.probs is not None else room(rows, vocab)
    dentropies = None if grads[1] is None else whole(grads[1])[0]
    module().token_logprobs_backward(
        *addresses(hidden, head, ids), 1.0 / temperature, *addresses(state.log_sums, dlogprobs),
        *(_address(t) for t in (state.entropies, dentropies)), int(kept), tokens, size, vocab, rows,
        logits.data_ptr(), _address(dhidden), _address(dhead),
    )  # fmt: skip
    return dhidden, dhead


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else int(tensor.data_ptr())


def _rows(tokens: int, vocab: int) -> int:
    return min(tokens, max(LEAST_ROWS, CHUNK_ELEMENTS // vocab))
