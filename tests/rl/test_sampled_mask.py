"""Tool outputs within a completion are context: in no term of a loss, no count, no advantage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ernie_train.rl.batch import (
    MicroBatch,
    TokenizedCompletion,
)
from ernie_train.rl.critic import Critic
from ernie_train.rl.estimators import (
    policy_logprobs,
    sequence_logprobs,
    sequence_values,
)
from ernie_train.rl.rollout import read_rollout, write_rollout
from tests.rl.records import make_scored, make_sequences
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
