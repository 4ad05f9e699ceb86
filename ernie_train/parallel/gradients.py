"""Who holds and who owns which parameter, and how updated ones get to the others.

Dense parameters are on all ranks, experts on their replicas. Many small tensors travel as a few
large ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.core import process_group
from ernie_train.model import is_expert_parameter
from ernie_train.parallel.collectives import lines

BUCKET_NUMBERS = 2**23  # of a buffer: 32 MiB in float32

Named = Mapping[str, Tensor]


def split_by_place(parameters: Named) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dense parameters, and experts."""
    experts = {n: p for n, p in parameters.items() if is_expert_parameter(n)}
    return {n: p for n, p in parameters.items() if n not in experts}, experts


def broadcast_updated(parameters: Named, owners: Mapping[str, int]) -> None:
    """Gives each parameter as its owner has it to the ranks that hold it.

    `owners`: the rank that updated each. Every rank must call it.
    """
    dense, experts = split_by_place(parameters)
    _broadcast(dense, owners, experts=False)
    if process_group.grid().data > 1:
        # Of experts it is the replica that counts: each expert group has an owner of its own there.
        replica = {n: owners[n] // process_group.grid().expert for n in experts}
        _broadcast(experts, replica, experts=True)


def _broadcast(parameters: Named, owners: Mapping[str, int], *, experts: bool) -> None:
    for owner in sorted({owners[n] for n in parameters}):
        theirs = {n: p for n, p in parameters.items() if owners[n] == owner}
        with paddle.no_grad():
            for names in buckets(theirs):
                bucket = [theirs[name] for name in names]
                unflatten(lines().copy_from(owner, flatten(bucket), experts=experts), bucket)


def buckets(tensors: Named) -> Iterator[list[str]]:
    """Names of tensors of one type, up to `BUCKET_NUMBERS` together; a larger one is alone."""
    held: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        bucket = held.setdefault(tensor.dtype, [])
        numbers = sum(int(tensors[other].size) for other in (*bucket, name))
        if bucket and numbers > BUCKET_NUMBERS:
            yield bucket
            bucket = held[tensor.dtype] = []
        bucket.append(name)
    yield from (bucket for bucket in held.values() if bucket)


def flatten(tensors: list[Tensor]) -> Tensor:
    """All numbers of the tensors, one after another."""
    return paddle.concat([tensor.reshape([-1]) for tensor in tensors])


def unflatten(flat: Tensor, tensors: list[Tensor]) -> None:
    """Fills the tensors with what `flatten` made."""
    start = 0
    for tensor in tensors:
        end = start + int(tensor.size)
        paddle.assign(flat[start:end].reshape(tensor.shape), output=tensor)
        start = end


def owned(parameters: Named) -> set[str]:
    """Names of the parameters that this rank writes."""
    return {name for name, owner in owners(parameters).items() if owner == process_group.rank()}


def owners(parameters: Named) -> dict[str, int]:
    """The rank that writes each of this rank's parameters, and updates it under sharding.

    Dense parameters are dealt out over all ranks, experts over their replicas, each kind so that
    ranks have about equally many numbers; a parameter is never cut.
    """
    dense, experts = split_by_place(parameters)
    grid = process_group.grid()
    found: dict[str, int] = {}
    for part, ranks in (
        (dense, list(range(process_group.world_size()))),
        (experts, grid.replicas(process_group.rank())),
    ):
        names = list(part)
        sizes = [int(np.prod(part[name].shape)) for name in names]
        for holder, hand in zip(
            ranks, process_group.partition_by_size(sizes, len(ranks)), strict=True
        ):
            found |= {names[at]: holder for at in hand}
    return found
