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

from ernie_train import distributed
from ernie_train.errors import ConfigError
from ernie_train.model import Ernie4_5_MoeConfig, Placement
from ernie_train.model.autograd import as_dtype
from ernie_train.model.dispatch import Arrived, Permute, Routing, Unpermute
from ernie_train.model.moe import ALL_HERE
from ernie_train.parallel.lines import Lines, lines, split_counts


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
        ranks = distributed.grid().expert
        counts = split_counts(tokens_per_expert).reshape([ranks, ranks, -1])  # [from,to,L]
        here = counts[:, distributed.rank() % ranks]  # [N,L]
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

    def out(self, rows: Tensor) -> Tensor:
        """Rows [R,W] of this rank's tokens -> rows [A,W] for its experts.

        Paddle's kernels take no empty tensors: where nothing arrives there is one row of zeros.
        """
        arrived = self.lines.exchange(rows, self.counts)
        if self.nothing_arrives:
            return paddle.zeros([1, rows.shape[-1]], rows.dtype)
        return paddle.gather(arrived, self.by_expert)

    def home(self, rows: Tensor) -> Tensor:
        """The inverse of `out`: [A,W] -> [R,W]."""
        rows = rows[:0] if self.nothing_arrives else paddle.gather(rows, self.by_arrival)
        return self.lines.exchange(rows, self.counts.T)


class _Out(PyLayer):
    """Rows [R,H] and their weights [R,1] to the experts; gradients come home by the same way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, way: Way) -> tuple[Tensor, Tensor]:
        ctx.way = way
        arrived = way.out(_packed(rows, weights))
        return _unpacked(arrived)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return _unpacked(ctx.way.home(_packed(*grads)))


class _Home(PyLayer):
    """Results [A,H] of the experts to the ranks of their tokens."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return way.home(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ctx.way.out(grads[0])


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

    def dispatch(self, x: Tensor, weights: Tensor, routing: Routing) -> Arrived:
        way = Way.of(routing.tokens_per_expert)
        rows = Permute.apply(x, routing)
        row_weights = paddle.gather(weights.reshape([-1, 1]), routing.weight_index)
        arrived, arrived_weights = _Out.apply(rows, as_dtype(row_weights, rows.dtype), way)
        per_expert = way.tokens_per_expert
        if way.nothing_arrives:
            per_expert = [1, *per_expert[1:]]  # the row of zeros
        return Arrived(arrived, arrived_weights, per_expert, (routing, way))

    def combine(self, rows: Tensor, arrived: Arrived) -> Tensor:
        routing, way = arrived.way_home
        return Unpermute.apply(_Home.apply(rows, way), routing)


def experts_placed(config: Ernie4_5_MoeConfig) -> Placement:
    """Where this rank's experts are under the grid of `distributed`.

    Raises `ConfigError` for a degree that does not divide the experts.
    """
    degree = distributed.grid().expert
    check_expert_degree(degree, config)
    if degree == 1:
        return ALL_HERE
    here = config.moe_num_experts // degree
    first = distributed.rank() % degree * here
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
