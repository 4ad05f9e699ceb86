"""Referee: the cumulative distribution in float64, searched without blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
import pytest

from ernie_train.generate import sampler as sampler_module
from ernie_train.generate.device_sampler import DeviceSampler
from ernie_train.generate.sampler import Sampler, SamplingConfig, likeliest, sample

ALMOST_ONE = np.nextafter(1.0, 0.0)


def cut_and_normalized(probs: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """What is left of one distribution [V], by definition."""
    kept, mass = np.zeros_like(probs), 0.0
    for rank, token in enumerate(sorted(range(len(probs)), key=lambda t: (-probs[t], t))):
        if mass >= top_p or (top_k and rank >= top_k):
            break
        kept[token] = probs[token]
        mass += probs[token]
    return kept / kept.sum()


def seated(kind: type[Sampler], config: SamplingConfig, ids: Sequence[int]) -> Sampler:
    """A sampler with the sequences `ids` in its lanes."""
    sampler = kind(config, len(ids))
    sampler.seat(np.arange(len(ids)), ids)
    return sampler


@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 128, 1000])
def test_inverts_the_cumulative_distribution(size):
    rng = np.random.default_rng(size)
    probs = rng.random((200, size)) ** 8
    probs[rng.random(probs.shape) < 0.3] = 0.0
    probs[:, size // 2] += 1e-3  # no row is all zero
    uniform = rng.random(200)
    tokens = sample(probs, uniform)
    for row, token in enumerate(tokens):
        cumulative = np.cumsum(probs[row]) / probs[row].sum()
        # Rounding may move the border between two tokens by a few last bits.
        assert (cumulative[token - 1] if token else 0.0) <= uniform[row] + 1e-12
        assert uniform[row] < cumulative[token] + 1e-12


@pytest.mark.parametrize("uniform", [0.0, 0.5, ALMOST_ONE])
@pytest.mark.parametrize("place", [0, 63, 64, 99])
def test_never_picks_a_token_without_mass(uniform, place):
    probs = np.zeros((1, 100), np.float32)
    probs[0, place] = 0.1  # not a power of two: sums of it round
    assert sample(probs, np.array([uniform])) == [place]
    probs[0, 70] = 1e-30
    assert probs[0, sample(probs, np.array([uniform]))[0]] > 0


def test_sums_that_round_up_do_not_lead_past_the_last_token_with_mass():
    """In float32 the sum of a block is above or below what its tokens add up to in float64."""
    probs = np.random.default_rng(5).random((300, 100)).astype(np.float32)
    probs[:, 80:] = 0.0
    assert (sample(probs, np.full(300, ALMOST_ONE)) == 79).mean() > 0.2
    assert (sample(probs, np.full(300, ALMOST_ONE)) <= 79).all()


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 4), (0.7, 2), (1e-9, 0)])
def test_follows_the_cut_distribution_and_reports_the_whole_one(top_p, top_k):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1.5, 70)
    temperature, count = 0.8, 20000
    config = SamplingConfig(1, temperature, top_p, top_k, seed=3)
    sampler = seated(Sampler, config, range(count))
    wide = np.tile(logits, (count, 1)).astype(np.float32)
    tokens, logprobs = sampler(wide, np.arange(count), np.zeros(count, np.int64))
    whole = np.exp(logits / temperature - np.logaddexp.reduce(logits / temperature))
    np.testing.assert_allclose(logprobs, np.log(whole)[tokens], atol=2e-6)
    left = cut_and_normalized(whole, top_p, top_k)
    counts = np.bincount(tokens, minlength=70)
    assert (counts[left == 0] == 0).all()
    expected = left[left > 0] * count
    # Pearson's chi-squared: mean n - 1, variance 2 (n - 1).
    freedom = len(expected) - 1
    chi_squared = (((counts[left > 0] - expected) ** 2) / expected).sum()
    assert chi_squared <= freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
@pytest.mark.parametrize(
    ("top_p", "top_k"), [(0.5, 0), (0.99, 0), (0.9, 30), (1.0, 30), (1.0, 1), (0.3, 300)]
)
def test_what_is_left_is_that_of_a_sort_of_all_tokens_but_few_are_sorted(
    monkeypatch, top_p, top_k, spread
):
    """Rounded logits are often equal, and of those the first tokens stay."""
    monkeypatch.setattr(sampler_module, "_FIRST", 20)
    sizes = []
    whole = likeliest
    monkeypatch.setattr(
        sampler_module, "likeliest", lambda p, n: sizes.append(len(whole(p, n)[0])) or whole(p, n)
    )
    logits = np.random.default_rng(4).normal(0, spread, (40, 200)).round(1)
    mass = np.exp(logits).astype(np.float32)
    sampler = Sampler(SamplingConfig(1, 1.0, top_p, top_k), 40)
    left = sampler._truncate(mass, mass.sum(-1))
    for row, probs in zip(left, mass / mass.sum(-1, keepdims=True), strict=True):
        expected = cut_and_normalized(probs.astype(np.float64), top_p, top_k)
        np.testing.assert_array_equal(row, np.where(expected > 0, probs, 0))
    if spread == 3.0 and top_p == 0.5:
        assert max(sizes) < 40


def test_greedy_reports_the_distribution_at_temperature_one():
    logits = np.random.default_rng(2).normal(0, 2, (5, 33)).astype(np.float32)
    tokens, logprobs = Sampler(SamplingConfig(1), 5)(logits, np.arange(5), np.zeros(5, np.int64))
    assert tokens.tolist() == logits.argmax(-1).tolist()
    expected = logits.max(-1) - np.logaddexp.reduce(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(logprobs, expected, atol=2e-6)


def test_numbers_depend_on_seed_and_index_alone():
    logits = np.zeros((4, 50), np.float32)
    few = seated(Sampler, SamplingConfig(3, 1.0, seed=9), [7, 2, 5, 0])
    many = seated(Sampler, SamplingConfig(8, 1.0, seed=9), range(8))
    other = seated(Sampler, SamplingConfig(3, 1.0, seed=10), [7, 2, 5, 0])
    late = seated(Sampler, SamplingConfig(3, 1.0, seed=9), [1, 7, 3, 4, 5])
    late.seat(np.array([2, 3]), [2, 0])
    late.select(np.array([1, 2, 4, 3]))
    rows, numbers = np.arange(4), np.array([7, 2, 5, 0])
    for step in np.repeat(np.arange(3), 4).reshape(3, 4):
        picked = few(logits, rows, step)[0].tolist()
        assert picked == many(logits, numbers, step)[0].tolist()
        assert picked == late(logits, rows, step)[0].tolist()
    assert picked != other(logits, rows, step)[0].tolist()
    mixed = few(logits, rows, np.array([2, 0, 1, 2]))[0].tolist()
    assert mixed == [few(logits, rows, np.full(4, at))[0][i] for i, at in enumerate((2, 0, 1, 2))]


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0, 1, 0), (1, 1, 0), (0.7, 0.8, 0), (1, 1, 5), (2, 0.9, 7)]
)
def test_a_device_samples_what_the_host_does(temperature, top_p, top_k):
    logits = np.random.default_rng(7).normal(0, 3, size=(150, 90)).astype(np.float32)
    config = SamplingConfig(3, temperature, top_p, top_k, seed=5)
    rows = np.arange(150)[::-1].copy()
    for step in np.repeat(np.arange(3), 150).reshape(3, 150):
        host = seated(Sampler, config, range(150))(logits, rows, step)
        device = seated(DeviceSampler, config, range(150))(paddle.to_tensor(logits), rows, step)
        assert [a.dtype for a in device] == [a.dtype for a in host]
        same = device[0] == host[0]
        assert same.mean() > 0.98  # sums differ in the last bits, so that few draws fall otherwise
        np.testing.assert_allclose(device[1][same], host[1][same], atol=1e-5)


@pytest.mark.parametrize("uniform", [1e-12, 0.5, ALMOST_ONE])
def test_a_device_too_never_picks_a_token_without_mass(uniform):
    logits = np.full((3, 100), -np.inf, np.float32)
    logits[:, [10, 79]] = 0.1
    sampler = DeviceSampler(SamplingConfig(1, 1.0), 3)
    sampler.uniform[:] = uniform
    steps = np.zeros(3, np.int64)
    tokens, logprobs = sampler(paddle.to_tensor(logits), np.arange(3), steps)
    assert tokens.tolist() == [10 if uniform < 0.5 else 79] * 3
    np.testing.assert_allclose(logprobs, np.log(0.5), rtol=1e-6)
