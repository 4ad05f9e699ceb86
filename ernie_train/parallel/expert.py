"""Expert parallelism: the dispatcher that sends tokens to the ranks of their experts.

Shapes: N ranks of the expert group, E experts of a layer, L = E/N experts of a rank, T tokens of
this rank, K experts per token, R their rows, A rows that arrive here, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from ernie_train.core import process_group
from ernie_train.core.errors import ConfigError
from ernie_train.model import Ernie4_5_MoeConfig, Placement
from ernie_train.model.moe import ALL_HERE
from ernie_train.model.pylayer import as_dtype, only, wanted
from ernie_train.model.token_dispatcher import Arrived, Departed, Permute, Routing, Unpermute
from ernie_train.parallel.collectives import Lines, Pending, lines, split_counts


@dataclass(frozen=True)
class Way:
    """The way of rows to the ranks of their experts and back.

    At home rows stand sorted by expert, so by rank too. They arrive rank after rank and are sorted
    by expert, within an expert by rank. `by_expert` [A] picks them from that order of arrival,
    `by_arrival` [A] is its inverse.
    """

    lines: Lines
    counts: np.ndarray  # [N,N] rows from each rank to each
    tokens_per_expert: list[int]  # [L] of the experts here, summing to A
    by_expert: Tensor
    by_arrival: Tensor

    @classmethod
    def of(cls, tokens_per_expert: list[int]) -> Way:
        """Tells all ranks what each has for every expert: `tokens_per_expert` [E] is this rank's.

        Every rank must call it at the same place.
        """
        ranks = process_group.grid().expert
        counts = split_counts(tokens_per_expert).reshape([ranks, ranks, -1])  # [from,to,L]
        here = counts[:, process_group.rank() % ranks]  # [N,L]
        number = np.arange(here.size).reshape(here.shape)  # of a block of rows, as they arrive
        block = np.repeat(number.reshape(-1), here.reshape(-1))
        order = np.argsort(number.T.reshape(-1))[block]  # its place when sorted by expert
        by_expert = np.argsort(order, kind="stable")
        return cls(
            lines(),
            counts.sum(-1),
            here.sum(0).tolist(),
            paddle.to_tensor(by_expert),
            paddle.to_tensor(np.argsort(by_expert, kind="stable")),
        )

    @property
    def nothing_arrives(self) -> bool:
        return not any(self.tokens_per_expert)

    def send_out(self, rows: Tensor) -> Pending:
        """Rows [R,W] of this rank's tokens leave for their experts; `received` ends it."""
        return self.lines.exchange(rows, self.counts)

    def received(self, pending: Pending) -> Tensor:
        """The rows [A,W] for this rank's experts.

        Paddle's kernels take no empty tensors: where nothing arrives there is one row of zeros.
        """
        arrived = pending.wait()
        if self.nothing_arrives:
            return paddle.zeros([1, arrived.shape[-1]], arrived.dtype)
        return paddle.gather(arrived, self.by_expert)

    def send_home(self, rows: Tensor) -> Pending:
        """The inverse of `send_out`: [A,W] leave for the ranks of their tokens, who wait."""
        rows = rows[:0] if self.nothing_arrives else paddle.gather(rows, self.by_arrival)
        return self.lines.exchange(rows, self.counts.T)


class _Trip:
    """What is on its way between `_Depart` and `_Arrive`, in either direction."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.pending: Pending | None = None

    def take(self) -> Pending:
        pending, self.pending = self.pending, None
        if pending is None:
            raise RuntimeError("rows are awaited that were not sent")
        return pending


class _Depart(PyLayer):
    """Begins the exchange that `_Arrive` ends; backward ends the one that `_Arrive` begins.

    x [T,H] passes through, and what is made of it passes through `_Arrive`: so the graph itself
    has that computed between the two, in the backward pass as well. The first output is a number
    of no meaning that ties the two together. What passes through is copied: Paddle takes an output
    that shares its memory with an input for an update in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, weights: Tensor, trip: _Trip) -> Any:
        ctx.trip, ctx.wanted = trip, wanted(x, rows, weights)
        ctx.set_materialize_grads(False)
        trip.pending = trip.way.send_out(_packed(rows, weights))
        return paddle.zeros([1], rows.dtype), x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return only(ctx.wanted, (grads[1], *_unpacked(ctx.trip.take().wait())))


