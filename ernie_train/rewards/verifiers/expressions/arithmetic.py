r"""Read a mathematical expression: its exact value if it is rational, and the forms that it uses.

An expression is not its value: 3 - 4 - 3 is a question, and -4 its answer. Forms tell them apart
("sum", "fraction", "root", "pi", ..). The reader takes LaTeX and plain text, evaluates rational
arithmetic only, and refuses what would be large before it is computed.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

_TOKEN = re.compile(
    r"\d+(?:\.\d+)?|\.\d+|\\[A-Za-z]+|\*\*|[A-Za-z]+|[-+*/^!(){}\[\]_%]|\s+", re.ASCII
)
_FUNCTIONS = frozenset({
    "log", "ln", "lg", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos",
    "arctan", "sinh", "cosh", "tanh", "gcd", "lcm", "max", "min",
})  # fmt: skip
_TIMES = {"*", "\\cdot", "\\times"}
_OVER = {"/", "\\div"}
_CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
_MAX_DEPTH = 40
# Larger numbers, powers of sums and factorials are not computed.
_MAX_BITS = 200_000
_MAX_FACTORIAL = 3000
_MAX_EXPONENT = 1000


class TooLargeError(Exception):
    """Signal that an expression would take long to compute."""


class _UnreadableError(Exception):
    """Signal that a text is no expression that this module reads."""


@dataclass(frozen=True)
class Expression:
    """Describe an expression.

    value: exact if it is rational; approximation: for any number that a float holds.
    forms: what it is made of besides one number: "sum", "product" (of numbers, or of sums),
    "fraction", "nested" (a fraction in a fraction), "power", "reciprocal" (2^{-10}, 1/2^{10}),
    "root", "factorial", "pi", "e", "i", names of functions, "variable".
    """

    value: Fraction | None
    approximation: float | None
    forms: frozenset[str] = frozenset()

    @property
    def is_number(self) -> bool:
        return "variable" not in self.forms

    @property
    def number(self) -> Fraction | float | None:
        """Return the value, or else the approximation."""
        return self.approximation if self.value is None else self.value


def read_expression(text: str) -> Expression | None:
    """Return what a text says as an expression; None if it is none. Raises TooLargeError."""
    tokens = _TOKEN.findall(text)
    if len("".join(tokens)) != len(text):
        return None
    parser = _Parser([token for token in tokens if not token.isspace()])
    try:
        expression = parser.sum()
    except (_UnreadableError, ZeroDivisionError):
        return None
    return expression if parser.at_end else None


def read_small(text: str) -> Expression | None:
    """Return what a text says as an expression; None if it is none, or too large."""
    try:
        return read_expression(text)
    except TooLargeError:
        return None


def is_final(answer: Expression, gold: Expression) -> bool:
    """Return True if an answer has no form that the gold number lacks.

    A gold number that is no integer may be a fraction, also one with a power below.
    """
    allowed = gold.forms
    if gold.value is None or gold.value.denominator > 1:
        allowed |= {"fraction", "reciprocal"}
    return answer.forms <= allowed


def _number(value: Fraction, forms: frozenset[str] = frozenset()) -> Expression:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise TooLargeError
    try:
        approximation = float(value)
    except OverflowError:
        approximation = None
    return Expression(value, approximation, forms)


@dataclass
class _Parser:
    tokens: list[str]
    position: int = 0
    depth: int = field(default=0)

    @property
    def at_end(self) -> bool:
        return self.position == len(self.tokens)

    @property
    def next(self) -> str:
        return "" if self.at_end else self.tokens[self.position]

    def take(self, *wanted: str) -> str:
        """Return the next token and go on, if it is one of these, or any; else ""."""
        token = self.next
        if not token or (wanted and token not in wanted):
            return ""
        self.position += 1
        return token

    def need(self, token: str) -> None:
        if not self.take(token):
            raise _UnreadableError

    def sum(self) -> Expression:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _UnreadableError
        total = self.product()
        while sign := self.take("+", "-"):
            term = self.product()
            total = _added(total, _negated(term) if sign == "-" else term)
        self.depth -= 1
        return total

    def product(self) -> Expression:
        if sign := self.take("+", "-"):
            factor = self.product()
            return _negated(factor) if sign == "-" else factor
        product, was_number = self.power(), self.tokens[self.position - 1][0].isdigit()
        while not self.at_end:
            if self.take(*_OVER):
                product = _divided(product, self.signed())
            elif self.take(*_TIMES):
                product = _multiplied(product, self.signed())
            elif self.next in ("+", "-", "_", "%") or self.next in _CLOSING.values():
                break
            elif was_number and self.next[0].isdigit():
                raise _UnreadableError  # 1 2
            elif was_number and self.next == "\\frac":
                part = self.power()
                mixed = part.value is not None and part.forms == {"fraction"}
                product = _mixed(product, part) if mixed else _multiplied(product, part)
            else:
                product = _multiplied(product, self.power())
            was_number = self.tokens[self.position - 1][0].isdigit()
        return product

    def signed(self) -> Expression:
        if self.take("-"):
            return _negated(self.power())
        self.take("+")
        return self.power()

    def power(self) -> Expression:
        base = self.atom()
        while True:
            if self.take("!"):
                base = _factorial(base)
            elif self.take("^", "**"):
                if self.take("\\circ"):
                    base = Expression(None, None, base.forms | {"degree"})
                    continue
                base = _raised(base, self.argument())
            else:
                return base

    def argument(self) -> Expression:
        """Return what stands in braces, or one signed atom."""
        if self.take("{"):
            inside = self.sum()
            self.need("}")
            return inside
        if self.take("-"):
            return _negated(self.atom())
        return self.atom()

    def atom(self) -> Expression:
        token = self.take()
        if not token:
            raise _UnreadableError
        if token[0].isdigit() or token[0] == ".":
            return _number(Fraction(token))
        if token in _CLOSING:
            inside = self.sum()
            self.need(_CLOSING[token])
            return inside
        return self.named(token)

    def named(self, token: str) -> Expression:
        """Return what begins with a name or command that is already taken."""
        name = token.removeprefix("\\")
        if name in ("frac", "binom"):
            upper, lower = self.digit_or_argument(), self.digit_or_argument()
            return _divided(upper, lower) if name == "frac" else _function(name, upper, lower)
        if name == "sqrt":
            return self.root()
        if name in ("pi", "e"):
            return Expression(None, {"pi": math.pi, "e": math.e}[name], frozenset({name}))
        if name == "i":
            return Expression(None, None, frozenset({"i"}))
        if name == "exp":
            return _raised(Expression(None, math.e, frozenset({"e"})), self.power())
        if name in _FUNCTIONS:
            index = [self.argument()] if self.take("_") else []
            return _function(name, *index, self.power())
        if not name.isalpha():
            raise _UnreadableError
        if self.take("_"):
            self.argument()
        return Expression(None, None, frozenset({"variable"}))

    def digit_or_argument(self) -> Expression:
        r"""Return an argument of \frac; \frac12 is a half."""
        if self.next[:1].isdigit() and len(self.next) > 1 and self.next.isdigit():
            first, self.tokens[self.position] = self.next[0], self.next[1:]
            return _number(Fraction(first))
        return self.argument()

    def root(self) -> Expression:
        degree = Fraction(2)
        if self.take("["):
            index = self.sum()
            self.need("]")
            if index.value is None or index.value <= 0:
                raise _UnreadableError
            degree = index.value
        inside = self.argument()
        return _root(inside, degree)


def _added(one: Expression, two: Expression) -> Expression:
    forms = one.forms | two.forms | {"sum"}
    if one.value is not None and two.value is not None:
        return _number(one.value + two.value, forms)
    return Expression(None, _both(one, two, lambda a, b: a + b), forms)


def _mixed(whole: Expression, part: Expression) -> Expression:
    if whole.value is None or part.value is None:
        raise _UnreadableError
    sign = -1 if whole.value < 0 else 1
    return _number(whole.value + sign * part.value, whole.forms | {"fraction"})


def _negated(one: Expression) -> Expression:
    value = None if one.value is None else -one.value
    approximation = None if one.approximation is None else -one.approximation
    twice = {"sum"} if (value or approximation or 0) > 0 else set()  # -(-5) is to be worked out
    return Expression(value, approximation, one.forms | twice)


def _multiplied(one: Expression, two: Expression) -> Expression:
    forms = one.forms | two.forms
    # 2 pi is a multiple; 2 * 3 and (1 + x)(2 + x) are to be multiplied.
    both_known = one.value is not None and two.value is not None
    reciprocal = "reciprocal" in forms or "power" in forms
    if (both_known and not reciprocal) or ("sum" in one.forms and "sum" in two.forms):
        forms |= {"product"}
    if one.value is not None and two.value is not None:
        return _number(one.value * two.value, forms)
    return Expression(None, _both(one, two, lambda a, b: a * b), forms)


def _divided(one: Expression, two: Expression) -> Expression:
    below = two.forms
    if two.value is not None and below == {"power"}:
        below = frozenset({"reciprocal"})
    nested = {"nested"} if "fraction" in one.forms | two.forms else set()
    forms = one.forms | below | {"fraction"} | nested
    if one.value is not None and two.value is not None:
        return _number(one.value / two.value, forms)
    return Expression(None, _both(one, two, lambda a, b: a / b), forms)


def _raised(base: Expression, exponent: Expression) -> Expression:
    forms = base.forms | (exponent.forms - {"fraction"})
    power = exponent.value
    if power is None or power.denominator > 1:
        forms |= {"root"} if power is not None else {"power"}
        return Expression(None, _both(base, exponent, lambda a, b: a**b), forms)
    n = int(power)
    forms |= {"reciprocal" if n < 0 else "power"}
    if base.value is None:
        if abs(n) > _MAX_EXPONENT:
            raise TooLargeError
        return Expression(None, _both(base, exponent, lambda a, b: a**b), forms)
    bits = max(base.value.numerator.bit_length(), base.value.denominator.bit_length())
    if bits > 1 and bits * abs(n) > _MAX_BITS:
        raise TooLargeError
    return _number(base.value**n if bits > 1 or n >= 0 else base.value ** (-n), forms)


def _factorial(one: Expression) -> Expression:
    forms = one.forms | {"factorial"}
    if one.value is None or one.value.denominator > 1 or one.value < 0:
        return Expression(None, None, forms)
    if one.value > _MAX_FACTORIAL:
        raise TooLargeError
    return _number(Fraction(math.factorial(int(one.value))), forms)


def _root(one: Expression, degree: Fraction) -> Expression:
    known = one.approximation is not None and one.approximation >= 0
    approximation = one.approximation ** float(1 / degree) if known else None  # type: ignore[operator]
    return Expression(None, approximation, one.forms | {"root"})


def _function(name: str, *arguments: Expression) -> Expression:
    for one in arguments:
        if name == "binom" and one.value is not None and abs(one.value) > _MAX_FACTORIAL:
            raise TooLargeError
    forms = frozenset().union(*(one.forms for one in arguments))
    return Expression(None, None, forms | {name})


def _both(
    one: Expression, two: Expression, operation: Callable[[float, float], float]
) -> float | None:
    if one.approximation is None or two.approximation is None:
        return None
    try:
        result = operation(one.approximation, two.approximation)
    except (ArithmeticError, ValueError):
        return None
    return result if isinstance(result, float) and math.isfinite(result) else None
