"""Gradients summed over micro-batches and the ranks that hold a parameter; who updates it.

Sums over micro-batches and over ranks are of one type: see `set_gradient_dtype`.
Dense parameters are on all ranks, experts on their replicas, so the two are summed over different
groups. Losses are sums divided by counts of the whole step, so gradients are summed, not averaged.
They travel in buckets, from the last layer to the first. In the last backward pass of a step a
bucket leaves as soon as its layers are through, and travels beside the rest of the pass where the
backend is asynchronous.

**One order on all ranks.** A rank may have another micro-batch than others, another graph or only
a dummy token, so gradients do not become complete in one order everywhere, and under expert
parallelism all-to-alls come between them. Buckets therefore leave at places that all ranks pass in
one order: when a layer's backward pass ends, which the all-to-alls of the layers above and below
enclose. What a loss may reach past the layers (routers, whose orthogonality is a term of its own;
a tied embedding) leaves after the pass.
"""

from __future__ import annotations

import re
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.core import process_group
from ernie_train.model import is_expert_parameter
from ernie_train.model.dtypes import cast
from ernie_train.parallel.collectives import Work, get_collectives

BUCKET_ELEMENTS = 2**23  # 32 MiB in float32; a larger tensor has a bucket of its own
MAX_IN_FLIGHT = 4  # buckets: 128 MiB of buffers in float32, more where a tensor is larger

Named = Mapping[str, Tensor]

# The input norm is a layer's first operation, so the gradient of its weight is the last of the
# layer: Paddle accumulates the gradients of an operation's parameters before it runs others.
_FIRST_OF_LAYER = re.compile(r"model\.layers\.(\d+)\.input_layernorm\.weight")
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(?!mlp\.gate\.)")
_AFTER_LAYERS = ("model.norm.", "lm_head.", "value_head.")
_AFTER_PASS = -1


