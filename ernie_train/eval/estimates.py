"""Estimates over problems with several completions each: pass@k, majority vote, intervals.

Shapes: P problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist

import numpy as np

LEVEL = 0.95  # of intervals
_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """Hold a mean over problems and the ends of its interval of `LEVEL`."""

    value: float
    low: float
    high: float


def pass_at_k(completions: int, correct: int, k: int) -> float:
    """Return the chance that k of n completions, drawn without replacement, hold a correct one.

    It is 1 - C(n-c, k) / C(n, k), which is unbiased for k independent completions
    (arXiv:2107.03374). Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= completions or not 0 <= correct <= completions:
        raise ValueError(f"pass@{k} of {completions} completions with {correct} correct ones")
    return 1.0 - comb(completions - correct, k) / comb(completions, k)


def majority_vote(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Return the chance that the answer which most completions give is correct.

    Among equally frequent answers each is as likely. None is a completion without an answer, which
    has no vote; without any vote the result is 0. Where completions of one answer were graded
    differently, the share of the correct ones counts.
    """
    votes: dict[str, list[bool]] = {}
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(right)
    most = max(map(len, votes.values()), default=0)
    leading = [sum(vote) / most for vote in votes.values() if len(vote) == most]
    return sum(leading) / len(leading) if leading else 0.0


def bootstrap(values: Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean of [P] values in 0..1 and its percentile-bootstrap interval over problems.

    Where all values are equal, resampling knows no spread: the interval of a share of problems that
    are each solved or not stands in its place, which is the widest that values of this mean have.
    It is the exact binomial bound (Clopper-Pearson) at 0 and 1, and Wilson's interval between.
    """
    distinct, counts = np.unique(np.asarray(values, float), return_counts=True)
    size, tail = len(values), (1 - LEVEL) / 2
    if len(distinct) == 1 and distinct[0] in (0.0, 1.0):
        far = float(tail ** (1 / size))
        return Estimate(0.0, 0.0, 1 - far) if distinct[0] == 0 else Estimate(1.0, far, 1.0)
    if len(distinct) == 1:
        return _wilson(float(distinct[0]), size)
    rng = np.random.Generator(np.random.Philox(key=seed))
    # Resampling problems is drawing how often each distinct value comes: no [resamples, P] array.
    means = rng.multinomial(size, counts / size, _RESAMPLES) @ distinct / size
    low, high = np.quantile(means, (tail, 1 - tail))
    return Estimate(float(counts @ distinct / size), float(low), float(high))


def _wilson(share: float, size: int) -> Estimate:
    """Return a share of `size` problems with Wilson's interval (doi:10.2307/2276774)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    weight = size / (size + z * z)
    centre = weight * share + (1 - weight) / 2
    half = weight * z * sqrt(share * (1 - share) / size + (z / (2 * size)) ** 2)
    return Estimate(share, centre - half, centre + half)


def estimates(
    correct: Sequence[Sequence[bool]],
    answers: Sequence[Sequence[str | None]] | None,
    ks: Sequence[int],
) -> Mapping[str, Estimate]:
    """Return pass@k for each k, and maj@n where answers can be compared, by name.

    Args:
        correct: for each of P problems, which of its n completions are correct; completions that
            could not be scored are not, and stay in the denominator.
        answers: their answers in a form in which equal ones are equal texts; None if there is none.
        ks: sizes of the samples, each at most n.
    """
    found = {
        f"pass@{k}": bootstrap([pass_at_k(len(row), sum(row), k) for row in correct]) for k in ks
    }
    if answers is not None:
        votes = [majority_vote(*pair) for pair in zip(answers, correct, strict=True)]
        found[f"maj@{len(correct[0])}"] = bootstrap(votes)
    return found
