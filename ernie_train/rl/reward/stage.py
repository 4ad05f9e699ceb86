"""Training of a reward model on preference pairs, a stage of its own: `kind: reward`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import model_validator

from ernie_train.core.config import NonNegative
from ernie_train.eval.gates import check_metric
from ernie_train.rl.estimators import sequence_values
from ernie_train.rl.pair_stage import PairRun, PairStageConfig, PreparedPairs
from ernie_train.rl.preference_data import OfflinePairSource, TokenizedPair
from ernie_train.rl.reward.model import (
    SCORE,
    PairBatch,
    RewardLoss,
    RewardModel,
    ScoreSpread,
    whole_conversation,
)
from ernie_train.train.stage import StageRun
from ernie_train.weights.checkpoint import Checkpoint

ACCURACY = "eval/accuracy"
_MODEL_PART = f"{SCORE}/model"


class RewardModelConfig(PairStageConfig):
    """A reward model: a scalar head on the stage's model, trained on pairs (Bradley-Terry)."""

    measured: ClassVar[tuple[str, ...]] = (ACCURACY, "eval/margin", "eval/loss")
    reads_margins: ClassVar[bool] = True

    kind: Literal["reward"]
    """A reward model, trained on pairs of completions."""
    center_coef: NonNegative = 0.0
    """Coefficient of (score chosen + score rejected)^2, which keeps scores around 0; 0.01 is usual.
    """

    @model_validator(mode="after")
    def _gate_is_measured(self) -> RewardModelConfig:
        if self.gate is None:
            return self
        if self.validation is None:
            raise ValueError("gate needs validation pairs")
        if self.gate.metric != ACCURACY:
            raise ValueError(f"gate.metric must be {ACCURACY}: of validation pairs ranked rightly")
        if self.gate.max_regression is not None:
            raise ValueError("gate.max_regression has no effect: a reward stage solves no problems")
        return self


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


def run(config: RewardModelConfig, stage: StageRun, prepared: PreparedPairs) -> dict[str, Any]:
    """Train the stage from its latest checkpoint, or from the start.

    Returns what `DONE` records. Raises `Interrupted` after saving, and `GateError`.
    """
    return _RewardRun(config, stage, prepared).train()


class _RewardRun(PairRun[RewardModel, PairBatch]):
    """The run of a stage that trains a reward model on pairs."""

    config: RewardModelConfig

    def __init__(self, config: RewardModelConfig, stage: StageRun, prepared: PreparedPairs) -> None:
        self.spread = ScoreSpread()
        loss = RewardLoss(config.center_coef)
        super().__init__(config, stage, prepared, RewardModel(stage.model), loss)

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

    def step_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        self.spread.add(metrics["mean_reward"], metrics.pop("mean_square_reward"))
        return metrics | {"reward_std": self.spread.std}

    def validate(self) -> dict[str, float]:
        """Return how many held-out pairs are ranked rightly, and the mean margin and loss."""
        pairs = self.prepared.validation
        sides = [whole_conversation(side) for pair in pairs for side in pair.completions]
        values = sequence_values(
            self.model,
            sides,
            batch_size=self.config.micro_batch_size,
            stop_requested=self.stage.stop_requested,
        )
        scores = np.concatenate(values).astype(np.float64).reshape(-1, 2)
        gaps = scores[:, 0] - scores[:, 1]
        margins = np.array([pair.margin for pair in pairs])
        losses = np.logaddexp(0.0, margins - gaps)
        found = (float((gaps > 0).mean()), float(gaps.mean()), float(losses.mean()))
        return dict(zip(self.config.measured, found, strict=True))

    def restore(self, saved: Checkpoint) -> None:
        super().restore(saved)
        self.model.load_head(saved.part(_MODEL_PART))
        self.spread = ScoreSpread(**saved.state["spread"])

    def state(self) -> dict[str, Any]:
        return {"spread": asdict(self.spread)}

    def parts(self) -> dict[str, Mapping[str, np.ndarray]]:
        # Empty on a rank that does not write the head.
        return {_MODEL_PART: self.model.head_arrays(self.spread, self.trainer.optimizer.owned)}

    def to_disk(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return self.model.to_disk(named)

    def from_disk(self, stored: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return self.model.from_disk(stored)
