"""Collectives between ranks: all-to-all of rows, sums and broadcasts, over gloo or NCCL.

NCCL runs each as one collective of a group. Paddle's gloo (paddlepaddle 3.3.1) implements neither
all-to-all nor reduce-scatter, and only its group of all ranks is reliable: a second gloo group
reads addresses that the first one left in the store. Over gloo everything is therefore built from
messages between pairs and from collectives of all ranks. `get_collectives` chooses by the backend;
no other code does.

Every rank of the job must make the same calls in the same order: gloo matches messages by it.

Shapes: N ranks of an expert group, R rows, W elements of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import paddle
from paddle import Tensor
from paddle import distributed as paddle_distributed

from ernie_train.core import process_group
from ernie_train.core.process_group import Grid


@dataclass
class Work:
    """Handle of a collective that was started; holds its buffers until `wait`."""

    result: Tensor
    task: Any = None  # Paddle's task; None where the result is complete already
    sent: Tensor | None = None

    def wait(self) -> Tensor:
        """Return the result, which must not be read before."""
        if self.task is not None:
            self.task.wait()
            self.task = self.sent = None
        return self.result


class Collectives(Protocol):
    """The collectives of one grid.

    NCCL's tasks run beside the computation. Over gloo a task is complete when Paddle returns it,
    also with `sync_op=False` and from isend and irecv (3.3.1), so nothing is left to wait for.
    """

    sent_bytes: int  # rows that left this rank, without padding
    group: list[int]  # [N] places of the expert group's ranks in what `gather` returns

    def gather(self, values: Tensor) -> np.ndarray:
        """Return int64 values [W] of all M ranks whose all-to-alls depend on one another, [M,W]."""
        ...

    def all_to_all(self, rows: Tensor, counts: np.ndarray) -> Work:
        """Start an all-to-all within the expert group.

        Args:
            rows: [R,W], in the order of the ranks that they go to. The result is in the order of
                the ranks that rows come from.
            counts: [N,N], the number of rows from each rank to each.
        """
        ...

    def all_reduce(self, flat: Tensor, *, experts: bool, dst: int | None = None) -> Work:
        """Start the sum of `flat` [W] over all ranks, or over the replicas of this rank's experts.

        `flat` belongs to the collective from here on.

        Args:
            experts: sum over the ranks that hold the same experts.
            dst: the only rank that needs the sum, with `experts` the index of the only replica
                (from 0); on other ranks the result is undefined. None: all of them.
        """
        ...

    def broadcast(self, flat: Tensor, src: int, *, experts: bool) -> Tensor:
        """Return `flat` [W] of rank `src`.

        With `experts` every expert group has a source of its own: `src` is then the index of a
        replica, from 0 to data - 1, and a rank gets what that replica of its own experts has.
        """
        ...


class GlooCollectives:
    """Messages between pairs of ranks, and collectives of all ranks."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.sent_bytes = grid, 0
        self.group = grid.expert_group(process_group.rank())
        self.group_rank = self.group.index(process_group.rank())

    def gather(self, values: Tensor) -> np.ndarray:
        return process_group.all_gather_ints(values.tolist())

    def all_to_all(self, rows: Tensor, counts: np.ndarray) -> Work:
        process_group.sync()
        me = self.group_rank
        self.sent_bytes += int(counts[me].sum() - counts[me, me]) * _row_bytes(rows)
        by_pairs = len(self.group) % 2 == 0
        parts = self._swap_in_pairs(rows, counts) if by_pairs else self._all_gather(rows, counts)
        return Work(paddle.concat(parts))

    def _swap_in_pairs(self, rows: Tensor, counts: np.ndarray) -> list[Tensor]:
        """Swap rows with one partner after another; of each pair the lower rank sends first.

        The order matters: where both send first, Paddle's gloo times out. An empty message is one
        row that is thrown away, so that all pairs make equally many calls.
        """
        me = self.group_rank
        starts = np.concatenate([[0], np.cumsum(counts[me])]).tolist()
        received: dict[int, Tensor] = {me: rows[starts[me] : starts[me + 1]]}
        filler = paddle.zeros([1, rows.shape[-1]], rows.dtype)
        for partner in _partners(me, len(self.group)):
            peer = self.group[partner]
            outgoing = rows[starts[partner] : starts[partner + 1]]
            outgoing = outgoing if outgoing.shape[0] else filler
            size = max(1, int(counts[partner, me]))
            received[partner] = paddle.empty([size, rows.shape[-1]], rows.dtype)
            if me < partner:
                paddle_distributed.send(outgoing, dst=peer)
                paddle_distributed.recv(received[partner], src=peer)
            else:
                paddle_distributed.recv(received[partner], src=peer)
                paddle_distributed.send(outgoing, dst=peer)
        present = [source for source in range(len(self.group)) if counts[source, me]]
        return [received[source] for source in present] or [filler[:0]]

    def _all_gather(self, rows: Tensor, counts: np.ndarray) -> list[Tensor]:
        """Gather the padded rows of all ranks and keep those for this one.

        For an odd number of ranks, of which one would lack a partner in every round.
        """
        longest = int(process_group.all_gather_ints([rows.shape[0]]).max())
        padding = paddle.zeros([longest - rows.shape[0], rows.shape[-1]], rows.dtype)
        gathered: list[Tensor] = []
        paddle_distributed.all_gather(gathered, paddle.concat([rows, padding]))
        ends = np.cumsum(counts, axis=1)
        parts = []
        for source, rank in enumerate(self.group):
            end, count = (int(a[source, self.group_rank]) for a in (ends, counts))
            if count:
                parts.append(gathered[rank][end - count : end])
        return parts or [rows[:0]]

    def all_reduce(self, flat: Tensor, *, experts: bool, dst: int | None = None) -> Work:
        process_group.sync()
        if not experts or self.grid.expert == 1:
            if dst is None:
                paddle_distributed.all_reduce(flat)
            else:
                paddle_distributed.reduce(flat, dst=dst)
            return Work(flat)
        # All ranks take part, so every rank of an expert group has a slot: replicas share theirs.
        slots = paddle.zeros([self.grid.expert, flat.shape[0]], flat.dtype)
        slots[self.group_rank] = flat
        paddle_distributed.all_reduce(slots)
        return Work(slots[self.group_rank])

    def broadcast(self, flat: Tensor, src: int, *, experts: bool) -> Tensor:
        process_group.sync()
        if not experts:
            paddle_distributed.broadcast(flat, src=src)
            return flat
        mine = flat
        for index, source in enumerate(self.grid.expert_group(src * self.grid.expert)):
            buffer = flat.clone()
            paddle_distributed.broadcast(buffer, src=source)
            mine = buffer if index == self.group_rank else mine
        return mine


