"""Referee: logits of the whole model, and the formulas written down again in numpy."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_train.losses import gae, whiten
from ernie_train.rewards.score import Score
from ernie_train.rl.batch import (
    KlInReward,
    SampleBatch,
    add_gae,
    add_group_advantages,
    add_logprobs,
    add_values,
    critic_values,
    micro_batches,
    policy_logprobs,
    reward_table,
)
from ernie_train.rl.critic import Critic
from ernie_train.rl.rollout import Sample
from tests.small_models import assert_same, make_model, state


def make_samples(count=6, seed=0, **keys):
    rng = np.random.default_rng(seed)
    return [
        Sample(
            problem=i,
            prompt_ids=rng.integers(3, 90, rng.integers(2, 9)).tolist(),
            completion_ids=rng.integers(3, 90, rng.integers(1, 12)).tolist(),
            domain="ab"[i % 2],
            reward=float(rng.integers(0, 2)),
            **keys,
        )
        for i in range(count)
    ]


def expected_logprobs(model, sample, temperature):
    """From the logits of the sample alone, in float64."""
    ids = np.array([sample.prompt_ids + sample.completion_ids])
    logits = model(paddle.to_tensor(ids)).logits.numpy()[0].astype(np.float64) / temperature
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    start = len(sample.prompt_ids) - 1
    places = start + np.arange(len(sample.completion_ids))
    entropy = -(np.exp(logprobs) * logprobs).sum(-1)[places]
    return logprobs[places, sample.completion_ids], entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_of_a_micro_batch_are_those_of_each_sample_alone(temperature):
    model, samples = make_model(), make_samples()
    batch = SampleBatch(tuple(samples))
    logprobs, entropy, stats = policy_logprobs(
        model, batch, temperature=temperature, with_entropy=True
    )
    expected = [expected_logprobs(model, s, temperature) for s in samples]
    np.testing.assert_allclose(logprobs.numpy(), np.concatenate([e[0] for e in expected]),
                               atol=2e-5)  # fmt: skip
    np.testing.assert_allclose(entropy.numpy(), np.concatenate([e[1] for e in expected]), atol=2e-5)
    assert stats[0].router_probs.shape[0] == batch.num_tokens
    lengths = [len(s.completion_ids) for s in samples]
    np.testing.assert_array_equal(batch.owners, np.repeat(np.arange(6), lengths))


def test_logprobs_are_filled_in_whatever_the_batches():
    model = make_model()
    found = []
    for size in (1, 4, 100):
        samples = make_samples()
        add_logprobs(model, samples, "old_logprobs", temperature=1.0, batch_size=size)
        found.append(np.concatenate([s.old_logprobs for s in samples]))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    np.testing.assert_allclose(found[0], found[2], atol=1e-5)


def test_the_share_of_changed_experts_is_counted_by_token():
    model, samples = make_model(), make_samples(4)
    batch = SampleBatch(tuple(samples))
    _, _, stats = policy_logprobs(model, batch, temperature=1.0)
    ends = np.cumsum([len(s.completion_ids) for s in samples])[:-1]
    now = np.stack([s.expert_ids.numpy()[batch.rows] for s in stats], 1)
    for s, part in zip(samples, np.split(now, ends), strict=True):
        s.expert_ids = part[..., ::-1].astype(np.int16)  # the order of choice does not count
    assert add_logprobs(model, samples, "old_logprobs", temperature=1.0, batch_size=2) == 0.0
    total = len(now)
    changed = samples[0].expert_ids[0, 0].copy()
    samples[0].expert_ids = samples[0].expert_ids.copy()
    samples[0].expert_ids[0, 0] = [next(e for e in range(4) if e not in changed), changed[1]]
    share = add_logprobs(model, samples, "old_logprobs", temperature=1.0, batch_size=2)
    assert share == pytest.approx(1 / total)


# ---- the critic ----------------------------------------------------------------------------------


def test_a_new_critic_values_everything_at_zero_and_survives_the_disk():
    policy = make_model()
    critic = Critic(policy)
    batch = SampleBatch(tuple(make_samples()))
    values, _ = critic_values(critic, batch)
    assert not values.numpy().any()
    weight = np.random.default_rng(0).normal(size=critic.value_head.weight.shape)
    critic.value_head.weight.set_value(weight.astype(np.float32))
    other = Critic(make_model())
    other.load(critic.arrays())
    assert_same(state(other), state(critic))
    samples = make_samples()
    add_values(critic, samples, batch_size=3)
    for s in samples:
        hidden = policy.model(paddle.to_tensor([(s.prompt_ids + s.completion_ids)[:-1]])).hidden
        expected = hidden.numpy()[len(s.prompt_ids) - 1 :] @ weight
        np.testing.assert_allclose(s.values, expected[:, 0], atol=1e-4)


# ---- advantages ----------------------------------------------------------------------------------


def grouped(prompts=5, size=4, seed=1):
    samples = make_samples(prompts * size, seed)
    for i, s in enumerate(samples):
        s.domain = "ab"[(i // size) % 2]
    groups = [samples[i : i + size] for i in range(0, len(samples), size)]
    groups[0][1].score = Score.timeout("slow machine")
    groups[2][3].trained = False
    return groups


def test_rewards_are_normalized_within_domain_over_valid_completions():
    groups = grouped()
    groups[0][1].reward = 50.0  # of no verdict: it must not move anyone's mean
    rewards, valid = reward_table(groups, normalize=True)
    assert valid.sum() == 18
    for domain in "ab":
        raw = [s.reward for g in groups for s in g
               if s.domain == domain and s.score.trains and s.trained]  # fmt: skip
        here = np.array([[s.domain == domain for s in g] for g in groups]) & valid
        expected = (np.array(raw) - np.mean(raw)) / (np.std(raw, ddof=1) + 1e-4)
        np.testing.assert_allclose(rewards[here], expected)


def test_group_advantages_are_spread_over_tokens_and_zero_where_invalid():
    groups = grouped()
    rewards, valid = reward_table(groups, normalize=False)
    add_group_advantages(groups, rewards, valid, scale="none", kl=None)
    for g, row, keep in zip(groups, rewards, valid, strict=True):
        for s, reward, ok in zip(g, row, keep, strict=True):
            expected = reward - row[keep].mean() if ok and np.ptp(row[keep]) > 0 else 0.0
            assert s.advantages.shape == (len(s.completion_ids),)
            np.testing.assert_allclose(s.advantages, expected, atol=1e-6)


@pytest.mark.parametrize("kl", [None, KlInReward(0.1, "k1")])
def test_gae_puts_the_reward_at_the_last_token_and_kl_at_each(kl):
    groups, rng = grouped(), np.random.default_rng(2)
    samples = [s for g in groups for s in g]
    for s in samples:
        n = len(s.completion_ids)
        s.values = rng.normal(size=n).astype(np.float32)
        s.old_logprobs, s.ref_logprobs = rng.normal(size=(2, n)).astype(np.float32)
    rewards, valid = reward_table(groups, normalize=False)
    add_gae(groups, rewards, valid, gamma=0.99, lam=0.9, kl=kl)
    raw, masks = [], []
    for s, reward, ok in zip(samples, rewards.reshape(-1), valid.reshape(-1), strict=True):
        n = len(s.completion_ids)
        token_rewards = np.zeros((1, n))
        token_rewards[0, -1] = reward
        if kl is not None:
            token_rewards[0] -= 0.1 * (s.old_logprobs - s.ref_logprobs)
        mask = np.full((1, n), float(ok))
        advantages, returns = gae(token_rewards, s.values[None].astype(np.float64), mask,
                                  gamma=0.99, lam=0.9)  # fmt: skip
        np.testing.assert_allclose(s.returns, returns[0], atol=1e-5)
        raw.append(advantages[0])
        masks.append(mask[0])
    white = whiten(np.concatenate(raw), np.concatenate(masks))
    np.testing.assert_allclose(np.concatenate([s.advantages for s in samples]), white, atol=1e-5)


# ---- micro-batches -------------------------------------------------------------------------------


def test_micro_batches_hold_every_sample_once_and_partners_together():
    samples = make_samples(13)
    strangers = make_samples(4, seed=9, trained=False)
    pairs = [(samples[2], samples[11]), (strangers[0], strangers[3]), (samples[5], strangers[1])]
    for size in (2, 3, 5, 40):
        batches = micro_batches(samples, pairs, size)
        flat = [id(s) for batch in batches for s in batch.samples]
        wanted = {id(s) for s in (*samples, strangers[0], strangers[3], strangers[1])}
        assert sorted(flat) == sorted(wanted)
        assert all(len(batch.samples) <= size for batch in batches)
        found = {(id(b.samples[c]), id(b.samples[r])) for b in batches for c, r in b.pairs}
        assert found == {(id(c), id(r)) for c, r in pairs}


def test_a_sample_in_two_pairs_is_trained_once():
    samples = make_samples(3)
    samples[0].ref_logprobs = np.ones(len(samples[0].completion_ids), np.float32)
    batches = micro_batches(samples, [(samples[0], samples[1]), (samples[0], samples[2])], 4)
    trained = sum(b.trained.sum() for b in batches)
    assert trained == sum(len(s.completion_ids) for s in samples)
    assert sum(len(b.pairs) for b in batches) == 2
    again = [s for b in batches for s in b.samples
             if s.completion_ids == samples[0].completion_ids and not s.trained]  # fmt: skip
    assert len(again) == 1
    np.testing.assert_array_equal(again[0].ref_logprobs, samples[0].ref_logprobs)
