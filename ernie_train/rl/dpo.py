"""Preference optimization on given pairs: DPO (arXiv:2305.18290), IPO or SimPO.

A stage of its own: no sampling, no rewards, the trainer's loop over micro-batches of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import paddle

from ernie_train import parallel
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.model.partial import adapter_off
from ernie_train.rl.batch import (
    MicroBatch,
    RolloutBatch,
    TokenizedCompletion,
    micro_batches,
)
from ernie_train.rl.config import PairLoss
from ernie_train.rl.estimators import sequence_logprobs
from ernie_train.rl.loss import DpoLoss, PairTerm
from ernie_train.rl.pair_stage import PairRun, PairStageConfig, PreparedPairs
from ernie_train.rl.preference_data import OfflinePairSource, TokenizedPair, add_pairs
from ernie_train.train.stage import StageRun
from ernie_train.train.supervised_data import VALIDATION_LOSS


class DpoConfig(PairStageConfig, PairLoss):
    """DPO and its kin; the reference is the policy at the stage's start."""

    sums_by_default: ClassVar[bool] = True
    measured: ClassVar[tuple[str, ...]] = (
        VALIDATION_LOSS,
        "validation/accuracies",
        "validation/margins",
    )

    kind: Literal["dpo"]
    """Preference optimization on pairs of completions (DPO and its kin)."""

    @property
    def needs_reference(self) -> bool:
        """Return whether the stage's starting policy is kept beside the policy."""
        return self.loss != "simpo"


def pair_batches(
    config: DpoConfig,
    pairs: list[TokenizedPair],
    reference: Ernie4_5_MoeForCausalLM | None,
    *,
    seed: int,
    done: int,
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of all steps after `done`, with the reference's logprobs.

    Every rank must draw them all: the reference's forward passes are shared out.
    """
    source = OfflinePairSource(pairs, config.pairs_per_step, seed)
    for step in range(done + 1, config.steps + 1):
        sequences: list[TokenizedCompletion] = []
        step_pairs = add_pairs(sequences, source.take(step))
        logprobs = _reference_logprobs(config, reference, sequences)
        batch = replace(RolloutBatch(sequences), ref_logprobs=logprobs)
        yield from micro_batches(batch, [], step_pairs, config.micro_batch_size)


def _reference_logprobs(
    config: DpoConfig,
    reference: Ernie4_5_MoeForCausalLM | None,
    sequences: list[TokenizedCompletion],
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[np.ndarray]:
    """Return the reference's logprobs of completions; empty where the loss needs none."""
    if reference is None:
        return []
    with adapter_off(reference):
        return sequence_logprobs(
            reference,
            sequences,
            temperature=1.0,
            batch_size=config.micro_batch_size,
            stop_requested=stop_requested,
        ).logprobs


def run(config: DpoConfig, stage: StageRun, prepared: PreparedPairs) -> dict[str, Any]:
    """Train the stage from its latest checkpoint, or from the start.

    Returns what `DONE` records. Raises `Interrupted` after saving.
    """
    return _DpoRun(config, stage, prepared).train()


class _DpoRun(PairRun[Ernie4_5_MoeForCausalLM, MicroBatch]):
    """The run of a stage on pairs, with its reference."""

    config: DpoConfig

    def __init__(self, config: DpoConfig, stage: StageRun, prepared: PreparedPairs) -> None:
        self.term = PairTerm.of(config, 1.0)
        # A resumed run is given the starting policy too, before its own checkpoint.
        self.reference = parallel.reference_model(stage.model) if config.needs_reference else None
        super().__init__(config, stage, prepared, stage.model, DpoLoss(self.term))

    @cached_property
    def held_out(self) -> MicroBatch:
        """Return all held-out pairs with the reference's logprobs, as one batch."""
        sequences: list[TokenizedCompletion] = []
        pairs = add_pairs(sequences, self.prepared.validation)
        logprobs = _reference_logprobs(
            self.config, self.reference, sequences, self.stage.stop_requested
        )
        return MicroBatch(
            tuple(sequences),
            (False,) * len(sequences),
            tuple(pairs),
            ref_logprobs=np.concatenate(logprobs) if logprobs else None,
        )

    def batches(self) -> Iterator[MicroBatch]:
        pairs, seed = self.prepared.pairs, self.stage.data.seed
        return pair_batches(self.config, pairs, self.reference, seed=seed, done=self.trainer.step)

    def step_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        alpha = self.config.rpo_alpha  # by the name that the objective has in every stage
        loss = metrics["preference"] + alpha * metrics.get("nll_loss", 0.0)
        return metrics | {"loss": loss}

    def validate(self) -> dict[str, float]:
        size, stop_requested = self.config.micro_batch_size, self.stage.stop_requested
        return validation_metrics(
            self.model, self.held_out, self.term, size, stop_requested=stop_requested
        )


def validation_metrics(
    model: Ernie4_5_MoeForCausalLM,
    held_out: MicroBatch,
    term: PairTerm,
    batch_size: int,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Return the loss of held-out pairs, the share that is ranked right, and the mean margin.

    Every rank must call it; each computes the logprobs of a share of the pairs' completions. Raises
    `Interrupted` on all ranks when a stop is requested on one.
    """
    logprobs = sequence_logprobs(
        model,
        held_out.sequences,
        temperature=1.0,
        batch_size=batch_size,
        stop_requested=stop_requested,
    ).logprobs
    terms, seen = term(paddle.to_tensor(np.concatenate(logprobs)), held_out)
    return {
        VALIDATION_LOSS: sum(part.coef * float(part.sum) / part.count for part in terms),
        "validation/accuracies": seen["rewards/accuracies"].value,
        "validation/margins": seen["rewards/margins"].value,
    }
