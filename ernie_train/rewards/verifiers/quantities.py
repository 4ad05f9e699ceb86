r"""Read numbers as people write them, with or without a unit, to exact values.

12, -0.5, 1,000, 3/4, \frac{3}{4}, 1\frac{3}{4}, 2.5 \times 10^{3}, 10%, $12, 5 cm, 20 m/s. There is
no parser of expressions, and only ASCII digits count. 10% is 1/10, so it is not 10. A quantity
without a unit equals one with any unit, as "12" answers "how many apples"; two with units must
agree in value and kind: 5 m is 500 cm and not 5 cm.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from ernie_train.rewards.verifiers.answer_text import HEDGES, fold

_DIGITS = r"\d{1,200}"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d{{0,200}})?|\.{_DIGITS})"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\s*(?:
      (?P<whole>\d{{1,200}})?\s*\\frac\s*(?:\{{(?P<ln>[+-]?{_DIGITS})\}}\s*\{{(?P<ld>{_DIGITS})\}}
                                           |(?P<sn>\d)(?P<sd>\d))
    | (?P<mixed>\d{{1,200}})\ (?P<mn>{_DIGITS})/(?P<md>{_DIGITS})
    | (?P<n>{_DIGITS})\s*/\s*(?P<d>[+-]?{_DIGITS})
    | (?P<decimal>{_DECIMAL})(?:\s*(?:\\times|\*|x)\s*10\^\{{?(?P<power>[+-]?\d{{1,3}})\}}?)?
    )""",
    re.VERBOSE | re.ASCII,
)
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])", re.ASCII)
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})")

_UNITS: dict[str, tuple[str, Fraction]] = {}
for _kind, _names in {
    "length": "mm:1/1000 cm:1/100 dm:1/10 m:1 km:1000 millimeter:1/1000 centimeter:1/100 meter:1 "
    "kilometer:1000 metre:1 centimetre:1/100 kilometre:1000 in:127/5000 inch:127/5000 "
    "inche:127/5000 ft:381/1250 foot:381/1250 feet:381/1250 yd:1143/1250 yard:1143/1250 "
    "mi:201168/125 mile:201168/125",
    "mass": "mg:1/1000000 g:1/1000 kg:1 t:1000 gram:1/1000 kilogram:1",
    "time": "ms:1/1000 s:1 sec:1 second:1 min:60 minute:60 h:3600 hr:3600 hour:3600 day:86400 "
    "week:604800",
    "volume": "mL:1/1000 ml:1/1000 L:1 l:1 liter:1 litre:1 milliliter:1/1000",
    "money": "dollar:1 usd:1 USD:1 cent:1/100",
    "angle": "degree:1 deg:1 circ:1",
    "energy": "J:1 kJ:1000 joule:1",
    "force": "N:1 kN:1000 newton:1",
    "power": "W:1 kW:1000 watt:1",
    "voltage": "mV:1/1000 V:1 kV:1000 volt:1",
    "current": "mA:1/1000 A:1 ampere:1",
}.items():
    for _entry in _names.split():
        _name, _, _factor = _entry.partition(":")
        _UNITS[_name] = (_kind, Fraction(_factor))
_UNIT = re.compile(r"([A-Za-z]+)(?:\s?\^\s?\{?([1-4])\}?)?", re.ASCII)
_UNIT_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9 /^{}*.-]{0,60}", re.ASCII)
_MAX_UNIT_WORDS = 4
# Words that look like units after a number and belong to an expression.
_NO_UNITS = HEDGES | {"pi", "sqrt", "sin", "cos", "tan", "ln", "log", "and", "e", "i", "x", "y"}
_POWERS = {"square": "2", "sq": "2", "cubic": "3"}


@dataclass(frozen=True)
class Unit:
    """Describe a unit. `kinds`: the quantities measured and their powers; `factor`: base units."""

    kinds: tuple[tuple[str, int], ...]
    factor: Fraction


