"""A check's figures, its outcome, and the run of all checks, in which none stops another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ernie_train.core.terminal import one_line

PASS, FAIL, SKIPPED = "pass", "fail", "skipped"


class Skip(Exception):
    """Raised by a check that cannot run here; its text is the reason."""


class Figure(NamedTuple):
    """A measured value and the bounds within which the check passes; None: no bound."""

    name: str
    value: float
    most: float | None = None
    least: float | None = None

    @property
    def passed(self) -> bool:
        """Return whether the value is a number within its bounds."""
        low = -math.inf if self.least is None else self.least
        high = math.inf if self.most is None else self.most
        return math.isfinite(self.value) and low <= self.value <= high

    def __str__(self) -> str:
        bounds = [f"at least {self.least:g}"] if self.least is not None else []
        bounds += [f"at most {self.most:g}"] if self.most is not None else []
        return f"{self.name} {self.value:.4g}" + (f" ({', '.join(bounds)})" if bounds else "")


@dataclass(frozen=True)
class Result:
    """The figures of a check, and a note on what ran."""

    figures: list[Figure]
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """The end of a check; `note` is the reason of a skipped or failed one."""

    name: str
    status: str
    figures: list[Figure] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; a figure that is no number is null."""
        figures = [
            {**figure._asdict(), "value": figure.value if math.isfinite(figure.value) else None}
            for figure in self.figures
        ]
        return {**vars(self), "figures": figures, "seconds": round(self.seconds, 2)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Outcome:
        """Read what `as_dict` returned."""
        figures = [
            Figure(**{**figure, "value": math.nan if figure["value"] is None else figure["value"]})
            for figure in data["figures"]
        ]
        return cls(**{**data, "figures": figures})


Check = Callable[[str], Result]  # given the device, `cpu` or `gpu`


def run_check(name: str, check: Check, device: str) -> Outcome:
    """Run a check; whatever it raises is its outcome."""
    began = time.perf_counter()
    try:
        result = check(device)
    except Skip as reason:
        return Outcome(name, SKIPPED, note=str(reason), seconds=time.perf_counter() - began)
    except Exception as error:  # a kernel fails in any way; the other checks still run
        note = one_line(f"{type(error).__name__}: {error}", 600)
        return Outcome(name, FAIL, note=note, seconds=time.perf_counter() - began)
    status = PASS if all(figure.passed for figure in result.figures) else FAIL
    return Outcome(name, status, result.figures, result.note, time.perf_counter() - began)
