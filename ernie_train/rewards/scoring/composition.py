"""Compose the reward of a recipe: weighted parts, graded together, each value reported.

reward: logic                                      # one verifier
reward: row                                        # the verifier that each row names
reward: {python: my_rewards.py:score}              # a user's function
reward:
  - {name: row, weight: 1.0}
  - {model: {path: runs/reward-model}, weight: 0.3}  # a reward model, in stages of kind upo
  - {name: format, weight: 0.1, max_tokens: 2048}
reward: {max_excluded_fraction: 0.05, parts: [...]}
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field
from pydantic_core import CoreSchema

from ernie_train.core.config import HARMLESS, PathText, StrictConfig
from ernie_train.core.errors import UserError
from ernie_train.rewards.registry import REWARDS, reward_named
from ernie_train.rewards.score import Score
from ernie_train.rewards.scoring.service import Reward, ScoringReport, ScoringService
from ernie_train.rewards.verifiers import format
from ernie_train.rewards.verifiers.llm_judge import Criterion, LlmJudge
from ernie_train.rewards.verifiers.user import find_user_reward

_SHOWN_EXCLUDED = 5


class RubricItem(StrictConfig):
    """Configure one line of a judge's checklist."""

    criterion: str = Field(min_length=1)
    """What the completion should do, or should not."""
    marks: float = 1.0
    """Marks for meeting it; below 0 for a fault."""
    reference: str | None = None
    """What meets the criterion, shown to the judge."""


class LlmJudgeConfig(StrictConfig):
    """Configure a language model that judges responses: verifiers/llm_judge.py.

    It compares them with `answer`, or says which criteria of a rubric they meet.
    """

    url: str = Field(pattern=r"^https?://[^/\s]")
    """OpenAI-compatible endpoint, up to and with `/v1`."""
    model: str = Field(min_length=1)
    """Name of the model at that endpoint."""
    api_key_env: str | None = None
    """The environment variable that holds the key."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds that one request may take."""
    retries: int = Field(default=2, ge=0, le=10)
    """Further requests after a failure."""
    parallel: int = Field(default=8, ge=1, le=256)
    """Requests at a time."""
    rubric: list[RubricItem] = []
    """A checklist for rows that have none of their own (docs/rewards.md)."""

    @pydantic.model_validator(mode="after")
    def _earns_marks(self) -> "LlmJudgeConfig":
        marks = [item.marks for item in self.rubric]
        if 0.0 in marks:
            raise ValueError("rubric: a criterion with 0 marks has no effect")
        if marks and max(marks) < 0:
            raise ValueError("rubric: no criterion has marks above 0")
        return self


class RewardModelPart(StrictConfig):
    """Configure a reward model, which a stage of kind reward trained.

    Its score is that of the whole conversation, rendered by its own tokenizer and template.
    """

    path: Annotated[
        PathText,
        Field(min_length=1),
        HARMLESS,
    ]
    """A run, stage, checkpoint or export of a reward model."""
    normalize: bool = True
    """Scores less the mean, divided by the deviation, of those at the end of its training."""
    clip: float = Field(default=5.0, gt=0)
    """Bound of a score's size; a completion without an answer gets the lower one."""
    batch_size: int = Field(default=16, ge=1)
    """Conversations that it scores at once."""


class RewardPart(StrictConfig):
    """Configure one part: exactly one of `name`, `python`, `judge` and `model`."""

    name: str | None = None
    """A verifier's name, or `row`: the one in each row's `reward`."""
    python: str | None = None
    """`file.py:function`, a reward of your own."""
    judge: LlmJudgeConfig | None = None
    """A language model that compares completions with `answer`."""
    model: RewardModelPart | None = None
    """A reward model (docs/reward_models.md)."""
    weight: float = 1.0
    """What its value is multiplied by."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Of `format` alone: longer completions lose half of it."""
    timeout_s: float | None = Field(default=None, gt=0)
    """Of `python` alone: seconds for one completion; 90 without it."""

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> "RewardPart":
        kinds = ("name", "python", "judge", "model")
        if sum(getattr(self, kind) is not None for kind in kinds) != 1:
            raise ValueError("exactly one of name, python, judge and model must be given")
        if self.name is not None and self.name != "row":
            try:
                reward_named(self.name)
            except UserError as error:
                raise ValueError(f"{error}, or row") from None
        if self.max_tokens is not None and self.name != "format":
            raise ValueError("max_tokens is for the part named format")
        if self.timeout_s is not None and self.python is None:
            raise ValueError("timeout_s is for a python function; a judge has its own")
        return self

    @property
    def label(self) -> str:
        """Return the name under which the part's values are logged."""
        if self.python is not None:
            return self.python.rpartition(":")[2]
        return self.name or ("judge" if self.judge is not None else "reward_model")

    @property
    def span(self) -> float:
        """Return by how much two values of the part may differ, before its weight."""
        return 1.0 if self.model is None else 2.0 * self.model.clip


