"""The order in which an RL stage draws its prompts, and which of them it passes over as solved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ernie_train.core.errors import ConfigError
from ernie_train.data.packing import epoch_order
from ernie_train.rl.config import SkipSolved

_ROUNDING = 1e-9  # of a share of completions, against a rate such as 0.9


class PromptOrder:
    """Prompts without end, each epoch in another order; resumable at every prompt.

    `passed` are those that the last `take` passed over as solved.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._sizes, self._weights, self._seed = list(sizes), list(weights), seed
        self._first = np.concatenate([[0], np.cumsum(self._sizes)])
        self._epoch = self._position = 0
        self.passed: list[int] = []

    def take(
        self,
        count: int,
        allowed: Callable[[int], bool],
        solved: Callable[[int], bool] = lambda prompt: False,
    ) -> list[int]:
        """Return the next `count` prompts that `allowed` lets through, as indices over all sources.

        Those that are `solved` are passed over for as many prompts as an epoch has; where too few
        others came by then, they fill up. Raises `ConfigError` where a whole epoch holds none.
        """
        taken: list[int] = []
        self.passed = []
        seen, once_around = 0, 0
        while len(taken) < count:
            sources, rows = epoch_order(self._sizes, self._weights, self._seed, self._epoch)
            once_around = once_around or len(sources)
            while self._position < len(sources) and len(taken) < count:
                at = int(self._first[sources[self._position]] + rows[self._position])
                self._position += 1
                seen += 1
                if allowed(at):
                    skips = seen <= once_around and solved(at)
                    (self.passed if skips else taken).append(at)
                if seen == once_around:
                    missing = count - len(taken)
                    taken, self.passed = taken + self.passed[:missing], self.passed[missing:]
            if self._position == len(sources):
                self._epoch, self._position = self._epoch + 1, 0
                if not taken and not self.passed and seen >= len(sources):
                    raise ConfigError("no prompt is left to sample from: check data and curriculum")
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._position = int(state["epoch"]), int(state["position"])


@dataclass
class SolvedPrompts:
    """Counts how often in a row the policy solved each prompt, and remembers when it last did."""

    config: SkipSolved
    streaks: dict[int, tuple[int, int]] = field(default_factory=dict)

    def note(self, prompt: int, correct: Sequence[bool], iteration: int) -> None:
        """Take up a draw of a prompt: whether each of its judged completions was correct."""
        if not correct:
            return
        if sum(correct) < (self.config.rate - _ROUNDING) * len(correct):
            self.streaks.pop(prompt, None)
        else:
            self.streaks[prompt] = (self.streaks.get(prompt, (0, 0))[0] + 1, iteration)

    def skips(self, prompt: int, iteration: int) -> bool:
        """Return whether an iteration passes a prompt over."""
        streak, last = self.streaks.get(prompt, (0, 0))
        revisit = self.config.revisit
        return streak >= self.config.after and (revisit is None or iteration - last < revisit)

    def count_skipped(self, prompts: Iterable[int], iteration: int) -> int:
        return sum(self.skips(prompt, iteration) for prompt in prompts)

    def state_dict(self) -> dict[str, list[int]]:
        return {str(prompt): list(streak) for prompt, streak in self.streaks.items()}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        self.streaks = {int(prompt): (streak[0], streak[1]) for prompt, streak in state.items()}
