"""Gradients and updated parameters between the ranks that hold the same ones.

Losses are sums divided by counts of the whole step, so gradients are added, not averaged. Dense
parameters are on all ranks, experts on their replicas. Many small tensors travel as a few large
ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_train import distributed
from ernie_train.model import is_expert_parameter
from ernie_train.parallel.lines import lines

BUCKET_NUMBERS = 2**23  # of a buffer: 32 MiB in float32

Named = Mapping[str, Tensor]


def split_by_place(parameters: Named) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dense parameters, and experts."""
    experts = {n: p for n, p in parameters.items() if is_expert_parameter(n)}
    return {n: p for n, p in parameters.items() if n not in experts}, experts


def reduce_gradients(parameters: Named) -> None:
    """Adds up the gradients of each parameter over the ranks that hold it.

    Every rank must call it, with the parameters in one order. A gradient that is absent on all
    ranks stays absent.
    """
    if distributed.world_size() == 1:
        return
    dense, experts = split_by_place(parameters)
    _reduce(list(dense.values()), experts=False)
    if experts and distributed.grid().data > 1:
        _reduce(list(experts.values()), experts=True)


def _reduce(parameters: list[Tensor], *, experts: bool) -> None:
    present = paddle.to_tensor([float(p.grad is not None) for p in parameters], "float32")
    ranks = lines().add_up(present, experts=experts).tolist()
    known = [p for p, having in zip(parameters, ranks, strict=True) if having > 0]
    for parameter in known:
        if parameter.grad is None:
            parameter.grad = paddle.zeros(parameter.shape, parameter.dtype)
    with paddle.no_grad():
        for bucket in _buckets(parameter.grad for parameter in known):
            _unflatten(lines().add_up(_flat(bucket), experts=experts), bucket)


def broadcast_updated(parameters: Named, owners: Mapping[str, int]) -> None:
    """Gives each parameter as its owner has it to the ranks that hold it.

    `owners`: the rank that updated each. Every rank must call it.
    """
    dense, experts = split_by_place(parameters)
    _broadcast(dense, owners, experts=False)
    if distributed.grid().data > 1:
        # Of experts it is the replica that counts: each expert group has an owner of its own there.
        replica = {n: owners[n] // distributed.grid().expert for n in experts}
        _broadcast(experts, replica, experts=True)


def _broadcast(parameters: Named, owners: Mapping[str, int], *, experts: bool) -> None:
    for owner in sorted({owners[n] for n in parameters}):
        with paddle.no_grad():
            for bucket in _buckets(p for n, p in parameters.items() if owners[n] == owner):
                _unflatten(lines().copy_from(owner, _flat(bucket), experts=experts), bucket)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type, up to `BUCKET_NUMBERS` together; a larger one is alone."""
    held: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        bucket = held.setdefault(tensor.dtype, [])
        if bucket and sum(int(t.size) for t in bucket) + int(tensor.size) > BUCKET_NUMBERS:
            yield bucket
            bucket = held[tensor.dtype] = []
        bucket.append(tensor)
    yield from (bucket for bucket in held.values() if bucket)


def _flat(tensors: list[Tensor]) -> Tensor:
    return paddle.concat([tensor.reshape([-1]) for tensor in tensors])


def _unflatten(flat: Tensor, tensors: list[Tensor]) -> None:
    start = 0
    for tensor in tensors:
        end = start + int(tensor.size)
        paddle.assign(flat[start:end].reshape(tensor.shape), output=tensor)
        start = end


def owned(parameters: Named) -> set[str]:
    """Names of the parameters that this rank writes."""
    return {name for name, owner in owners(parameters).items() if owner == distributed.rank()}


def owners(parameters: Named) -> dict[str, int]:
    """The rank that writes each of this rank's parameters, and updates it under sharding.

    Dense parameters are dealt out over all ranks, experts over their replicas, each kind so that
    ranks have about equally many numbers; a parameter is never cut.
    """
    dense, experts = split_by_place(parameters)
    grid = distributed.grid()
    found: dict[str, int] = {}
    for part, ranks in (
        (dense, list(range(distributed.world_size()))),
        (experts, grid.replicas(distributed.rank())),
    ):
        names = list(part)
        sizes = [int(np.prod(part[name].shape)) for name in names]
        for holder, hand in zip(ranks, distributed.deal(sizes, len(ranks)), strict=True):
            found |= {names[at]: holder for at in hand}
    return found
