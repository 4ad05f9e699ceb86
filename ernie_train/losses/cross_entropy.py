"""Compute cross-entropy by a fused LM head, and the weights of tokens.

Shapes: N trained tokens, H hidden size, V vocabulary, B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer

from ernie_train import kernels
from ernie_train.core.autograd import once_differentiable

CHUNK_ELEMENTS = 8 * 1024 * 1024  # most logits of a chunk (32 MiB in float32)
# On a GPU: a chunk reads and writes the gradient of a large head, a GB, and would be 81 tokens.
GPU_CHUNK_ELEMENTS = 64 * 1024 * 1024
Trains = tuple[bool, bool, bool]  # whether hidden, weight and bias take a gradient


class _LinearCrossEntropy(PyLayer):
    """Compute sum_n w_n * cross_entropy(hidden_n weight^T + bias, label_n), chunk by chunk.

    The token weights are known in the forward pass, so each chunk's gradients are computed while
    its logits exist, and no tensor of tokens x vocabulary outlives its chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
        token_weights: Tensor, trains: Trains,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if bias is None and kernels.usable(hidden, weight, token_weights):
            token_losses, *ctx.gradients = kernels.linear_cross_entropy(
                hidden, weight, labels, token_weights, trains=trains[:2]
            )
            return (token_losses * token_weights).sum(), token_losses
        losses, grad_hidden = [], []
        grad_weight = grad_bias = None
        for part in chunks(hidden, weight.shape[0]):
            h, y, w = hidden[part], labels[part], token_weights[part].unsqueeze(1)
            loss, (dh, dw, db) = _chunk(h, weight, bias, y, w, trains)
            losses.append(loss)
            grad_hidden.append(dh)
            grad_weight, grad_bias = added(grad_weight, dw), added(grad_bias, db)
            del dw  # [V,H], before the next one is made
        token_losses = paddle.concat(losses)
        ctx.gradients = [paddle.concat(grad_hidden) if trains[0] else None]
        sums = (grad_weight, grad_bias)[: 1 + (bias is not None)]
        ctx.gradients += [s if s is None else cast(s, weight.dtype) for s in sums]
        return (token_losses * token_weights).sum(), token_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (g if g is None else g * grads[0].astype(g.dtype) for g in ctx.gradients)
        return (*scaled, None, None)


