"""pass@k, majority votes and intervals against closed forms."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest

from ernie_train.eval.estimates import bootstrap, estimates, majority_vote, pass_at_k


@pytest.mark.parametrize(("n", "c"), [(5, 0), (5, 1), (5, 2), (5, 5), (1, 1), (6, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n, c):
    drawn = [at < c for at in range(n)]
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(drawn, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@pytest.mark.parametrize("p", [0.03, 0.4])
def test_pass_at_k_is_unbiased(p):
    n = 9
    for k in (1, 4, 9):
        chances = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        expected = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances))
        assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match="completions"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        ("aab", [1, 1, 0], 1.0),
        ("abb", [1, 0, 0], 0.0),
        ("ab", [1, 0], 0.5),  # a tie: either is as likely
        ("abc", [0, 0, 1], 1 / 3),
        ("a..", [1, 0, 0], 1.0),  # no answer, no vote
        ("...", [0, 0, 0], 0.0),
        ("aaab", [1, 1, 0, 0], 2 / 3),  # one of them could not be scored
    ],
)
def test_majority_vote(answers, correct, expected):
    voted = [None if answer == "." else answer for answer in answers]
    assert majority_vote(voted, list(map(bool, correct))) == pytest.approx(expected)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, truth, covered = np.random.default_rng(0), 0.3, 0
    for trial in range(300):
        found = bootstrap(rng.random(80) < truth, seed=trial)
        covered += found.low <= truth <= found.high
    assert 0.91 < covered / 300 < 0.98


def test_the_interval_of_the_normal_approximation_and_of_equal_values():
    values = [1.0] * 300 + [0.0] * 700
    found = bootstrap(values)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert found.value == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.003)
    assert found == bootstrap(values[::-1]), "neither order nor chance decides"
    none, all_of_them = bootstrap([0.0] * 20), bootstrap([1.0] * 20)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert (none.low, all_of_them.high, all_of_them.low) == (0.0, 1.0, 1 - none.high)


@pytest.mark.parametrize(
    ("value", "problems", "low", "high"),
    [
        (0.5, 20, 0.2993, 0.7007),  # 10 of 20, as tables of Wilson's interval have it
        (0.25, 40, 0.1419, 0.4019),  # 10 of 40
        (0.5, 1, 0.0546, 0.9454),
        (0.1, 100, 0.0552, 0.1744),  # 10 of 100
    ],
)
def test_equal_values_have_the_interval_of_as_many_problems_solved(value, problems, low, high):
    found = bootstrap([value] * problems)
    assert found.value == value
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    # Its ends are where the normal approximation at that truth reaches the value.
    for end in (found.low, found.high):
        spread = (end * (1 - end) / problems) ** 0.5
        assert abs(value - end) == pytest.approx(1.959964 * spread, rel=1e-5)


def test_estimates_have_the_names_of_the_field():
    correct = [[True, False], [False, False]]
    found = estimates(correct, [["1", "2"], ["3", "3"]], [1, 2])
    assert {name: one.value for name, one in found.items()} == {
        "pass@1": 0.25, "pass@2": 0.5, "maj@2": 0.25,
    }  # fmt: skip
    assert list(estimates(correct, None, [1])) == ["pass@1"]
