"""Compute logprobs and entropy by a fused LM head, without a tensor of tokens x vocabulary.

Shapes: T tokens, H hidden size, V vocabulary, N tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from ernie_train import kernels
from ernie_train.core.autograd import once_differentiable
from ernie_train.losses.cross_entropy import (
    Trains,
    add_to_chosen,
    added,
    cast,
    chunks,
    cross_entropy_rows,
)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return logprobs of `ids` under softmax((hidden weight^T + bias) / temperature), and entropy.

    hidden [T,H], weight [V,H], bias [V] or None, ids [T] int64 -> (logprobs [T], entropy [T] or
    None), float32 in nats, both with gradient through hidden, weight and bias. Logits are made in
    float32 of bfloat16 tensors too, on which a logit of 20 would be off by 0.06 (arXiv:2510.13786).
    Backward recomputes them, chunk by chunk; a detached entropy costs it nothing. Raises
    `ValueError` for no tokens, or a temperature that is not positive.
    """
    if hidden.shape[0] == 0:
        raise ValueError("no tokens: hidden is empty")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if bias is None and kernels.usable(hidden, weight):
        grad = paddle.is_grad_enabled()
        trains = tuple(grad and not t.stop_gradient for t in (hidden, weight))
        logprobs, *entropy = _NativeTokenLogprobs.apply(
            hidden, weight, ids, temperature, with_entropy, trains
        )
        return logprobs, entropy[0] if with_entropy else None
    logprobs, *entropy = _TokenLogprobs.apply(hidden, weight, bias, ids, temperature, with_entropy)
    return logprobs, entropy[0] if with_entropy else None


class _NativeTokenLogprobs(PyLayer):
    """The same by native kernels; probabilities are kept where they fit into one chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float,
        with_entropy: bool, trains: tuple[bool, bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        logprobs, state = kernels.token_logprobs(
            hidden, weight, ids, temperature, with_entropy=with_entropy
        )
        if any(trains):
            ctx.save_for_backward(hidden, weight, ids)
            ctx.state, ctx.temperature, ctx.trains = state, temperature, trains
            ctx.set_materialize_grads(False)
        if state.entropies is None:
            return (logprobs,)
        return logprobs, state.entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, ids = ctx.saved_tensor()
        of_logprobs = paddle.zeros([len(ids)]) if grads[0] is None else grads[0]
        of_entropy = grads[1] if len(grads) > 1 else None
        state, ctx.state = ctx.state, None
        made = kernels.token_logprobs_backward(
            hidden, weight, ids, ctx.temperature, state, (of_logprobs, of_entropy), ctx.trains
        )
        return (*made, None)


class _TokenLogprobs(PyLayer):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor,
        temperature: float, with_entropy: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.save_for_backward(hidden, weight, ids)
        ctx.bias, ctx.temperature = bias, temperature
        ctx.trains = tuple(t is not None and not t.stop_gradient for t in (hidden, weight, bias))
        ctx.set_materialize_grads(False)  # a gradient of None: no loss uses that output
        logprobs, entropies = [], []
        head = _widened(weight, bias)
        for part in chunks(hidden, weight.shape[0]):
            logits = _logits(hidden[part], *head, temperature)
            losses, probs = cross_entropy_rows(logits, ids[part])
            logprobs.append(-losses)
            if with_entropy:
                _, below = _weighted_logits(logits, probs)
                entropies.append(below - paddle.log(probs.max(-1)))
        if not with_entropy:
            return (paddle.concat(logprobs),)
        return paddle.concat(logprobs), paddle.concat(entropies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, ids = ctx.saved_tensor()
        scaled = [None if grad is None else grad / ctx.temperature for grad in grads]
        grad_logprobs = paddle.zeros([len(ids)]) if scaled[0] is None else scaled[0]
        grad_entropy = scaled[1] if len(scaled) > 1 else None
        grad_hidden: list[Any] = []
        totals: list[Tensor | None] = [None, None]
        head = _widened(weight, ctx.bias)
        for part in chunks(hidden, weight.shape[0]):
            below = None if grad_entropy is None else grad_entropy[part]
            args = ids[part], grad_logprobs[part], below, ctx.trains
            dh, *sums = _chunk_gradients(hidden[part], weight, head, ctx.temperature, *args)
            grad_hidden.append(dh)
            totals = [added(total, more) for total, more in zip(totals, sums, strict=True)]
        sums = totals[: 1 + (ctx.bias is not None)]
        wanted = (s if s is None else cast(s, weight.dtype) for s in sums)
        return paddle.concat(grad_hidden) if ctx.trains[0] else None, *wanted, None


def _chunk_gradients(
    h: Tensor, weight: Tensor, head: tuple[Tensor, Tensor | None], temperature: float,
    ids: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor | None, trains: Trains,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return gradients of hidden [N,H], weight and bias; a chunk's logits are freed on return.

    They are products in the weight's own dtype, `head` is it and the bias in float32.
    """
    logits = _logits(h, *head, temperature)
    _, probs = cross_entropy_rows(logits, ids)
    rows = _dense_gradient(logits, probs, grad_logprobs, grad_entropy)
    return _head_gradients(rows, h, weight, ids, grad_logprobs, trains)


