"""Settings of an RL stage's problems and of the completions that are sampled for them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ernie_train.core.config import (
    HARMLESS,
    NonNegative,
    NonNegativeInt,
    PathText,
    Positive,
    PositiveInt,
    SampleWeight,
    StrictConfig,
)
from ernie_train.data import MappedRows, RowSource
from ernie_train.generate.engines import EngineConfig


class PromptSource(RowSource):
    """Problems with a verifier: a file of rows, a directory or a pattern of them."""

    later_keys = (*RowSource.later_keys, "format")

    weight: SampleWeight = 1.0
    """An epoch has round(weight x problems) of them."""
    tasks: list[str] = []
    """Keeps problems of the named tasks or domains; all unless given."""
    max_examples: PositiveInt | None = None
    """Uses only this many first problems of each task."""


class SkipSolved(StrictConfig):
    """Prompts that are passed over because the policy solves them anyway."""

    rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a draw's completions that must be correct for the prompt to count as solved."""
    after: PositiveInt = 2
    """Draws in a row in which it must be."""
    revisit: PositiveInt | None = None
    """Iterations after its last draw in which it is drawn again; never, unless given."""


class RolloutConfig(StrictConfig):
    """Sampling of an iteration: `prompts_per_iteration` groups of `group_size` completions."""

    prompts_per_iteration: PositiveInt | None = None
    """Number of prompts of an iteration."""
    group_size: PositiveInt = 8
    """Completions sampled for each prompt."""
    engine: EngineConfig = EngineConfig()
    """What samples; the built-in sampler by default."""
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt, in tokens; longer ones are left out, with a notice."""
    max_new_tokens: PositiveInt
    """Longest completion, in tokens."""
    temperature: Positive = 1.0
    """Sampling temperature; all logprobs are at this temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Samples from the likeliest tokens of this total probability."""
    top_k: NonNegativeInt = 0
    """Samples from the k likeliest tokens; 0: from all."""
    batch_size: PositiveInt = 256
    """Sequences that the built-in sampler samples at once."""
    refill_rounds: NonNegativeInt = 0
    """Further rounds of prompts that replace groups without a difference in reward."""
    skip_solved: SkipSolved | None = None
    """Passes over prompts that the policy solved before."""
    truncated: Literal["keep", "mask", "punish", "ramp"] = "keep"
    """Completions cut at `max_new_tokens` are kept with what they earned (`keep`), left out
    (`mask`), or kept with less (`punish`); `ramp` punishes those near that end in part too
    (arXiv:2503.14476).
    """
    truncation_penalty: NonNegative = 0.0
    """What `punish` takes off the reward, and `ramp` at most."""
    overlong_tokens: PositiveInt | None = None
    """Of `ramp`: the last tokens of `max_new_tokens`, over which the penalty rises from 0."""
    max_logprob_mismatch: Annotated[Positive, HARMLESS] = 0.05
    """Bound of mean min(exp(abs(recomputed - sampled logprob)), 20) - 1; above it the stage stops,
    with `policy.sampler_correction` above 20 times as much.
    """
    dump: Annotated[bool, HARMLESS] = False
    """Keeps each iteration's rollout in `rollouts/` of the stage's directory."""
    replay: Annotated[PathText | None, HARMLESS] = None
    """A directory of such rollouts, used instead of sampling. Settings that decided what they hold
    are refused beside it: `top_p`, `top_k`, `batch_size`, `refill_rounds`, `curriculum` and
    `audit_reward`. The stage's prompts and `group_size` must be those that they were sampled with.
    """

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
        if self.engine.kind == "vllm" and self.temperature != 1 and (self.top_p < 1 or self.top_k):
            raise ValueError(
                "vllm has no log-probabilities at a temperature before top_p and top_k truncate "
                "the distribution: set temperature: 1, or leave top_p at 1 and top_k at 0"
            )
        return self


class Curriculum(StrictConfig):
    """Prompts up to a difficulty, which rises when the policy solves enough of an iteration's.

    Rows have an integer field `difficulty` (1 where it is missing); without a curriculum it may be
    anything.
    """

    start: PositiveInt = 1
    """Difficulty of the hardest prompts at first."""
    raise_at: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the hardest prompts that must be solved before the next level is drawn."""


class StageEvaluation(MappedRows):
    """Held-out problems solved during training; greedy, unless `samples` asks for pass@k."""

    path: Annotated[PathText, HARMLESS]
    """A file of problems, a directory, or a pattern (docs/data.md)."""
    every_iterations: Annotated[PositiveInt, HARMLESS]
    """Iterations between evaluations; there is one at the end too."""
    max_examples: PositiveInt | None = None
    """Problems of each task; all unless given."""
    tasks: list[str] = []
    """Solves problems of these tasks or domains alone; all unless given."""
    samples: PositiveInt = 1
    """Completions of each problem, for pass@k and majority votes (docs/evaluation.md)."""
    temperature: NonNegative = 0.0
    """Sampling temperature; 0 is greedy."""

    @model_validator(mode="after")
    def _sampled(self) -> StageEvaluation:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 need a temperature: greedy completions are all equal")
        return self
