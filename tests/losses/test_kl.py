"""Estimates of the KL and its term of the loss, against closed forms and enumerated outcomes."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_train.losses import KL_IN_LOSS_KINDS, kl_estimate, kl_loss, logprob_gap
from tests.losses.finite_differences import gradient

SHAPE = (5, 8)


def leaf(array):
    return paddle.to_tensor(array, stop_gradient=False)


@pytest.mark.parametrize("kind, expected", [("k1", 0.5), ("k2", 0.125), ("k3", 0.106531)])
def test_kl_at_one_half(kind, expected):
    logprobs, ref = np.array([-0.7]), np.array([-1.2])
    np.testing.assert_allclose(kl_estimate(logprobs, ref, kind), expected, atol=5e-7)
    tensor = kl_estimate(paddle.to_tensor(logprobs), paddle.to_tensor(ref), kind)
    np.testing.assert_allclose(tensor.numpy(), expected, atol=5e-7)
    assert kl_estimate(ref, logprobs, kind)[0] != pytest.approx(expected) or kind == "k2"


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimates_are_unbiased(kind):
    rng = np.random.default_rng(4)
    policy, ref = rng.dirichlet(3 * np.ones(6), 2)
    assert (ref < 20 * policy).all(), "beyond, k3 is truncated"
    estimate = kl_estimate(np.log(policy), np.log(ref), kind)
    exact = (policy * np.log(policy / ref)).sum()
    assert (policy * estimate).sum() == pytest.approx(exact)


def test_k3_keeps_its_digits_near_the_reference():
    d = np.array([1e-4, -1e-4], np.float32)
    estimate = kl_estimate(paddle.to_tensor(d), paddle.zeros([2]), "k3").numpy()
    # Taken literally in float32, exp(-d) - 1 + d is off by several times the result itself.
    np.testing.assert_allclose(estimate, d.astype(np.float64) ** 2 / 2, rtol=2e-3)


def test_the_gap_of_logprobs_is_not_that_of_one_token():
    """By hand: it counts 19 of 2M, not exp(15) - 1, which gives 1.6; but none may be infinite."""
    differences = np.zeros(2_000_000, np.float32)
    assert logprob_gap(differences) == 0.0 == logprob_gap(differences[:0])
    differences[7] = -15
    assert logprob_gap(differences) == pytest.approx(19 / 2_000_000)
    small = np.array([0.1, -0.2, 0.3])
    assert logprob_gap(small) == pytest.approx(np.mean([np.exp(0.1), np.exp(0.2), np.exp(0.3)]) - 1)
    for wrong in (np.inf, -np.inf, np.nan):
        differences[7] = wrong
        assert logprob_gap(differences) == np.inf


def truncated_k3(d):
    """The integral of 1 - min(exp(-d), 20) from 0."""
    edge = -np.log(20)
    return np.where(d < edge, 19 + edge - 19 * (d - edge), np.exp(-np.maximum(d, edge)) - 1 + d)


@pytest.mark.parametrize("kind", KL_IN_LOSS_KINDS)
def test_kl_loss_and_gradient(kind):
    rng = np.random.default_rng(5)
    logprobs, ref = rng.normal(size=(2, *SHAPE))
    mask = rng.random(SHAPE) < 0.7

    def by_hand(z):
        d = (z - ref)[mask]
        return (d**2 / 2).sum() if kind == "k2" else truncated_k3(d).sum()

    x = leaf(logprobs)
    total, truncated = kl_loss(x, x, paddle.to_tensor(ref), paddle.to_tensor(mask), kind=kind)
    assert int(truncated) == (kind == "k3") * ((logprobs - ref)[mask] < -np.log(20)).sum()
    total.backward()
    np.testing.assert_allclose(float(total), by_hand(logprobs), rtol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), gradient(by_hand, logprobs), atol=1e-7)


def softmax(theta):
    return np.exp(theta) / np.exp(theta).sum()


def divergence(kind, policy, ref):
    p, q = (policy, ref) if kind == "k2" else (ref, policy)
    return (p * np.log(p / q)).sum()


@pytest.mark.parametrize("kind", KL_IN_LOSS_KINDS)
def test_expected_gradients_are_those_of_the_two_divergences(kind):
    """Over the policy's own samples, in a table of logits, exactly: all outcomes are summed."""
    rng = np.random.default_rng(6)
    theta, ref = 0.6 * rng.normal(size=5), softmax(rng.normal(size=5))
    assert (ref < 20 * softmax(theta)).all(), "beyond, k3 is truncated"
    x = leaf(theta)
    logprobs = x - paddle.log(paddle.exp(x).sum())
    samples = paddle.to_tensor(softmax(theta))  # how often each is drawn; not differentiated
    d = logprobs - paddle.to_tensor(np.log(ref))
    (samples * kl_estimate(d, paddle.zeros_like(d), kind)).sum().backward()

    exact = gradient(lambda z: divergence(kind, softmax(z), ref), theta)
    np.testing.assert_allclose(x.grad.numpy(), exact, atol=1e-8)


@pytest.mark.parametrize("kind", KL_IN_LOSS_KINDS)
def test_of_an_earlier_policys_samples_the_gradients_are_still_those(kind):
    rng = np.random.default_rng(8)
    theta, ref, old = rng.normal(size=5), softmax(rng.normal(size=5)), softmax(rng.normal(size=5))
    x = leaf(theta)
    logprobs = x - paddle.log(paddle.exp(x).sum())
    assert np.abs(np.log(softmax(theta) / old)).max() > 0.5, "the policy has moved"
    total, truncated = kl_loss(
        logprobs, *map(paddle.to_tensor, (np.log(old), np.log(ref), np.ones(5))), kind=kind,
        weights=paddle.to_tensor(old),
    )  # fmt: skip
    assert int(truncated) == 0
    total.backward()

    exact = gradient(lambda z: divergence(kind, softmax(z), ref), theta)
    np.testing.assert_allclose(x.grad.numpy(), exact, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_token_far_below_its_reference_pulls_like_19_and_not_like_millions(dtype):
    x = leaf(np.array([-16.0, -200.0, -0.5], dtype))
    others = map(paddle.to_tensor, (np.array([-1.0, -1.0, -0.5], dtype), np.ones(3, dtype)))
    total, truncated = kl_loss(x, x, *others, kind="k3")
    total.backward()
    assert int(truncated) == 2
    np.testing.assert_allclose(x.grad.numpy(), [-19.0, -19.0, 0.0])
    assert float(total) == pytest.approx(truncated_k3(np.array([-15.0, -199.0])).sum(), rel=1e-6)
    assert truncated_k3(np.array(-15.0)) == pytest.approx(19 * 16 - 20 * np.log(20))
    np.testing.assert_allclose(
        kl_estimate(np.array([-15.0, -1.0]), np.zeros(2)), truncated_k3(np.array([-15.0, -1.0]))
    )


@pytest.mark.parametrize("kind", KL_IN_LOSS_KINDS)
def test_a_token_that_became_far_likelier_weighs_20_in_the_kl(kind):
    x = leaf(np.array([-1.0]))
    others = map(paddle.to_tensor, ([-30.0], [-1.5], [1.0]))
    total, truncated = kl_loss(x, *others, kind=kind)
    total.backward()
    assert int(truncated) == 1
    assert float(total) == pytest.approx(20 * kl_estimate(np.array([0.5]), np.zeros(1), kind)[0])
    assert x.grad.item() == pytest.approx(20 * (0.5 if kind == "k2" else 1 - np.exp(-0.5)))
