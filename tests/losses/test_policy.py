"""Referees: float64 numpy written per token, finite differences of it, published closed forms."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_train.losses import (
    KL_IN_LOSS_KINDS,
    kl_estimate,
    kl_loss,
    policy_loss,
    sequence_logratios,
    value_loss,
)
from tests.losses.finite_differences import gradient

SHAPE = (5, 8)


def leaf(array):
    return paddle.to_tensor(array, stop_gradient=False)


def surrogate(logprobs, old, advantages, mask, low, high):
    """PPO's objective by cases; also how many tokens lie where it is flat."""
    total, flat = 0.0, 0
    for i in map(tuple, np.argwhere(mask)):
        x, a = np.exp(logprobs[i] - old[i]), advantages[i]
        if a > 0 and x > 1 + high:
            total, flat = total - (1 + high) * a, flat + 1
        elif a < 0 and x < 1 - low:
            total, flat = total - (1 - low) * a, flat + 1
        else:
            total -= x * a
    return total, flat


def policy_case(seed):
    rng = np.random.default_rng(seed)
    old = -rng.random(SHAPE) - 0.1
    return old + rng.normal(0, 0.4, SHAPE), old, rng.normal(size=SHAPE), rng.random(SHAPE) < 0.7


@pytest.mark.parametrize("clip_ratio", [0.2, (0.2, 0.28), (0.5, 0.1)])
def test_policy_loss_and_gradient(clip_ratio):
    logprobs, old, advantages, mask = policy_case(0)
    low, high = clip_ratio if isinstance(clip_ratio, tuple) else (clip_ratio, clip_ratio)
    x = leaf(logprobs)
    total, clipped = policy_loss(
        x, *map(paddle.to_tensor, (old, advantages, mask)), clip_ratio=clip_ratio
    )
    expected, flat = surrogate(logprobs, old, advantages, mask, low, high)
    assert 0 < flat < mask.sum(), "the case must hold tokens on both sides"
    np.testing.assert_allclose(float(total), expected, rtol=1e-12)
    assert int(clipped) == flat
    total.backward()
    slopes = gradient(lambda z: surrogate(z, old, advantages, mask, low, high)[0], logprobs)
    np.testing.assert_allclose(x.grad.numpy(), slopes, atol=1e-8)
    assert (x.grad.numpy() == 0).sum() == (~mask).sum() + flat


LENGTHS = (3, 1, 6)
IDS = np.repeat(range(3), LENGTHS)


def gspo(logprobs, old, per_sequence, mask, low, high):
    """The mean over sequences of min(s A, clip(s) A), s the geometric mean of the ratios."""
    gains = []
    for i, gain in enumerate(per_sequence):
        own = (i == IDS) & mask
        s = np.exp((logprobs - old)[own].mean())
        gains.append(min(s * gain, np.clip(s, 1 - low, 1 + high) * gain))
    return -np.mean(gains)


@pytest.mark.parametrize("bounds", [(0.05, 0.04), (0.9, 5.0)])
def test_ratios_of_sequences_are_gspo(bounds):
    """Value and gradient, the gradient by finite differences, where some are clipped or none."""
    rng = np.random.default_rng(4)
    old, mask = -rng.random(10) - 0.1, np.arange(10) != 7
    logprobs, per_sequence = old + rng.normal(0, 0.3, 10), np.array([0.7, -1.2, 0.4])
    x, lengths = leaf(logprobs), np.bincount(IDS, mask)
    total, clipped = policy_loss(
        x, *map(paddle.to_tensor, (old, per_sequence[IDS], mask)), clip_ratio=bounds,
        sequence_ids=paddle.to_tensor(IDS), weights=paddle.to_tensor(1 / lengths[IDS]),
    )  # fmt: skip
    total.backward()
    assert float(total) / 3 == pytest.approx(gspo(logprobs, old, per_sequence, mask, *bounds))
    slopes = gradient(lambda z: gspo(z, old, per_sequence, mask, *bounds), logprobs)
    np.testing.assert_allclose(x.grad.numpy() / 3, slopes, atol=1e-9)
    assert x.grad.numpy()[7] == 0
    flat = [i for i in range(3) if (slopes[i == IDS] == 0).all()]
    assert int(clipped) == sum(lengths[i] for i in flat)
    assert bool(flat) == (bounds[1] < 1)


