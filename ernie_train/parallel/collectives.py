"""The lines between ranks: rows from each to each, sums and copies among those that hold the same.

NCCL has all of it as collectives of groups. Gloo has no all-to-all, and Paddle's groups of gloo can
be relied on for all ranks only (a second group reads addresses that the first one left in the
store), so there everything is made of messages and collectives among all ranks. Which of the two is
chosen in `lines`, by the backend, and nowhere else.

Every rank of the job must make the same calls in the same order: gloo numbers messages by it.

Shapes: N ranks of an expert group, R rows, W numbers of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import paddle
from paddle import Tensor
from paddle import distributed as paddle_distributed

from ernie_train.core import process_group
from ernie_train.core.process_group import Grid


@dataclass
class Pending:
    """What is on its way. Buffers are held here until it was waited for."""

    result: Tensor
    task: Any = None  # None: it is here already
    sent: Tensor | None = None

    def wait(self) -> Tensor:
        """The result; only now may it be read."""
        if self.task is not None:
            self.task.wait()
            self.task = self.sent = None
        return self.result


class Lines(Protocol):
    """What ranks send each other under one grid.

    NCCL's tasks run beside the computation. Paddle's over gloo are done when they are returned,
    send and recv without `sync_op` too, so there is nothing to wait for.
    """

    sent_bytes: int  # rows that left this rank, without padding

    def exchange(self, rows: Tensor, counts: np.ndarray) -> Pending:
        """Begins to exchange rows within the expert group.

        counts [N,N]: how many rows go from each rank to each. rows [R,W] stand in the order of the
        ranks that they go to; those that come, in the order of the ranks that they come from.
        """
        ...

    def add_up(self, flat: Tensor, *, experts: bool, at: int | None = None) -> Pending:
        """Begins to add up `flat` [W] over all ranks, or over the replicas of this rank's experts.

        at: the only rank, with `experts` the only replica (counted from 0), that needs the sum; on
        others the result is of no use. `flat` must not be used any more.
        """
        ...

    def copy_from(self, owner: int, flat: Tensor, *, experts: bool) -> Tensor:
        """`flat` [W] as rank `owner` has it; with `experts` as its counterpart `owner` has it.

        With `experts` each expert group has a copy of its own: `owner` is then the number of a
        replica, from 0 to data - 1.
        """
        ...


class GlooLines:
    """Messages between pairs, and collectives of all ranks."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.sent_bytes = grid, 0
        self.group = grid.expert_group(process_group.rank())
        self.me = self.group.index(process_group.rank())

    def exchange(self, rows: Tensor, counts: np.ndarray) -> Pending:
        process_group.sync()
        elsewhere = int(counts[self.me].sum() - counts[self.me, self.me])
        self.sent_bytes += elsewhere * rows.shape[-1] * rows.element_size()
        parts = self._in_pairs(rows, counts) if len(self.group) % 2 == 0 else None
        return Pending(paddle.concat(self._by_gathering(rows, counts) if parts is None else parts))

    def _in_pairs(self, rows: Tensor, counts: np.ndarray) -> list[Tensor]:
        """Round after round each rank has one partner; of the two the lower one sends first.

        An empty message is one row that is thrown away, so that the numbers of messages agree.
        """
        starts = np.concatenate([[0], np.cumsum(counts[self.me])]).tolist()
        own = rows[starts[self.me] : starts[self.me + 1]]
        came: dict[int, Tensor] = {self.me: own}
        filler = paddle.zeros([1, rows.shape[-1]], rows.dtype)
        for partner in _partners(self.me, len(self.group)):
            other = self.group[partner]
            going = rows[starts[partner] : starts[partner + 1]]
            going = going if going.shape[0] else filler
            size = max(1, int(counts[partner, self.me]))
            came[partner] = paddle.empty([size, rows.shape[-1]], rows.dtype)
            if self.me < partner:
                paddle_distributed.send(going, dst=other)
                paddle_distributed.recv(came[partner], src=other)
            else:
                paddle_distributed.recv(came[partner], src=other)
                paddle_distributed.send(going, dst=other)
        present = [at for at in range(len(self.group)) if counts[at, self.me]]
        return [came[at] for at in present] or [filler[:0]]

    def _by_gathering(self, rows: Tensor, counts: np.ndarray) -> list[Tensor]:
        """For an odd number of ranks, of which one would be without a partner in every round."""
        most = int(process_group.all_gather_ints([rows.shape[0]]).max())
        room = paddle.zeros([most - rows.shape[0], rows.shape[-1]], rows.dtype)
        told: list[Tensor] = []
        paddle_distributed.all_gather(told, paddle.concat([rows, room]))
        ends = np.cumsum(counts, axis=1)
        parts = []
        for at, source in enumerate(self.group):
            end, count = int(ends[at, self.me]), int(counts[at, self.me])
            if count:
                parts.append(told[source][end - count : end])
        return parts or [rows[:0]]

    def add_up(self, flat: Tensor, *, experts: bool, at: int | None = None) -> Pending:
        process_group.sync()
        if not experts or self.grid.expert == 1:
            if at is None:
                paddle_distributed.all_reduce(flat)
            else:
                paddle_distributed.reduce(flat, dst=at)
            return Pending(flat)
        # A slot for the experts of each rank of a group: replicas add up in theirs.
        slots = paddle.zeros([self.grid.expert, flat.shape[0]], flat.dtype)
        slots[self.me] = flat
        paddle_distributed.all_reduce(slots)
        return Pending(slots[self.me])

    def copy_from(self, owner: int, flat: Tensor, *, experts: bool) -> Tensor:
        process_group.sync()
        if not experts:
            paddle_distributed.broadcast(flat, src=owner)
            return flat
        mine = flat
        for at, source in enumerate(self.grid.expert_group(owner * self.grid.expert)):
            sent = flat.clone()
            paddle_distributed.broadcast(sent, src=source)
            mine = sent if at == self.me else mine
        return mine