class RewardConfig(StrictConfig):
    """Configure the parts of a reward; a recipe may also give a name, a part or a list of parts."""

    parts: list[RewardPart] = Field(min_length=1)
    """Weighted parts, whose values add up."""
    max_excluded_fraction: float = Field(
        default=0.25,
        ge=0,
        le=1,
    )
    """Share of a batch that may go without a score; above it the run stops."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        """Read a name, a part or a list of parts as the section that it stands for."""
        if isinstance(value, str):
            return {"parts": [{"name": value}]}
        if isinstance(value, list):
            return {"parts": value}
        if not isinstance(value, dict) or value.keys() & RewardConfig.model_fields.keys():
            return value
        beside = {key: value[key] for key in value if key in cls.model_fields}  # of a subclass
        return {"parts": [{k: v for k, v in value.items() if k not in beside}], **beside}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: pydantic.GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Return the JSON Schema of the section and of its short forms."""
        full, part = handler(schema), handler(RewardPart.__pydantic_core_schema__)
        keys = dict(handler.resolve_ref_schema(full)["properties"])
        one = dict(handler.resolve_ref_schema(part))
        beside = {key: keys[key] for key in keys if key not in RewardConfig.model_fields}
        one["properties"] = {**one["properties"], **beside}
        return {"anyOf": [full, one, {"type": "array", "items": part}, {"type": "string"}]}

    @pydantic.model_validator(mode="after")
    def _labels_differ(self) -> "RewardConfig":
        labels = Counter(part.label for part in self.parts)
        if twice := [label for label, count in labels.items() if count > 1]:
            raise ValueError(f"two parts have the name {twice[0]!r}")
        return self

    @property
    def span(self) -> float:
        """Return by how much two rewards may differ."""
        return sum(abs(part.weight) * part.span for part in self.parts)

    @property
    def verifier(self) -> RewardPart:
        """Return the part that decides if a completion is correct.

        It is the first other than format and reward models; else a reward model.
        """
        parts = sorted(self.parts, key=lambda part: part.model is not None)
        return next((part for part in parts if part.name != "format"), parts[0])


@dataclass(frozen=True)
class ComposedScore:
    """Hold the reward of one completion.

    value: the sum of weight times value over the parts. score: the score of the verifier, which is
    the first part other than format and reward models; if some part could not grade the completion,
    the score of that part, so that `score.trains` is valid for the whole. parts: each part's value
    by its label.
    """

    value: float
    score: Score
    parts: dict[str, float]


@dataclass(frozen=True)
class ScoredBatch:
    """Hold the scores of a batch of completions, and a report on the grading."""

    scores: list[ComposedScore]
    report: ScoringReport


