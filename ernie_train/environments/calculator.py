"""The calculator: exact arithmetic on fractions, with bounds on every step."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from ernie_train.environments.tool import Signature, ToolContext, ToolError

_MAX_CHARACTERS = 400
_MAX_BITS = 4096  # of a numerator or denominator, about 1200 digits
_MAX_PLACES = 30  # decimal places that are written out; else the result is a fraction
# Signs of print: times, divided by, minus.
_SIGNS = str.maketrans({"\u00d7": "*", "\u00f7": "/", "\u2212": "-"})

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculator(expression: str) -> str:
    """Compute an arithmetic expression exactly.

    Args:
        expression: numbers, parentheses and the operators + - * / // % **
    """
    return _format_number(_evaluate(_parse(expression)))


class Calculator:
    """Checks the arguments of the tool `calculator` and computes."""

    signature = Signature.of(calculator)
    schema = signature.schema

    def call(self, arguments: dict[str, Any], context: ToolContext) -> str:
        return calculator(**self.signature.check(arguments))


def _parse(expression: str) -> ast.expr:
    text = expression.translate(_SIGNS).strip()
    if len(text) > _MAX_CHARACTERS:
        raise ToolError(f"the expression has more than {_MAX_CHARACTERS} characters")
    try:
        body = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError("not an arithmetic expression; write it as 2 * (3 + 4)") from None
    for node in ast.walk(body):
        if isinstance(node, ast.Constant):
            # The literal's own digits: 0.1 is a tenth, and not the nearest binary number.
            node.kind = ast.get_source_segment(text, node)
    return body


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _parse_number(str(node.kind))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _evaluate(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Pow):
            return _check_size(_power(left, right))
        if type(node.op) in _BINARY:
            try:
                return _check_size(Fraction(_BINARY[type(node.op)](left, right)))
            except ZeroDivisionError:
                raise ToolError("division by zero") from None
    raise ToolError("only numbers, parentheses and + - * / // % ** are allowed; a power is 2 ** 3")


def _parse_number(text: str) -> Fraction:
    exponent = text.lower().partition("e")[2]
    if text.lower().startswith("0x") or (exponent and not -99 <= int(exponent) <= 99):
        raise ToolError(f"{text[:20]} is not a number of this calculator")
    try:
        return Fraction(text)
    except ValueError:
        raise ToolError(f"{text[:20]} is not a number of this calculator") from None


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError("an exponent must be a whole number")
    if base == 0 and exponent < 0:
        raise ToolError("division by zero")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base not in (0, 1, -1) and (bits - 1) * abs(exponent) > _MAX_BITS:
        raise ToolError("the result is too large")  # before it is computed
    if base in (0, 1, -1):
        return base if exponent % 2 else base * base if exponent else Fraction(1)
    return Fraction(base ** int(exponent))


def _check_size(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise ToolError("the result is too large")
    return value


def _format_number(value: Fraction) -> str:
    """Return a whole number, a decimal where it is finite and short, or else a fraction."""
    places = next((n for n in range(_MAX_PLACES + 1) if 10**n % value.denominator == 0), None)
    if places is None:
        return f"{value.numerator}/{value.denominator}"
    if places == 0:
        return str(value.numerator)
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
