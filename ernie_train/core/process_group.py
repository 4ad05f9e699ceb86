"""The ranks of this job: their number, their layout, and reductions of numbers and small objects.

Ranks = `expert` x `data`. The experts of every layer are split over the `expert` consecutive ranks
of an expert group; ranks that hold the same experts, one of each expert group, are replicas. Dense
parameters are on all ranks.

On a single process every function is the identity and `paddle.distributed` is not imported.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ernie_train.core.barrier import HostBarrier
from ernie_train.core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
K = TypeVar("K", str, tuple[str, str])


@dataclass(frozen=True)
class Grid:
    """Layout of the ranks, as torch's DeviceMesh; `sharding` splits optimizer state (ZeRO-1)."""

    expert: int = 1
    data: int = 1
    sharding: bool = False

    def check(self, ranks: int) -> None:
        """Raise `ConfigError` where expert x data is not `ranks`."""
        if self.expert * self.data != ranks:
            raise ConfigError(
                f"parallel.expert={self.expert} x parallel.data={self.data} needs "
                f"{self.expert * self.data} ranks, but this job has {ranks}: start as many, or "
                "change the degrees"
            )

    def expert_group(self, of: int) -> list[int]:
        """Return the ranks among which rank `of` exchanges rows."""
        first = of - of % self.expert
        return list(range(first, first + self.expert))

    def replicas(self, of: int) -> list[int]:
        """Return the ranks that hold the same experts as rank `of`."""
        return list(range(of % self.expert, self.expert * self.data, self.expert))


# State of the process, like torch's default process group: a process is one rank of one job, and
# passing these through every call that may reduce something would say nothing more.
_grid = Grid()
_host_barrier: HostBarrier | None = None

# Bytes of an object that are on the device at a time while it travels.
_BROADCAST_BYTES = 64 << 20


