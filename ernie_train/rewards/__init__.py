"""Grade completions: verifiers `REWARDS[name](row, completion) -> Score`, alone and in batches.

A row holds what its verifier needs (`answer`, `tests`, `expected_calls`, ...); the completion is
what a policy wrote after the generation prompt, hostile input that is never run outside of the
sandbox. `scoring.composition.build_reward` combines verifiers into a recipe's reward;
docs/rewards.md describes all of it.
"""

from ernie_train.rewards.registry import REWARDS, RewardFn, fitting_verifier, reward_named
from ernie_train.rewards.sandbox.api import SandboxUnavailable
from ernie_train.rewards.score import Score, Status, read_completion, read_response
from ernie_train.rewards.scoring.service import ScoringReport, ScoringService, score_batch

__all__ = [
    "REWARDS",
    "RewardFn",
    "SandboxUnavailable",
    "Score",
    "ScoringReport",
    "ScoringService",
    "Status",
    "fitting_verifier",
    "read_completion",
    "read_response",
    "reward_named",
    "score_batch",
]
