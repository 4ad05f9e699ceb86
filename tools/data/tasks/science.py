"""Science: short computed questions with units, and conversions of units."""

import random
from decimal import Decimal

from .base import Item, count_down, count_on, held_out

# Quantity = first * second, with unit and wording of each of the three.
_LAWS = [
    ("distance", "m", "speed", "m/s", "time", "s"),
    ("mass", "g", "density", "g/cm3", "volume", "cm3"),
    ("force", "N", "mass", "kg", "acceleration", "m/s2"),
    ("energy", "J", "power", "W", "time", "s"),
    ("work", "J", "force", "N", "distance", "m"),
    ("voltage", "V", "current", "A", "resistance", "ohm"),
    ("momentum", "kg m/s", "mass", "kg", "speed", "m/s"),
    ("force", "N", "pressure", "Pa", "area", "m2"),
    ("charge", "C", "current", "A", "time", "s"),
    ("power", "W", "voltage", "V", "current", "A"),
    ("wave speed", "m/s", "frequency", "Hz", "wavelength", "m"),
]
_WORDINGS = [
    "Given {given}, find the {wanted}.",
    "What is the {wanted} for {given}?",
    "Compute the {wanted} from {given}.",
]


def formula(rng: random.Random, level: int) -> Item | None:
    """Ask for one of the three quantities of a law from the other two.

    Two numbers up to 9, one of them at most 5; at the second level two that no demonstration
    multiplies or divides, at the third the one that is wanted is 10 to 12.
    """
    product, unit, first, unit1, second, unit2 = rng.choice(_LAWS)
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    amounts = {product: f"{a * b} {unit}", first: f"{a} {unit1}", second: f"{b} {unit2}"}
    wanted = rng.choice([product, first, second])
    result = a * b if wanted == product else a if wanted == first else b
    known = b if wanted == first else a
    if level == 3:
        if wanted == product or result < 10 or known > 9:
            return None
    elif max(a, b) > 9 or min(a, b) > 5 or held_out("product", *sorted((a, b))) != (level == 2):
        return None
    given = " and ".join(f"{name} {amounts[name]}" for name in amounts if name != wanted)
    if wanted == product:
        steps = [f"{product} = {first} * {second}", f"{a} * {b}", count_on(0, a, b)]
    else:
        other = second if wanted == first else first
        steps = [f"{wanted} = {product} / {other}", f"{a * b} / {known}"]
        steps.append(count_down(a * b, known))
    return Item(
        key=f"{wanted}: {given}",
        prompt=rng.choice(_WORDINGS).format(given=given, wanted=wanted),
        think="\n".join(steps),
        answer=amounts[wanted],
        reward="exact",
    )


_UNITS = [
    ("km", "m", 1000), ("m", "cm", 100), ("cm", "mm", 10), ("m", "mm", 1000), ("t", "kg", 1000),
    ("kg", "g", 1000), ("g", "mg", 1000), ("L", "mL", 1000), ("kJ", "J", 1000), ("kW", "W", 1000),
    ("V", "mV", 1000), ("A", "mA", 1000), ("kN", "N", 1000), ("MW", "kW", 1000),
    ("bar", "mbar", 1000), ("mol", "mmol", 1000), ("kPa", "Pa", 1000), ("GHz", "MHz", 1000),
]  # fmt: skip


def _plain(value: Decimal) -> str:
    """Return a decimal without exponent and trailing zeros."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def unit_conversion(rng: random.Random, level: int) -> Item | None:
    """Ask for an amount of one unit in a larger or smaller one.

    Whole numbers of up to two digits; at the second level those that no demonstration converts, at
    the third with two decimals.
    """
    large, small, factor = rng.choice(_UNITS)
    to_smaller = rng.random() < 0.5
    value = Decimal(rng.randint(2, 99))
    if level == 3:
        value = Decimal(rng.randint(11, 999)) / 100
    elif held_out("amount", value) != (level == 2):
        return None
    if to_smaller:
        amount, result, one, other, sign = value, value * factor, large, small, "*"
    else:
        amount, result, one, other, sign = value * factor, value, small, large, "/"
    prompt = f"Convert {_plain(amount)} {one} to {other}."
    answer = f"{_plain(result)} {other}"
    return Item(
        key=prompt,
        prompt=prompt,
        think=f"1 {large} = {factor} {small}\n{_plain(amount)} {sign} {factor} = {_plain(result)}",
        answer=answer,
        reward="exact",
    )
