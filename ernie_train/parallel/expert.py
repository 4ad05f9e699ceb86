"""Expert parallelism: the dispatcher that sends tokens to the ranks of their experts.

An MoE layer makes two all-to-alls of rows forward (dispatch, combine) and two backward. While
the dispatch travels, forward and backward, the layer computes its shared experts: `_StartDispatch`
and `_WaitDispatch` are separate nodes of the autograd graph for that.

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
from ernie_train.core.autograd import needs_grad, once_differentiable, select_grads
from ernie_train.core.errors import ConfigError
from ernie_train.model import Ernie4_5_MoeConfig, Placement
from ernie_train.model.dtypes import cast
from ernie_train.model.moe import LOCAL_PLACEMENT
from ernie_train.model.token_dispatcher import Dispatched, InFlight, Permute, Routing, Unpermute
from ernie_train.parallel.collectives import Collectives, Work, get_collectives


@dataclass
class Signals:
    """Bits that travel with the row counts of a model's MoE layers; `Lockstep` says their meaning.

    own: what this rank tells; heard: what any rank that it exchanges rows with has told since that
    was set to 0.
    """

    own: int = 0
    heard: int = 0

    def gather(self, values: Tensor) -> np.ndarray:
        """Return the int64 values [W] of the group's ranks, [N,W]; the host waits for them."""
        collectives = get_collectives()
        found = collectives.gather(paddle.concat([values, paddle.full([1], self.own, "int64")]))
        self.heard |= int(np.bitwise_or.reduce(found[:, -1]))
        return found[collectives.group, :-1]


@dataclass(frozen=True)
class AllToAllPlan:
    """Split sizes and row orders of the all-to-alls of one MoE layer in one pass.

    A rank sends rows sorted by expert, so by destination too. They arrive rank after rank, and
    are sorted by expert, within an expert by rank, for the experts to compute on.
    """

    collectives: Collectives
    counts: np.ndarray  # [N,N] rows from each rank to each
    tokens_per_expert: list[int]  # [L] of this rank's experts, summing to A
    to_expert_order: Tensor  # [A] gathers arrived rows into the order of experts
    to_arrival_order: Tensor  # [A] its inverse

    @classmethod
    def make(cls, ends: Tensor, signals: Signals) -> AllToAllPlan:
        """Exchange where the rows of each expert end, and signals; `ends` [E] is this rank's.

        Every rank must call it at the same place.
        """
        ranks = process_group.grid().expert
        counts = np.diff(signals.gather(ends), prepend=0)  # [N,E]
        counts = counts.reshape([ranks, ranks, -1])  # [from,to,L]
        arriving = counts[:, process_group.rank() % ranks]  # [N,L]
        to_expert_order = _expert_order(arriving)
        to_arrival_order = np.empty_like(to_expert_order)
        to_arrival_order[to_expert_order] = np.arange(len(to_expert_order))
        return cls(
            get_collectives(),
            counts.sum(-1),
            arriving.sum(0).tolist(),
            paddle.to_tensor(to_expert_order),
            paddle.to_tensor(to_arrival_order),
        )

    @property
    def nothing_arrives(self) -> bool:
        return not any(self.tokens_per_expert)

    def start_dispatch(self, rows: Tensor) -> Work:
        """Start sending rows [R,W] of this rank's tokens to their experts."""
        return self.collectives.all_to_all(rows, self.counts)

    def wait_dispatch(self, work: Work) -> Tensor:
        """Return the rows [A,W] for this rank's experts, sorted by expert.

        Paddle's kernels (3.3.1) take no empty tensors: where nothing arrives there is one row of
        zeros.
        """
        arrived = work.wait()
        if self.nothing_arrives:
            return paddle.zeros([1, arrived.shape[-1]], arrived.dtype)
        return paddle.gather(arrived, self.to_expert_order)

    def start_combine(self, rows: Tensor) -> Work:
        """Start sending rows [A,W] back to the ranks of their tokens; inverse of the dispatch."""
        rows = rows[:0] if self.nothing_arrives else paddle.gather(rows, self.to_arrival_order)
        return self.collectives.all_to_all(rows, self.counts.T)


def _expert_order(arriving: np.ndarray) -> np.ndarray:
    """Return the places [A], in the order of arrival, of rows in the order of experts.

    arriving: [N,L] rows from each rank for each expert, which arrive rank after rank.
    """
    ends = np.cumsum(arriving).reshape(arriving.shape)
    blocks = arriving.T.reshape(-1)  # by (expert, rank)
    starts = (ends - arriving).T.reshape(-1) - (np.cumsum(blocks) - blocks)
    return np.repeat(starts, blocks) + np.arange(blocks.sum())


class _Transfer:
    """Hands a started all-to-all from the autograd node that starts it to the one that waits."""

    def __init__(self, plan: AllToAllPlan) -> None:
        self.plan = plan
        self.work: Work | None = None

    def take(self) -> Work:
        work, self.work = self.work, None
        if work is None:
            raise RuntimeError("waited for an all-to-all that was not started")
        return work