# ---- rank and layout -----------------------------------------------------------------------------
def _number(variable: str, fallback: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else fallback


def world_size() -> int:
    """Return the number of ranks in the job, as the launcher set it; 1 without a launcher."""
    return max(1, _number("PADDLE_TRAINERS_NUM", 1))


def rank() -> int:
    """Return the number of this process in the job, from 0."""
    return _number("PADDLE_TRAINER_ID", 0) if world_size() > 1 else 0


def is_main() -> bool:
    """Return whether this is rank 0, which alone prints and writes files of the whole job."""
    return rank() == 0


def grid() -> Grid:
    """Return the layout that `set_grid` chose; one rank before that."""
    return _grid


def init_process_group() -> None:
    """Connect to the other ranks, once, before any reduction. Does nothing on one process."""
    if world_size() == 1:
        return
    import paddle

    if not paddle.distributed.is_initialized():
        # Paddle prints the flags that are not at their defaults to stderr, on every rank: shown
        # only where connecting fails.
        output = io.StringIO()
        try:
            with redirect_stderr(output):
                paddle.distributed.init_parallel_env()
        except BaseException:
            sys.stderr.write(output.getvalue())
            raise


def require_backend(device: str) -> None:
    """Raise `ConfigError` where the backend does not fit `device`, which is `cpu` or `gpu`.

    `run --nproc` starts ranks with the right backend; other launchers may not.
    """
    if world_size() == 1:
        return
    import paddle

    wanted, found = {"cpu": "GLOO", "gpu": "NCCL"}[device], paddle.distributed.get_backend()
    if found != wanted:
        raise ConfigError(
            f"device: the ranks talk over {found.lower()}, which does not go with device {device}: "
            f"set `device: {device}` in the recipe and start them with --nproc, or with "
            f"PADDLE_DISTRI_BACKEND={wanted.lower()}"
        )


def sync() -> None:
    """Prepare for a collective; must precede each one.

    Over gloo ranks wait for one another here, because its collectives time out after 30 s, which
    Paddle (3.3.1) does not let us set.
    """
    if over_gloo():
        wait_for_all_ranks()


def over_gloo() -> bool:
    """Return whether ranks communicate over gloo, that is on CPUs."""
    init_process_group()
    import paddle

    return bool(paddle.distributed.get_backend() == "GLOO")


def wait_for_all_ranks() -> None:
    """Wait for all ranks without a time limit; see `HostBarrier`."""
    global _host_barrier
    if _host_barrier is None:
        init_process_group()
        _host_barrier = _connect_host_barrier()
    _host_barrier.wait()


def _connect_host_barrier() -> HostBarrier:
    from paddle.base import core

    store, name = core.create_or_get_global_tcp_store(), "ernie_train/barrier"
    host = os.environ.get("PADDLE_CURRENT_ENDPOINT", "").rpartition(":")[0] or "127.0.0.1"

    def look_up() -> str:
        store.wait(name)
        return bytes(store.get(name)).decode()

    return HostBarrier(rank(), world_size(), host, lambda text: store.set(name, text), look_up)


def set_grid(chosen: Grid) -> None:
    """Set the layout; every rank must call it with the same grid, before models are built.

    Raises `ConfigError` where expert x data is not the number of ranks.
    """
    global _grid
    chosen.check(world_size())
    _grid = chosen


# ---- reductions ----------------------------------------------------------------------------------
def barrier() -> None:
    """Wait until every rank has called it."""
    if world_size() > 1:
        import paddle

        sync()
        paddle.distributed.barrier()


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Return the sum of each value over all ranks, computed in float64.

    Every rank gets the same bits, so decisions on them need no further agreement.

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
    """Return the integers of all ranks, [ranks,len(values)]; each rank passes equally many."""
    import numpy as np

    if world_size() == 1:
        return np.array([values], np.int64)
    import paddle

    sync()
    parts: list[Any] = []
    paddle.distributed.all_gather(parts, paddle.to_tensor(list(values), "int64"))
    found: np.ndarray = paddle.stack(parts).numpy()  # one copy from a GPU, not one a rank
    return found


def sum_over_ranks(ranks: Sequence[int], value: float) -> float:
    """Return the sum over some ranks; every rank of the job must call it.

    It is rounded once (fsum), so groups of ranks that add the same values in another order get
    the same bits, and with them the same clipping.
    """
    if world_size() == 1:
        return value
    import paddle

    sync()
    parts: list[Any] = []
    paddle.distributed.all_gather(parts, paddle.to_tensor([value], "float64"))
    found = paddle.concat(parts).numpy()
    return math.fsum(float(found[at]) for at in ranks)


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank."""
    return all_reduce_sum([float(flag)])[0] > 0


def all_gather_objects(value: T) -> list[T]:
    """Return the objects of all ranks, in rank order; for small objects that can be pickled."""
    if world_size() == 1:
        return [value]
    import paddle

    sync()
    found: list[T] = []
    paddle.distributed.all_gather_object(found, value)
    return found


def broadcast_object(value: T | None) -> T:
    """Return rank 0's object on all ranks, whatever others pass; one of any size, that is pickled.

    Rank 0 sends it in parts of bounded size, so that little memory of a GPU is taken.
    """
    if world_size() == 1:
        return value  # type: ignore[return-value] # this rank is rank 0
    import numpy as np
    import paddle

    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL) if is_main() else b""
    size = int(all_reduce_sum([len(data)])[0])
    buffer = np.frombuffer(data, np.uint8) if is_main() else np.empty(size, np.uint8)
    for start in range(0, size, _BROADCAST_BYTES):
        sync()
        part = paddle.to_tensor(buffer[start : start + _BROADCAST_BYTES])
        paddle.distributed.broadcast(part, src=0)
        if not is_main():
            buffer[start : start + _BROADCAST_BYTES] = part.numpy()
    return value if is_main() else pickle.loads(buffer.data)  # type: ignore[return-value]


def all_reduce_named(values: Mapping[K, float]) -> dict[K, float]:
    """Return sums by name over all ranks; a rank may lack names that others have.

    Names are texts or tuples of texts.
    """
    if world_size() == 1:
        return dict(values)
    found = all_gather_objects(dict(values))
    names = sorted({name for part in found for name in part})
    return {name: _sum(part.get(name, 0.0) for part in found) for name in names}


def _sum(parts: Iterable[float]) -> float:
    """Return the sum, rounded once; NaN for opposite infinities, which fsum refuses."""
    values = list(parts)
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


# ---- sharing work --------------------------------------------------------------------------------
def shard(items: Sequence[T]) -> Sequence[T]:
    """Return this rank's part of items that all ranks have: every world_size-th one."""
    return items if world_size() == 1 else items[rank() :: world_size()]


def gather_shards(results: Sequence[T]) -> list[T]:
    """Return the results of all items, in their order, from the results of each rank's `shard`."""
    if world_size() == 1:
        return list(results)
    parts = all_gather_objects(list(results))
    total = sum(map(len, parts))
    return [parts[at % len(parts)][at // len(parts)] for at in range(total)]


def partition_by_size(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Partition item indices into parts of about equal size: the largest first, to the lightest."""
    indices: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for item in sorted(range(len(sizes)), key=lambda at: (-sizes[at], at)):
        lightest = loads.index(min(loads))
        indices[lightest].append(item)
        loads[lightest] += sizes[item]
    return indices
