"""Records of RL with made-up tokens, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from ernie_train.rewards.score import Score
from ernie_train.rl.batch import TokenizedCompletion
from ernie_train.rl.rollout import ScoredCompletion


def make_sequences(count: int = 6, seed: int = 0) -> list[TokenizedCompletion]:
    """Prompts of 2 to 8 and completions of 1 to 11 random tokens."""
    rng = np.random.default_rng(seed)
    return [
        TokenizedCompletion(
            rng.integers(3, 90, rng.integers(2, 9)).tolist(),
            rng.integers(3, 90, rng.integers(1, 12)).tolist(),
        )
        for _ in range(count)
    ]


def make_scored(**values: Any) -> ScoredCompletion:
    """A correct, finished completion of prompt 0, with `values` replaced."""
    defaults: dict[str, Any] = {
        "prompt_ids": [1, 2], "completion_ids": [3], "prompt": 0, "domain": "d", "task": "t",
        "text": "x", "finished": True, "score": Score.correct(), "raw_reward": 1.0,
        "reward_parts": {},
    }  # fmt: skip
    return ScoredCompletion(**{**defaults, **values})