def test_log_ratios_of_sequences_are_means_of_their_kept_tokens():
    logratios, mask = np.array([1.0, 3.0, 9.0, 2.0]), np.array([1.0, 1.0, 0.0, 1.0])
    found = sequence_logratios(*map(paddle.to_tensor, (logratios, mask, np.array([0, 0, 0, 2]))))
    np.testing.assert_array_equal(found.numpy(), [2.0, 2.0, 0.0, 2.0])


def test_cispo_weighs_logprobs_by_clipped_ratios_and_every_token_keeps_its_gradient():
    logprobs, old, advantages, mask = policy_case(5)
    x, low, high = leaf(logprobs), 0.3, 0.2
    total, clipped = policy_loss(
        x, *map(paddle.to_tensor, (old, advantages, mask)), clip_ratio=(low, high),
        objective="cispo",
    )  # fmt: skip
    total.backward()
    ratio = np.exp(logprobs - old)
    weight = np.clip(ratio, 1 - low, 1 + high) * advantages * mask
    assert float(total) == pytest.approx(-(weight * logprobs).sum())
    np.testing.assert_allclose(x.grad.numpy(), -weight, rtol=1e-12)
    assert (x.grad.numpy() != 0).sum() == mask.sum()
    outside = ((ratio < 1 - low) | (ratio > 1 + high)) & mask
    assert 0 < int(clipped) == outside.sum() < mask.sum()


@pytest.mark.parametrize("objective", ["ppo", "cispo"])
def test_weights_multiply_the_terms_of_tokens(objective):
    logprobs, old, advantages, mask = policy_case(6)
    weights = np.random.default_rng(7).random(SHAPE)
    constant = map(paddle.to_tensor, (old, advantages, mask))
    x, y = leaf(logprobs), leaf(logprobs)
    weighted, _ = policy_loss(
        x, *constant, clip_ratio=0.2, objective=objective, weights=paddle.to_tensor(weights)
    )
    as_gains, _ = policy_loss(
        y, *map(paddle.to_tensor, (old, advantages * weights, mask)), clip_ratio=0.2,
        objective=objective,
    )  # fmt: skip
    assert float(weighted) == float(as_gains)
    (weighted + as_gains).backward()
    np.testing.assert_array_equal(x.grad.numpy(), y.grad.numpy())


def test_on_policy_the_gradient_is_that_of_reinforce():
    _, old, advantages, mask = policy_case(1)
    x = leaf(old)
    total, clipped = policy_loss(x, *map(paddle.to_tensor, (old, advantages, mask)), clip_ratio=0.2)
    assert float(total) == pytest.approx(-(advantages * mask).sum())
    assert int(clipped) == 0
    total.backward()
    np.testing.assert_allclose(x.grad.numpy(), -advantages * mask, rtol=1e-12)


def test_what_is_masked_has_no_influence_on_any_loss():
    rng = np.random.default_rng(2)
    mask = np.array([[True, False, True], [False, False, True]])
    clean = rng.normal(size=(3, 2, 3)) * 0.1
    dirty = np.where(mask, clean, np.array([np.nan, np.inf, -1e300])[:, None, None])
    assert np.isnan(dirty).any()

    def results(arrays):
        tensors = [leaf(a) for a in arrays]
        m = paddle.to_tensor(mask)
        losses = [
            policy_loss(*tensors, m, clip_ratio=0.2)[0],
            value_loss(*tensors, m, clip_range=0.1),
            value_loss(*tensors, m, clip_range=None),
            *[kl_loss(*tensors, m, kind=kind)[0] for kind in KL_IN_LOSS_KINDS],
        ]
        sum(losses[1:], losses[0]).backward()
        assert tensors[1].grad is None and tensors[2].grad is None
        return [float(loss) for loss in losses], tensors[0].grad.numpy()

    values, grads = results(clean)
    dirty_values, dirty_grads = results(dirty)
    assert dirty_values == values and all(values)
    np.testing.assert_array_equal(dirty_grads, grads)
    np.testing.assert_array_equal(grads[~mask], 0)


