"""Training of a reward model on preference pairs, a stage of its own: `kind: reward`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator
from rich.console import Console

from ernie_train.core import consensus
from ernie_train.core.config import HARMLESS, NonNegative, PositiveInt
from ernie_train.core.errors import Interrupted
from ernie_train.data import MappedRows
from ernie_train.eval.gates import check_metric
from ernie_train.io.metrics_log import PendingLine, StageMetrics
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
from ernie_train.train.moe_health import MoeHealth, PromptProbe
from ernie_train.train.optimizer import Optimizer, optimizer_arrays, restore_optimizer
from ernie_train.train.stage import StageConfig, StageData, StageRun
from ernie_train.train.trainer import StepResult, Throughput, Trainer
from ernie_train.weights.checkpoint import Checkpoint, CheckpointStore

ACCURACY = "eval/accuracy"
MEASURED = (ACCURACY, "eval/margin", "eval/loss")
_MODEL_PART = f"{SCORE}/model"


class RewardModelConfig(StageConfig, MappedRows):
    """A reward model: a scalar head on the stage's model, trained on pairs (Bradley-Terry).

    data: a path of rows with a prompt, a chosen and a rejected completion, maybe a margin, and
        their columns.
    seq_len: longest prompt with its completion; pairs beyond it are left out.
    center_coef: coefficient of (score chosen + score rejected)^2, which keeps scores around 0.
    validation: rows of held-out pairs; their accuracy is what a gate of the stage asks for.
    validate_every_steps: steps between two measurements on them; by default as often as
        checkpoints are written.
    """

    kind: Literal["reward"]
    data: Annotated[str, Field(min_length=1), HARMLESS]
    seq_len: PositiveInt
    steps: PositiveInt
    pairs_per_step: PositiveInt
    center_coef: NonNegative = 0.0
    validation: Annotated[str | None, Field(min_length=1), HARMLESS] = None
    validate_every_steps: PositiveInt | None = None

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


class _RewardRun:
    """The run of one stage: a trainer, its metrics, validation and checkpoints."""

    def __init__(
        self, config: RewardModelConfig, stage: StageRun, prepared: PreparedRewardPairs
    ) -> None:
        self.config, self.stage, self.prepared = config, stage, prepared
        self.model = RewardModel(stage.model)
        self.trainer: Trainer[RewardModel, PairBatch] = Trainer(
            self.model,
            Optimizer(self.model, config.optim),
            grad_accum_steps=config.micro_batches_per_step,
            balance=config.balance,
        )
        self.store = CheckpointStore(stage.directory / "checkpoints", config.checkpoint)
        self.spread = ScoreSpread()
        self.measured: tuple[int, dict[str, float]] = (0, {})  # step, and the validation after it
        self.pending: PendingLine | None = None  # of the last step, until it is validated
        self.saved: tuple[int, bool] | None = None  # the last checkpoint: step, and if logged
        self.resumed = self.store.load_latest()
        if self.resumed is not None:
            with consensus.fail_together():
                self._restore(self.resumed)

    def _restore(self, saved: Checkpoint) -> None:
        saved.load_model(self.stage.model)
        self.model.load_head(saved.part(_MODEL_PART))
        restore_optimizer(
            self.trainer.optimizer,
            saved.optimizer,
            saved.state["powers"],
            self.model.from_disk,
            checkpoint=saved.path,
            steps=saved.step,
        )
        self.spread = ScoreSpread(**saved.state["spread"])
        self.trainer.step = saved.step
        self.pending = PendingLine.from_state(saved.step, saved.state["pending"])

    def train(self) -> dict[str, Any]:
        config, stage, resumed = self.config, self.stage, self.resumed
        with StageMetrics(
            stage.directory,
            resume_step=resumed.step - (self.pending is not None) if resumed else None,
            terminal=stage.terminal,
            total_steps=config.steps,
            label=config.name,
        ) as self.metrics:
            prompts = [pair.chosen.prompt_ids for pair in self.prepared.pairs]
            self.health = MoeHealth(
                stage.model,
                config.moe_health,
                first_batch=lambda: PromptProbe.of(prompts, config.moe_health.probe_tokens),
                state=resumed.state["moe_health"] if resumed else None,
                warn=self.metrics.note,
            )
            self.model.train()
            self.throughput = Throughput()
            try:
                if self.pending is not None:
                    self._finish_step(self.pending)
                self.trainer.fit(
                    pair_batches(
                        config, self.prepared.pairs, seed=stage.data.seed, done=self.trainer.step
                    ),
                    RewardLoss(config.center_coef),
                    config.steps,
                    hooks=[(1, self._after_step)],
                    stop_requested=lambda: stage.stop.requested,
                )
            except Interrupted:
                self._save()
                raise
        chosen = self.store.finish(self.trainer.step, stage.model)
        if config.gate is not None:
            found = self.store.load(chosen, verify=False).metrics
            check_metric(config.gate, config.name, found)
        return {"steps": self.trainer.step, "checkpoint": chosen.name}

    def _after_step(self, result: StepResult) -> None:
        metrics = result.metrics | self.health.observe(result.step, result.load)
        self.spread.add(metrics["mean_reward"], metrics.pop("mean_square_reward"))
        metrics["reward_std"] = self.spread.std
        self.pending = PendingLine(result.step, metrics, self.throughput.timings(result))
        self._finish_step(self.pending)

    def _finish_step(self, line: PendingLine) -> None:
        """Validate, log and save as is due after a step; a stop leaves the line to a later run."""
        metrics = line.metrics
        if self.prepared.validation and self._is_due(self.config.validation_interval, line.step):
            self.measured = (line.step, self._validate())
            metrics = metrics | self.measured[1]
        self.metrics.log(line.step, metrics, line.timings)
        self.pending = None
        if self._is_due(self.config.checkpoint.every_steps, line.step):
            self._save()

    def _is_due(self, every: int, step: int) -> bool:
        return step % every == 0 or step == self.config.steps

    def _validate(self) -> dict[str, float]:
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

    def _save(self) -> None:
        step = self.trainer.step
        holds = (step, self.pending is None)
        if self.saved == holds:
            return  # interrupted after a step that has been saved
        # Metrics first: a run that resumes from a checkpoint must find the lines up to its step.
        self.metrics.sync()
        optimizer = self.trainer.optimizer
        self.store.save(
            step,
            model=self.stage.model,
            optimizer=optimizer_arrays(optimizer, self.model.to_disk),
            state={
                "powers": optimizer.beta_powers(),
                "moe_health": self.health.state_dict(),
                "pending": self.pending.to_state() if self.pending else None,
                "spread": asdict(self.spread),
            },
            metrics=self.measured[1] if self.measured[0] == step else None,
            # Empty on a rank that does not write the head.
            parts={_MODEL_PART: self.model.head_arrays(self.spread, optimizer.owned)},
        )
        self.saved = holds