def _widened(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the head in float32: one copy of it for all chunks of a pass, where it is narrower."""
    return cast(weight, paddle.float32), None if bias is None else cast(bias, paddle.float32)


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """Return logits [N,V] of h [N,H] in float32, divided by the temperature as in sampling."""
    logits = paddle.matmul(cast(h, paddle.float32), weight, transpose_y=True)
    if bias is not None:
        logits = logits + bias
    return logits if temperature == 1 else logits / temperature


def _weighted_logits(logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return p x [N,V] and -sum(p x) [N], with x the logits minus the maximum of their row.

    entropy = -sum(p x) - log(max p): neither term is negative, so no digits cancel.
    """
    centred = logits - paddle.expand(logits.max(-1, keepdim=True), logits.shape)
    products = probs * centred
    ones = paddle.ones([probs.shape[1], 1], probs.dtype)  # 1.7 ms at 2048 x 4096 on a CPU; sum: 7.7
    return products, -paddle.matmul(products, ones).squeeze(1)


def _dense_gradient(
    logits: Tensor, probs: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor | None
) -> Tensor:
    """Return the gradient of the logits [N,V] without the one-hot part of the logprobs.

    d logprob / dx = onehot - p;  d entropy / dx = -p (x + m), with m = -sum(p x).
    """
    if grad_entropy is None:
        return probs * paddle.expand(-grad_logprobs.unsqueeze(1), probs.shape)
    products, below = _weighted_logits(logits, probs)
    scale = -(grad_logprobs + grad_entropy * below).unsqueeze(1)
    spread = products * paddle.expand(grad_entropy.unsqueeze(1), probs.shape)
    return probs * paddle.expand(scale, probs.shape) - spread


def _head_gradients(
    rows: Tensor, h: Tensor, weight: Tensor, ids: Tensor, grad_logprobs: Tensor, trains: Trains
) -> tuple[Tensor | None, ...]:
    """Return gradients of hidden, weight and bias for logits' rows + grad_logprobs onehot(ids).

    `rows` is changed. What is frozen has none, as in `cross_entropy`.
    """
    rows = cast(add_to_chosen(rows, ids, grad_logprobs), weight.dtype)
    dh = dw = db = None
    if trains[0]:
        dh = paddle.matmul(rows, weight)
    if trains[1]:
        dw = paddle.matmul(rows, h, transpose_x=True)
    if trains[2]:
        ones = paddle.ones([rows.shape[0], 1], rows.dtype)
        db = paddle.matmul(rows, ones, transpose_x=True).squeeze(1)
    return dh, dw, db
