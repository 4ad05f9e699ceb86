"""Gradients added up over the ranks that hold a parameter, during the backward pass.

Losses are sums divided by counts of the whole step, so gradients are added, not averaged. They
travel in buckets, from the last layer to the first. In the last backward pass of a step a bucket
leaves as soon as its layers are through, and travels beside the rest of the pass where the backend
is asynchronous.

**One order on all ranks.** A rank may have another micro-batch than others, another graph or only
an idle token, so gradients do not become complete in one order everywhere, and under expert
parallelism exchanges of rows come between them. Buckets therefore leave at places that all ranks
pass in one order: when a layer's backward pass ends, which the exchanges of the layers above and
below enclose. What a loss may reach past the layers (routers, whose orthogonality is a term of its
own; a tied embedding) leaves after the pass.
"""

from __future__ import annotations

import re
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import paddle
from paddle import Tensor

from ernie_train.core import process_group
from ernie_train.parallel.collectives import Pending, lines
from ernie_train.parallel.gradients import Named, buckets, flatten, split_by_place, unflatten

IN_FLIGHT = 4  # buckets; so their buffers take 128 MiB in float32, more where a tensor is larger

# A layer's first step is this norm, so its weight's gradient is the last of the layer: Paddle
# accumulates the gradients of a step's parameters before it goes on to other steps.
_FIRST_OF_LAYER = re.compile(r"model\.layers\.(\d+)\.input_layernorm\.weight")
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(?!mlp\.gate\.)")
_AFTER_LAYERS = ("model.norm.", "lm_head.", "value_head.")
_AFTER_PASS = -1


def _complete_after(name: str) -> float:
    """The layer after whose backward pass the gradient is complete; `_AFTER_PASS` for none."""
    if name.startswith(_AFTER_LAYERS):
        return float("inf")
    found = _IN_LAYER.match(name)
    return int(found.group(1)) if found else _AFTER_PASS


@dataclass(frozen=True)
class _Bucket:
    names: tuple[str, ...]
    experts: bool
    owner: int | None  # who alone gets the sum, as `Lines.add_up` counts them
    complete_after: float

    @property
    def comes_here(self) -> bool:
        return self.owner in (None, _holder(process_group.rank(), experts=self.experts))