def critic_error(values, old, returns, mask, clip_range):
    total = 0.0
    for i in map(tuple, np.argwhere(mask)):
        v, o, r = values[i], old[i], returns[i]
        near = min(max(v, o - clip_range), o + clip_range)
        total += 0.5 * max((v - r) ** 2, (near - r) ** 2)
    return total


@pytest.mark.parametrize("clip_range", [0.2, None])
def test_value_loss_and_gradient(clip_range):
    rng = np.random.default_rng(3)
    values, old, returns = rng.normal(0, 0.3, (3, *SHAPE))
    mask = rng.random(SHAPE) < 0.7
    bound = 1e9 if clip_range is None else clip_range
    x = leaf(values)
    total = value_loss(x, *map(paddle.to_tensor, (old, returns, mask)), clip_range=clip_range)
    expected = critic_error(values, old, returns, mask, bound)
    np.testing.assert_allclose(float(total), expected, rtol=1e-12)
    total.backward()
    slopes = gradient(lambda z: critic_error(z, old, returns, mask, bound), values)
    np.testing.assert_allclose(x.grad.numpy(), slopes, atol=1e-8)
    if clip_range is not None:
        assert (slopes[mask] == 0).any(), "the case must hold clipped values"


@pytest.mark.parametrize(
    "ratio, advantage, value, slope",
    [
        (10.0, -1.0, 3.0, 0.0),  # beyond it
        (2.9, -1.0, 2.9, 2.9),  # before it: the full push
        (10.0, 1.0, -1.2, 0.0),  # of a positive advantage: the clipped surrogate alone
        (0.5, -1.0, 0.8, 0.0),
        (1.0, -1.0, 1.0, 1.0),
    ],
)
def test_dual_clip_bounds_what_a_negative_advantage_pushes(ratio, advantage, value, slope):
    x = leaf(np.log([ratio]))
    total, clipped = policy_loss(
        x, *map(paddle.to_tensor, ([0.0], [advantage], [1.0])), clip_ratio=0.2, dual_clip=3.0
    )
    total.backward()
    assert float(total) == pytest.approx(value)
    assert x.grad.item() == pytest.approx(slope)
    assert int(clipped) == (slope == 0)


@pytest.mark.parametrize("objective", ["ppo", "cispo"])
def test_a_ratio_beyond_what_a_float_holds_is_no_nan(objective):
    """Of a token that a router sent elsewhere: exp(100) is infinite, and times 0 not a number."""
    x = leaf(np.array([-0.5, -0.5, -0.5], np.float32))
    old = np.array([-100.5, -100.5, -0.5], np.float32)
    advantages = np.array([0.0, -1.0, 1.0], np.float32)
    total, _ = policy_loss(
        x, *map(paddle.to_tensor, (old, advantages, np.ones(3))), clip_ratio=0.2, dual_clip=3.0,
        objective=objective,
    )  # fmt: skip
    total.backward()
    assert np.isfinite(float(total)) and np.isfinite(x.grad.numpy()).all()
    assert x.grad.numpy()[0] == 0 and x.grad.numpy()[2] == -1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: policy_loss(x, x, x, x, clip_ratio=0.0), "clip_ratio=0.0"),
        (lambda x: policy_loss(x, x, x, x, clip_ratio=(0.2, -0.1)), "clip_ratio"),
        (lambda x: policy_loss(x, x, x, x, clip_ratio=float("nan")), "clip_ratio=nan"),
        (lambda x: value_loss(x, x, x, x, clip_range=0.0), "clip_range=0.0"),
        (lambda x: kl_estimate(x, x, "k4"), "k1, k2, k3"),
        (lambda x: kl_loss(x, x, x, x, kind="k1"), "no useful gradient; use k2 or k3"),
        (lambda x: kl_loss(x, x, x, x, kind="kl"), "kind='kl'"),
        (lambda x: policy_loss(x, x, x, x, clip_ratio=0.2, dual_clip=1.0), "dual_clip=1.0"),
    ],
)
def test_mistakes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(paddle.ones([2, 3]))