class _StartDispatch(PyLayer):
    """Forward: start the all-to-all of rows. Backward: wait for that of their gradients.

    `_WaitDispatch.backward` has started the latter, so shared experts overlap with communication
    in both passes: they read the x that passes through here, and their output passes through
    `_WaitDispatch`, so the graph itself places them between the two nodes. The dummy output orders
    the two nodes in the graph. x is cloned, because Paddle (3.3.1) takes an output that shares
    memory with an input for an in-place update.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, weights: Tensor, transfer: _Transfer) -> Any:
        ctx.transfer, ctx.needs_grad = transfer, needs_grad(x, rows, weights)
        ctx.set_materialize_grads(False)
        transfer.work = transfer.plan.start_dispatch(_pack(rows, weights))
        return paddle.zeros([1], rows.dtype), x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return select_grads(ctx.needs_grad, (grads[1], *_unpack(ctx.transfer.take().wait())))


class _WaitDispatch(PyLayer):
    """Forward: wait for the all-to-all of rows. Backward: start that of their gradients.

    Returns rows [A,H] and weights [A,1] of this rank's experts, and `overlapped` [T,H] unchanged.
    """

    @staticmethod
    def forward(ctx: Any, dummy: Tensor, overlapped: Tensor | None, transfer: _Transfer) -> Any:
        ctx.transfer = transfer
        arrived = _unpack(transfer.plan.wait_dispatch(transfer.take()))
        if overlapped is None:
            ctx.needs_grad = needs_grad(dummy)
            return arrived
        ctx.needs_grad = needs_grad(dummy, overlapped)
        return *arrived, overlapped.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.needs_grad[0]:
            ctx.transfer.work = ctx.transfer.plan.start_combine(_pack(*grads[:2]))
        return select_grads(ctx.needs_grad, (paddle.zeros([1], grads[0].dtype), *grads[2:]))


class _Combine(PyLayer):
    """Send results [A,H] back to the ranks of their tokens, [R,H]; nothing overlaps with it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: AllToAllPlan) -> Tensor:
        ctx.plan = plan
        return plan.start_combine(rows).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ctx.plan.wait_dispatch(ctx.plan.start_dispatch(grads[0]))


def _pack(rows: Tensor, weights: Tensor) -> Tensor:
    """Join [R,H] and [R,1] to one message [R,H+1], so that one all-to-all carries both."""
    return paddle.concat([rows, weights], axis=-1)


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    hidden = packed.shape[-1] - 1
    return packed[:, :hidden].contiguous(), packed[:, hidden:].contiguous()


@dataclass(frozen=True)
class AllToAllMetadata:
    """State of one dispatch, kept until its `combine`."""

    routing: Routing
    transfer: _Transfer
    dummy: Tensor  # first output of `_StartDispatch`


class ExpertDispatcher:
    """Dispatches over an expert group whose rank r holds the experts `range(r * L, (r + 1) * L)`.

    Every rank must run the same layers in the same order; one without a micro-batch runs
    `dummy_pass`. All layers of a model, and of its copies, share one dispatcher and its signals.
    """

    def __init__(self) -> None:
        self.signals = Signals()

    def dispatch_start(
        self, x: Tensor, weights: Tensor, routing: Routing
    ) -> InFlight[AllToAllMetadata]:
        transfer = _Transfer(AllToAllPlan.make(routing.ends, self.signals))
        rows = Permute.apply(x, routing)
        row_weights = paddle.gather(weights.reshape([-1, 1]), routing.weight_index)
        row_weights = cast(row_weights, rows.dtype)
        dummy, x = _StartDispatch.apply(x, rows, row_weights, transfer)
        return InFlight(x, AllToAllMetadata(routing, transfer, dummy))

    def dispatch_wait(
        self, in_flight: InFlight[AllToAllMetadata], overlapped: Tensor | None
    ) -> Dispatched[AllToAllMetadata]:
        metadata = in_flight.metadata
        plan = metadata.transfer.plan
        rows, weights, *through = _WaitDispatch.apply(metadata.dummy, overlapped, metadata.transfer)
        per_expert = plan.tokens_per_expert
        if plan.nothing_arrives:
            per_expert = [1, *per_expert[1:]]  # the row of zeros
        return Dispatched(rows, weights, per_expert, through[0] if through else None, metadata)

    def combine(self, rows: Tensor, dispatched: Dispatched[AllToAllMetadata]) -> Tensor:
        metadata = dispatched.metadata
        return Unpermute.apply(_Combine.apply(rows, metadata.transfer.plan), metadata.routing)


def expert_placement(config: Ernie4_5_MoeConfig) -> Placement:
    """Return the experts of this rank under the grid of `process_group`, and their dispatcher.

    A model without MoE layers, such as a reward model beside the policy, is whole on every rank.
    Raises `ConfigError` for a degree that does not divide the experts.
    """
    degree = process_group.grid().expert
    check_expert_degree(degree, config)
    if degree == 1 or not has_moe_layers(config):
        return LOCAL_PLACEMENT
    local = config.moe_num_experts // degree
    first = process_group.rank() % degree * local
    return Placement(range(first, first + local), ExpertDispatcher())


def has_moe_layers(config: Ernie4_5_MoeConfig) -> bool:
    """Return whether any layer has experts."""
    return any(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))


def check_expert_degree(degree: int, config: Ernie4_5_MoeConfig) -> None:
    """Raise `ConfigError` where `degree` ranks cannot hold equal parts of a layer's experts."""
    if has_moe_layers(config) and config.moe_num_experts % degree:
        raise ConfigError(
            f"parallel.expert={degree} must divide moe_num_experts={config.moe_num_experts}"
        )
