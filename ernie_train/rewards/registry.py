"""Map the names that rows and recipes give to verifiers."""

from collections.abc import Callable
from typing import Any

from ernie_train.core.errors import UserError, did_you_mean
from ernie_train.rewards.score import Score
from ernie_train.rewards.verifiers import code, exact, format, logic, math_answer, tool_call

RewardFn = Callable[[dict[str, Any], str], Score]

REWARDS: dict[str, RewardFn] = {
    "exact": exact.score,
    "math": math_answer.score,
    "logic": logic.score,
    "code": code.score,
    "tool_call": tool_call.score,
    "format": format.score,
}


def reward_named(name: str) -> RewardFn:
    """Return the verifier of that name; raises UserError with the nearest name if unknown."""
    if name not in REWARDS:
        raise UserError(f"unknown reward {name!r}{did_you_mean(name, REWARDS)}")
    return REWARDS[name]
