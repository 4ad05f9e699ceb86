"""The settings of a recipe of reinforcement learning: its stage and its evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ernie_train.cli.init.problems import BY_ROW, Problems

LEAST_PROMPTS, MOST_PROMPTS = 4, 16  # of an iteration
GROUP_SIZE = 8
LEAST_ITERATIONS = 20  # of an epoch of few rows
MICRO_BATCH_TOKENS, SAMPLED_TOKENS = 8192, 65536  # trained at once, sampled at once
EVALUATIONS = 5  # of a run, at least
MOST_BETWEEN = 50  # iterations between checkpoints


@dataclass(frozen=True)
class ReinforcedStage:
    """Hold what the settings of a stage are made of.

    count: prompts that are trained. held_out: where others lie, and `held` their number.
    columns: those of the rows, as in a recipe.
    """

    problems: Problems
    count: int
    epochs: int
    held_out: str
    held: int
    columns: dict[str, Any]

    @property
    def prompts(self) -> int:
        """Return the prompts of an iteration."""
        some = max(LEAST_PROMPTS, min(MOST_PROMPTS, self.count // LEAST_ITERATIONS))
        return min(self.count, some)

    @property
    def iterations(self) -> int:
        return max(1, self.count * self.epochs // self.prompts)

    @property
    def batch_size(self) -> int:
        """Return the sequences that are sampled at once, whose cache takes memory."""
        some = min(MOST_PROMPTS * GROUP_SIZE, SAMPLED_TOKENS // self.problems.seq_len)
        return max(GROUP_SIZE, some)

    def settings(self) -> dict[str, Any]:
        """Return the keys of the stage that are those of reinforcement learning alone.

        The advantages are those of a group: pairs of completions add nothing to them
        (docs/rl_ablation.md), hence no `preference`.
        """
        found = self.problems
        every = max(1, min(MOST_BETWEEN, self.iterations // EVALUATIONS))
        stage: dict[str, Any] = {"reward": found.verifier, "iterations": self.iterations}
        stage |= {} if found.tried else {"canaries": 0}
        stage["micro_batch_size"] = max(1, min(GROUP_SIZE, MICRO_BATCH_TOKENS // found.seq_len))
        stage["rollout"] = {
            "prompts_per_iteration": self.prompts,
            "group_size": GROUP_SIZE,
            "max_prompt_tokens": found.max_prompt_tokens,
            "max_new_tokens": found.max_new_tokens,
            "batch_size": self.batch_size,
        }
        if self.held:
            stage["evaluation"] = {**self._held_out(), "every_iterations": every}
        return stage | {"checkpoint": {"every_steps": every}}

    def evaluation(self) -> dict[str, Any]:
        """Return the recipe's section that compares the model before and after; {} without rows."""
        if not self.held:
            return {}
        sampled = {"max_new_tokens": self.problems.max_new_tokens, "batch_size": self.batch_size}
        return {"evaluation": self._held_out() | sampled | {"untrained_examples": self.held}}

    def _held_out(self) -> dict[str, Any]:
        """Return the held-out rows as problems, which must name their verifier each."""
        verifier = self.problems.verifier
        named = {} if verifier == BY_ROW else {"reward": {"value": verifier}}
        columns = {**self.columns, **named}
        return {"path": self.held_out, **({"columns": columns} if columns else {})}
