"""The ranks of this job: who this process is, how they are laid out, and what they tell each other.

Ranks = `expert` x `data`. The experts of every layer are dealt out over the `expert` consecutive
ranks of an expert group; ranks that hold the same experts, one of each expert group, are replicas.
Dense parameters are on all ranks.

On a single process everything is the identity and Paddle's distributed package is not touched.
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ernie_train.core.barrier import HostBarrier
from ernie_train.core.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Grid:
    """How the ranks are laid out; `sharding` spreads optimizer state over equal parameters."""

    expert: int = 1
    data: int = 1
    sharding: bool = False

    def check(self, ranks: int) -> None:
        """Raises `ConfigError` where the degrees do not make `ranks` ranks."""
        if self.expert * self.data != ranks:
            raise ConfigError(
                f"parallel.expert={self.expert} x parallel.data={self.data} needs "
                f"{self.expert * self.data} ranks, but this job has {ranks}: start as many, or "
                "change the degrees"
            )

    def expert_group(self, of: int) -> list[int]:
        """The ranks among which rank `of` exchanges rows."""
        first = of - of % self.expert
        return list(range(first, first + self.expert))

    def replicas(self, of: int) -> list[int]:
        """The ranks that hold the same experts as rank `of`."""
        return list(range(of % self.expert, self.expert * self.data, self.expert))


_grid = Grid()


_meeting: HostBarrier | None = None


# ---- who is who ----------------------------------------------------------------------------------
def _number(variable: str, fallback: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else fallback


def world_size() -> int:
    """Number of ranks in the job, as the launcher says; 1 without a launcher."""
    return max(1, _number("PADDLE_TRAINERS_NUM", 1))


def rank() -> int:
    """Number of this process in the job, from 0."""
    return _number("PADDLE_TRAINER_ID", 0) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is rank 0, which alone prints and writes what is not a rank's own."""
    return rank() == 0


def grid() -> Grid:
    """The layout that `set_grid` chose; one rank before that."""
    return _grid


def init_process_group() -> None:
    """Joins the other ranks; needed once, before any reduction. Does nothing on one process."""
    if world_size() == 1:
        return
    import paddle

    if not paddle.distributed.is_initialized():
        # It tells on stderr, on every rank, which flags of Paddle are not at their defaults: that
        # is of use only where joining fails.
        told = io.StringIO()
        try:
            with redirect_stderr(told):
                paddle.distributed.init_parallel_env()
        except BaseException:
            sys.stderr.write(told.getvalue())
            raise


def require_backend(device: str) -> None:
    """Raises `ConfigError` where ranks were joined for the CPU and compute on GPUs, or the reverse.

    `device` is `cpu` or `gpu`. `run --nproc` starts ranks rightly; other launchers may not.
    """
    if world_size() == 1:
        return
    import paddle

    wanted, found = {"cpu": "GLOO", "gpu": "NCCL"}[device], paddle.distributed.get_backend()
    if found != wanted:
        raise ConfigError(
            f"device: the ranks talk over {found.lower()}, which does not go with device {device}: "
            f"start them with --nproc, or with PADDLE_DISTRI_BACKEND={wanted.lower()}"
        )


def sync() -> None:
    """Every rank passes here before each collective; nothing else begins one.

    Over gloo they wait for one another here, for its collectives give up after 30 s.
    """
    if over_gloo():
        wait_for_all_ranks()


def over_gloo() -> bool:
    init_process_group()
    import paddle

    return bool(paddle.distributed.get_backend() == "GLOO")


def wait_for_all_ranks() -> None:
    global _meeting
    if _meeting is None:
        _meeting = _meet()
    _meeting.wait()


def _meet() -> HostBarrier:
    from paddle.base import core

    store, name = core.create_or_get_global_tcp_store(), "ernie_train/meeting"
    host = os.environ.get("PADDLE_CURRENT_ENDPOINT", "").rpartition(":")[0] or "127.0.0.1"

    def look_up() -> str:
        store.wait(name)
        return bytes(store.get(name)).decode()

    return HostBarrier(rank(), world_size(), host, lambda text: store.set(name, text), look_up)


def set_grid(chosen: Grid) -> None:
    """Lays the ranks out; every rank must call it with the same grid, before models are made.

    Raises `ConfigError` where the degrees do not make this job's ranks.
    """
    global _grid
    chosen.check(world_size())
    _grid = chosen


# ---- sums and objects ----------------------------------------------------------------------------
def barrier() -> None:
    """Waits until every rank is here."""
    if world_size() > 1:
        import paddle

        sync()
        paddle.distributed.barrier()


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """The sum of each value over all ranks, computed in float64; each rank gets the same bits.

    Args:
        values: as many on every rank, in the same order.
    """
    if world_size() == 1 or not values:
        return [float(value) for value in values]
    import paddle

    sync()
    total = paddle.to_tensor(list(values), dtype="float64")
    paddle.distributed.all_reduce(total)
    return [float(value) for value in total.numpy()]


def all_gather_ints(values: Sequence[int]) -> np.ndarray:
    """The whole numbers of all ranks, [ranks,len(values)]; each rank gives as many."""
    if world_size() == 1:
        return np.array([values], np.int64)
    import paddle

    sync()
    told: list[Any] = []
    paddle.distributed.all_gather(told, paddle.to_tensor(list(values), "int64"))
    return np.stack([part.numpy() for part in told])


def sum_over_ranks(ranks: Sequence[int], value: float) -> float:
    """The sum over some ranks, rounded once: groups of ranks that add equal numbers agree.

    Every rank of the job must call it.
    """
    if world_size() == 1:
        return value
    import paddle

    sync()
    parts: list[Any] = []
    paddle.distributed.all_gather(parts, paddle.to_tensor([value], "float64"))
    return math.fsum(float(parts[at]) for at in ranks)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return all_reduce_sum([float(flag)])[0] > 0


def all_gather_objects(value: T) -> list[T]:
    """What every rank has, in the order of the ranks; for small things that can be pickled."""
    if world_size() == 1:
        return [value]
    import paddle

    sync()
    found: list[T] = []
    paddle.distributed.all_gather_object(found, value)
    return found


def all_reduce_named(values: Mapping[str, float]) -> dict[str, float]:
    """Sums by name over all ranks; a rank may lack names that others have."""
    if world_size() == 1:
        return dict(values)
    found = all_gather_objects(dict(values))
    names = sorted({name for part in found for name in part})
    return {name: _sum(part.get(name, 0.0) for part in found) for name in names}


def _sum(parts: Iterable[float]) -> float:
    """The sum, rounded once; NaN for opposite infinities, which fsum refuses."""
    values = list(parts)
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


# ---- sharing work --------------------------------------------------------------------------------
def shard(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of work that all ranks know: every world_size-th item."""
    return items if world_size() == 1 else items[rank() :: world_size()]


def gather_shards(results: Sequence[T]) -> list[T]:
    """The results of all items, in their order, from what each rank made of its `share`."""
    if world_size() == 1:
        return list(results)
    parts = all_gather_objects(list(results))
    total = sum(map(len, parts))
    return [parts[at % len(parts)][at // len(parts)] for at in range(total)]


def partition_by_size(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Items by number, dealt into hands of about equal size: the largest first, to the lightest."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    loads = [0] * hands
    for item in sorted(range(len(sizes)), key=lambda at: (-sizes[at], at)):
        lightest = loads.index(min(loads))
        dealt[lightest].append(item)
        loads[lightest] += sizes[item]
    return dealt