def _chunk(
    h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, w: Tensor, trains: Trains
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the losses and gradients of a chunk, whose logits are freed on return."""
    logits = paddle.matmul(h, weight, transpose_y=True)
    if bias is not None:
        logits = logits + bias
    losses, probs = cross_entropy_rows(logits, labels)
    return losses, _chunk_gradients(probs, h, weight, labels, w, trains)


def added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Add a chunk's gradient to the sum of those before, in float32; None where it has none.

    A bfloat16 sum of a thousand would lose a tenth.
    """
    if part is None or total is None:
        return part if part is None else cast(part, paddle.float32)
    return total.add_(cast(part, paddle.float32))


def cast(tensor: Tensor, dtype: Any) -> Tensor:
    """Return `tensor` as `dtype`, itself where it has that one."""
    return tensor if tensor.dtype == dtype else tensor.astype(dtype)


def chunk_elements(*, on_gpu: bool) -> int:
    """Return the most logits that are made at once."""
    return GPU_CHUNK_ELEMENTS if on_gpu else CHUNK_ELEMENTS


def chunks(hidden: Tensor, vocab_size: int) -> Iterator[slice]:
    """Yield slices of the tokens of hidden [N,H] whose logits fit into `chunk_elements`."""
    size = max(1, chunk_elements(on_gpu=hidden.place.is_gpu_place()) // vocab_size)
    return (slice(start, start + size) for start in range(0, hidden.shape[0], size))


def cross_entropy_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return cross-entropies [N] in nats of logits [N,V] for labels [N], and probabilities [N,V].

    In float32 and without overflow: log(sum(exp(x))) = max(x) - log(max(p)), since the largest
    probability is 1 / sum(exp(x - max(x))). On a CPU at 2048 x 4096 Paddle 3.3.1 takes 14 ms for
    the softmax, which is needed anyway, and 6 for a maximum, but 59 for its logsumexp.
    """
    logits = cast(logits, paddle.float32)
    probs = F.softmax(logits)
    normalizer = logits.max(-1) - paddle.log(probs.max(-1))
    # Paddle's take_along_axis copies all logits to read one per row: 3.6 ms, gather_nd takes 0.01.
    indices = paddle.stack([paddle.arange(len(labels)), labels], axis=1)
    chosen = paddle.gather_nd(logits, indices)
    return normalizer - chosen, probs


def add_to_chosen(rows: Tensor, ids: Tensor, values: Tensor | float) -> Tensor:
    """Return rows [N,V] with values [N], or a number, added in place to the entry ids[n] of row n.

    In float32: a bfloat16 rounds probabilities from 0.998 on to 1, and p - 1 of a token that the
    model knows is all of its gradient. Each row has one such entry, so nothing is summed in an
    order of a GPU's own.
    """
    flat = rows.reshape([-1])
    at = paddle.arange(rows.shape[0]) * rows.shape[1] + ids
    return paddle.scatter_(flat, at, paddle.gather(flat, at) + values).reshape(rows.shape)


def _chunk_gradients(
    probs: Tensor, h: Tensor, weight: Tensor, labels: Tensor, w: Tensor, trains: Trains
) -> tuple[Tensor | None, ...]:
    """Return the gradients of sum_n w_n * loss_n; those of the logits, p - onehot, replace `probs`.

    What is frozen has none: each product would be a third of the head's work.
    """
    dh = dw = db = None
    if not any(trains):
        return dh, dw, db
    rows, w = cast(add_to_chosen(probs, labels, -1.0), weight.dtype), cast(w, weight.dtype)
    if trains[0]:
        dh = paddle.matmul(rows, weight)
        dh = dh.multiply_(paddle.expand(w, dh.shape))
    if trains[1]:
        dw = paddle.matmul(rows, h * paddle.expand(w, h.shape), transpose_x=True)
    if trains[2]:
        db = paddle.matmul(rows, w, transpose_x=True).squeeze(1)
    return dh, dw, db


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of cross-entropies of `hidden weight^T + bias` for `labels`.

    hidden [N,H], weight [V,H], bias [V] or None, labels [N] int64, token_weights [N] float32 ->
    (sum over n of token_weights[n] * loss[n], a scalar with gradient; the losses [N] themselves in
    nats, without gradient). `token_weights` takes no gradient. Raises `ValueError` for no tokens.
    """
    if hidden.shape[0] == 0:
        raise ValueError("no tokens: hidden is empty")
    grad = paddle.is_grad_enabled()  # a forward pass that no backward pass follows computes none
    takes = [grad and t is not None and not t.stop_gradient for t in (hidden, weight, bias)]
    total, token_losses = _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, token_weights, tuple(takes)
    )
    return total, token_losses.detach()


def token_balanced_weights(
    loss_mask: np.ndarray, document_ids: np.ndarray
) -> tuple[np.ndarray, int]:
    """Return weights [B,S] float32 with which losses add up to sums over samples, and their count.

    loss_mask, document_ids [B,S]; a sample is a (row, document id), id 0 is padding. A trained
    token weighs 1 / all positions of its sample: divided by the trained ones alone, samples with
    few of them would outweigh the others (ERNIE 4.5 technical report, token-balanced loss).
    """
    rows = np.arange(len(document_ids))[:, None]
    keys = rows * (int(document_ids.max(initial=0)) + 1) + document_ids
    flat = np.where(document_ids > 0, keys, -1).reshape(-1)
    _, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
    weights = loss_mask.reshape(-1) * (flat >= 0) / counts[inverse.reshape(-1)]
    samples = len(counts) - int((flat < 0).any())
    return weights.reshape(loss_mask.shape).astype(np.float32), samples
