"""Referees: the definitions written out as sums in float64, closed forms, invariances."""

from __future__ import annotations

import numpy as np
import pytest

from ernie_train.losses import explained_variance, gae, group_advantages, varied_groups, whiten


def gae_by_definition(rewards, values, mask, gamma, lam):
    """A_i = sum_k (gamma lam)^k delta_{i+k} over the kept positions alone; no recursion."""
    advantages = np.zeros_like(rewards)
    for row in range(len(rewards)):
        kept = np.flatnonzero(mask[row])
        r, v = rewards[row, kept], np.append(values[row, kept], 0.0)
        deltas = r + gamma * v[1:] - v[:-1]
        for i, position in enumerate(kept):
            weights = (gamma * lam) ** np.arange(len(kept) - i)
            advantages[row, position] = (weights * deltas[i:]).sum()
    return advantages


@pytest.mark.parametrize(
    "gamma, lam", [(0.9, 0.8), (1.0, 0.95), (1.0, 1.0), (0.5, 0.0), (0.0, 1.0)]
)
def test_gae_equals_its_definition_with_holes_and_padding(gamma, lam):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 6, 9))
    mask = rng.random((6, 9)) < 0.6
    mask[0], mask[1] = True, False
    mask[2] = np.arange(9) < 4
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = gae_by_definition(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(advantages, expected, atol=1e-13)
    np.testing.assert_allclose(returns, np.where(mask, expected + values, 0), atol=1e-13)


def test_gae_closed_forms():
    rewards, values = np.array([[0.0, 0.0, 1.0]]), np.array([[0.2, 0.5, 0.6]])
    mask = np.ones((1, 3))
    # lam 1: what is earned from here on, less the value. lam 0: one step's surprise.
    whole, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    np.testing.assert_allclose(whole, [[0.8, 0.5, 0.4]])
    np.testing.assert_allclose(returns, [[1.0, 1.0, 1.0]])
    step, _ = gae(rewards, values, mask, gamma=1.0, lam=0.0)
    np.testing.assert_allclose(step, [[0.3, 0.1, 0.4]])
    discounted, _ = gae(rewards, 0 * values, mask, gamma=0.5, lam=0.5)
    np.testing.assert_allclose(discounted, [[0.25**2, 0.25, 1.0]])


def test_gae_bridges_holes_as_if_they_were_cut_out():
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 1, 4))
    wide_rewards, wide_values = np.full((2, 1, 7), np.nan)
    kept = [0, 1, 4, 6]
    mask = np.zeros((1, 7), bool)
    mask[0, kept] = True
    wide_rewards[0, kept], wide_values[0, kept] = rewards, values
    short = gae(rewards, values, np.ones((1, 4)), gamma=0.9, lam=0.7)
    wide = gae(wide_rewards, wide_values, mask, gamma=0.9, lam=0.7)
    for narrow, with_holes in zip(short, wide, strict=True):
        np.testing.assert_array_equal(with_holes[:, kept], narrow)
        np.testing.assert_array_equal(with_holes[~mask], 0)


def group_by_hand(rewards, valid, scale):
    out = np.zeros_like(rewards)
    for p, row in enumerate(rewards):
        members = [g for g in range(len(row)) if valid[p, g]]
        if len(members) < 2:
            continue
        mean = sum(row[g] for g in members) / len(members)
        variance = sum((row[g] - mean) ** 2 for g in members) / (len(members) - 1)
        for g in members:
            out[p, g] = (row[g] - mean) / (variance**0.5 + 1e-4 if scale == "std" else 1.0)
    return out


@pytest.mark.parametrize("scale", ["std", "none"])
def test_group_advantages_equal_a_loop_over_members(scale):
    rng = np.random.default_rng(2)
    rewards = rng.normal(size=(12, 5))
    valid = np.arange(5) < np.arange(12)[:, None] % 6  # 0 to 5 valid completions
    valid = rng.permuted(valid, axis=1)
    advantages = group_advantages(rewards, valid, scale=scale)
    np.testing.assert_allclose(advantages, group_by_hand(rewards, valid, scale), atol=1e-12)
    np.testing.assert_allclose(advantages.sum(1), 0, atol=1e-12)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_the_baseline_of_leave_one_out_is_the_mean_of_the_others(scale):
    rng = np.random.default_rng(8)
    rewards = rng.normal(size=(9, 5))
    valid = rng.permuted(np.arange(5) < 2 + np.arange(9)[:, None] % 4, axis=1)
    found = group_advantages(rewards, valid, scale=scale, baseline="leave_one_out")
    for p, g in np.ndindex(rewards.shape):
        own = rewards[p][valid[p]]
        others = [rewards[p, h] for h in range(5) if valid[p, h] and h != g]
        expected = rewards[p, g] - np.mean(others) if valid[p, g] else 0.0
        expected /= own.std(ddof=1) + 1e-4 if scale == "std" else 1.0
        assert found[p, g] == pytest.approx(expected, abs=1e-12)


