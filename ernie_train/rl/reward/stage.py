"""Training of a reward model on preference pairs, a stage of its own: `kind: reward`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator
from rich.console import Console

from ernie_train.core.config import HARMLESS, NonNegative, PathText, PositiveInt
from ernie_train.data import MappedRows
from ernie_train.eval.gates import check_metric
from ernie_train.rl.estimators import sequence_values
from ernie_train.rl.preference_data import (
    OfflinePairSource,
    PromptReport,
    TokenizedPair,
    read_fitting_pairs,
)
from ernie_train.rl.reward.model import (
    SCORE,
    PairBatch,
    RewardLoss,
    RewardModel,
    ScoreSpread,
    whole_conversation,
)
from ernie_train.train.moe_health import PromptProbe
from ernie_train.train.optimizer import Optimizer
from ernie_train.train.stage import StageConfig, StageData, StageRun
from ernie_train.train.step_loop import StepLoop
from ernie_train.train.trainer import Trainer
from ernie_train.weights.checkpoint import Checkpoint

ACCURACY = "eval/accuracy"
MEASURED = (ACCURACY, "eval/margin", "eval/loss")
_MODEL_PART = f"{SCORE}/model"


class RewardModelConfig(StageConfig, MappedRows):
    """A reward model: a scalar head on the stage's model, trained on pairs (Bradley-Terry)."""

    kind: Literal["reward"]
    """A reward model, trained on pairs of completions."""
    data: Annotated[PathText, Field(min_length=1), HARMLESS]
    """A path of rows with a prompt, a chosen and a rejected completion, and maybe a `margin`."""
    seq_len: PositiveInt
    """Longest prompt with its completion; pairs beyond it are left out, and told."""
    steps: PositiveInt
    """Duration in optimizer steps."""
    pairs_per_step: PositiveInt
    """Pairs of an optimizer step."""
    center_coef: NonNegative = 0.0
    """Coefficient of (score chosen + score rejected)^2, which keeps scores around 0; 0.01 is usual.
    """
    validation: Annotated[PathText | None, Field(min_length=1), HARMLESS] = None
    """A path of held-out pairs; `gate` and `checkpoint.best_metric` need them."""
    validate_every_steps: Annotated[PositiveInt | None, HARMLESS] = None
    """Steps between two measurements on them; as often as checkpoints, unless given."""

    @model_validator(mode="after")
    def _consistent(self) -> RewardModelConfig:
        if self.micro_batch_size < 2:
            raise ValueError("micro_batch_size must be at least 2: a pair goes through together")
        if self.seq_len < 2:
            raise ValueError("seq_len must hold a prompt and a completion")
        if self.validation is None:
            needing = {
                "validate_every_steps": self.validate_every_steps,
                "checkpoint.best_metric": self.checkpoint.best_metric,
                "gate": self.gate,
            }
            if missing := [name for name, value in needing.items() if value is not None]:
                raise ValueError(f"{' and '.join(missing)} needs validation pairs")
        return self

    @model_validator(mode="after")
    def _measured(self) -> RewardModelConfig:
        best = self.checkpoint.best_metric
        if best is not None and best not in MEASURED:
            raise ValueError(f"checkpoint.best_metric={best} is none of {', '.join(MEASURED)}")
        if best is not None:
            self.checkpoint.require_scores("validate_every_steps", self.validation_interval)
        if self.gate is not None and self.gate.metric != ACCURACY:
            raise ValueError(f"gate.metric must be {ACCURACY}: of validation pairs ranked rightly")
        if self.gate is not None and self.gate.max_regression is not None:
            raise ValueError("gate.max_regression has no effect: a reward stage solves no problems")
        return self

    @property
    def validation_interval(self) -> int:
        """Return the steps between two validations, where there are pairs for it."""
        return self.validate_every_steps or self.checkpoint.every_steps

    def lengths(self) -> dict[str, int]:
        """Return the sequence lengths that the model must be able to hold, by setting."""
        return {"seq_len": self.seq_len}

    def paths(self) -> list[str]:
        """Return every file or directory that the stage reads."""
        return [self.data] + ([self.validation] if self.validation else [])

    @property
    def pairs_at_once(self) -> int:
        return self.micro_batch_size // 2

    @property
    def micro_batches_per_step(self) -> int:
        """Return how many; pairs are never split, so an odd micro_batch_size holds one less."""
        return -(-self.pairs_per_step // self.pairs_at_once)


@dataclass(frozen=True)
class PreparedRewardPairs:
    """The pairs that fit the stage's length, and those to validate on."""

    pairs: list[TokenizedPair]
    validation: list[TokenizedPair]
    report: PromptReport


def prepare(config: RewardModelConfig, data: StageData) -> PreparedRewardPairs:
    """Read and encode the stage's pairs; `DataError` where none fits."""

    def read(path: str) -> tuple[list[TokenizedPair], dict[str, Any], list[Any]]:
        return read_fitting_pairs(
            path,
            data,
            max_prompt_tokens=config.seq_len - 1,
            max_new_tokens=config.seq_len - 1,
            max_tokens=config.seq_len,
            max_bad_fraction=config.max_bad_fraction,
            columns=config.columns,
            with_margin=True,
        )

    pairs, facts, warnings = read(config.data)
    validation: list[TokenizedPair] = []
    if config.validation is not None:
        validation, _, more = read(config.validation)
        warnings += more
    return PreparedRewardPairs(pairs, validation, PromptReport([], facts, warnings))


def describe(
    config: RewardModelConfig, data: StageData, prepared: PreparedRewardPairs, console: Console
) -> None:
    """Print the size of a step."""
    console.print(
        f"a step trains {config.pairs_per_step} of {len(prepared.pairs)} pairs; "
        f"steps: {config.steps}; validation: {len(prepared.validation)} pairs",
        highlight=False,
    )


def pair_batches(
    config: RewardModelConfig, pairs: Sequence[TokenizedPair], *, seed: int, done: int
) -> Iterator[PairBatch]:
    """Yield the micro-batches of all steps after `done`; pairs of similar length go together."""
    source, size = OfflinePairSource(pairs, config.pairs_per_step, seed), config.pairs_at_once
    for step in range(done + 1, config.steps + 1):
        taken = source.take(step)
        taken.sort(key=lambda pair: max(side.length for side in pair.completions))
        for start in range(0, len(taken), size):
            yield PairBatch(tuple(taken[start : start + size]))


def run(
    config: RewardModelConfig, stage: StageRun, prepared: PreparedRewardPairs
) -> dict[str, Any]:
    """Train the stage from its latest checkpoint, or from the start.

    Returns what `DONE` records. Raises `Interrupted` after saving, and `GateError`.
    """
    return _RewardRun(config, stage, prepared).train()


class _RewardRun(StepLoop[RewardModel, PairBatch]):
    """The run of a stage that trains a reward model on pairs."""

    config: RewardModelConfig

    def __init__(
        self, config: RewardModelConfig, stage: StageRun, prepared: PreparedRewardPairs
    ) -> None:
        self.prepared, self.spread = prepared, ScoreSpread()
        self.model = RewardModel(stage.model)
        trainer: Trainer[RewardModel, PairBatch] = Trainer(
            self.model,
            Optimizer(self.model, config.optim),
            grad_accum_steps=config.micro_batches_per_step,
            balance=config.balance,
        )
        super().__init__(
            config,
            stage,
            trainer,
            RewardLoss(config.center_coef),
            steps=config.steps,
            validate_every=config.validation_interval if prepared.validation else None,
        )

    def train(self) -> dict[str, Any]:
        """Run all steps that are left; return what `DONE` records.

        Raises `Interrupted` after saving, and `GateError`.
        """
        self.model.train()
        done = super().train()
        if self.config.gate is not None:
            chosen = self.store.directory / done["checkpoint"]
            found = self.store.load(chosen, verify=False).metrics
            check_metric(self.config.gate, self.config.name, found)
        return done

    def batches(self) -> Iterator[PairBatch]:
        pairs, seed = self.prepared.pairs, self.stage.data.seed
        return pair_batches(self.config, pairs, seed=seed, done=self.trainer.step)

    def probe(self) -> PromptProbe:
        prompts = [pair.chosen.prompt_ids for pair in self.prepared.pairs]
        return PromptProbe.of(prompts, self.config.moe_health.probe_tokens)

    def step_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        self.spread.add(metrics["mean_reward"], metrics.pop("mean_square_reward"))
        return metrics | {"reward_std": self.spread.std}

    def validate(self) -> dict[str, float]:
        """Return how many held-out pairs are ranked rightly, and the mean margin and loss."""
        pairs, stop = self.prepared.validation, self.stage.stop
        sides = [whole_conversation(side) for pair in pairs for side in pair.completions]
        values = sequence_values(
            self.model,
            sides,
            batch_size=self.config.micro_batch_size,
            stop_requested=lambda: stop.requested,
        )
        scores = np.concatenate(values).astype(np.float64).reshape(-1, 2)
        gaps = scores[:, 0] - scores[:, 1]
        margins = np.array([pair.margin for pair in pairs])
        losses = np.logaddexp(0.0, margins - gaps)
        found = (float((gaps > 0).mean()), float(gaps.mean()), float(losses.mean()))
        return dict(zip(MEASURED, found, strict=True))

    def restore(self, saved: Checkpoint) -> None:
        super().restore(saved)
        self.model.load_head(saved.part(_MODEL_PART))
        self.spread = ScoreSpread(**saved.state["spread"])

    def state(self) -> dict[str, Any]:
        return {"spread": asdict(self.spread)}

    def parts(self) -> dict[str, Mapping[str, np.ndarray]]:
        # Empty on a rank that does not write the head.
        return {_MODEL_PART: self.model.head_arrays(self.spread, self.trainer.optimizer.owned)}

    def to_disk(self, named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.model.to_disk(named)

    def from_disk(self, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.model.from_disk(stored)
