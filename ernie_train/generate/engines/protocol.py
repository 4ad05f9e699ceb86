"""The interface of everything that samples completions for a rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from ernie_train.generate.engine import Completion
from ernie_train.generate.sampler import SamplingConfig
from ernie_train.model import Ernie4_5_MoeForCausalLM

T = TypeVar("T")


def require_loaded(loaded: T | None) -> T:
    """Return what `load_weights` left; raise `ValueError` before it has."""
    if loaded is None:
        raise ValueError("load_weights comes before sample")
    return loaded


class Engine(Protocol):
    """Samples completions with the weights that it was last given.

    An engine is made for one tokenizer: its stop tokens end every completion. On several ranks
    every rank makes the same calls with the same arguments and gets the same completions.

    A conversation of several turns calls `sample` once per turn, for all episodes that still run:
    `prompts` are the token ids so far (prompt, sampled ids as they were returned, token ids of the
    tools' results), `sequence_ids` the numbers of the episodes, `limits` the tokens that each may
    still sample, and `settings.seed` differs from turn to turn, as a sequence draws the same random
    numbers wherever seed and sequence id are the same. Weights stay as they are between the turns.
    """

    def load_weights(self, model: Ernie4_5_MoeForCausalLM, version: int) -> None:
        """Sample from now on with the weights of `model`; the same version again does nothing.

        version: grows with every update of the weights.
        Raises `EngineError` where the engine cannot be brought to sample with them, and
        `Interrupted` when a stop is requested.
        """
        ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingConfig,
        *,
        sequence_ids: Sequence[int] | None = None,
        limits: Sequence[int] | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> list[Completion]:
        """Return a completion of every prompt, in prompt order, with its log-probabilities.

        sequence_ids: with the seed they determine a completion's random numbers; by default the
            index of its prompt.
        limits: the most tokens of each completion, at most `settings.max_new_tokens`, the default.

        `Completion.expert_ids` is None where the engine does not tell. Raises `Interrupted` when a
        stop is requested, `EngineError` where the engine fails or its answer is not what was
        asked for, and `ValueError` on an empty prompt or a setting out of range.
        """
        ...

    def sleep(self) -> None:
        """Give memory that the learner can use back until `load_weights`, if it is so set up.

        Does nothing before weights were loaded. `load_weights` comes before `sample` again, of the
        same version too. Raises `EngineError` where the engine fails.
        """
        ...

    def close(self) -> None:
        """End what the engine started; may be called more than once."""
        ...