@dataclass(frozen=True)
class Quantity:
    """Hold an exact value with its unit, if any."""

    value: Fraction
    unit: Unit | None

    def equals(self, gold: "Quantity") -> bool:
        """Compare values; in base units if both sides have a unit of the same kind."""
        if self.unit is None or gold.unit is None:
            return self.value == gold.value
        if self.unit.kinds != gold.unit.kinds:
            return False
        return self.value * self.unit.factor == gold.value * gold.unit.factor


def parse_number(text: str) -> Fraction | None:
    """Return the value of an integer, decimal or fraction without a unit; None for other texts."""
    quantity = parse_quantity(text)
    return quantity.value if quantity is not None and quantity.unit is None else None


def parse_quantity(text: str) -> Quantity | None:
    """Return a number and its unit; None if the text is anything else, or more than that."""
    text = text.strip().removesuffix(".").strip()
    money = re.match(r"([+-]?)\s*\\?\$\s*(?=[\d.])", text)
    if money:
        text = (money.group(1) + text[money.end() :]).removesuffix("$")
    text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    number = _NUMBER.match(text)
    value = _value(number) if number else None
    if number is None or value is None:
        return None
    rest = _DEGREES.sub(" circ", text[number.end() :])
    if rest.strip() in ("%", "\\%", "percent"):
        return Quantity(value / 100, None)
    if not rest.strip():
        return Quantity(value, _known_unit("dollar") if money else None)
    unit = _read_unit(rest)
    return None if unit is None else Quantity(value, unit)


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""Split an expression from a known unit of two letters or more after it: 12\pi cm^3."""
    words = text.split(" ")
    for i in range(max(1, len(words) - _MAX_UNIT_WORDS), len(words)):
        tail = " ".join(words[i:])
        if tail[:2].isalpha() and (unit := _known_unit(tail)) is not None:
            return " ".join(words[:i]), unit
    return text, None


def _value(match: re.Match[str]) -> Fraction | None:
    part = match.groupdict()
    sign = -1 if part["sign"] == "-" else 1
    if part["decimal"] is not None:
        return sign * Fraction(part["decimal"]) * Fraction(10) ** int(part["power"] or 0)
    numerator = part["ln"] or part["sn"] or part["mn"] or part["n"]
    denominator = part["ld"] or part["sd"] or part["md"] or part["d"]
    if int(denominator) == 0:
        return None
    whole = int(part["whole"] or part["mixed"] or 0)
    return sign * (whole + Fraction(int(numerator), int(denominator)))


def _read_unit(text: str) -> Unit | None:
    """Return the unit that follows a number; an unknown name is a kind of its own."""
    apart, text = text[0].isspace(), text.strip()
    if not _UNIT_TEXT.fullmatch(text):
        return None
    known = _known_unit(text)
    # `2m` and `2ab` are products, `2 m` and `2cm` are not.
    if known is not None and (apart or len(text) > 1):
        return known
    words = fold(text).split()
    if not apart or len(words) > 3 or not all(word.isalpha() for word in words):
        return None
    if set(words) & _NO_UNITS or len(words[0]) < 2:
        return None
    return Unit(((" ".join(word.removesuffix("s") for word in words), 1),), Fraction(1))


def _known_unit(text: str) -> Unit | None:
    """Return a known unit such as cm, m/s, m^2, km per hour, square meters, kg m/s, or None."""
    kinds: dict[str, int] = {}
    factor, text = Fraction(1), re.sub(r"\s+\^", "^", text)
    for place, side in enumerate(re.split(r"/|\bper\b", text)):
        side = re.sub(r"\b(square|sq|cubic) (\w+)", lambda m: m[2] + "^" + _POWERS[m[1]], side)
        for written in side.replace("*", " ").split():
            match = _UNIT.fullmatch(written)
            name = match.group(1) if match else ""
            entry = _UNITS.get(name) or _UNITS.get(fold(name).removesuffix("s"))
            if match is None or entry is None:
                return None
            power = int(match.group(2) or 1) * (-1 if place else 1)
            kinds[entry[0]] = kinds.get(entry[0], 0) + power
            factor *= entry[1] ** power
    if not kinds:
        return None
    return Unit(tuple(sorted(kinds.items())), factor)