def _row_bytes(rows: Tensor) -> int:
    return int(rows.shape[-1] * rows.element_size())


def _partners(me: int, size: int) -> Iterator[int]:
    """Yield the partner of rank `me` in each of the `size` - 1 rounds; `size` is even.

    The circle method of round-robin tournaments: in round t partners add up to t modulo size - 1;
    the rank that would be alone meets the last one.
    """
    last = size - 1
    for turn in range(last):
        if me == last:
            yield turn * (size // 2) % last
        else:
            partner = (turn - me) % last
            yield last if partner == me else partner


class NcclCollectives:
    """Collectives of Paddle's groups; never run on GPUs by the tests.

    Gradients have a group of all ranks of their own: a small message that others wait for, such as
    the number of rows to expect, must not queue behind buckets of 32 MiB on the default group.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid, self.sent_bytes = grid, 0
        world = range(process_group.world_size())
        self.expert_group = _new_groups(map(grid.expert_group, world))
        self.replicas = _new_groups(map(grid.replicas, world))
        self.world = _new_groups([list(world)])
        self.group = list(range(grid.expert))
        self.group_rank = process_group.rank() % grid.expert
        self._connect()

    def _connect(self) -> None:
        """Make one collective of each kind in each group, for which NCCL takes memory.

        Later there may be none: Paddle keeps what a rollout freed, for tensors alone.
        """
        one, expert = paddle.zeros([1]), self.grid.expert
        for ranks, group in ((expert, self.expert_group), (self.grid.data, self.replicas)):
            if ranks > 1:
                paddle_distributed.all_reduce(one, group=group)
        paddle_distributed.all_reduce(one, group=self.world)
        if expert > 1:
            rows, each = paddle.zeros([expert, 1]), [1] * expert
            paddle_distributed.alltoall_single(
                paddle.empty_like(rows), rows, each, each, group=self.expert_group
            )

    def gather(self, values: Tensor) -> np.ndarray:
        # Of the group alone: an MoE layer waits for it, and must not wait for other machines.
        parts: list[Tensor] = []
        paddle_distributed.all_gather(parts, values, group=self.expert_group)
        found: np.ndarray = paddle.stack(parts).numpy()  # one copy from the GPU, not one a rank
        return found

    def all_to_all(self, rows: Tensor, counts: np.ndarray) -> Work:
        me = self.group_rank
        sent, expected = counts[me].tolist(), counts[:, me].tolist()
        self.sent_bytes += (sum(sent) - sent[me]) * _row_bytes(rows)
        received = paddle.empty([sum(expected), rows.shape[-1]], rows.dtype)
        task = paddle_distributed.alltoall_single(
            received, rows, sent, expected, group=self.expert_group, sync_op=False
        )
        return Work(received, task, rows)

    def all_reduce(self, flat: Tensor, *, experts: bool, dst: int | None = None) -> Work:
        group = self.replicas if experts else self.world
        if dst is None:
            task = paddle_distributed.all_reduce(flat, group=group, sync_op=False)
        else:
            to = self.grid.replicas(process_group.rank())[dst] if experts else dst
            task = paddle_distributed.reduce(flat, dst=to, group=group, sync_op=False)
        return Work(flat, task)

    def broadcast(self, flat: Tensor, src: int, *, experts: bool) -> Tensor:
        if experts:
            source = self.grid.replicas(process_group.rank())[src]
            paddle_distributed.broadcast(flat, src=source, group=self.replicas)
        else:
            paddle_distributed.broadcast(flat, src=src)
        return flat


def _new_groups(members: Iterable[list[int]]) -> Any:
    """Create all groups on every rank, as Paddle requires, and return the one of this rank."""
    mine = None
    for ranks in sorted({tuple(ranks) for ranks in members}):
        group = paddle_distributed.new_group(list(ranks))
        if process_group.rank() in ranks:
            mine = group
    return mine


_BACKENDS: dict[str, Callable[[Grid], Collectives]] = {
    "GLOO": GlooCollectives,
    "NCCL": NcclCollectives,
}
# NCCL groups must be created once for each grid, by all ranks together.
_of_grid: dict[Grid, Collectives] = {}


def get_collectives() -> Collectives:
    """Return the collectives of the present grid; the first call must be made by all ranks."""
    grid = process_group.grid()
    if grid not in _of_grid:
        process_group.init_process_group()
        _of_grid[grid] = _BACKENDS[paddle_distributed.get_backend()](grid)
    return _of_grid[grid]
