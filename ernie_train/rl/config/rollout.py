"""Settings of an RL stage's problems and of the completions that are sampled for them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ernie_train.core.config import (
    HARMLESS,
    NonNegative,
    Positive,
    PositiveInt,
    SampleWeight,
    StrictConfig,
)
from ernie_train.data import MappedRows
from ernie_train.generate.engines import EngineConfig


class PromptSource(MappedRows):
    """Problems with a verifier: a file of rows, a directory or a pattern of them.

    weight: an epoch holds round(weight * problems) of them.
    tasks: keeps those of the named tasks or domains; empty keeps all.
    max_examples: uses the first of each task only.
    """

    path: Annotated[str, Field(min_length=1), HARMLESS]
    weight: SampleWeight = 1.0
    tasks: list[str] = []
    max_examples: PositiveInt | None = None


class SkipSolved(StrictConfig):
    """Prompts that are passed over because the policy solves them anyway.

    rate: share of a draw's completions that must be correct for the prompt to count as solved.
    after: draws in a row in which it must be.
    revisit: iterations after its last draw in which it is drawn again; None: never.
    """

    rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    after: PositiveInt = 2
    revisit: PositiveInt | None = None


class RolloutConfig(StrictConfig):
    """Sampling of an iteration: `prompts_per_iteration` groups of `group_size` completions.

    max_prompt_tokens: longer prompts are left out.
    engine: who samples; our own sampler by default.
    batch_size: sequences that our own sampler samples at once.
    refill_rounds: further rounds of prompts that replace groups without a difference in reward.
    skip_solved: passes prompts over that the policy solved before, by their solve rate.
    truncated: completions cut at max_new_tokens are kept with what they earned ("keep"), left out
        ("mask"), or kept with their reward less `truncation_penalty` ("punish"). "ramp" takes it
        off in part already from completions that end within the last `overlong_tokens` before
        max_new_tokens (soft overlong punishment, arXiv:2503.14476).
    max_logprob_mismatch: bound of mean exp|recomputed - sampled logprob| - 1; above it the stage
        stops.
    dump: writes each iteration's rollout to `rollouts/` in the stage's directory.
    replay: a directory of such rollouts, which are used instead of sampling.
    """

    prompts_per_iteration: PositiveInt | None = None
    group_size: PositiveInt = 8
    engine: EngineConfig = EngineConfig()
    max_prompt_tokens: PositiveInt = 512
    max_new_tokens: PositiveInt
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    batch_size: PositiveInt = 256
    refill_rounds: Annotated[int, Field(ge=0)] = 0
    skip_solved: SkipSolved | None = None
    truncated: Literal["keep", "mask", "punish", "ramp"] = "keep"
    truncation_penalty: NonNegative = 0.0
    overlong_tokens: PositiveInt | None = None
    max_logprob_mismatch: Annotated[Positive, HARMLESS] = 0.05
    dump: Annotated[bool, HARMLESS] = False
    replay: Annotated[str | None, HARMLESS] = None

    @model_validator(mode="after")
    def _consistent(self) -> RolloutConfig:
        punishes, penalty = self.truncated in ("punish", "ramp"), self.truncation_penalty
        if penalty and not punishes:
            raise ValueError(f"truncation_penalty has no effect with truncated: {self.truncated}")
        if punishes and not penalty:
            raise ValueError(
                f"truncated: {self.truncated} takes truncation_penalty off the reward, which is 0: "
                "give a penalty, such as 0.5, or say truncated: keep"
            )
        if self.replay is not None and self.skip_solved is not None:
            raise ValueError("skip_solved has no effect under replay, which gives the prompts")
        tokens = self.overlong_tokens
        if tokens is not None and self.truncated != "ramp":
            raise ValueError(f"overlong_tokens has no effect with truncated: {self.truncated}")
        if self.truncated == "ramp" and (tokens is None or tokens > self.max_new_tokens):
            raise ValueError(
                "truncated: ramp punishes the last overlong_tokens of max_new_tokens="
                f"{self.max_new_tokens}: give how many, such as {max(1, self.max_new_tokens // 7)}"
            )
        return self

    def length_penalty(self, tokens: int, *, finished: bool) -> float:
        """Return what the length of a completion of `tokens` tokens takes off its reward."""
        if not finished:
            return self.truncation_penalty
        if self.overlong_tokens is None:
            return 0.0
        beyond = tokens - (self.max_new_tokens - self.overlong_tokens)
        return self.truncation_penalty * max(0, beyond) / self.overlong_tokens

    @model_validator(mode="after")
    def _engine_fits(self) -> RolloutConfig:
        engine = self.engine
        if engine.kind == "own":
            return self
        if engine.kind == "vllm" and self.temperature != 1 and (self.top_p < 1 or self.top_k):
            raise ValueError(
                "vllm has no log-probabilities at a temperature before top_p and top_k truncate "
                "the distribution: set temperature: 1, or leave top_p at 1 and top_k at 0"
            )
        return self


class Curriculum(StrictConfig):
    """Prompts up to a difficulty, which rises when the policy solves enough of an iteration's.

    Rows have an integer field `difficulty` (1 where it is missing).
    """

    start: PositiveInt = 1
    raise_at: Annotated[float, Field(gt=0, le=1)] = 0.8


class StageEvaluation(MappedRows):
    """Held-out problems solved during training; greedy, unless `samples` asks for pass@k."""

    path: Annotated[str, HARMLESS]
    every_iterations: Annotated[PositiveInt, HARMLESS]
    max_examples: PositiveInt | None = None
    tasks: list[str] = []
    samples: PositiveInt = 1
    temperature: NonNegative = 0.0

    @model_validator(mode="after")
    def _sampled(self) -> StageEvaluation:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 need a temperature: greedy completions are all equal")
        return self
