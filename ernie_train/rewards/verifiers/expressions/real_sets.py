r"""Read sets of real numbers: intervals, their unions, inequalities, the line without some points.

(5, \infty), x > 5, 1 \le x < 2, x < 1 or x > 2, x \ne 2, \mathbb{R} \setminus \{2\} and
\{x \mid x > 5\} are all read as a list of intervals. Ends are kept as texts, ordered by value.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from ernie_train.rewards.verifiers.answer_text import bracket_depths
from ernie_train.rewards.verifiers.expressions.arithmetic import read_small

_NAME = r"(?P<name>[A-Za-z](?:_\w|_\{\w+\})?|\\[a-z]+)"
_BUILDER = re.compile(
    rf"\\\{{\s*{_NAME}\s*(?:\\in\s*\\mathbb\{{R\}}\s*)?(?:\\mid|\\vert|:|\|)\s*(?P<rule>.+)\\\}}"
)
_MEMBER = re.compile(rf"{_NAME}\s*\\in\s*(?P<set>.+)")
_RELATION = re.compile(r"\s*(<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z]))\s*")
_UNION = re.compile(r"\\cup(?![A-Za-z])|\\vee(?![A-Za-z])|\bor\b|或者?")
_BOTH = re.compile(r"\\wedge(?![A-Za-z])|\band\b|且")
_WITHOUT = re.compile(
    r"(?:\\mathbb\{R\}|\(\s*-\s*\\infty\s*,\s*\+?\s*\\infty\s*\))\s*(?:\\setminus|\\backslash|-)\s*"
    r"\\\{(?P<points>[^{}]+)\\\}"
)
_REALS = {"\\mathbb{R}", "all real numbers", "all reals", "(-\\infty, \\infty)", "全体实数"}
_INFINITE = re.compile(r"[+-]?\s*\\infty")
_MAX_INTERVALS = 16
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


@dataclass(frozen=True)
class Interval:
    r"""Hold the ends of an interval; -\infty and \infty are open ends."""

    low: str
    low_closed: bool
    high: str
    high_closed: bool


@dataclass(frozen=True)
class RealSet:
    """Hold intervals in order. `certain` is False for (1, 2) and [1, 2], which may be a pair."""

    name: str
    intervals: tuple[Interval, ...]
    certain: bool

    def equals(self, other: "RealSet", same: Callable[[str, str], bool]) -> bool:
        """Compare with another set; `same` compares two ends."""
        if self.name and other.name and self.name != other.name:
            return False
        if len(self.intervals) != len(other.intervals):
            return False
        return all(
            (a.low_closed, a.high_closed) == (b.low_closed, b.high_closed)
            and all(
                x == y if "\\infty" in x + y else same(x, y)
                for x, y in ((a.low, b.low), (a.high, b.high))
            )
            for a, b in zip(self.intervals, other.intervals, strict=True)
        )


def read_real_set(text: str) -> RealSet | None:
    """Return the set of real numbers that a normalized text describes, or None."""
    if not ("\\" in text or "<" in text or ">" in text or text[:1] in ("(", "[") or " " in text):
        return None
    name = ""
    if match := _BUILDER.fullmatch(text):
        name, text = match["name"], match["rule"].strip()
    elif match := _MEMBER.fullmatch(text):
        name, text = match["name"], match["set"].strip()
    if text in _REALS:
        return RealSet(name, (Interval("-\\infty", False, "\\infty", False),), True)
    if match := _WITHOUT.fullmatch(text):
        return _ordered(name, _gaps(match["points"].split(",")), True)
    intervals: list[Interval] = []
    parts = _UNION.split(text)
    certain = len(parts) > 1
    if len(parts) > _MAX_INTERVALS:
        return None
    for part in parts:
        read = _bracketed(part.strip()) or _inequality(part.strip())
        if read is None:
            return None
        found, variable, sure = read
        if variable and name and variable != name:
            return None
        name, certain = name or variable, certain or sure
        intervals += found
    return _ordered(name, intervals, certain)


_Read = tuple[list[Interval], str, bool]


def _bracketed(text: str) -> _Read | None:
    r"""Read (a, b) and its kinds, and a single point \{a\}."""
    if text.startswith("\\{") and text.endswith("\\}") and "," not in text:
        point = text[2:-2].strip()
        return ([Interval(point, True, point, True)], "", False) if _is_end(point) else None
    if text[:1] not in ("(", "[") or text[-1:] not in (")", "]"):
        return None
    depths = bracket_depths(text[1:-1])
    commas = [at for at, depth in enumerate(depths, 1) if depth == 0 and text[at] == ","]
    if min(depths, default=0) < 0 or len(commas) != 1:
        return None
    low, high = text[1 : commas[0]].strip(), text[commas[0] + 1 : -1].strip()
    if not (_is_end(low) and _is_end(high)):
        return None
    interval = Interval(_end(low), text[0] == "[", _end(high), text[-1] == "]")
    mixed = (text[0] == "[") != (text[-1] == "]")
    return [interval], "", mixed or "\\infty" in low + high


def _inequality(text: str) -> _Read | None:
    """Read a < x, x < a, a < x < b, x < a and x > b, x != a."""
    both = [part.strip() for part in _BOTH.split(text)]
    if len(both) == 2:
        read = [_inequality(part) for part in both]
        if read[0] is None or read[1] is None or read[0][1] != read[1][1]:
            return None
        return _meet(read[0], read[1])
    pieces = _RELATION.split(text)
    sides, signs = pieces[::2], pieces[1::2]
    if len(sides) == 2 and _is_variable(sides[1]) and signs[0] in _FLIPPED:
        sides, signs = sides[::-1], [_FLIPPED[signs[0]]]
    if len(sides) == 2 and _is_variable(sides[0]) and _is_end(sides[1]):
        return _half_line(sides[0], signs[0], sides[1])
    if len(sides) == 3 and _is_variable(sides[1]) and _is_end(sides[0]) and _is_end(sides[2]):
        if signs[0] in (">", "\\ge"):
            sides, signs = sides[::-1], [_FLIPPED.get(sign, sign) for sign in signs[::-1]]
        if set(signs) <= {"<", "\\le"}:
            low, high = _end(sides[0]), _end(sides[2])
            return [Interval(low, signs[0] == "\\le", high, signs[1] == "\\le")], sides[1], True
    return None


def _half_line(variable: str, sign: str, end: str) -> _Read:
    if sign == "\\ne":
        return _gaps([end]), variable, True
    if sign in ("<", "\\le"):
        return [Interval("-\\infty", False, _end(end), sign == "\\le")], variable, True
    return [Interval(_end(end), sign == "\\ge", "\\infty", False)], variable, True


def _meet(one: _Read, two: _Read) -> _Read | None:
    """Return the interval between a lower and an upper bound."""
    if len(one[0]) != 1 or len(two[0]) != 1:
        return None
    lower, upper = sorted((one[0][0], two[0][0]), key=lambda interval: interval.low == "-\\infty")
    if lower.high != "\\infty" or upper.low != "-\\infty":
        return None
    met = Interval(lower.low, lower.low_closed, upper.high, upper.high_closed)
    return [met], one[1], True


def _gaps(points: list[str]) -> list[Interval]:
    """Return the line without these points, which are texts."""
    ends = sorted((point.strip() for point in points), key=lambda point: _place(point) or 0)
    lows, highs = ["-\\infty", *ends], [*ends, "\\infty"]
    return [Interval(low, False, high, False) for low, high in zip(lows, highs, strict=True)]


def _ordered(name: str, intervals: list[Interval], certain: bool) -> RealSet:
    """Return the set with its intervals in order, those that touch made one."""
    placed = [(_place(interval.low), interval) for interval in intervals]
    if len(intervals) > 1 and all(place is not None for place, _ in placed):
        intervals = [interval for _, interval in sorted(placed, key=lambda pair: pair[0] or 0)]
    joined: list[Interval] = []
    for interval in intervals:
        last = joined[-1] if joined else None
        if last and last.high == interval.low and (last.high_closed or interval.low_closed):
            joined[-1] = Interval(last.low, last.low_closed, interval.high, interval.high_closed)
        else:
            joined.append(interval)
    return RealSet(name, tuple(joined), certain)


def _place(end: str) -> Fraction | float | None:
    """Return a number by which ends are ordered; None for one with letters."""
    if "\\infty" in end:
        return float("-inf") if end.startswith("-") else float("inf")
    expression = read_small(end)
    return expression.number if expression else None


def _is_variable(text: str) -> bool:
    return re.fullmatch(_NAME, text) is not None and text not in ("\\pi", "e", "\\infty")


def _is_end(text: str) -> bool:
    return _INFINITE.fullmatch(text) is not None or _place(text) is not None or _is_variable(text)


def _end(text: str) -> str:
    if _INFINITE.fullmatch(text):
        return "-\\infty" if text.startswith("-") else "\\infty"
    return text
