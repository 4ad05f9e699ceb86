"""Jinja's sandbox with bounds on what a foreign template may compute and make.

A template can be short and its work endless: texts that double in a loop, macros that call
themselves twice, `"%99999999d"`, lists of lists of lists. An operation whose result can be larger
than its operands is measured before it is done, and what one rendering does altogether is counted.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from string import Formatter
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import Environment, nodes, pass_context
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ernie_train.core.errors import DataError

MOST_TEXT = 16_000_000  # characters of one text
_MOST_MADE = 32 * MOST_TEXT  # characters and items that one rendering makes
_MOST_ITEMS = 2_000_000  # that all loops of one rendering go over
_MOST_CALLS = 300_000  # of macros, functions and filters, in one rendering
_MOST_NESTED = 300_000  # values in a list of lists, each counted as often as it occurs
_MOST_SECONDS = 30.0  # of the processor, for one rendering
_BETWEEN_LOOKS = 32  # calls and rounds of loops, unless they make much:
_MADE_BETWEEN_LOOKS = 50_000  # characters and items
_MOST_BITS = 65_536  # of a whole number
_WIDEST = 10_000  # characters a text may be padded to, or a filter's number
_LONGEST_SLOW = 100_000  # characters for filters that take more than linear time

# Filters that hand on what they are given, or members of it; all others make text of it.
_SHAPING = {
    "attr", "batch", "count", "d", "default", "dictsort", "first", "float", "groupby", "int",
    "items", "last", "length", "list", "map", "max", "min", "random", "reject", "rejectattr",
    "reverse", "select", "selectattr", "slice", "sort", "sum", "unique",
}  # fmt: skip
_COPYING = {"batch", "dictsort", "groupby", "list", "reverse", "slice", "sort", "unique"}
_SLOW = {"pprint", "striptags", "title", "urlize", "wordcount", "wordwrap", "xmlattr"}
_WITH_VALUES = {"d", "default", "float", "int"}  # their numbers are values, not sizes
# Methods of texts and numbers that no chat template needs and that make much of little.
_WITHHELD = {"encode", "expandtabs", "to_bytes", "translate"}
# What Jinja judges by its type alone.
_JUDGED_BY_TYPE = frozenset({dict, list, str, Namespace, LoopContext})
_DICT_ATTRIBUTES = frozenset(dir(dict))
_MOST_JUDGEMENTS = 4096
_METHODS = (MethodType, BuiltinMethodType)
_PRINTF = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")


class _Budget:
    """Count what one rendering does; raise `DataError` beyond the bounds."""

    def __init__(self) -> None:
        self.items = self.calls = self.made = self._asked = self._looked = 0
        self._until = time.thread_time() + _MOST_SECONDS

    def go_over(self, items: int) -> None:
        self.items += items
        if self.items > _MOST_ITEMS:
            raise _beyond("loops")

    def call(self) -> None:
        self.calls += 1
        if self.calls > _MOST_CALLS:
            raise _beyond("calls")
        self.check_time()

    def make(self, size: int) -> None:
        """Count what an operation has made, or is about to make."""
        self.made += size
        if size > MOST_TEXT or self.made > _MOST_MADE:
            raise _beyond("makes text")

    def check_time(self) -> None:
        """Look at the clock, which takes 1 us, but only after some work."""
        self._asked += 1
        if self._asked % _BETWEEN_LOOKS and self.made - self._looked < _MADE_BETWEEN_LOOKS:
            return
        self._looked = self.made
        if time.thread_time() > self._until:
            raise _beyond("computes")


_BUDGET: ContextVar[_Budget] = ContextVar("what the rendering has done")


@contextmanager
def bounded_rendering() -> Iterator[None]:
    """Give the rendering inside a budget of its own."""
    token = _BUDGET.set(_Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


def bounded_range(*bounds: int) -> range:
    """Return `range(*bounds)`, counted as a loop over it."""
    _BUDGET.get().go_over(len(found := range(*bounds)))
    return found


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which loops, calls, filters and operators are counted and measured.

    Filters that are there at the start are measured; `add_filter` adds others.
    """

    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._plain = Environment()  # it has the filters themselves
        self._judgements: dict[tuple[type, str], bool] = {}
        self.finalize = pass_context(lambda context, value: self.measured(value))
        self.filters = {name: self._bounded_filter(name) for name in self._plain.filters}

    def add_filter(self, name: str, filter_: Callable[..., Any]) -> None:
        self._plain.filters[name] = filter_
        self.filters[name] = self._bounded_filter(name)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counting().visit(super()._parse(source, name, filename))

    # ---- called by templates, in place of what they say ------------------------------------------

    def counted(self, items: Iterable[Any]) -> Sequence[Any]:
        """Return the items of a loop."""
        found = items if isinstance(items, range | list | tuple | str) else list(items)
        _BUDGET.get().go_over(len(found))
        return found

    def tick(self, text: int) -> None:
        """Count a round of a loop with so many characters of text in it."""
        budget = _BUDGET.get()
        budget.make(text)
        budget.check_time()

    def joined(self, *parts: Any) -> str:
        """Return the texts of the parts, joined: the operator `~`."""
        _BUDGET.get().make(sum(map(_size, parts)))
        return "".join(map(str, parts))

    def measured(self, value: Any) -> Any:
        """Return a list, tuple or dict that the template makes, or a value that it writes."""
        _BUDGET.get().make(len(value) if type(value) is str else _size(value))
        return value

    # ---- Jinja's hooks ---------------------------------------------------------------------------

    # Each of these is asked dozens of times for a row. What they do first is what Jinja does for
    # the values that rows consist of, without its search for others.

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        kind = type(obj)
        if kind not in _JUDGED_BY_TYPE:
            return self._judge(obj, attr, value)
        if (known := self._judgements.get((kind, attr))) is None:
            if len(self._judgements) >= _MOST_JUDGEMENTS:  # a template may compute names
                self._judgements.clear()
            known = self._judgements[kind, attr] = self._judge(obj, attr, value)
        return known

    def _judge(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _WITHHELD and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        owner = getattr(__obj, "__self__", None)
        if owner is __self:
            return __obj(*args)  # `kwargs` are Jinja's own, for functions that take a context
        budget = _BUDGET.get()
        budget.call()
        if type(__obj) is Macro:
            text = __context.call(__obj, *args, **kwargs)
            budget.make(len(text))
            return text
        if isinstance(__obj, type):  # dict and namespace
            budget.make(_size([*args, *kwargs.values()]))
        if isinstance(owner, str) and __obj.__name__ == "join":
            args = ([*args[0]], *args[1:])
            budget.make(_size(args[0]) + len(owner) * len(args[0]))
        elif isinstance(owner, str):
            budget.make(_grown(__obj.__name__, owner, [*args, *kwargs.values()]))
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str | list | tuple):
            budget.make(len(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value) if isinstance(value, _METHODS) else None
        if formatted is None:
            return None
        text: str = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            specs = [spec or "" for _, _, spec, _ in Formatter().parse(text)]
            widths = [width for spec in specs for width in re.findall(r"\d+|\{", spec)]
            given = _size([*args, *kwargs.values()])
            _BUDGET.get().make(len(text) + len(specs) * given + _padding(widths))
            return formatted(*args, **kwargs)

        return bounded

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget, texts = _BUDGET.get(), (str, list, tuple)
        if operator == "+" and type(left) is str and type(right) is str:
            budget.make(len(left) + len(right))
            return left + right
        if operator == "%" and isinstance(left, str):
            budget.make(_printed(left, right))
        elif isinstance(left, int) and isinstance(right, int):
            bits, more = left.bit_length(), right.bit_length()
            size = {"**": bits * max(0, right), "*": bits + more}.get(operator, max(bits, more))
            if size > _MOST_BITS:
                raise _beyond(f"computes with {operator}")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, texts) and isinstance(times, int):
                    budget.make(len(value) * max(0, times))
        elif isinstance(left, texts) and isinstance(right, texts):
            budget.make(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def _bounded_filter(self, name: str) -> Callable[..., Any]:
        @pass_context
        def bounded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
            budget, given = _BUDGET.get(), [*args, *kwargs.values()]
            budget.call()
            if given and name not in _WITH_VALUES:
                _padding([str(int(number)) for number in given if isinstance(number, int)])
            if name not in _SHAPING:
                if type(value) is not str and isinstance(value, Iterator):
                    value = [*value]
                budget.make(_filtered(name, value, given))
            elif name in _COPYING and isinstance(value, str | list | tuple):
                budget.make(len(value))
            return self._plain.call_filter(name, value, args, kwargs, context=context)

        return bounded


class _Counting(NodeTransformer):
    """Let loops, joins and literals of a template call the environment's counting methods."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = _call("counted", node.iter)
        tick = nodes.ExprStmt(_call("tick", nodes.Const(text, lineno=node.lineno)))
        node.body.insert(0, tick.set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return self._literal(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        return node if node.ctx != "load" else self._literal(node, node.items)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        return self._literal(node, [pair.value for pair in node.items])

    def _literal(self, node: nodes.Expr, items: list[nodes.Expr]) -> nodes.Node:
        constant = all(isinstance(item, nodes.Const) for item in items)
        self.generic_visit(node)
        return node if constant else _call("measured", node)


def _call(method: str, *arguments: nodes.Node) -> nodes.Call:
    line = arguments[0].lineno
    function = nodes.EnvironmentAttribute(method, lineno=line)
    return nodes.Call(function, list(arguments), [], None, None, lineno=line)


def _beyond(deed: str) -> DataError:
    return DataError(f"a chat template {deed} beyond all bounds")


def _size(value: Any) -> int:
    """Return about how many characters a value has as text.

    Raises `DataError` for one with more than `_MOST_NESTED` values in it, as for one in itself.
    """
    if isinstance(value, str):
        return len(value)
    size, seen, todo = 0, 0, [value]
    while todo:
        seen += 1
        if seen > _MOST_NESTED:
            raise _beyond("nests lists")
        found = todo.pop()
        if isinstance(found, Namespace):
            found = found._Namespace__attrs
        if isinstance(found, dict):
            todo += [*found, *found.values()]
        elif isinstance(found, list | tuple | set | frozenset):
            todo += found
        size += len(found) if isinstance(found, str) else 8
    return size


def _padding(widths: Iterable[str]) -> int:
    """Return the sum of widths; raise `DataError` for one that is too wide or computed."""
    found = [int(width) if width.lstrip("-").isdigit() else _WIDEST + 1 for width in widths]
    if any(abs(width) > _WIDEST for width in found):
        raise _beyond("pads text")
    return sum(map(abs, found))


def _printed(text: str, arguments: Any) -> int:
    """Return the most characters that `text % arguments` can have."""
    widths = [width for pair in _PRINTF.findall(text) for width in pair if width]
    return len(text) + text.count("%") * _size(arguments) + _padding(widths)


def _grown(method: str, text: str, arguments: Sequence[Any]) -> int:
    """Return the most characters that a method of a text makes, but for `join`."""
    if method == "replace" and len(arguments) >= 2:
        old, new = map(str, arguments[:2])
        return len(text) + text.count(old) * len(new)
    return max(len(text), *(abs(n) for n in arguments if isinstance(n, int)), 0)


def _filtered(name: str, value: Any, arguments: Sequence[Any]) -> int:
    """Return the most characters that a filter makes of a value."""
    size = _size(value)
    if name in _SLOW and size > _LONGEST_SLOW:
        raise _beyond(f"uses the filter {name}")
    if name == "replace":
        return _grown(name, str(value), arguments)
    if name == "format":
        return _printed(str(value), arguments)
    if name == "join" and isinstance(value, list | tuple | str):
        return size + len(value) * _size(arguments[0] if arguments else "")
    if name in ("indent", "wordwrap"):
        added = sum(n if isinstance(n, int) else len(str(n)) for n in arguments) + 4
        return size + (str(value).count("\n") + 1 if name == "indent" else size) * added
    if name == "center":
        return max([size, *(n for n in arguments if isinstance(n, int))])
    return size
