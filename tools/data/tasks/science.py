"""Science: short computed questions with units, and conversions of units."""

import random
from decimal import Decimal

from .base import Item, Slip, count_down, count_on

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


def formula(rng: random.Random) -> Item | None:
    """Ask for one of the three quantities of a law from the other two."""
    product, unit, first, unit1, second, unit2 = rng.choice(_LAWS)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    amounts = {product: f"{a * b} {unit}", first: f"{a} {unit1}", second: f"{b} {unit2}"}
    wanted = rng.choice([product, first, second])
    given = " and ".join(f"{name} {amounts[name]}" for name in amounts if name != wanted)
    if wanted == product:
        steps = [f"{product} = {first} * {second}", f"{a} * {b}", count_on(0, a, b)]
    else:
        known, factor = (second, b) if wanted == first else (first, a)
        steps = [f"{wanted} = {product} / {known}", f"{a * b} / {factor}"]
        steps.append(count_down(a * b, factor))
    return Item(
        key=f"{wanted}: {given}",
        prompt=rng.choice(_WORDINGS).format(given=given, wanted=wanted),
        think="\n".join(steps),
        answer=amounts[wanted],
        reward="exact",
        # Its unit is forgotten.
        slip=Slip("\n".join(steps), str(a)) if wanted == first else None,
    )


_UNITS = [
    ("km", "m", 1000), ("m", "cm", 100), ("cm", "mm", 10), ("m", "mm", 1000), ("t", "kg", 1000),
    ("kg", "g", 1000), ("g", "mg", 1000), ("L", "mL", 1000), ("kJ", "J", 1000), ("kW", "W", 1000),
    ("V", "mV", 1000), ("A", "mA", 1000), ("h", "min", 60), ("min", "s", 60),
]  # fmt: skip


def _plain(value: Decimal) -> str:
    """Return a decimal without exponent and trailing zeros."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def unit_conversion(rng: random.Random) -> Item | None:
    """Ask for a whole number of one unit in a larger or smaller one."""
    large, small, factor = rng.choice(_UNITS)
    value = rng.randint(2, 9 if factor == 60 else 99)
    return _unit_conversion(rng, large, small, factor, Decimal(value))


def unit_conversion_decimal(rng: random.Random) -> Item | None:
    """Ask for the same with a decimal point."""
    large, small, factor = rng.choice([unit for unit in _UNITS if unit[2] != 60])
    return _unit_conversion(rng, large, small, factor, Decimal(rng.randint(11, 999)) / 100)


def _unit_conversion(
    rng: random.Random, large: str, small: str, factor: int, value: Decimal
) -> Item:
    if rng.random() < 0.5:
        amount, result, one, other, sign = value, value * factor, large, small, "*"
    else:
        amount, result, one, other, sign = value * factor, value, small, large, "/"
    prompt = f"Convert {_plain(amount)} {one} to {other}."
    think = f"1 {large} = {factor} {small}\n{_plain(amount)} {sign} {factor} = {_plain(result)}"
    return Item(
        key=prompt,
        prompt=prompt,
        think=think,
        answer=f"{_plain(result)} {other}",
        reward="exact",
        slip=Slip(think, _plain(result)) if sign == "/" else None,  # the unit is forgotten
    )