class _Arrive(PyLayer):
    """Rows [A,H] and weights [A,1] of the experts here, and `meanwhile` [T,H] as it came."""

    @staticmethod
    def forward(ctx: Any, tie: Tensor, meanwhile: Tensor | None, trip: _Trip) -> Any:
        ctx.trip = trip
        arrived = _unpacked(trip.way.received(trip.take()))
        if meanwhile is None:
            ctx.wanted = wanted(tie)
            return arrived
        ctx.wanted = wanted(tie, meanwhile)
        return *arrived, meanwhile.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.wanted[0]:
            ctx.trip.pending = ctx.trip.way.send_home(_packed(*grads[:2]))
        return only(ctx.wanted, (paddle.zeros([1], grads[0].dtype), *grads[2:]))


class _Home(PyLayer):
    """Results [A,H] of the experts to the ranks of their tokens."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return way.send_home(rows).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ctx.way.received(ctx.way.send_out(grads[0]))


def _packed(rows: Tensor, weights: Tensor) -> Tensor:
    """One message instead of two: [R,H], [R,1] -> [R,H+1]."""
    return paddle.concat([rows, weights], axis=-1)


def _unpacked(packed: Tensor) -> tuple[Tensor, Tensor]:
    hidden = packed.shape[-1] - 1
    return packed[:, :hidden].contiguous(), packed[:, hidden:].contiguous()


class ExpertDispatcher:
    """Experts live on the ranks of a group, `range(rank * L, (rank + 1) * L)` on each.

    Every rank must run the same layers in the same order; one without a micro-batch runs
    `idle_pass`.
    """

    def depart(self, x: Tensor, weights: Tensor, routing: Routing) -> Departed:
        trip = _Trip(Way.of(routing.tokens_per_expert))
        rows = Permute.apply(x, routing)
        row_weights = paddle.gather(weights.reshape([-1, 1]), routing.weight_index)
        tie, x = _Depart.apply(x, rows, as_dtype(row_weights, rows.dtype), trip)
        return Departed(x, (tie, routing, trip))

    def arrive(self, departed: Departed, meanwhile: Tensor | None) -> Arrived:
        tie, routing, trip = departed.way
        rows, weights, *through = _Arrive.apply(tie, meanwhile, trip)
        per_expert = trip.way.tokens_per_expert
        if trip.way.nothing_arrives:
            per_expert = [1, *per_expert[1:]]  # the row of zeros
        return Arrived(
            rows, weights, per_expert, through[0] if through else None, (routing, trip.way)
        )

    def combine(self, rows: Tensor, arrived: Arrived) -> Tensor:
        routing, way = arrived.way_home
        return Unpermute.apply(_Home.apply(rows, way), routing)


def experts_placed(config: Ernie4_5_MoeConfig) -> Placement:
    """Where this rank's experts are under the grid of `distributed`.

    Raises `ConfigError` for a degree that does not divide the experts.
    """
    degree = process_group.grid().expert
    check_expert_degree(degree, config)
    if degree == 1:
        return ALL_HERE
    here = config.moe_num_experts // degree
    first = process_group.rank() % degree * here
    return Placement(range(first, first + here), ExpertDispatcher())


def check_expert_degree(degree: int, config: Ernie4_5_MoeConfig) -> None:
    """Raises `ConfigError` where the experts of a layer cannot be dealt out over `degree` ranks."""
    if degree == 1:
        return
    if not any(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)):
        raise ConfigError(f"parallel.expert={degree} has no effect: the model has no MoE layer")
    if config.moe_num_experts % degree:
        raise ConfigError(
            f"parallel.expert={degree} must divide moe_num_experts={config.moe_num_experts}"
        )
