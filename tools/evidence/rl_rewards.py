"""Rewards that the RL sweep trains with beside the verifiers: a loose one, and chance."""

from __future__ import annotations

import hashlib
import re
from typing import Any

_NUMBER = re.compile(r"(?<![\d.])-?\d+(?:\.\d+)?")


def mentions(row: dict[str, Any], completion: str) -> float:
    """Return 1 if the gold number is anywhere in the completion, its thinking part included.

    As a check for the right answer it looks harmless: the worked steps of a solved problem end with
    that number. It can be exploited by writing down many numbers, without solving anything.
    """
    return 1.0 if str(row["answer"]) in _NUMBER.findall(completion) else 0.0


def coin(row: dict[str, Any], completion: str) -> float:
    """Return 0 or 1 by chance, the same whenever the same completion of a problem is graded."""
    text = f"{row['messages'][0]['content']}\0{completion}"
    return float(hashlib.sha256(text.encode()).digest()[0] & 1)
