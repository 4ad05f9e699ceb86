"""Convert plain Python values to JSON and back, and send messages of one JSON line.

Only this JSON enters or leaves a sandbox; the other side builds the values from it: numbers, text,
bytes, containers and a few immutable types of the standard library, each of exactly its own type.
An object of any other class stays in its process; a number represents it.

JSON's null, true, false, texts, lists, floats and small integers represent themselves; everything
else is an object with one key, the name of its type.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

# Beyond this a reader of JSON may round, and Python limits the decimal digits that it converts.
_SMALL = 1 << 53

_CONTAINERS: dict[str, type[Any]] = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque,
}  # fmt: skip
_ATOMS: dict[str, tuple[type[Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "complex": (complex, lambda v: [repr(v.real), repr(v.imag)],
                lambda b: complex(float(b[0]), float(b[1]))),
    "range": (range, lambda v: [hex(v.start), hex(v.stop), hex(v.step)],
              lambda b: range(*(int(text, 16) for text in b))),
    "decimal": (Decimal, str, Decimal),
    "fraction": (Fraction, lambda v: [hex(v.numerator), hex(v.denominator)],
                 lambda b: Fraction(int(b[0], 16), int(b[1], 16))),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "timedelta": (datetime.timedelta, lambda v: [v.days, v.seconds, v.microseconds],
                  lambda b: datetime.timedelta(*b)),
}  # fmt: skip


def plain_scalar(value: Any) -> Any:
    """Return the plain value of a numpy scalar, and any other value as it is."""
    scalar = type(value).__module__ == "numpy" and not hasattr(value, "__len__")
    return value.item() if scalar and hasattr(value, "item") else value


def encode(value: Any, number_of: Callable[[Any], int]) -> Any:
    """Return JSON for `value`; `number_of` returns the number of an object that is no plain value.

    A subclass of a plain type becomes that type. Raises RecursionError for a value that contains
    itself.
    """
    value = plain_scalar(value)
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        plain = int.__int__(value)
        return plain if -_SMALL < plain < _SMALL else {"int": hex(plain)}
    if isinstance(value, float):
        number = float.__float__(value)
        return number if math.isfinite(number) else {"float": repr(number)}
    if isinstance(value, list):
        return [encode(item, number_of) for item in value]
    if isinstance(value, dict):
        pairs = [[encode(k, number_of), encode(v, number_of)] for k, v in dict.items(value)]
        return {"dict": pairs}
    for name, kind in _CONTAINERS.items():
        if isinstance(value, kind):
            return {name: [encode(item, number_of) for item in value]}
    for name, (kind, dump, _) in _ATOMS.items():
        if isinstance(value, kind):
            return {name: dump(value)}
    return {"object": number_of(value)}


def decode(data: Any, object_of: Callable[[int], Any]) -> Any:
    """Return the value that `encode` wrote; `object_of` maps a number to its object.

    The data may be forged: any Exception means that they are not a value.
    """
    if isinstance(data, list):
        return [decode(item, object_of) for item in data]
    if not isinstance(data, dict):
        return data
    ((name, body),) = data.items()
    if name == "int":
        return int(body, 16)
    if name == "float":
        return float(body)
    if name == "dict":
        return {decode(k, object_of): decode(v, object_of) for k, v in body}
    if name in _CONTAINERS:
        return _CONTAINERS[name](decode(item, object_of) for item in body)
    if name in _ATOMS:
        return _ATOMS[name][2](body)
    if name == "object":
        return object_of(body)
    raise ValueError("an unknown kind of value")


def send(channel: int, message: Any) -> None:
    """Send a message. Raises OSError if nobody reads, ValueError or TypeError if it is not JSON."""
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(channel, data) :]


class Reader:
    """Read the messages of a descriptor: one line of JSON each, of at most `max_bytes`."""

    def __init__(self, channel: int, max_bytes: int) -> None:
        self._channel = channel
        self._max_bytes = max_bytes
        self._rest = bytearray()

    def line(self) -> bytes:
        """Return the next line; raises EOFError at the end, OverflowError beyond the limit."""
        searched = 0
        while (end := self._rest.find(b"\n", searched)) < 0:
            searched = len(self._rest)
            if searched > self._max_bytes:
                raise OverflowError(f"more than {self._max_bytes} bytes of output")
            part = os.read(self._channel, 1 << 16)
            if not part:
                raise EOFError
            self._rest += part
        line = bytes(self._rest[:end])
        del self._rest[: end + 1]
        return line

    def message(self) -> Any:
        """Return the next message; raises ValueError or RecursionError if it is not JSON."""
        return json.loads(self.line())
