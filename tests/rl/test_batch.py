"""Micro-batches and minibatches: every sequence once, partners together, groups whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ernie_train.rl.batch import (
    MicroBatch,
    PreferencePair,
    RolloutBatch,
    TokenizedCompletion,
    fill_micro_batches,
    micro_batches,
    minibatches,
)
from tests.rl.records import make_sequences


def places(batch, micro):
    """The sequences of a micro-batch by their place in the batch."""
    return [batch.sequences.index(s) for s in micro.sequences]


def rollout_batch(groups=13, others=4, pairs=(), **arrays):
    return RolloutBatch(make_sequences(groups + others), pairs, groups, 1, **arrays)


@pytest.mark.parametrize("size", [2, 3, 5, 40])
def test_micro_batches_hold_every_sequence_once_and_partners_together(size):
    pairs = [PreferencePair(2, 11), PreferencePair(13, 16), PreferencePair(5, 14)]
    batch = rollout_batch(pairs=pairs)
    found = micro_batches(batch, range(13), pairs, size)
    flat = [place for micro in found for place in places(batch, micro)]
    assert sorted(flat) == [*range(13), 13, 14, 16]
    assert all(len(micro.sequences) <= size for micro in found)
    seen = {
        (places(batch, micro)[c], places(batch, micro)[r])
        for micro in found
        for c, r in micro.pairs
    }
    assert seen == set(pairs)
    for micro in found:
        for place, trained in zip(places(batch, micro), micro.trained, strict=True):
            assert trained == (place < 13), "what is outside the groups is only compared"


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("most", [None, 60, 90, 200])
def test_micro_batches_are_filled_as_their_own_count_says(share_prompts, most):
    """Referee: a micro-batch is built of all members for each unit that might join it."""
    random = np.random.default_rng(most)
    sequences = [
        TokenizedCompletion([5] * int(n) + [p], [7] * int(c))
        for n, p, c in zip(
            random.integers(1, 20, 60), random.integers(0, 2, 60), random.integers(1, 20, 60),
            strict=True,
        )
    ]  # fmt: skip
    units = [random.choice(60, random.integers(1, 4)).tolist() for _ in range(90)]
    expected: list[list[int]] = []
    for number in range(len(units)):
        joined = [sequences[i] for n in [*(expected[-1] if expected else []), number]
                  for i in units[n]]  # fmt: skip
        both = MicroBatch.without_arrays(joined, share_prompts=share_prompts)
        fits = len(joined) <= 9 and (most is None or both.num_tokens <= most)
        if expected and fits:
            expected[-1].append(number)
        else:
            expected.append([number])
    found = list(fill_micro_batches(units, sequences, 9, most, share_prompts=share_prompts))
    assert found == expected and max(map(len, found)) > 1


def test_filling_micro_batches_reads_each_prompt_once():
    """Not again for each sequence that might join, which would be quadratic."""
    reads = []

    class Prompt(list):
        def __iter__(self):
            reads.append(1)
            return super().__iter__()

    sequences = [TokenizedCompletion(Prompt([5, 6, at % 3]), [7]) for at in range(50)]
    units = [[at] for at in range(50)]
    assert len(list(fill_micro_batches(units, sequences, 50, 999, share_prompts=True))) == 1
    assert len(reads) == 50


@pytest.mark.parametrize("share_prompts", [False, True])
def test_no_micro_batch_is_over_its_tokens_and_partners_stay_together(share_prompts):
    sequences = sharing_sequences() + make_sequences(30, seed=2)
    pairs = [PreferencePair(0, 2), PreferencePair(7, 12), PreferencePair(7, 9)]
    batch = RolloutBatch(sequences, pairs, 36, 1, share_prompts=share_prompts)
    most = max(2 * (s.length - 1) for s in sequences)
    found = micro_batches(batch, range(36), pairs, 9, most)
    sizes = [micro.num_tokens for micro in found]
    assert max(sizes) <= most and sum(sizes) > 0.6 * most * len(found), "and they are full"
    counts = [len(micro.sequences) for micro in found]
    assert max(counts) <= 9 and len(set(counts)) > 2, "long ones by fewer than short ones"
    assert sum(sum(micro.trained) for micro in found) == 36
    assert sum(len(micro.pairs) for micro in found) == 3
    by_count = micro_batches(batch, range(36), pairs, 9)
    assert micro_batches(batch, range(36), pairs, 9, 10**6) == by_count != found


def test_a_sequence_in_two_pairs_is_trained_once():
    pairs = [PreferencePair(0, 1), PreferencePair(0, 2)]
    ref = [np.full(len(s.completion_ids), at + 1.0) for at, s in enumerate(make_sequences(3))]
    batch = rollout_batch(3, 0, pairs, ref_logprobs=ref, old_logprobs=ref)
    found = micro_batches(batch, range(3), pairs, 4)
    tokens = [len(s.completion_ids) for s in batch.sequences]
    assert sum(micro.loss_mask.sum() for micro in found) == sum(tokens)
    assert sum(len(micro.pairs) for micro in found) == 2
    copies = 0
    for micro in found:
        ends = np.cumsum(micro.lengths)[:-1]
        rows = zip(
            places(batch, micro), micro.trained, np.split(micro.ref_logprobs, ends),
            np.split(micro.old_logprobs, ends), strict=True,
        )  # fmt: skip
        for place, trained, reference, old in rows:
            np.testing.assert_array_equal(reference, ref[place])
            np.testing.assert_array_equal(old, ref[place] if trained else 0.0)
            copies += not trained
    assert copies == 1


def test_minibatches_deal_groups_out_whole_with_their_pairs():
    pairs = [PreferencePair(4, 7), PreferencePair(9, 8), *[PreferencePair(20, 21)] * 3]
    batch = RolloutBatch(make_sequences(22), pairs, num_groups=5, group_size=4)
    found = minibatches(batch, 2, 3, 1)
    assert sorted(at for part in found for at in part.trained) == list(range(20))
    for part in found:
        groups = {at // 4 for at in part.trained}
        assert {at // 4 for at in part.trained} == groups
        assert all(sum(at // 4 == g for at in part.trained) == 4 for g in groups)
        own = [pair for pair in part.pairs if pair.chosen < 20]
        assert all(pair.chosen // 4 in groups for pair in own)
    assert sorted(len([p for p in part.pairs if p.chosen == 20]) for part in found) == [1, 2]
    assert minibatches(batch, 2, 3, 1) == found
    assert minibatches(batch, 2, 3, 2) != found, "another epoch, another order"


def test_without_groups_to_train_only_pairs_make_minibatches():
    pairs = [PreferencePair(0, 1)]
    batch = RolloutBatch(make_sequences(8), pairs, num_groups=2, group_size=4)
    found = minibatches(batch, 2, 5, train_groups=False)
    assert [(part.trained, part.pairs) for part in found] == [([], pairs)]


# ---- shared prompts ------------------------------------------------------------------------------


def sharing_sequences() -> list[TokenizedCompletion]:
    """Two prompts with three completions each, of one token too, with tool outputs in one."""
    rng = np.random.default_rng(4)
    found = []
    for prompt, lengths in ((5, (4, 1, 9)), (2, (6, 6, 3))):
        ids = rng.integers(3, 90, prompt).tolist()
        found += [TokenizedCompletion(ids, rng.integers(3, 90, n).tolist()) for n in lengths]
    masked = TokenizedCompletion(
        found[4].prompt_ids, found[4].completion_ids, sampled_mask=[True, False] * 3
    )
    return [found[0], found[3], found[1], masked, found[2], found[5]]  # not next to each other


def test_shared_prompts_go_through_once_and_every_token_keeps_its_predictor():
    sequences = sharing_sequences()
    plain = MicroBatch.without_arrays(sequences)
    shared = MicroBatch.without_arrays(sequences, share_prompts=True)
    assert plain.num_tokens == sum(s.length - 1 for s in sequences)
    assert shared.num_tokens == plain.num_tokens - 2 * 5 - 2 * 2
    ids, layout = shared.inputs
    assert ids.shape == (1, shared.num_tokens) and layout.num_tokens == shared.num_tokens
    np.testing.assert_array_equal(shared.targets, plain.targets)
    rows, documents = plain.inputs
    positions = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)[documents > 0]
    before = rows[documents > 0][plain.predictors], positions[plain.predictors]
    now = ids[0][shared.predictors], layout.default_positions()[shared.predictors]
    np.testing.assert_array_equal(before, now)


def test_recorded_experts_stand_where_their_tokens_do():
    sequences = [
        replace(s, expert_ids=np.array(s.completion_ids)[:, None, None] % 7,
                prompt_expert_ids=np.array(s.prompt_ids[:-1])[:, None, None] % 7)
        for s in sharing_sequences()
    ]  # fmt: skip
    # All completions of a prompt were sampled from one distribution, by the same experts.
    for s in sequences:
        s.expert_ids[0] = len(s.prompt_ids)
    plain, shared = (MicroBatch.without_arrays(sequences, share_prompts=x) for x in (False, True))
    assert shared.routing.shape == (shared.num_tokens, 1, 1)
    for micro in (plain, shared):
        expected = np.concatenate([s.expert_ids[s.sampled_places] for s in sequences])
        np.testing.assert_array_equal(micro.routing[micro.predictors], expected)
    prompts = [s.prompt_expert_ids for s in (sequences[0], sequences[1])]
    np.testing.assert_array_equal(shared.routing[:4], prompts[0])


def test_members_of_a_group_are_in_one_micro_batch_to_share():
    sequences = sharing_sequences()
    batch = RolloutBatch(sequences, num_groups=2, group_size=3, share_prompts=True)
    for micro in micro_batches(batch, range(6), [], 3):
        assert micro.share_prompts and len({tuple(s.prompt_ids) for s in micro.sequences}) == 1
