"""The reward that both sides call, a Python function of the completion's text."""

from __future__ import annotations

from typing import Any


def score(row: Any, completion: str) -> float:
    """Return the share of different characters among the first hundred: never quite the same."""
    text = completion[:100]
    return len(set(text)) / max(1, len(text))
