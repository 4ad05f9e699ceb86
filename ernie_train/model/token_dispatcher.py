"""From tokens to the experts that they chose, and back: the dispatcher between router and experts.

Shapes: T tokens, H hidden size, E experts, K experts per token (moe_k), R routed rows (T*K less
what a capacity limit drops).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer


@dataclass(frozen=True)
class Routing:
    """The way of T*K (token, expert) pairs into rows sorted by expert, and back."""

    tokens: int  # T
    tokens_per_expert: list[int]  # rows of each expert, summing to R
    token_of_row: Tensor  # [R]
    row_of_pair: Tensor  # [K*T] row of the pair (k, token), k outermost; R where dropped
    weight_index: Tensor  # [R] where the row's weight stands in weights [T,K] flattened
    dropped: int


@dataclass(frozen=True)
class Departed:
    """Rows on their way to their experts; what is made of `x` is made while they travel."""

    x: Tensor  # [T,H] as it was given
    way: Any  # what the dispatcher needs to receive them


@dataclass(frozen=True)
class Arrived:
    """Rows where their experts are; R here is what came, E the experts that are here."""

    rows: Tensor  # [R,H] sorted by expert
    weights: Tensor  # [R,1]
    tokens_per_expert: list[int]  # [E] summing to R
    meanwhile: Tensor | None  # [T,H] what was made of the tokens while rows travelled
    way_home: Any  # what the dispatcher needs to bring them back


class Dispatcher(Protocol):
    """Brings tokens to their experts and their results home."""

    def depart(self, x: Tensor, weights: Tensor, routing: Routing) -> Departed:
        """Sends the rows of x [T,H] and their weights, of [T,K], off to their experts."""
        ...

    def arrive(self, departed: Departed, meanwhile: Tensor | None) -> Arrived:
        """Waits for the rows of the experts that are here.

        meanwhile [T,H]: what was made of `departed.x`. It goes on as `Arrived.meanwhile`, so that
        in the backward pass too its gradient is computed while gradients of rows travel.
        """
        ...

    def combine(self, rows: Tensor, arrived: Arrived) -> Tensor:
        """What became of `arrived.rows` [R,H], weighted -> its sum for each token [T,H]."""
        ...


def make_routing(expert_ids: Tensor, num_experts: int, capacity: int | None) -> Routing:
    """Sorts the pairs of `expert_ids` [T,K] by expert; within an expert they keep token order.

    With a capacity every expert takes its first `capacity` pairs in the order of choice (first
    choices of all tokens before second ones) and the rest is dropped.
    """
    tokens, choices = expert_ids.shape
    flat = expert_ids.transpose([1, 0]).reshape([-1])  # [K*T]
    order = paddle.argsort(flat, stable=True)
    counts = paddle.bincount(flat, minlength=num_experts)
    per_expert: list[int] = counts.tolist()
    dropped = 0
    if capacity is not None and max(per_expert) > capacity:
        first = paddle.cumsum(counts) - counts
        rank = paddle.arange(len(flat)) - paddle.gather(first, paddle.gather(flat, order))
        order = paddle.masked_select(order, rank < capacity)
        kept = [min(count, capacity) for count in per_expert]
        dropped = sum(per_expert) - sum(kept)
        per_expert = kept
    row_of_pair = paddle.full([len(flat)], len(order), "int64")
    row_of_pair = paddle.scatter(row_of_pair, order, paddle.arange(len(order)))
    token = order % tokens
    return Routing(
        tokens, per_expert, token, row_of_pair, token * choices + order // tokens, dropped
    )


class Permute(PyLayer):
    """rows[r] = x[token_of_row[r]]; its gradient is `_sum_pairs`, so nothing is scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return paddle.gather(x, routing.token_of_row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _sum_pairs(grads[0], ctx.routing)


class Unpermute(PyLayer):
    """out[t] = sum of the rows of token t; its gradient is a gather."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return _sum_pairs(rows, routing)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return paddle.gather(grads[0], ctx.routing.token_of_row)


def _sum_pairs(rows: Tensor, routing: Routing) -> Tensor:
    tokens = routing.tokens
    if routing.dropped:
        rows = paddle.concat([rows, paddle.zeros([1, rows.shape[-1]], rows.dtype)])
    pairs = paddle.gather(rows, routing.row_of_pair)
    # One slice after another: a sum over an inner axis is slow in Paddle's CPU kernels.
    total = pairs[:tokens]
    for start in range(tokens, pairs.shape[0], tokens):
        total = total + pairs[start : start + tokens]
    return total


class LocalDispatcher:
    """All experts live here: dispatching is a permutation."""

    def depart(self, x: Tensor, weights: Tensor, routing: Routing) -> Departed:
        rows = Permute.apply(x, routing)
        row_weights = paddle.gather(weights.reshape([-1, 1]), routing.weight_index)
        return Departed(x, (rows, row_weights, routing))

    def arrive(self, departed: Departed, meanwhile: Tensor | None) -> Arrived:
        rows, row_weights, routing = departed.way
        return Arrived(rows, row_weights, routing.tokens_per_expert, meanwhile, routing)

    def combine(self, rows: Tensor, arrived: Arrived) -> Tensor:
        return Unpermute.apply(rows, arrived.way_home)


@dataclass(frozen=True)
class Placement:
    """Which experts of every layer live in this process, and who brings tokens to them."""

    experts: range | None  # None: all
    dispatcher: Dispatcher

    def of(self, num_experts: int) -> range:
        return range(num_experts) if self.experts is None else self.experts


def is_expert_parameter(name: str) -> bool:
    """Whether a parameter of this name holds experts, stacked: it may lie on some ranks only."""
    return ".mlp.experts." in name