def _partners(me: int, size: int) -> Iterator[int]:
    """The partner of one of an even number of ranks in each of `size` - 1 rounds.

    The circle method: in round t partners add up to t modulo size - 1; the one that would be alone
    meets the last rank.
    """
    last = size - 1
    for turn in range(last):
        if me == last:
            yield turn * (size // 2) % last
        else:
            partner = (turn - me) % last
            yield last if partner == me else partner


class NcclLines:
    """Collectives of Paddle's groups; not run on GPUs here.

    Gradients have a group of their own for all ranks: what others wait for, such as how many rows
    come, must not queue behind them.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid, self.sent_bytes = grid, 0
        me = process_group.rank()
        self.experts = _group(grid.expert_group(at) for at in range(process_group.world_size()))
        self.replicas = _group(grid.replicas(at) for at in range(process_group.world_size()))
        self.everyone = _group(iter([list(range(process_group.world_size()))]))
        self.me = me % grid.expert

    def exchange(self, rows: Tensor, counts: np.ndarray) -> Pending:
        sent, received = counts[self.me].tolist(), counts[:, self.me].tolist()
        self.sent_bytes += (sum(sent) - sent[self.me]) * rows.shape[-1] * rows.element_size()
        came = paddle.empty([sum(received), rows.shape[-1]], rows.dtype)
        task = paddle_distributed.alltoall_single(
            came, rows, sent, received, group=self.experts, sync_op=False
        )
        return Pending(came, task, rows)

    def add_up(self, flat: Tensor, *, experts: bool, at: int | None = None) -> Pending:
        group = self.replicas if experts else self.everyone
        if at is None:
            task = paddle_distributed.all_reduce(flat, group=group, sync_op=False)
        else:
            to = self.grid.replicas(process_group.rank())[at] if experts else at
            task = paddle_distributed.reduce(flat, dst=to, group=group, sync_op=False)
        return Pending(flat, task)

    def copy_from(self, owner: int, flat: Tensor, *, experts: bool) -> Tensor:
        if experts:
            source = self.grid.replicas(process_group.rank())[owner]
            paddle_distributed.broadcast(flat, src=source, group=self.replicas)
        else:
            paddle_distributed.broadcast(flat, src=owner)
        return flat


def _group(members: Iterator[list[int]]) -> Any:
    """Makes all groups, as Paddle wants it on every rank, and returns the one of this rank."""
    mine = None
    for ranks in sorted({tuple(ranks) for ranks in members}):
        made = paddle_distributed.new_group(list(ranks))
        if process_group.rank() in ranks:
            mine = made
    return mine


_BACKENDS: dict[str, Callable[[Grid], Lines]] = {"GLOO": GlooLines, "NCCL": NcclLines}
_made: dict[Grid, Lines] = {}


def lines() -> Lines:
    """The lines of the present grid; every rank must ask for them first at the same place."""
    grid = process_group.grid()
    if grid not in _made:
        process_group.init_process_group()
        _made[grid] = _BACKENDS[paddle_distributed.get_backend()](grid)
    return _made[grid]


def split_counts(tokens_per_expert: Sequence[int]) -> np.ndarray:
    """What the ranks of the expert group have for every expert, [N,E]; all ranks must ask."""
    told = process_group.all_gather_ints(tokens_per_expert)
    return told[process_group.grid().expert_group(process_group.rank())]
