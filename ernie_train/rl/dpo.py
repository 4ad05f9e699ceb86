"""Preference optimization on given pairs: DPO (arXiv:2305.18290), IPO, SimPO or ORPO.

A stage of its own: no sampling, no rewards, the trainer's loop over micro-batches of pairs. The
reference is the policy at the start, which goes through all pairs before the first step, so that no
second model stands beside the one that trains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import numpy as np
import paddle

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import Interrupted
from ernie_train.core.terminal import ProgressDisplay, Terminal
from ernie_train.io.block_file import BlockFile
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.model.dtypes import dtype_name
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

REFERENCE = "reference_logprobs.bin"
Block = Sequence[TokenizedCompletion]  # of a step, or all held-out ones


class DpoConfig(PairStageConfig, PairLoss):
    """DPO and its kin; the reference is the policy at the stage's start.

    Its logprobs of all pairs are computed before the first step and kept in the stage's directory.
    """

    sums_by_default: ClassVar[bool] = True
    measured: ClassVar[tuple[str, ...]] = (
        VALIDATION_LOSS,
        "validation/accuracies",
        "validation/margins",
    )

    kind: Literal["dpo"]
    """Preference optimization on pairs of completions (DPO and its kin)."""


def pair_batches(
    config: DpoConfig,
    pairs: Sequence[TokenizedPair],
    reference: Mapping[TokenizedCompletion, np.ndarray],
    *,
    seed: int,
    done: int,
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of all steps after `done`, with the reference's logprobs."""
    source = OfflinePairSource(pairs, config.pairs_per_step, seed)
    for step in range(done + 1, config.steps + 1):
        sequences: list[TokenizedCompletion] = []
        step_pairs = add_pairs(sequences, source.take(step))
        logprobs = [reference[s] for s in sequences] if config.has_reference else []
        batch = RolloutBatch(sequences, ref_logprobs=logprobs)
        yield from micro_batches(batch, [], step_pairs, config.micro_batch_size)


def run(config: DpoConfig, stage: StageRun, prepared: PreparedPairs) -> dict[str, Any]:
    """Train the stage from its latest checkpoint, or from the start.

    Returns what `DONE` records. Raises `Interrupted` after saving.
    """
    return _DpoRun(config, stage, prepared).train()


class _DpoRun(PairRun[Ernie4_5_MoeForCausalLM, MicroBatch]):
    """The run of a stage on pairs, with the reference's logprobs of them."""

    config: DpoConfig

    def __init__(self, config: DpoConfig, stage: StageRun, prepared: PreparedPairs) -> None:
        self.term = PairTerm.of(config, 1.0)
        # Before a checkpoint is loaded: a resumed run is given the starting policy too.
        self.reference = reference_logprobs(config, stage, prepared) if config.has_reference else {}
        super().__init__(config, stage, prepared, stage.model, DpoLoss(self.term))

    @cached_property
    def held_out(self) -> MicroBatch:
        """Return all held-out pairs with the reference's logprobs, as one batch."""
        sequences: list[TokenizedCompletion] = []
        pairs = add_pairs(sequences, self.prepared.validation)
        logprobs = [self.reference[s] for s in sequences] if self.config.has_reference else []
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
        alpha = self.term.rpo_alpha  # by the name that the objective has in every stage
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


# ---- the reference -------------------------------------------------------------------------------


def reference_logprobs(
    config: DpoConfig, stage: StageRun, prepared: PreparedPairs
) -> dict[TokenizedCompletion, np.ndarray]:
    """Return the logprobs [sampled tokens] of all completions that the steps compare.

    `stage.model` must be the starting policy. Blocks that the stage's file has are read, the others
    computed and appended, to bits that depend neither on the number of data ranks nor on stops.
    They are kept by token: sums of policy and reference are large and nearly equal, so that their
    difference would lack digits of the loss.

    Every rank must call it. Raises `CheckpointError` where the file was computed from something
    else, and `Interrupted` on all ranks when a stop is requested on one.
    """
    held_out = [completion for pair in prepared.validation for completion in pair.completions]
    steps = first_epoch(config, prepared.pairs, stage.data.seed)
    every: list[Block] = [held_out, *steps] if held_out else [*steps]
    dtype = dtype_name(stage.model.model.norm.weight)
    made_of = {**stage.inputs, "dtype": dtype, "pairs": hash_blocks(every)}
    file = BlockFile(stage.directory / REFERENCE)
    consensus.run_on_main(partial(file.begin, made_of, config.name))
    blocks = every[: config.steps + bool(held_out)]
    found: dict[TokenizedCompletion, np.ndarray] = {}
    for block in blocks:
        lengths = [completion.num_sampled for completion in block]
        kept = consensus.run_on_main(partial(file.read, lengths))
        if kept is None:
            break
        found.update(zip(block, kept, strict=True))
    if missing := [block for block in blocks if block[0] not in found]:
        _compute(config, stage, file, missing, found)
    return found


def _compute(
    config: DpoConfig,
    stage: StageRun,
    file: BlockFile,
    missing: Sequence[Block],
    found: dict[TokenizedCompletion, np.ndarray],
) -> None:
    """Add the logprobs of the blocks that are missing to the file and to what was found."""
    total = len(found) + sum(map(len, missing))
    display = ProgressDisplay(
        Terminal(quiet=not process_group.is_main()),
        bar=stage.terminal,
        label=f"{config.name}: reference",
        unit="completion",
        total=total,
        first=len(found),
    )
    with closing(display), adapter_off(stage.model):
        for block in missing:
            try:
                logprobs = sequence_logprobs(
                    stage.model,
                    block,
                    temperature=1.0,
                    batch_size=config.micro_batch_size,
                    stop_requested=stage.stop_requested,
                ).logprobs
            except Interrupted:
                raise Interrupted(
                    f"stopped on a signal; reference log-probabilities of {len(found)} of {total} "
                    "completions are kept"
                ) from None
            consensus.run_on_main(partial(file.append, logprobs))
            found.update(zip(block, logprobs, strict=True))
            display.update(len(found))


def first_epoch(
    config: DpoConfig, pairs: Sequence[TokenizedPair], seed: int
) -> list[list[TokenizedCompletion]]:
    """Return the completions of each step of the first epoch; its last step may be smaller."""
    source = OfflinePairSource(pairs, config.pairs_per_step, seed)
    found: list[list[TokenizedCompletion]] = []
    for first in range(0, len(pairs), config.pairs_per_step):
        taken = source.take(len(found) + 1)[: len(pairs) - first]
        found.append([completion for pair in taken for completion in pair.completions])
    return found


def hash_blocks(blocks: Sequence[Block]) -> str:
    """Return a hash of the tokens of all completions, and of how they are dealt into blocks."""
    found = hashlib.sha256()
    for block in blocks:
        found.update(f"{len(block)};".encode())
        for sequence in block:
            ids, mask = sequence.prompt_ids + sequence.completion_ids, sequence.sampled_mask
            found.update(f"{len(sequence.prompt_ids)},{len(ids)},{mask is None};".encode())
            found.update(np.asarray(ids, np.int32).tobytes())
            found.update(b"" if mask is None else np.asarray(mask, np.bool_).tobytes())
    return found.hexdigest()
