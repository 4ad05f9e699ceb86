"""Paddle's inference of types and shapes for operators that have no kernel here.

A CPU build knows the operators of GPUs, but refuses to trace them: it looks for a kernel first.
Its rewriting of graphs (DRR) does not, so a graph is made in which such an operator replaces a
placeholder that reads the same inputs. Building it checks name, attributes and number of inputs,
and infers the outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import paddle
from paddle import Tensor
from paddle.base import framework

# Paddle's numbers of attribute types in an operator's description.
_INT, _FLOAT, _STRING, _BOOL, _LONG = 0, 1, 2, 6, 9
_ATTRIBUTES = {
    _INT: (int, "Int32Attr"),
    _FLOAT: (float, "Float32Attr"),
    _STRING: (str, "StrAttr"),
    _BOOL: (bool, "BoolAttr"),
    _LONG: (int, "Int64Attr"),
}
_numbers = itertools.count()


def infer(name: str, arguments: Sequence[Any]) -> list[Tensor]:
    """Return zeros of the types and shapes that the operator `name` returns.

    arguments: those of Paddle's own call, in its order: inputs (None for one left out), then
        attributes.

    Raises `TypeError` for an unknown operator, and for arguments that it does not take.
    """
    proto = _description(name)
    inputs = list(arguments[: len(proto.inputs)])
    attributes = _attributes(name, proto, arguments[len(proto.inputs) :])
    specs = [None if x is None else (list(x.shape), x.dtype) for x in inputs]
    paddle.enable_static()
    try:
        outputs = _outputs(name, specs, attributes, len(proto.outputs))
    finally:
        paddle.disable_static()
    return [paddle.zeros(shape, dtype) for shape, dtype in outputs]


def _description(name: str) -> Any:
    try:
        return framework.OpProtoHolder.instance().get_op_proto(name)
    except ValueError:
        raise TypeError(f"Paddle has no operator {name}") from None


def _attributes(name: str, proto: Any, values: Sequence[Any]) -> dict[str, tuple[str, Any]]:
    """Return {name: (maker of Paddle's attribute, value)} of attributes that are given by place."""
    wanted = [a for a in proto.attrs if not a.name.startswith(("op_", "with_quant"))]
    if len(values) != len(wanted):
        names = ", ".join(attribute.name for attribute in wanted)
        raise TypeError(f"{name} takes the attributes {names}, not {len(values)} of them")
    found = {}
    for attribute, value in zip(wanted, values, strict=True):
        kind, maker = _ATTRIBUTES[attribute.type]
        if type(value) is not kind:  # Paddle would read a wrong type as garbage
            given = type(value).__name__
            raise TypeError(f"{name}: {attribute.name} must be {kind.__name__}, not {given}")
        found[attribute.name] = (maker, value)
    return found


def _outputs(
    name: str,
    specs: Sequence[tuple[list[int], Any] | None],
    attributes: Mapping[str, tuple[str, Any]],
    count: int,
) -> list[tuple[list[int], Any]]:
    """Return shape and type of the operator's outputs, by a rewritten graph."""
    program = paddle.static.Program()
    real = [at for at, spec in enumerate(specs) if spec is not None]
    with paddle.static.program_guard(program, paddle.static.Program()):
        total = None
        for at in real:
            shape, dtype = specs[at]  # type: ignore[misc]
            size = paddle._C_ops.numel(paddle.static.data(f"x{at}", shape, dtype))
            total = size if total is None else paddle._C_ops.add(total, size)
    context = paddle.pir.DrrPatternContext()
    pattern = context.SourcePattern()
    last = None
    for at in real:
        size = pattern.Tensor(f"size{at}")
        pattern.Op("pd_op.numel")([pattern.Tensor(f"x{at}")], [size])
        if last is not None:
            total_name = "out0" if at == real[-1] else f"total{at}"
            both = pattern.Tensor(total_name)
            pattern.Op("pd_op.add")([last, size], [both])
            size = both
        last = size
    result = pattern.ResultPattern()
    made = {key: getattr(result, maker)(value) for key, (maker, value) in attributes.items()}
    given = [
        result.InputNoneTensor() if spec is None else result.Tensor(f"x{at}")
        for at, spec in enumerate(specs)
    ]
    result.Op(f"pd_op.{name}", made)(given, [result.Tensor(f"out{at}") for at in range(count)])
    passes = paddle.base.libpaddle.pir.PassManager()
    passes.register_pass(f"ernie_train_infer_{next(_numbers)}", context)
    passes.run(program)
    for operation in program.global_block().ops:
        if operation.name() == f"pd_op.{name}":
            return [(list(value.shape), value.dtype) for value in operation.results()]
    raise TypeError(f"Paddle did not build {name}")


@contextmanager
def operators_by_inference(names: Sequence[str], flags: Mapping[str, Any]) -> Iterator[list[str]]:
    """Replace Paddle's calls of some operators by `infer` within the context.

    flags: Paddle's flags that a CPU build does not have, as a GPU build has them.
    Yields the names of the operators called so far.
    """
    called: list[str] = []
    before = {name: getattr(paddle._C_ops, name) for name in names}
    get_flags = framework.get_flags

    def known_flags(asked: Any) -> dict[str, Any]:
        wanted = [asked] if isinstance(asked, str) else list(asked)
        rest = [flag for flag in wanted if flag not in flags]
        return {flag: flags[flag] for flag in wanted if flag in flags} | (
            get_flags(rest) if rest else {}
        )

    def stand_in(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            called.append(name)
            outputs = infer(name, arguments)
            return outputs[0] if len(outputs) == 1 else tuple(outputs)

        return call

    flag_getters = [(framework, get_flags), (paddle, paddle.get_flags)]
    try:
        for name in names:
            setattr(paddle._C_ops, name, stand_in(name))
        for module, _ in flag_getters:
            module.get_flags = known_flags
        yield called
    finally:
        for name, original in before.items():
            setattr(paddle._C_ops, name, original)
        for module, getter in flag_getters:
            module.get_flags = getter
