"""How prompts are divided over ranks; what ranks sample together is tested in tests/parallel."""

from __future__ import annotations

import numpy as np
import pytest

from ernie_train.generate.engine import Completion
from ernie_train.generate.sharded import _partition, pieces_of, share_prompt_experts


def groups_of(sizes, prompt_tokens):
    return [
        [i] * tokens for i, (size, tokens) in enumerate(zip(sizes, prompt_tokens, strict=True))
        for _ in range(size)
    ]  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_long_completions_of_a_prompt_are_dealt_to_all_ranks(ranks):
    """Each rank gets as many of a hard prompt's as the others, whichever prompt it is."""
    prompts = groups_of([16] * 5, [100, 700, 60, 300, 300])
    parts = _partition(prompts, [7168] * len(prompts), ranks)
    assert sorted(i for part in parts for i in part) == list(range(len(prompts)))
    for group in range(5):
        counts = [sum(prompts[i][0] == group for i in part) for part in parts]
        assert max(counts) - min(counts) <= 1
    assert max(map(len, parts)) - min(map(len, parts)) <= 5


@pytest.mark.parametrize("ranks", [2, 4])
def test_short_completions_of_a_prompt_stay_together(ranks):
    """To compute the prompt once more would take longer than what is shared out."""
    prompts = groups_of([8] * 8, [200, 190, 210, 180, 200, 200, 205, 195])
    parts = _partition(prompts, [64] * len(prompts), ranks)
    assert sorted(i for part in parts for i in part) == list(range(len(prompts)))
    owners = {(prompts[i][0], rank) for rank, part in enumerate(parts) for i in part}
    assert len(owners) == 8
    assert {len(part) for part in parts} == {64 // ranks}


def test_loads_count_what_is_sampled_too():
    """A long prompt is not worth ten short ones."""
    prompts = groups_of([1] * 21, [1000, *[100] * 20])
    parts = _partition(prompts, [1000] * len(prompts), 2)
    assert sorted(map(len, parts)) == [10, 11]


def test_limits_of_single_sequences_count():
    prompts = groups_of([1] * 9, [10] * 9)
    parts = _partition(prompts, [800, *[100] * 8], 2)
    assert sorted(map(sorted, parts)) == [[0], list(range(1, 9))]


def test_pieces_are_worth_the_prompt():
    assert pieces_of(16, 1024, 16 * 7168, 8) == 7  # 16 times 1024 tokens or more each
    assert pieces_of(16, 1024, 16 * 7168, 4) == 4
    assert pieces_of(4, 10, 4 * 7168, 8) == 4
    assert pieces_of(8, 200, 8 * 64, 2) == 1


def test_equal_prompts_share_experts_where_ranks_chose_the_same():
    table = np.arange(12, dtype=np.int16).reshape(2, 3, 2)
    other = table + np.int16(1)
    arrays = [table, table.copy(), other, table.copy()]
    found = [Completion(prompt_expert_ids=array) for array in arrays]
    share_prompt_experts([[1, 2, 3], [1, 2, 3], [1, 2, 3], [4, 5, 6]], found)
    kept = [completion.prompt_expert_ids for completion in found]
    assert [array is mine for array, mine in zip(kept, arrays, strict=True)] == [
        True, False, True, True,
    ]  # fmt: skip
    assert kept[1] is table