# ---- who holds and who owns what -----------------------------------------------------------------
def split_experts(parameters: Named) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split parameters into dense ones and experts."""
    experts = {n: p for n, p in parameters.items() if is_expert_parameter(n)}
    return {n: p for n, p in parameters.items() if n not in experts}, experts


def parameter_owners(parameters: Named) -> dict[str, int]:
    """Return the rank that writes each of this rank's parameters, and updates it under sharding.

    Dense parameters are partitioned over all ranks, experts over their replicas, each kind so that
    ranks have about equally many elements; a parameter is never cut.
    """
    dense, experts = split_experts(parameters)
    grid = process_group.grid()
    owners: dict[str, int] = {}
    for part, ranks in (
        (dense, list(range(process_group.world_size()))),
        (experts, grid.replicas(process_group.rank())),
    ):
        names = list(part)
        sizes = [int(np.prod(part[name].shape)) for name in names]
        shares = process_group.partition_by_size(sizes, len(ranks))
        for rank, share in zip(ranks, shares, strict=True):
            owners |= {names[at]: rank for at in share}
    return owners


def owned_names(parameters: Named) -> set[str]:
    """Return the names of the parameters that this rank writes."""
    owners = parameter_owners(parameters)
    return {name for name, owner in owners.items() if owner == process_group.rank()}


def _owner_index(rank: int, *, experts: bool) -> int:
    """Return a rank as `Collectives` counts sources: for experts the index of the replica.

    Every expert group has an owner of its own for its experts, all with the same index.
    """
    return rank // process_group.grid().expert if experts else rank


def broadcast_updated(parameters: Named, owners: Mapping[str, int]) -> None:
    """Give each parameter as its owner has updated it to all ranks that hold it.

    Every rank must call it.
    """
    for experts, part in _shared_parameters(parameters).items():
        source = {n: _owner_index(owners[n], experts=experts) for n in part}
        for owner in sorted(set(source.values())):
            of_owner = {n: p for n, p in part.items() if source[n] == owner}
            for names in buckets(of_owner):
                bucket = [part[name] for name in names]
                with paddle.no_grad():
                    flat = get_collectives().broadcast(flatten(bucket), owner, experts=experts)
                    unflatten(flat, bucket)


def _shared_parameters(parameters: Named) -> dict[bool, dict[str, Tensor]]:
    """Return the parameters that several ranks hold, by whether they are experts."""
    if process_group.world_size() == 1:
        return {}
    dense, experts = split_experts(parameters)
    parts = {False: dense, True: experts if process_group.grid().data > 1 else {}}
    return {kind: part for kind, part in parts.items() if part}


# ---- buckets -------------------------------------------------------------------------------------
def buckets(tensors: Named) -> Iterator[list[str]]:
    """Yield names of tensors of one dtype, up to `BUCKET_ELEMENTS` together."""
    open_buckets: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        bucket = open_buckets.setdefault(tensor.dtype, [])
        elements = sum(int(tensors[other].size) for other in (*bucket, name))
        if bucket and elements > BUCKET_ELEMENTS:
            yield bucket
            bucket = open_buckets[tensor.dtype] = []
        bucket.append(name)
    yield from (bucket for bucket in open_buckets.values() if bucket)


def flatten(tensors: list[Tensor]) -> Tensor:
    """Return all elements of the tensors, one after another."""
    return paddle.concat([tensor.reshape([-1]) for tensor in tensors])


def unflatten(flat: Tensor, tensors: list[Tensor]) -> None:
    """Fill the tensors with what `flatten` made."""
    start = 0
    for tensor in tensors:
        end = start + int(tensor.size)
        paddle.assign(flat[start:end].reshape(tensor.shape), output=tensor)
        start = end


@dataclass(frozen=True)
class _Bucket:
    names: tuple[str, ...]
    experts: bool
    owner: int | None  # the only one that gets the sum, as `_owner_index` counts; None: all do
    complete_after: float

    @property
    def sum_comes_here(self) -> bool:
        return self.owner in (None, _owner_index(process_group.rank(), experts=self.experts))


def _complete_after(name: str) -> float:
    """Return the layer after whose backward pass a gradient is complete, or `_AFTER_PASS`."""
    if name.startswith(_AFTER_LAYERS):
        return float("inf")
    found = _IN_LAYER.match(name)
    return int(found.group(1)) if found else _AFTER_PASS


def _gradient_buckets(
    parts: Mapping[bool, Named], owners: Mapping[str, int] | None
) -> tuple[_Bucket, ...]:
    """Return the buckets in the order in which they leave."""
    made = []
    for experts, part in parts.items():
        groups: dict[tuple[int | None, bool], dict[str, Tensor]] = {}
        for name, parameter in part.items():
            owner = None if owners is None else _owner_index(owners[name], experts=experts)
            group = groups.setdefault((owner, _complete_after(name) == _AFTER_PASS), {})
            group[name] = parameter
        for (owner, _), group in groups.items():
            for names in buckets(group):
                after = min(map(_complete_after, names))
                made.append(_Bucket(tuple(names), experts, owner, after))
    return tuple(sorted(made, key=lambda bucket: -bucket.complete_after))


# ---- one parameter's gradient --------------------------------------------------------------------
def set_gradient_dtype(parameters: Iterable[Tensor], dtype: Literal["float32", "bfloat16"]) -> None:
    """Choose the type in which gradients of bfloat16 parameters are summed from now on.

    Paddle sums backward passes in the type of the weights, and the eight bits of bfloat16 lose an
    addend of which the sum is 512 times as large. In float32, what a pass adds goes to `main_grad`,
    Paddle's own name for it, as soon as a parameter has it; its gradient in bfloat16 is freed.
    """
    for parameter in parameters:
        if parameter.dtype == paddle.float32:
            continue
        if not hasattr(parameter, "main_grad"):
            parameter.main_grad = None
            # The parameter has the hook, which must not keep the parameter.
            parameter._register_backward_hook(partial(_move_of, weakref.ref(parameter)))
        parameter.sums_in_float32 = dtype == "float32"


def _sums_apart(parameter: Tensor) -> bool:
    """Return whether the parameter's gradient is summed in `main_grad`."""
    return getattr(parameter, "sums_in_float32", False)


def _move_of(reference: weakref.ref[Tensor]) -> None:
    parameter = reference()
    if parameter is not None and _sums_apart(parameter):
        _move_gradient(parameter)


def _move_gradient(parameter: Tensor) -> None:
    if parameter.grad is None:
        return
    with paddle.no_grad():
        added = cast(parameter.grad, paddle.float32)
        if parameter.main_grad is None:
            parameter.main_grad = added
        else:
            parameter.main_grad.add_(added)
    parameter.clear_gradient(False)


def gradient(parameter: Tensor) -> Tensor | None:
    """Return the gradient of all passes since `free_gradients`, None without any.

    It has the parameter's type, or that of `set_gradient_dtype`.
    """
    if not _sums_apart(parameter):
        return parameter.grad
    _move_gradient(parameter)  # if its hook failed for want of memory: Paddle drops that error
    found: Tensor | None = parameter.main_grad
    return found


def _gradient_or_zeros(parameter: Tensor) -> Tensor:
    """Return the gradient, made of zeros where there is none."""
    if gradient(parameter) is None:
        apart = _sums_apart(parameter)
        zeros = paddle.zeros(parameter.shape, "float32" if apart else parameter.dtype)
        setattr(parameter, "main_grad" if apart else "grad", zeros)
    return gradient(parameter)


def free_gradients(parameters: Iterable[Tensor]) -> None:
    """Free the gradients, which are None then."""
    for parameter in parameters:
        parameter.clear_gradient(False)
        if _sums_apart(parameter):
            parameter.main_grad = None


