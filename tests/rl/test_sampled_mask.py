"""Tool outputs within a completion are context: in no term of a loss, no count, no advantage."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import paddle
import pytest

from ernie_train.losses import PairCounts
from ernie_train.rl.batch import (
    MicroBatch,
    PreferencePair,
    RolloutBatch,
    TokenizedCompletion,
    micro_batches,
)
from ernie_train.rl.config import RolloutConfig
from ernie_train.rl.critic import Critic
from ernie_train.rl.estimators import (
    gae_advantages,
    group_relative_advantages,
    policy_logprobs,
    sequence_logprobs,
    sequence_values,
)
from ernie_train.rl.loss import PairTerm, UpoLoss, ValueLoss
from ernie_train.rl.pairs import best_worst_pairs
from ernie_train.rl.report import rollout_metrics
from ernie_train.rl.rollout import Rollout, read_rollout, write_rollout
from tests.rl.records import make_scored, make_sequences
from tests.rl.referee_kl import k3
from tests.rl.test_loss import new_trainer
from tests.small_models import make_model

MASKS = ([1, 1, 0, 0, 1], [1], [1, 0, 1, 0, 0, 1, 1], [1, 1, 1, 0])


def with_tool_outputs() -> list[TokenizedCompletion]:
    rng = np.random.default_rng(3)
    return [
        TokenizedCompletion(
            rng.integers(3, 90, 2 + at).tolist(),
            rng.integers(3, 90, len(mask)).tolist(),
            sampled_mask=[bool(m) for m in mask],
        )
        for at, mask in enumerate(MASKS)
    ]


def whole(sequence: TokenizedCompletion) -> TokenizedCompletion:
    return replace(sequence, sampled_mask=None)


def test_estimates_are_those_of_the_whole_sequence_at_the_sampled_tokens():
    model, sequences = make_model(), with_tool_outputs()
    critic = Critic(model)
    weight = np.random.default_rng(0).normal(size=critic.value_head.weight.shape)
    critic.value_head.weight.set_value(weight.astype(np.float32))
    plain = [whole(s) for s in sequences]

    def estimates(given):
        logprobs, _, _ = sequence_logprobs(model, given, temperature=0.7, batch_size=3)
        batch = MicroBatch.without_arrays(given)
        _, entropy, _ = policy_logprobs(model, batch, temperature=0.7, with_entropy=True)
        values = sequence_values(critic, given, batch_size=3)
        return logprobs, np.split(entropy.numpy(), np.cumsum(batch.lengths)[:-1]), values

    for found, expected in zip(estimates(sequences), estimates(plain), strict=True):
        for array, full, mask in zip(found, expected, MASKS, strict=True):
            np.testing.assert_allclose(array, full[np.array(mask, bool)], atol=1e-5)


def test_changed_experts_are_counted_over_the_sampled_tokens_alone():
    model, sequences = make_model(), with_tool_outputs()
    batch = MicroBatch.without_arrays(sequences)
    _, _, stats = policy_logprobs(model, batch, temperature=1.0)
    now = np.stack([s.expert_ids.numpy()[batch.predictors] for s in stats], 1)
    sampled = np.split(now, np.cumsum(batch.lengths)[:-1])
    known = []
    for s, experts in zip(sequences, sampled, strict=True):
        others = np.full((len(s.completion_ids), *experts.shape[1:]), -1, np.int16)
        others[s.sampled_places] = experts
        known.append(replace(s, expert_ids=others))
    _, _, changed = sequence_logprobs(model, known, temperature=1.0, batch_size=2)
    assert changed == 0.0


def filled(sequences):
    rng = np.random.default_rng(8)
    old, ref, advantages, values, returns = (
        [rng.normal(-3 if at < 2 else 0, 0.3, s.num_sampled).astype(np.float32) for s in sequences]
        for at in range(5)
    )
    pairs = [PreferencePair(0, 2)]
    return RolloutBatch(
        sequences, pairs, len(sequences), 1, None, old, ref, advantages, values, returns
    )


@pytest.mark.parametrize("size", [2, 50])
def test_every_term_by_definition_over_the_sampled_tokens(size):
    """Each sum and each count in float64, token by token."""
    model, batch = make_model(), filled(with_tool_outputs())
    sums = dict.fromkeys(("policy", "entropy_loss", "kl_loss"), 0.0)
    ratios, clipped_tokens, tokens = [], 0, 0
    for at, s in enumerate(batch.sequences):
        alone = MicroBatch.without_arrays([whole(s)])
        with paddle.no_grad():
            logprobs, entropy, _ = policy_logprobs(model, alone, temperature=1.0, with_entropy=True)
        places = np.flatnonzero(MASKS[at])
        ratios.append(0.0)
        for n, place in enumerate(places):
            lp, gain = float(logprobs[place]), float(batch.advantages[at][n])
            ratio = math.exp(lp - batch.old_logprobs[at][n])
            clipped = min(max(ratio, 0.8), 1.3)
            sums["policy"] -= min(ratio * gain, clipped * gain)
            clipped_tokens += clipped * gain < ratio * gain
            sums["entropy_loss"] += float(entropy[place])
            d = lp - batch.ref_logprobs[at][n]
            sums["kl_loss"] += min(ratio, 20) * float(k3(np.array(d))[0])
            ratios[at] += d
            tokens += 1
    assert tokens == sum(map(sum, MASKS))
    loss = UpoLoss(
        temperature=1.0, clip_ratio=(0.2, 0.3), entropy_coef=0.01, kl_coef=0.05, kl_kind="k3",
        pairs=PairTerm(beta=0.3, coef=0.5),
    )  # fmt: skip
    micro = micro_batches(batch, range(len(MASKS)), batch.pairs, size)
    assert sum(loss.counts(m)["policy"] for m in micro) == tokens
    metrics = new_trainer(model).train_step(micro, loss, 9).metrics
    for name, total in sums.items():
        assert metrics[name] == pytest.approx(total / tokens, rel=3e-5), name
    assert metrics["clip_ratio"] == pytest.approx(clipped_tokens / tokens)
    margin = 0.3 * (ratios[0] - ratios[2])
    assert metrics["preference"] == pytest.approx(math.log1p(math.exp(-margin)), rel=3e-5)


def test_the_critic_learns_the_values_of_sampled_tokens_alone():
    batch, critic = filled(with_tool_outputs()), Critic(make_model())
    (micro,) = micro_batches(batch, range(len(MASKS)), [], 50)
    output = ValueLoss(None)(critic, micro)
    (term,) = output.terms
    expected = sum(0.5 * (r.astype(np.float64) ** 2).sum() for r in batch.returns)  # values are 0
    assert float(term.sum) == pytest.approx(expected, rel=1e-5)
    assert term.count == sum(map(sum, MASKS))


def test_gae_goes_across_a_tool_output_to_the_next_sampled_token():
    """Closed form in float64: no reward, value or discount stands at the tokens in between."""
    gamma, lam = 0.9, 0.8
    values = [np.array([0.5, -0.2, 0.7, 0.1]), np.array([0.3])]  # sampled tokens of two completions
    rewards, valid = np.array([[1.0, -1.0]]), np.ones((1, 2), bool)
    _, returns = gae_advantages(rewards, valid, values, gamma=gamma, lam=lam)
    v = values[0]
    delta = [
        gamma * v[1] - v[0],
        gamma * v[2] - v[1],  # the tool output stood here
        gamma * v[3] - v[2],
        1.0 - v[3],
    ]
    decay = gamma * lam
    expected = [sum(decay ** (k - t) * delta[k] for k in range(t, 4)) + v[t] for t in range(4)]
    np.testing.assert_allclose(returns[0], expected, rtol=1e-6)
    np.testing.assert_allclose(returns[1], [-1.0])


def test_group_advantages_and_metrics_count_sampled_tokens():
    long = make_scored(completion_ids=[3] * 9, sampled_mask=[True] * 2 + [False] * 6 + [True])
    short = make_scored(completion_ids=[3] * 4, raw_reward=0.0)
    rollout = Rollout.of([[long, short]], RolloutConfig(max_new_tokens=8, group_size=2))
    found = group_relative_advantages(
        rollout.rewards, rollout.valid, [c.num_sampled for c in rollout.completions()], scale="none"
    )
    assert [len(a) for a in found] == [3, 4]
    assert rollout_metrics(rollout)["completions/mean_length"] == 3.5
    _, counts = best_worst_pairs(rollout.groups, rollout.rewards, rollout.valid, margin=0.5)
    assert counts == PairCounts(pairs=1), "the better one is the shorter one, by what it wrote"


def test_a_dump_keeps_the_mask(tmp_path):
    mask = [True, False, True]
    kept = make_scored(completion_ids=[3, 4, 5], sampled_mask=mask)
    write_rollout(tmp_path / "1.jsonl", [[kept, make_scored()]])
    first, second = read_rollout(tmp_path / "1.jsonl")[0]
    assert (first.sampled_mask, second.sampled_mask) == (mask, None)


@pytest.mark.parametrize("mask", [[True], [False] * 3, []])
def test_a_mask_that_does_not_fit_is_refused(mask):
    with pytest.raises(ValueError, match="does not fit a completion of 3"):
        TokenizedCompletion([1], [2, 3, 4], sampled_mask=mask)


def test_a_full_mask_changes_nothing():
    plain = make_sequences()
    masked = [replace(s, sampled_mask=[True] * len(s.completion_ids)) for s in plain]
    model = make_model()
    for one, other in zip(
        sequence_logprobs(model, plain, temperature=1.0, batch_size=4)[0],
        sequence_logprobs(model, masked, temperature=1.0, batch_size=4)[0],
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