class ComposedReward:
    """Grade with a recipe's reward; `close` ends its processes. Made by `build_reward`."""

    def __init__(
        self, config: RewardConfig, rewards: Sequence[Reward | None], service: ScoringService
    ) -> None:
        self.config = config
        self._parts = list(zip(config.parts, rewards, strict=True))
        self._service = service

    def grade_verifier(
        self,
        rows: Sequence[dict[str, Any]],
        completions: Sequence[str],
        *,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> list[Score]:
        """Return the scores of the verifier alone, however many of them are excluded."""
        reward = next(reward for part, reward in self._parts if part is self.config.verifier)
        items = [
            (reward or _reward_of_row(row), row, completion)
            for row, completion in zip(rows, completions, strict=True)
        ]
        return self._service.score(items, stop_requested=stop_requested)[0]

    def score_batch(
        self,
        rows: Sequence[dict[str, Any]],
        completions: Sequence[str],
        token_counts: Sequence[int] | None = None,
        *,
        of_models: Mapping[str, Sequence[Score]] | None = None,
        whole: bool = True,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> ScoredBatch:
        """Grade `completions[i]` for `rows[i]`; `token_counts[i]` is its length in tokens.

        `of_models`: the scores that reward models gave, by the label of their part.

        `whole=False`: these are a part of a batch; the caller calls `check_excluded` on all of it.

        Raises UserError if a row names no known verifier, for a reward model whose scores are not
        given, if `max_tokens` is set and `token_counts` are not given, and if more than
        `max_excluded_fraction` of the batch has no score; SandboxUnavailable if there are programs
        to run and no sandbox.
        """
        if len(rows) != len(completions) or len(token_counts or rows) != len(rows):
            raise ValueError("rows, completions and token_counts must have the same length")
        stopped = False

        def stop() -> bool:
            nonlocal stopped
            stopped = stopped or stop_requested()
            return stopped

        pairs = list(zip(rows, completions, strict=True))
        sent = [
            (part, reward)
            for part, reward in self._parts
            if part.name != "format" and part.model is None
        ]
        items = [
            (reward or _reward_of_row(row), row, text) for _, reward in sent for row, text in pairs
        ]
        graded, report = self._service.score(items, stop_requested=stop)
        columns = {
            part.label: graded[i * len(pairs) : (i + 1) * len(pairs)]
            for i, (part, _) in enumerate(sent)
        }
        for part in self.config.parts:
            if part.name == "format":
                columns[part.label] = _format_scores(part, pairs, token_counts)
            elif part.model is not None:
                columns[part.label] = _model_scores(part, of_models or {})
        scores = [
            self._compose({part.label: columns[part.label][i] for part in self.config.parts})
            for i in range(len(pairs))
        ]
        if whole and not stopped:
            self.check_excluded([composed.score for composed in scores])
        return ScoredBatch(scores, report)

    def close(self) -> None:
        self._service.close()

    def _compose(self, scores: dict[str, Score]) -> ComposedScore:
        excluded = [score for score in scores.values() if not score.trains]
        total = sum(part.weight * scores[part.label].value for part in self.config.parts)
        score = excluded[0] if excluded else scores[self.config.verifier.label]
        return ComposedScore(total, score, {label: s.value for label, s in scores.items()})

    def check_excluded(self, scores: Sequence[Score]) -> None:
        """Raise UserError if more than `max_excluded_fraction` of a batch has no score."""
        excluded = [score for score in scores if not score.trains]
        bound = self.config.max_excluded_fraction
        if len(excluded) <= bound * len(scores):
            return
        told = Counter(f"{score.status}: {score.detail}" for score in excluded)
        shown = "\n".join(f"  {n} x {text}" for text, n in told.most_common(_SHOWN_EXCLUDED))
        raise UserError(
            f"{len(excluded)} of {len(scores)} completions could not be scored, more than "
            f"max_excluded_fraction {bound:g} allows:\n{shown}"
        )


def build_reward(config: RewardConfig, base_directory: Path) -> ComposedReward:
    """Return the reward that a recipe describes; files are relative to `base_directory`.

    Nothing is run or started yet. Raises UserError for a function that does not exist and for a
    judge whose key is not set.
    """
    rewards: list[Reward | None] = []
    workers = None
    for part in config.parts:
        if part.python is not None:
            rewards.append(find_user_reward(part.python, base_directory, part.timeout_s))
        elif part.judge is not None:
            settings = part.judge.model_dump(exclude={"parallel", "rubric"})
            rubric = tuple(Criterion(**item.model_dump()) for item in part.judge.rubric)
            judge = LlmJudge(**settings, rubric=rubric)
            judge.require_key()
            rewards.append(judge)
            workers = max(workers or 0, part.judge.parallel)
        else:
            rewards.append(None if part.name == "row" else part.name)  # None: a model's too
    return ComposedReward(config, rewards, ScoringService(workers))


def _reward_of_row(row: dict[str, Any]) -> str:
    name = row.get("reward")
    if not isinstance(name, str):
        raise UserError(
            f"a row names no verifier; it needs a field reward, one of {', '.join(sorted(REWARDS))}"
        )
    reward_named(name)
    return name


def _model_scores(part: RewardPart, of_models: Mapping[str, Sequence[Score]]) -> list[Score]:
    if part.label not in of_models:
        raise UserError(
            "a reward model scores in stages of kind upo alone: it needs a policy's device and "
            "ranks"
        )
    return list(of_models[part.label])


def _format_scores(
    part: RewardPart, pairs: Sequence[tuple[dict[str, Any], str]], counts: Sequence[int] | None
) -> list[Score]:
    if part.max_tokens is not None and counts is None:
        raise UserError("reward format: max_tokens needs the number of tokens of each completion")
    return [
        format.score(row, text, tokens=counts[i] if counts else None, max_tokens=part.max_tokens)
        for i, (row, text) in enumerate(pairs)
    ]