# ---- summing gradients over ranks ----------------------------------------------------------------
class GradientReducer:
    """Sums the gradients of each parameter over the ranks that hold it.

    Every rank must construct it with the parameters in one order, and call `finish` once a step.
    `begin_last_backward` before that is optional, for all ranks alike, and changes no bit.

    Args:
        owners: the rank of each parameter that alone gets its sum; on the others the gradient is
            freed. Without it all ranks get all sums.
    """

    def __init__(self, parameters: Named, owners: Mapping[str, int] | None = None) -> None:
        self.parameters = parameters
        self.parts = _shared_parameters(parameters)
        if self.parts:
            get_collectives()  # connects the ranks while there is memory for it
        self._buckets = _gradient_buckets(self.parts, owners)
        self._reset()
        for name, parameter in parameters.items() if self.parts else ():
            parameter._register_backward_hook(_hook(weakref.ref(self), name))

    def _reset(self) -> None:
        self._last_backward = False
        self._waiting = deque(self._buckets)
        self._in_flight: deque[tuple[_Bucket, Work]] = deque()
        self._sent: dict[str, bool] = {}  # name -> whether there was a gradient
        self._error: Exception | None = None

    def begin_last_backward(self) -> None:
        """Announce that no backward pass but the next one, if any, comes before `finish`."""
        self._last_backward = True

    def on_accumulated(self, name: str) -> None:
        """Handle the end of the accumulation into the gradient of `name` in a backward pass."""
        if not self._last_backward or self._error is not None:
            return
        # Paddle (3.3.1) drops exceptions of hooks within its backward pass, so `finish` raises.
        try:
            if name in self._sent:
                raise RuntimeError(f"the gradient of {name} grew after it had been sent")
            if found := _FIRST_OF_LAYER.fullmatch(name):
                self._send_complete(int(found.group(1)))
        except Exception as error:
            self._error = error

    def _send_complete(self, layer: int) -> None:
        while self._waiting and self._waiting[0].complete_after >= layer:
            self._send(self._waiting.popleft())

    def _send(self, bucket: _Bucket) -> None:
        if len(self._in_flight) == MAX_IN_FLIGHT:
            self._receive()
        parameters = [self.parameters[name] for name in bucket.names]
        present = [gradient(parameter) is not None for parameter in parameters]
        self._sent |= dict(zip(bucket.names, present, strict=True))
        with paddle.no_grad():
            flat = flatten([_gradient_or_zeros(parameter) for parameter in parameters])
            if not bucket.sum_comes_here:
                free_gradients(parameters)
            work = get_collectives().all_reduce(flat, experts=bucket.experts, dst=bucket.owner)
        self._in_flight.append((bucket, work))

    def _receive(self) -> None:
        bucket, work = self._in_flight.popleft()
        total = work.wait()
        if bucket.sum_comes_here:
            with paddle.no_grad():
                parameters = [self.parameters[name] for name in bucket.names]
                unflatten(total, [_gradient_or_zeros(parameter) for parameter in parameters])

    def finish(self) -> None:
        """Send what is left and wait for all sums.

        A gradient that is absent on all ranks stays absent. Raises `RuntimeError` where a gradient
        grew after it had been sent.
        """
        if self._error is not None:
            error = self._error
            self._reset()
            raise error
        # Where buckets may have left on some ranks, all leave on all before anything else is sent;
        # where none has, gradients that are absent everywhere need not.
        present = None if self._last_backward else self._present_somewhere()
        for bucket in self._waiting:
            names = tuple(n for n in bucket.names if present is None or n in present)
            if names:
                self._send(replace(bucket, names=names))
        while self._in_flight:
            self._receive()
        present = self._present_somewhere() if present is None else present
        free_gradients(self.parameters[name] for name in self._sent if name not in present)
        self._reset()

    def _present_somewhere(self) -> set[str]:
        """Return names of parameters that have a gradient on some rank that holds them."""
        names: set[str] = set()
        for experts, part in self.parts.items():
            present = [self._sent.get(n, gradient(p) is not None) for n, p in part.items()]
            flags = paddle.to_tensor(present, "float32")
            ranks = get_collectives().all_reduce(flags, experts=experts).wait().tolist()
            names |= {name for name, count in zip(part, ranks, strict=True) if count > 0}
        return names


def _hook(of: weakref.ref[GradientReducer], name: str) -> Callable[[], None]:
    """Return a hook that keeps no reducer alive.

    Parameters outlive their optimizer, and Paddle (3.3.1) cannot remove such a hook.
    """

    def on_accumulated() -> None:
        reducer = of()
        if reducer is not None:
            reducer.on_accumulated(name)

    return on_accumulated
