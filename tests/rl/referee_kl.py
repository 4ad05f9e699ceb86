"""The KL in the loss, written down a second time, in numpy and float64."""

from __future__ import annotations

import numpy as np

from tests.rl.referee_adamw import Array


def k3(d: Array) -> tuple[Array, Array]:
    """Return exp(-d) - 1 + d and its slope, which is never below -19."""
    edge = -np.log(20)
    line = 20 - 1 + edge - 19 * (d - edge)
    value = np.where(d < edge, line, np.exp(-np.maximum(d, edge)) - 1 + d)
    return value, 1 - np.minimum(np.exp(-d), 20)


def kl_terms(logprobs: Array, old: Array, ref: Array, kind: str | None) -> tuple[Array, ...]:
    """Return the weighted estimate of each token, its slope, and whether a ratio is truncated."""
    d, moved = logprobs - ref, np.exp(logprobs - old)
    estimate, slope = (d**2 / 2, d) if kind == "k2" else k3(d)
    weight = np.minimum(moved, 20)
    return weight * estimate, weight * slope, (moved > 20) | ((kind != "k2") & (np.exp(-d) > 20))
