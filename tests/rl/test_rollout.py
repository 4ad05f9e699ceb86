"""Rollouts: what is judged of groups, the order of prompts, the curriculum, files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_train.core.errors import CheckpointError, ConfigError
from ernie_train.rewards.score import Score
from ernie_train.rl.config import RolloutConfig, SkipSolved, UpoConfig
from ernie_train.rl.rollout import (
    Rollout,
    RolloutSampler,
    read_rollout,
    write_rollout,
)
from ernie_train.rl.rollout.prompt_order import PromptOrder, SolvedPrompts
from tests.rl.records import make_scored
from tests.rl.upo_stages import stage


def config(**values):
    return RolloutConfig(prompts_per_iteration=2, max_new_tokens=4, group_size=2, **values)


def test_a_group_of_one_is_informative_where_it_is_valid():
    single = RolloutConfig(prompts_per_iteration=2, max_new_tokens=4, group_size=1)
    unknown = make_scored(score=Score.timeout("slow machine"))
    rollout = Rollout.of([[make_scored()], [unknown]], single)
    np.testing.assert_array_equal(rollout.informative, [True, False])
    assert not Rollout.of([], config()).informative.size


def test_a_rollout_survives_the_disk(tmp_path):
    logprobs = np.array([-0.1, -2.5], np.float32)
    scored = make_scored(completion_ids=[3, 4], sampled_logprobs=logprobs, reward_parts={"a": 0.5})
    write_rollout(tmp_path / "000001.jsonl", [[scored, make_scored()], [make_scored()]])
    (first, second), (third,) = read_rollout(tmp_path / "000001.jsonl")
    assert first.sampled_logprobs.tobytes() == logprobs.tobytes()
    assert (first.reward_parts, first.score) == ({"a": 0.5}, Score.correct())
    assert vars(second) == vars(third) == vars(make_scored())
    (tmp_path / "old.jsonl").write_text('{"group": 0, "problem": 1}\n')
    with pytest.raises(CheckpointError, match=r"old\.jsonl: not a rollout"):
        read_rollout(tmp_path / "old.jsonl")


def test_a_rollout_whose_logprobs_are_cut_is_refused(tmp_path):
    path = tmp_path / "cut.jsonl"
    write_rollout(path, [[make_scored(sampled_logprobs=np.zeros(2, np.float32))]])
    with pytest.raises(CheckpointError, match="2 logprobs for 1 sampled tokens"):
        read_rollout(path)


def test_the_order_of_prompts_goes_on_where_it_stood():
    def everything(index):
        return True

    order = PromptOrder([5, 3], [1.0, 2.0], seed=3)
    assert sorted(PromptOrder([5, 3], [1.0, 2.0], 3).take(11, everything)) == sorted(
        [*range(5), *[5, 6, 7] * 2]
    )
    order.take(4, everything)
    again = PromptOrder([5, 3], [1.0, 2.0], seed=3)
    again.load_state_dict(json.loads(json.dumps(order.state_dict())))
    assert again.take(20, everything) == order.take(20, everything)
    assert set(order.take(30, lambda index: index in (1, 6))) == {1, 6}
    with pytest.raises(ConfigError, match="no prompt is left"):
        order.take(1, lambda index: False)


def test_the_curriculum_passes_over_levels_that_no_prompt_has():
    sampler = RolloutSampler.__new__(RolloutSampler)
    sampler.config = UpoConfig(**stage(Path("x"), curriculum={"raise_at": 0.5}))
    prompts = [SimpleNamespace(difficulty=level) for level in (1, 3, 7)]
    sampler.prepared, sampler.level, sampler.passed = SimpleNamespace(prompts=prompts), 1, []
    for expected in (3, 7, 7):
        at = [p.difficulty for p in prompts].index(sampler.level)
        sampler.raise_level(Rollout.of([[make_scored(prompt=at)]], sampler.config.rollout))
        assert sampler.level == expected


# ---- solved prompts ------------------------------------------------------------------------------

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=3)


@settings(max_examples=60)
@given(SIZES, st.integers(0, 99), st.integers(1, 12), st.sets(st.integers(0, 17)))
def test_solved_prompts_are_passed_over_unless_others_run_out(sizes, seed, count, solved):
    """Each once in a pass, no solved one before the last of the others, in the epoch's order."""
    order, plain = (PromptOrder(sizes, [1.0] * len(sizes), seed) for _ in range(2))
    total = sum(sizes)
    first_pass = plain.take(total, lambda at: True)
    others = [at for at in first_pass if at not in solved]
    taken = order.take(count, lambda at: True, lambda at: at in solved)
    assert len(taken) == count
    assert taken[: min(count, len(others))] == others[:count]
    if count > len(others):
        fill = [at for at in first_pass if at in solved][: count - len(others)]
        assert taken[len(others) : total] == fill[: total - len(others)]
    assert set(order.passed) <= solved and not set(order.passed) & set(taken[:total])
    again = PromptOrder(sizes, [1.0] * len(sizes), seed)
    again.take(count, lambda at: True, lambda at: at in solved)
    resumed = PromptOrder(sizes, [1.0] * len(sizes), seed)
    resumed.load_state_dict(again.state_dict())
    rest = [one.take(count, lambda at: True, lambda at: at in solved) for one in (order, resumed)]
    assert rest[0] == rest[1]


def test_a_prompt_counts_as_solved_by_its_rate_in_a_row_until_it_is_drawn_again():
    solved = SolvedPrompts(SkipSolved(rate=0.75, after=2, revisit=3))
    right, most, half = [True] * 4, [True, True, True, False], [True, True, False, False]
    solved.note(7, right, 1)
    assert not solved.skips(7, 2)
    solved.note(7, most, 2)
    assert [solved.skips(7, iteration) for iteration in (3, 4, 5, 6)] == [True, True, False, False]
    solved.note(7, right, 5)
    assert solved.skips(7, 6) and solved.count_skipped(range(9), 6) == 1
    restored = SolvedPrompts(solved.config)
    restored.load_state_dict(json.loads(json.dumps(solved.state_dict())))
    assert restored == solved
    solved.note(7, [], 6)  # no completion was judged: says nothing
    assert solved.skips(7, 7)
    solved.note(7, half, 8)
    solved.note(7, right, 9)
    assert not solved.skips(7, 10)
    for_good = SolvedPrompts(SkipSolved(after=1))
    for_good.note(0, right, 1)
    assert for_good.skips(0, 10**6) and not for_good.skips(1, 2)
