"""Referee: logits of the whole model, and the formulas written down again in numpy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import paddle
import pytest

from ernie_train.io.safetensors import array_entries, write_tensor_files
from ernie_train.parallel import new_model
from ernie_train.rl import estimators
from ernie_train.rl.batch import MicroBatch
from ernie_train.rl.config import CriticConfig, SamplerCorrectionConfig
from ernie_train.rl.critic import Critic
from ernie_train.rl.estimators import (
    critic_values,
    gae_advantages,
    group_relative_advantages,
    normalize_by_domain,
    policy_logprobs,
    sampler_weights,
    sequence_logprobs,
    sequence_values,
)
from tests.rl.records import make_sequences
from tests.small_models import assert_same, make_config, make_model, state


def expected_logprobs(model, sequence, temperature):
    """From the logits of the sequence alone, in float64."""
    ids = np.array([sequence.prompt_ids + sequence.completion_ids])
    logits = model(paddle.to_tensor(ids)).logits.numpy()[0].astype(np.float64) / temperature
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    start = len(sequence.prompt_ids) - 1
    places = start + np.arange(len(sequence.completion_ids))
    entropy = -(np.exp(logprobs) * logprobs).sum(-1)[places]
    return logprobs[places, sequence.completion_ids], entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_of_a_micro_batch_are_those_of_each_sequence_alone(temperature):
    model, sequences = make_model(), make_sequences()
    batch = MicroBatch.without_arrays(sequences)
    logprobs, entropy, stats = policy_logprobs(
        model, batch, temperature=temperature, with_entropy=True
    )
    expected = [expected_logprobs(model, s, temperature) for s in sequences]
    np.testing.assert_allclose(logprobs.numpy(), np.concatenate([e[0] for e in expected]),
                               atol=2e-5)  # fmt: skip
    np.testing.assert_allclose(entropy.numpy(), np.concatenate([e[1] for e in expected]), atol=2e-5)
    assert stats[0].router_probs.shape[0] == batch.num_tokens
    lengths = [len(s.completion_ids) for s in sequences]
    np.testing.assert_array_equal(batch.sequence_ids, np.repeat(np.arange(6), lengths))


@pytest.mark.parametrize("size", [1, 4, 100])
def test_each_sequence_gets_its_own_logprobs_whatever_the_batches(size):
    model, sequences = make_model(), make_sequences()
    found, entropy, changed = sequence_logprobs(
        model, sequences, temperature=1.0, batch_size=size, with_entropy=True
    )
    assert changed is None
    expected = [expected_logprobs(model, sequence, 1.0)[1] for sequence in sequences]
    assert entropy == pytest.approx(np.concatenate(expected).mean(), rel=1e-5)
    for array, sequence in zip(found, sequences, strict=True):
        np.testing.assert_allclose(array, expected_logprobs(model, sequence, 1.0)[0], atol=2e-5)


def test_passes_without_gradient_keep_within_the_tokens_too(monkeypatch):
    model, sequences = make_model(), make_sequences(12)
    most = max(s.length for s in sequences) + 2
    sizes = []
    forward = estimators.policy_logprobs

    def counted(model, batch, **options):
        sizes.append(batch.num_tokens)
        return forward(model, batch, **options)

    monkeypatch.setattr(estimators, "policy_logprobs", counted)
    found = sequence_logprobs(
        model, sequences, temperature=1.0, batch_size=9, batch_tokens=most
    ).logprobs
    assert sum(sizes) == sum(s.length - 1 for s in sequences) and max(sizes) <= most
    for array, sequence in zip(found, sequences, strict=True):
        np.testing.assert_allclose(array, expected_logprobs(model, sequence, 1.0)[0], atol=2e-5)
    critic = Critic(model)
    values = sequence_values(critic, sequences, batch_size=9, batch_tokens=most)
    assert [len(v) for v in values] == [s.num_sampled for s in sequences]


def test_the_share_of_changed_experts_is_counted_by_token():
    model, sequences = make_model(), make_sequences(4)
    batch = MicroBatch.without_arrays(sequences)
    _, _, stats = policy_logprobs(model, batch, temperature=1.0)
    ends = np.cumsum([len(s.completion_ids) for s in sequences])[:-1]
    now = np.stack([s.expert_ids.numpy()[batch.predictors] for s in stats], 1)
    # The order of choice does not count.
    sampled = [part[..., ::-1].astype(np.int16) for part in np.split(now, ends)]

    def share(experts):
        known = [replace(s, expert_ids=e) for s, e in zip(sequences, experts, strict=True)]
        return sequence_logprobs(model, known, temperature=1.0, batch_size=2).experts_changed

    assert share(sampled) == 0.0
    first = sampled[0].copy()
    first[0, 0] = [next(e for e in range(4) if e not in first[0, 0]), first[0, 0, 1]]
    assert share([first, *sampled[1:]]) == pytest.approx(1 / len(now))
    assert share([None] * 4) is None
    assert share([first, None, None, None]) == pytest.approx(1 / len(first))


# ---- the critic ----------------------------------------------------------------------------------


def test_a_new_critic_values_everything_at_zero_and_survives_the_disk():
    policy = make_model()
    paddle.seed(1)
    critic = Critic(policy)
    left = paddle.randn([4])  # for weights that are copied over it draws nothing
    paddle.seed(1)
    np.testing.assert_array_equal(left.numpy(), paddle.randn([4]).numpy())
    values, _ = critic_values(critic, MicroBatch.without_arrays(make_sequences()))
    assert not values.numpy().any()
    weight = np.random.default_rng(0).normal(size=critic.value_head.weight.shape)
    critic.value_head.weight.set_value(weight.astype(np.float32))
    other = Critic(make_model())
    other.load(critic.arrays())
    assert_same(state(other), state(critic))
    sequences = make_sequences()
    for s, found in zip(sequences, sequence_values(critic, sequences, batch_size=3), strict=True):
        hidden = policy.model(paddle.to_tensor([(s.prompt_ids + s.completion_ids)[:-1]])).hidden
        expected = hidden.numpy()[len(s.prompt_ids) - 1 :] @ weight
        np.testing.assert_allclose(found, expected[:, 0], atol=1e-4)


def test_a_bfloat16_critic_survives_the_disk(tmp_path):
    """Files are read as float32, which a bfloat16 parameter does not take."""
    policy = new_model(make_config(), "bfloat16")
    critic, other = Critic(policy), Critic(new_model(make_config(), "bfloat16"))
    write_tensor_files(tmp_path, "model", array_entries(critic.arrays()), "1GB")
    other.load_directory(tmp_path)
    assert other.model.norm.weight.dtype == paddle.bfloat16
    assert_same(state(other), state(critic))


def test_by_default_a_reward_at_the_end_reaches_the_first_token_whole():
    """0.95 leaves 1 % of it 90 tokens before, over a critic of zeros."""
    critic = CriticConfig(optim={"lr": 1e-3})
    assert critic.warmup_iterations > 0
    table = np.ones((1, 2)) * [1.0, 0.0]
    values = [np.zeros(91, np.float32), np.zeros(91, np.float32)]
    valid = np.ones((1, 2), bool)

    def advantages(**lams):
        return gae_advantages(table, valid, values, gamma=critic.gamma, **lams)

    found, returns = advantages(lam=critic.lam, policy_lam=critic.policy_lam)
    np.testing.assert_array_equal(returns[0], np.ones(91))
    np.testing.assert_allclose(found[0], found[0][-1])
    decayed, returns = advantages(lam=1.0, policy_lam=0.95)
    np.testing.assert_array_equal(returns[0], np.ones(91))
    gap = (decayed[0] - decayed[1]) / (decayed[0] - decayed[1])[-1]
    assert gap[0] == pytest.approx(0.95**90, rel=1e-3)


# ---- advantages ----------------------------------------------------------------------------------


@pytest.fixture
def table():
    """rewards, valid [5,4], two of them without a verdict, and domains by prompt."""
    rng = np.random.default_rng(1)
    rewards = rng.integers(0, 2, (5, 4)).astype(np.float64)
    valid = np.ones((5, 4), bool)
    valid[0, 1] = valid[2, 3] = False
    domains = np.array([["ab"[i % 2]] * 4 for i in range(5)])
    return rewards, valid, domains


def advantages_of(correct, format_ok, weight=0.1, penalties=(), size=8):
    """Of a group in which so many are right, and so many of these well formed."""
    marks = (np.arange(size) < correct).astype(float)[None]
    rewards = marks + weight * (np.arange(size) < format_ok)
    valid = np.ones((1, size), bool)
    found = group_relative_advantages(
        rewards, valid, [1] * size, scale="std", verdicts=marks, penalties=penalties
    )
    return np.concatenate(found)


def test_a_small_format_part_does_not_outweigh_correctness():
    """Divided by the deviation of a group that is all right but for it, it had +0.35 and -2.47."""
    right, wrong = advantages_of(4, 8)[[0, -1]]
    assert right == -wrong == pytest.approx(0.5 / np.sqrt(8 / 4 / 7), rel=1e-3)  # 0.94
    for correct in (0, 8):
        formed, malformed = advantages_of(correct, 7)[[0, -1]]
        assert formed == pytest.approx(2 * 0.1 / 8)
        assert malformed == pytest.approx(-2 * 0.1 * 7 / 8)
    # Beside correctness it adds to it, on the scale of a group of which half is right.
    mixed = advantages_of(4, 3)
    np.testing.assert_allclose(mixed[:3] - mixed[3], 2 * 0.1, rtol=1e-5)
    assert mixed[3] > mixed[4]


def test_normalizing_within_domains_does_nothing_to_advantages_divided_by_deviations(table):
    """Why it is refused there; over undivided ones it acts."""
    rewards, valid, domains = table
    rewards = rewards + (domains == "a") * rewards  # another scale in one of the domains
    normalized = normalize_by_domain(rewards, valid, domains)
    for scale in ("std", "none"):
        plain, scaled = (
            np.concatenate(group_relative_advantages(r, valid, [1] * 20, scale=scale))
            for r in (rewards, normalized)
        )
        assert (np.abs(plain - scaled).max() < 1e-3) == (scale == "std")


# ---- off-policy samples --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["truncated", "masked"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sampler_weights_by_definition(kind, level):
    rng = np.random.default_rng(5)
    sampled = [rng.normal(-1, 0.3, n).astype(np.float32) for n in (3, 1, 5)]
    new = [a + rng.normal(0, 0.4, len(a)).astype(np.float32) for a in sampled]
    weights, metrics = sampler_weights(new, sampled, SamplerCorrectionConfig(kind=kind, level=level,
                                                               bounds=[0.8, 1.2]))  # fmt: skip
    outside = 0
    for found, a, b in zip(weights, new, sampled, strict=True):
        for t in range(len(a)):
            gap = float(a[t]) - float(b[t])
            if level == "sequence":
                gap = sum(float(x) - float(y) for x, y in zip(a, b, strict=True))
            weight = math.exp(gap)
            outside += not 0.8 <= weight <= 1.2
            if kind == "truncated":
                weight = min(max(weight, 0.8), 1.2)
            elif not 0.8 <= weight <= 1.2:
                weight = 0.0
            assert found[t] == pytest.approx(weight, rel=1e-6)
    assert metrics["sampler_weight/clipped"] == outside / 9 > 0
    assert metrics["sampler_weight/mean"] == pytest.approx(np.concatenate(weights).mean())


def test_weighted_means_over_the_sampler_are_means_over_the_policy():
    """Over all tokens of a vocabulary, so exactly: sum of q w f = sum of p f."""
    rng = np.random.default_rng(6)
    q, p = (np.exp(x) / np.exp(x).sum() for x in rng.normal(size=(2, 30)))
    f = rng.normal(size=30)
    (weights,), _ = sampler_weights(
        [np.log(p)], [np.log(q)], SamplerCorrectionConfig(kind="truncated", bounds=[0, 1e6])
    )
    assert (q * weights * f).sum() == pytest.approx((p * f).sum(), rel=1e-5)
    assert abs((q * f).sum() - (p * f).sum()) > 0.05
    far = [np.full(3, -1e4, np.float32)]
    (held,), _ = sampler_weights([np.zeros(3)], far, SamplerCorrectionConfig(kind="truncated"))
    assert held.tolist() == [2.0] * 3, "finite however unlikely the sampler called them"
