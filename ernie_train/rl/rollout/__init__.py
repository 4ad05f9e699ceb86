"""Rollouts: groups of completions of prompts, sampled and scored.

A rollout can be written to a file and read from it instead of being sampled, which makes runs
comparable that differ in something else only.
"""

from ernie_train.rl.rollout.files import read_rollout, write_rollout
from ernie_train.rl.rollout.grading import Answer, grade
from ernie_train.rl.rollout.kept import KEPT, keep_rollout, take_kept
from ernie_train.rl.rollout.records import PromptGroup, Rollout, ScoredCompletion
from ernie_train.rl.rollout.sampler import RolloutSampler
from ernie_train.rl.rollout.sampler_gap import (
    correction_of,
    largest_mismatch,
    logprob_mismatch,
)
from ernie_train.rl.rollout.second_reward import SecondReward, second_rewards

__all__ = [
    "KEPT",
    "Answer",
    "PromptGroup",
    "Rollout",
    "RolloutSampler",
    "ScoredCompletion",
    "SecondReward",
    "correction_of",
    "grade",
    "keep_rollout",
    "largest_mismatch",
    "logprob_mismatch",
    "read_rollout",
    "second_rewards",
    "take_kept",
    "write_rollout",
]
