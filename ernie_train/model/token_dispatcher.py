"""From tokens to the experts that they chose, and back: the dispatcher between router and experts.

Shapes: T tokens, H hidden size, E experts, K experts per token (moe_k), R routed rows (T*K less
what a capacity limit drops).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from ernie_train import kernels
from ernie_train.core.autograd import once_differentiable

MetadataT = TypeVar("MetadataT")  # what one kind of dispatcher keeps between its three calls


@dataclass(frozen=True)
class Routing:
    """Maps T*K (token, expert) pairs to rows sorted by expert, and back."""

    tokens: int  # T
    ends: Tensor  # [E] where the rows of each expert end, the last one's at R
    token_of_row: Tensor  # [R]
    row_of_pair: Tensor  # [K*T] row of the pair (k, token), k outermost; R where dropped
    weight_index: Tensor  # [R] index of the row's weight in weights [T,K] flattened
    dropped: int


@dataclass(frozen=True)
class InFlight(Generic[MetadataT]):
    """Handle of a dispatch in flight; compute on `x` until `dispatch_wait`."""

    x: Tensor  # [T,H] as it was given
    metadata: MetadataT


@dataclass(frozen=True)
class Dispatched(Generic[MetadataT]):
    """Rows at their experts; here R counts the rows received and E the experts of this rank."""

    rows: Tensor  # [R,H] sorted by expert
    weights: Tensor  # [R,1]
    tokens_per_expert: list[int]  # [E] summing to R
    overlapped: Tensor | None  # [T,H] what was computed while rows travelled
    metadata: MetadataT


class Dispatcher(Protocol[MetadataT]):
    """Sends tokens to their experts and brings the results back."""

    def dispatch_start(self, x: Tensor, weights: Tensor, routing: Routing) -> InFlight[MetadataT]:
        """Send the rows of x [T,H] and their weights, of [T,K], to their experts."""
        ...

    def dispatch_wait(
        self, in_flight: InFlight[MetadataT], overlapped: Tensor | None
    ) -> Dispatched[MetadataT]:
        """Wait for the rows of this rank's experts.

        overlapped [T,H]: what was computed of `in_flight.x`. It passes through to
        `Dispatched.overlapped`, so that the backward pass too computes its gradient while the
        gradients of rows travel.
        """
        ...

    def combine(self, rows: Tensor, dispatched: Dispatched[MetadataT]) -> Tensor:
        """Return, for each token, the sum of its weighted expert outputs `rows` [R,H]: [T,H]."""
        ...


def make_routing(expert_ids: Tensor, num_experts: int, capacity: int | None) -> Routing:
    """Sort the pairs of `expert_ids` [T,K] by expert; within an expert they keep token order.

    With a capacity every expert takes its first `capacity` pairs in the order of choice (first
    choices of all tokens before second ones) and the rest is dropped.
    """
    tokens, choices = expert_ids.shape
    flat = expert_ids.transpose([1, 0]).reshape([-1])  # [K*T]
    order = paddle.argsort(flat, stable=True)
    # Where the rows of each expert end. A bincount waits for a GPU twice more: it looks for the
    # smallest and the largest number first.
    ends = paddle.searchsorted(paddle.gather(flat, order), paddle.arange(num_experts), right=True)
    if capacity is not None:
        first = paddle.concat([paddle.zeros([1], "int64"), ends[:-1]])
        rank = paddle.arange(len(flat)) - paddle.gather(first, paddle.gather(flat, order))
        order = paddle.masked_select(order, rank < capacity)
        ends = paddle.cumsum(paddle.clip(ends - first, max=capacity))
    row_of_pair = paddle.full([len(flat)], len(order), "int64")
    row_of_pair = paddle.scatter(row_of_pair, order, paddle.arange(len(order)))
    token = order % tokens
    weight_index = token * choices + order // tokens
    return Routing(tokens, ends, token, row_of_pair, weight_index, len(flat) - len(order))


class Permute(PyLayer):
    """rows[r] = x[token_of_row[r]]; its gradient is `_sum_pairs`, so nothing is scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return _gather(x, routing.token_of_row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _sum_pairs(grads[0], ctx.routing)


class Unpermute(PyLayer):
    """out[t] = sum of the rows of token t; its gradient is a gather."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return _sum_pairs(rows, routing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _gather(grads[0], ctx.routing.token_of_row)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return kernels.gather_rows(x, index) if kernels.usable(x) else paddle.gather(x, index)


def _sum_pairs(rows: Tensor, routing: Routing) -> Tensor:
    tokens = routing.tokens
    if kernels.usable(rows):
        return kernels.sum_pairs(rows, routing.row_of_pair, tokens)
    if routing.dropped:
        rows = paddle.concat([rows, paddle.zeros([1, rows.shape[-1]], rows.dtype)])
    pairs = paddle.gather(rows, routing.row_of_pair)
    # One slice after another: a sum over an inner axis is slow in Paddle's CPU kernels.
    total = pairs[:tokens]
    for start in range(tokens, pairs.shape[0], tokens):
        total = total + pairs[start : start + tokens]
    return total


@dataclass(frozen=True)
class LocalMetadata:
    """Permuted rows and weights, and how to sum rows into tokens again."""

    rows: Tensor  # [R,H]
    weights: Tensor  # [R,1]
    tokens_per_expert: list[int]
    routing: Routing


class LocalDispatcher:
    """Dispatches within one process that holds all experts: a permutation, complete at once."""

    def dispatch_start(
        self, x: Tensor, weights: Tensor, routing: Routing
    ) -> InFlight[LocalMetadata]:
        per_expert = np.diff(routing.ends.numpy(), prepend=0).tolist()  # the host waits for a GPU
        rows = Permute.apply(x, routing)
        row_weights = paddle.gather(weights.reshape([-1, 1]), routing.weight_index)
        return InFlight(x, LocalMetadata(rows, row_weights, per_expert, routing))

    def dispatch_wait(
        self, in_flight: InFlight[LocalMetadata], overlapped: Tensor | None
    ) -> Dispatched[LocalMetadata]:
        local = in_flight.metadata
        return Dispatched(local.rows, local.weights, local.tokens_per_expert, overlapped, local)

    def combine(self, rows: Tensor, dispatched: Dispatched[LocalMetadata]) -> Tensor:
        return Unpermute.apply(rows, dispatched.metadata.routing)


@dataclass(frozen=True)
class Placement:
    """The experts of every layer that this process holds, and who brings tokens to them."""

    experts: range | None  # None: all
    dispatcher: Dispatcher[Any]

    def local_experts(self, num_experts: int) -> range:
        """Return the experts of a layer of `num_experts` that this process holds."""
        return range(num_experts) if self.experts is None else self.experts


def is_expert_parameter(name: str) -> bool:
    """Return whether a parameter of this name stacks experts, so may lie on some ranks only."""
    return ".mlp.experts." in name
