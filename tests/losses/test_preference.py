"""Referees: float64 numpy, finite differences, DPO's closed forms, a search over all pairs."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import paddle
import pytest

from ernie_train.losses import (
    Pair,
    PairCounts,
    choose_pairs,
    completion_logratios,
    dpo_loss,
    implicit_rewards,
    ipo_loss,
    orpo_loss,
    simpo_loss,
)
from tests.losses.finite_differences import gradient


def leaf(array):
    return paddle.to_tensor(array, stop_gradient=False)


def test_dpo_closed_forms():
    same = paddle.to_tensor([-3.0, 0.0, 7.0], "float64")
    np.testing.assert_allclose(dpo_loss(same, same, beta=0.1).numpy(), math.log(2), rtol=1e-12)
    # beta x margin 0.5
    chosen, rejected = paddle.to_tensor([2.0], "float64"), paddle.to_tensor([-3.0], "float64")
    assert dpo_loss(chosen, rejected, beta=0.1).item() == pytest.approx(0.474077, abs=5e-7)
    assert dpo_loss(rejected, chosen, beta=0.1).item() == pytest.approx(0.974077, abs=5e-7)


def test_dpo_loss_and_gradients():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0, 10, (2, 6))
    x, y = leaf(chosen), leaf(rejected)
    losses = dpo_loss(x, y, beta=0.3)
    losses.sum().backward()

    def total(c, r):
        return np.log(1 + np.exp(-0.3 * (c - r))).sum()

    np.testing.assert_allclose(losses.numpy(), np.log(1 + np.exp(-0.3 * (chosen - rejected))))
    expected = gradient(lambda z: total(z, rejected), chosen)
    np.testing.assert_allclose(x.grad.numpy(), expected, atol=1e-8)
    np.testing.assert_allclose(y.grad.numpy(), -expected, atol=1e-8)
    assert (x.grad.numpy() < 0).all(), "a step makes the chosen ones likelier"


@pytest.mark.parametrize(
    ("loss", "by_definition", "slope"),
    [
        (lambda c, r: ipo_loss(c, r, beta=0.3), lambda m: (m - 1 / 0.6) ** 2, -1 / 0.3),
        (
            lambda c, r: simpo_loss(c, r, beta=2.0, gamma=0.7),
            lambda m: np.log(1 + np.exp(0.7 - 2 * m)),
            -2 / (1 + math.exp(-0.7)),
        ),
    ],
    ids=["ipo", "simpo"],
)
def test_ipo_and_simpo_by_definition_with_their_gradients(loss, by_definition, slope):
    rng = np.random.default_rng(4)
    chosen, rejected = rng.normal(0, 2, (2, 6))
    x, y = leaf(chosen), leaf(rejected)
    losses = loss(x, y)
    losses.sum().backward()
    np.testing.assert_allclose(losses.numpy(), by_definition(chosen - rejected), rtol=1e-12)
    expected = gradient(lambda z: by_definition(z - rejected).sum(), chosen)
    np.testing.assert_allclose(x.grad.numpy(), expected, atol=1e-7)
    np.testing.assert_allclose(y.grad.numpy(), -expected, atol=1e-7)
    same = leaf(np.zeros(1))
    loss(same, paddle.zeros([1], "float64")).sum().backward()
    assert same.grad.item() == pytest.approx(slope)


def test_orpo_by_definition_with_its_gradients():
    rng = np.random.default_rng(4)
    chosen, rejected = -rng.exponential(1.0, (2, 6))
    x, y = leaf(chosen), leaf(rejected)
    losses = orpo_loss(x, y, beta=0.2)
    losses.sum().backward()

    def by_definition(c, r):
        odds = [np.exp(lp) / (1 - np.exp(lp)) for lp in (c, r)]
        return -0.2 * np.log(1 / (1 + odds[1] / odds[0]))

    np.testing.assert_allclose(losses.numpy(), by_definition(chosen, rejected), rtol=1e-10)
    for found, wanted in (
        (x.grad, gradient(lambda z: by_definition(z, rejected).sum(), chosen)),
        (y.grad, gradient(lambda z: by_definition(chosen, z).sum(), rejected)),
    ):
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-7)


def test_orpo_is_precise_for_certain_and_for_impossible_completions():
    logprobs = np.array([-1e-4, -80.0, 0.0], np.float32)
    x = leaf(logprobs)
    losses = orpo_loss(x, paddle.full([3], math.log(0.5)), beta=1.0)  # odds of 1
    losses.sum().backward()
    np.testing.assert_allclose(losses.numpy(), [1e-4, 80.0, 0.0], rtol=1e-3, atol=1e-6)
    assert np.isfinite(x.grad.numpy()).all()


def test_ipo_pulls_a_margin_back_to_its_target():
    target = paddle.to_tensor([1 / (2 * 0.25)], "float64")
    zero = paddle.zeros([1], "float64")
    assert ipo_loss(target, zero, beta=0.25).item() == 0
    assert ipo_loss(target * 2, zero, beta=0.25).item() == ipo_loss(zero, zero, beta=0.25).item()


def test_dpo_stays_finite_far_from_the_reference():
    x = leaf(np.array([-1e6, 1e6], np.float32))
    losses = dpo_loss(x, paddle.zeros([2]), beta=1.0)
    losses.sum().backward()
    np.testing.assert_allclose(losses.numpy(), [1e6, 0])
    np.testing.assert_allclose(x.grad.numpy(), [-1, 0])


def test_logratios_are_sums_over_the_tokens_of_a_completion():
    rng = np.random.default_rng(1)
    logprobs, ref = rng.normal(size=(2, 12))
    ids = np.array([0, 0, 2, 2, 2, 0, 1, 4, 4, 4, 4, 4])
    x, y = leaf(logprobs), leaf(ref)
    ratios = completion_logratios(x, y, paddle.to_tensor(ids), 5)
    expected = [(logprobs - ref)[ids == i].sum() for i in range(5)]
    np.testing.assert_allclose(ratios.numpy(), expected, atol=1e-14)
    weights = rng.normal(size=5)
    (ratios * paddle.to_tensor(weights)).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), weights[ids])
    assert y.grad is None


def test_length_normalized_logratios_are_means_with_or_without_a_reference():
    rng = np.random.default_rng(1)
    logprobs, ref = rng.normal(size=(2, 12))
    ids = np.array([0, 0, 2, 2, 2, 0, 1, 4, 4, 4, 4, 4])
    counts = np.array([3, 1, 3, 1, 5])  # completion 3 has no token: its ratio is 0
    for reference in (ref, None):
        x = leaf(logprobs)
        given = None if reference is None else leaf(reference)
        ratios = completion_logratios(x, given, paddle.to_tensor(ids), 5, length_normalize=True)
        difference = logprobs - (0 if reference is None else reference)
        expected = [difference[ids == i].sum() / counts[i] for i in range(5)]
        np.testing.assert_allclose(ratios.numpy(), expected, atol=1e-14)
        weights = rng.normal(size=5)
        (ratios * paddle.to_tensor(weights)).sum().backward()
        np.testing.assert_allclose(x.grad.numpy(), (weights / counts)[ids], atol=1e-15)


def test_implicit_rewards():
    chosen, rejected = leaf(np.array([1.0, 2.0, 3.0])), leaf(np.array([0.0, 2.0, 5.0]))
    shown = implicit_rewards(chosen, rejected, beta=0.5)
    np.testing.assert_allclose(shown.chosen.numpy(), [0.5, 1.0, 1.5])
    np.testing.assert_allclose(shown.rejected.numpy(), [0.0, 1.0, 2.5])
    np.testing.assert_allclose(shown.margins.numpy(), [0.5, 0.0, -1.0])
    np.testing.assert_array_equal(shown.accuracies.numpy(), [1.0, 0.0, 0.0])
    assert all(tensor.stop_gradient for tensor in shown)


def pairs_of(rewards, valid=None, lengths=None, margin=0.5):
    rewards = np.asarray(rewards, np.float64)
    valid = np.ones_like(rewards) if valid is None else np.asarray(valid)
    lengths = np.ones(rewards.shape, int) if lengths is None else np.asarray(lengths)
    return choose_pairs(rewards, valid, lengths, margin=margin)


def test_best_against_worst_where_the_margin_is_met():
    pairs, counts = pairs_of([[0.2, 1.0, 0.0, 0.4], [0.5, 0.5, 0.4, 0.2], [0.1, 0.6, 0.3, 0.3]])
    assert pairs == [Pair(0, chosen=1, rejected=2), Pair(2, chosen=1, rejected=0)]
    assert counts == PairCounts(pairs=2, below_margin=1)


def test_a_margin_met_but_for_rounding_is_met():
    assert 1.0 - 0.9 < 0.1
    assert pairs_of([[1.0, 0.9]], margin=0.1)[0] == [Pair(0, 0, 1)]
    assert pairs_of([[1.0, 0.901]], margin=0.1)[0] == []
    assert pairs_of(np.float32([[1.3, 1.2]]), margin=0.1)[0] == [Pair(0, 0, 1)]


def test_completions_without_a_verdict_are_never_used():
    rewards = [[0.0, 0.5, 1.0, np.nan], [1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    valid = [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    pairs, counts = pairs_of(rewards, valid)
    assert pairs == [Pair(0, chosen=2, rejected=1)]
    assert counts == PairCounts(pairs=1, too_few_valid=2)


@pytest.mark.parametrize(
    "lengths, expected",
    [
        ([10, 30, 31, 90], (1, 2)),  # nearest in length: 30 and 31
        ([10, 30, 32, 8], (0, 3)),  # equally near pairs: the shorter chosen one
        ([30, 10, 12, 8], (1, 2)),  # the same chosen one twice: the first rejected one
        ([20, 20, 20, 20], (0, 2)),  # all alike: the first ones
    ],
)
def test_ties_go_to_completions_of_like_length(lengths, expected):
    pairs, counts = pairs_of([[1.0, 1.0, 0.0, 0.0]], lengths=[lengths])
    assert pairs == [Pair(0, *expected)]
    assert counts.tied == 1


def test_longer_chosen_completions_are_counted():
    rewards = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    pairs, counts = pairs_of(rewards, lengths=[[5, 9], [5, 9], [4, 4]])
    assert pairs == [(0, 0, 1), (1, 1, 0), (2, 0, 1)]
    assert counts == PairCounts(pairs=3, chosen_longer=1)


def test_pairs_equal_a_search_over_all_of_them():
    rng = np.random.default_rng(2)
    rewards = rng.integers(0, 4, (300, 6)) / 2
    valid, lengths = rng.random((300, 6)) < 0.5, rng.integers(1, 9, (300, 6))
    pairs, counts = choose_pairs(rewards, valid, lengths, margin=1.0)
    found = {pair.prompt: pair for pair in pairs}
    outcomes = Counter()
    for p in range(300):
        members = np.flatnonzero(valid[p])
        ordered = [(c, r) for c in members for r in members if rewards[p, c] > rewards[p, r]]
        widest = max((rewards[p, c] - rewards[p, r] for c, r in ordered), default=0.0)
        if len(members) < 2 or widest < 1.0:
            outcomes["few" if len(members) < 2 else "close"] += 1
            assert p not in found
            continue
        length = lengths[p]
        ranked = sorted(
            (rewards[p, r] - rewards[p, c], abs(length[c] - length[r]), length[c], c, r)
            for c, r in ordered
        )
        assert (found[p].chosen, found[p].rejected) == ranked[0][3:]
        outcomes["tied"] += len(ranked) > 1 and ranked[1][0] == ranked[0][0]
        outcomes["longer"] += length[ranked[0][3]] > length[ranked[0][4]]
    assert counts == PairCounts(
        len(pairs), outcomes["few"], outcomes["close"], outcomes["tied"], outcomes["longer"]
    )
    assert counts.pairs + counts.too_few_valid + counts.below_margin == 300
    assert min(outcomes.values()) > 0 and len(outcomes) == 4


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pairs_of([[1.0, 0.0]], margin=0.0), "margin=0.0 must be positive"),
        (lambda: pairs_of([[1.0, 0.0]], margin=float("nan")), "margin=nan"),
        (lambda: pairs_of([[1.0, 0.0]], valid=[[1]]), r"\[1, 2\], \[1, 1\] and \[1, 2\]"),
        (lambda: pairs_of([1.0, 0.0]), "share one shape"),
        (lambda: pairs_of([[np.nan, 0.0]]), "not finite"),
        (lambda: dpo_loss(paddle.ones([1]), paddle.ones([1]), beta=0.0), "beta=0.0"),
        (lambda: ipo_loss(paddle.ones([1]), paddle.ones([1]), beta=-1.0), "beta=-1.0"),
        (
            lambda: simpo_loss(paddle.ones([1]), paddle.ones([1]), beta=1.0, gamma=-0.1),
            "gamma=-0.1 must be at least 0",
        ),
    ],
)
def test_mistakes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