def test_groups_without_a_difference_give_exactly_nothing():
    rewards = np.array(
        [[0.1] * 7, [1.0, 2, 3, 4, 5, 6, 7], [np.nan] * 7, [0.3, 0.3, 9, 9, 9, 9, 9]]
    )
    valid = np.array([[1] * 7, [0, 0, 0, 1, 0, 0, 0], [0] * 7, [1, 1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(varied_groups(rewards, valid), [False] * 4)
    np.testing.assert_array_equal(group_advantages(rewards, valid), np.zeros((4, 7)))
    np.testing.assert_array_equal(varied_groups([[0, 1, 5], [2, 2, 5]], [[1, 1, 0]] * 2), [1, 0])


def test_rewards_without_a_verdict_have_no_influence():
    rewards, valid = np.array([[1.0, 0.0, 0.5, 1e9]]), np.array([[1, 1, 1, 0]])
    unknown = np.array([[1.0, 0.0, 0.5, np.nan]])
    np.testing.assert_array_equal(
        group_advantages(rewards, valid), group_advantages(unknown, valid)
    )


def test_whitening_is_over_kept_values_and_keeps_signs():
    rng = np.random.default_rng(3)
    advantages, mask = rng.normal(3.0, 5.0, (4, 50)), rng.random((4, 50)) < 0.7
    white = whiten(advantages, mask)
    kept = advantages[mask]
    np.testing.assert_allclose(white[mask].mean(), 0, atol=1e-12)
    np.testing.assert_allclose(white[mask].std(ddof=1), 1, rtol=1e-9)
    assert np.corrcoef(white[mask], kept)[0, 1] == pytest.approx(1)
    np.testing.assert_array_equal(white[~mask], 0)
    expected = (kept - kept.mean()) / np.sqrt(np.var(kept, ddof=1) + 1e-8)
    np.testing.assert_allclose(white[mask], expected, atol=1e-12)


@pytest.mark.parametrize("kept", [[], [0.3], [0.1] * 7])
def test_whitening_what_does_not_vary_gives_nothing(kept):
    advantages = np.array([*kept, np.nan])
    mask = np.array([*[1] * len(kept), 0])
    np.testing.assert_array_equal(whiten(advantages, mask), np.zeros(len(kept) + 1))


def test_explained_variance():
    returns, mask = np.array([[1.0, 2.0, 3.0, 99.0]]), np.array([[1, 1, 1, 0]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(returns + 5, returns, mask) == 1, "a constant error explains as much"
    assert explained_variance(np.full((1, 4), 2.0), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(1 - 4)
    assert explained_variance(returns / 2, returns, mask) == pytest.approx(1 - 0.25)
    assert explained_variance(returns, np.full((1, 4), 0.1), mask) is None
    assert explained_variance(returns, returns, [[1, 0, 0, 0]]) is None


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: gae(x, x, x, gamma=1.1, lam=1.0), "gamma=1.1"),
        (lambda x: gae(x, x, x, gamma=1.0, lam=-0.1), "lam=-0.1"),
        (lambda x: gae(x, x[:1], x, gamma=1.0, lam=1.0), r"values \[1, 3\] must have the shape"),
        (lambda x: gae(x, x, x[:, :1], gamma=1.0, lam=1.0), r"mask \[2, 1\]"),
        (lambda x: group_advantages(x, x[:1]), r"valid \[1, 3\]"),
        (lambda x: group_advantages(x, x, scale="var"), "scale='var'"),
        (lambda x: group_advantages(x, x, baseline="median"), "baseline='median'"),
        (lambda x: whiten(x, x[0]), r"mask \[3\]"),
        (lambda x: explained_variance(x, x[0], x), r"returns \[3\]"),
    ],
)
def test_mistakes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones((2, 3)))