class GradientReduction:
    """Adds up the gradients of each parameter over the ranks that hold it.

    Every rank must make it with the parameters in one order, and call `finish` once a step.
    `begin_last_pass` before that is optional, for all ranks alike, and changes no bit.

    Args:
        owners: the rank of each parameter that alone gets its sum; on the others the gradient is
            absent then. Without it all ranks get all sums.
    """

    def __init__(self, parameters: Named, owners: Mapping[str, int] | None = None) -> None:
        self.parameters = parameters
        self.parts = _parts(parameters)
        self._buckets = _all_buckets(self.parts, owners)
        self._begin()
        for name, parameter in parameters.items() if self.parts else ():
            parameter._register_backward_hook(_hook(weakref.ref(self), name))

    def _begin(self) -> None:
        self._last_pass = False
        self._waiting = deque(self._buckets)
        self._in_flight: deque[tuple[_Bucket, Pending]] = deque()
        self._sent: dict[str, bool] = {}  # whether there was a gradient
        self._fault: Exception | None = None

    def begin_last_pass(self) -> None:
        """Says that no backward pass but the next one, if any, comes before `finish`."""
        self._last_pass = True

    def accumulated(self, name: str) -> None:
        """Is told when a backward pass has added what it has to the gradient of `name`."""
        if not self._last_pass or self._fault is not None:
            return
        # Paddle loses what is raised within its backward pass, so `finish` raises it.
        try:
            if name in self._sent:
                raise RuntimeError(f"the gradient of {name} grew after it had been sent")
            if found := _FIRST_OF_LAYER.fullmatch(name):
                self._send_complete(int(found.group(1)))
        except Exception as error:
            self._fault = error

    def _send_complete(self, layer: int) -> None:
        while self._waiting and self._waiting[0].complete_after >= layer:
            self._send(self._waiting.popleft())

    def _send(self, bucket: _Bucket) -> None:
        if len(self._in_flight) == IN_FLIGHT:
            self._receive()
        parameters = [self.parameters[name] for name in bucket.names]
        present = [parameter.grad is not None for parameter in parameters]
        self._sent |= dict(zip(bucket.names, present, strict=True))
        with paddle.no_grad():
            flat = flatten([_gradient(parameter) for parameter in parameters])
            if not bucket.comes_here:
                _let_go(parameters)
            pending = lines().add_up(flat, experts=bucket.experts, at=bucket.owner)
        self._in_flight.append((bucket, pending))

    def _receive(self) -> None:
        bucket, pending = self._in_flight.popleft()
        total = pending.wait()
        if bucket.comes_here:
            with paddle.no_grad():
                unflatten(total, [_gradient(self.parameters[name]) for name in bucket.names])

    def finish(self) -> None:
        """Sends what is left and waits for all sums.

        A gradient that is absent on all ranks stays absent. Raises `RuntimeError` where a gradient
        grew after it had been sent.
        """
        if self._fault is not None:
            fault = self._fault
            self._begin()
            raise fault
        # Where buckets may have left on some ranks, all leave on all before anything else is sent;
        # where none has, those that are absent everywhere need not.
        known = None if self._last_pass else self._known()
        for bucket in self._waiting:
            names = tuple(n for n in bucket.names if known is None or n in known)
            if names:
                self._send(replace(bucket, names=names))
        while self._in_flight:
            self._receive()
        known = self._known() if known is None else known
        _let_go(self.parameters[name] for name in self._sent if name not in known)
        self._begin()

    def _known(self) -> set[str]:
        """Names of the parameters that have a gradient on some rank that holds them."""
        known: set[str] = set()
        for experts, part in self.parts.items():
            present = [self._sent.get(n, p.grad is not None) for n, p in part.items()]
            flags = paddle.to_tensor(present, "float32")
            ranks = lines().add_up(flags, experts=experts).wait().tolist()
            known |= {name for name, having in zip(part, ranks, strict=True) if having > 0}
        return known


def _parts(parameters: Named) -> dict[bool, dict[str, Tensor]]:
    """The parameters that are on several ranks, by whether they are experts."""
    if process_group.world_size() == 1:
        return {}
    dense, experts = split_by_place(parameters)
    parts = {False: dense, True: experts if process_group.grid().data > 1 else {}}
    return {kind: part for kind, part in parts.items() if part}


def _all_buckets(
    parts: Mapping[bool, Named], owners: Mapping[str, int] | None
) -> tuple[_Bucket, ...]:
    """The buckets in the order in which they leave."""
    made = []
    for experts, part in parts.items():
        groups: dict[tuple[int | None, bool], dict[str, Tensor]] = {}
        for name, parameter in part.items():
            owner = None if owners is None else _holder(owners[name], experts=experts)
            group = groups.setdefault((owner, _complete_after(name) == _AFTER_PASS), {})
            group[name] = parameter
        for (owner, _), group in groups.items():
            for names in buckets(group):
                after = min(map(_complete_after, names))
                made.append(_Bucket(tuple(names), experts, owner, after))
    return tuple(sorted(made, key=lambda bucket: -bucket.complete_after))


def _holder(rank: int, *, experts: bool) -> int:
    """A rank as one of those that hold a parameter: of experts it is the replica that counts."""
    return rank // process_group.grid().expert if experts else rank


def _hook(of: weakref.ref[GradientReduction], name: str) -> Callable[[], None]:
    """Parameters outlive an optimizer, and Paddle cannot take such a hook away again."""

    def accumulated() -> None:
        reduction = of()
        if reduction is not None:
            reduction.accumulated(name)

    return accumulated


def _gradient(parameter: Tensor) -> Tensor:
    """Its gradient, zeros where it has none."""
    if parameter.grad is None:
        parameter.grad = paddle.zeros(parameter.shape, parameter.dtype)
    return parameter.grad


def _let_go(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.clear_gradient(False)
