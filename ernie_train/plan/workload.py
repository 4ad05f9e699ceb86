"""Derive the workload of a recipe's stages: micro-batches, passes of the model, sampling.

Lengths are the longest that the recipe allows: packed rows are full and completions reach their
limit, so memory and time are bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ernie_train.generate.sharded import pieces_of
from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.plan.layout import BYTES, Dtype, Precision, TrainedPart, count_trained
from ernie_train.run.recipe import Recipe
from ernie_train.run.stages import AnyStageConfig, DpoConfig, RewardModelConfig, UpoConfig
from ernie_train.train.supervised_data import SupervisedConfig
from ernie_train.weights.hf import load_config
from ernie_train.weights.model_directory import find_model


@dataclass(frozen=True)
class MicroBatch:
    """Hold `rows` full rows of `seq_len` tokens, packed from documents of `document_tokens`.

    shared_tokens: those of prompts that other rows have too, which are computed once.
    """

    rows: int
    seq_len: int
    document_tokens: int
    shared_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Return the tokens that go through the model."""
        return self.rows * self.seq_len - self.shared_tokens

    @property
    def shared(self) -> float:
        """Return the share of the rows' tokens that is not computed again."""
        return self.shared_tokens / (self.rows * self.seq_len)


@dataclass(frozen=True)
class Sampling:
    """Hold a round of an iteration's completions over all ranks: `batch_size` at once on each rank.

    engine: who samples. records_experts: each token's experts are kept. dumps: all is written.
    rounds: the most of them that an iteration takes, those that refill as full as the first.
    """

    sequences: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    engine: str = "own"
    records_experts: bool = False
    dumps: bool = False
    rounds: int = 1

    @property
    def total(self) -> int:
        """Return the most completions of an iteration."""
        return self.rounds * self.sequences

    @property
    def by_ranks(self) -> bool:
        """Return whether the learner's ranks sample, not a server."""
        return self.engine == "own"

    def on_rank(self, ranks: int) -> int:
        """Return the sequences of a round on the fullest rank."""
        return -(-self.sequences // ranks)

    def prompts(self, sequences: int, ranks: int) -> int:
        """Return the most different prompts that so many sequences of a rank have."""
        new_tokens = self.group_size * self.new_tokens
        pieces = pieces_of(self.group_size, self.prompt_tokens, new_tokens, ranks)
        return -(-sequences // (self.group_size // pieces))

    def at_once(self, ranks: int) -> int:
        """Return the sequences that share a cache on the fullest rank."""
        return min(self.batch_size, self.on_rank(ranks))


@dataclass(frozen=True)
class Workload:
    """Describe a phase of a stage, counted over all ranks.

    A step is an optimizer step; in RL it is an iteration, which has `updates` of them.
    """

    name: str
    micro_batch: MicroBatch
    updates: int = 1  # optimizer steps of a step
    micro_batches: int = 1  # of one update
    steps: int | None = None  # None: until its epochs end
    loss: Literal["cross_entropy", "logprobs", "score"] = "cross_entropy"
    reference: bool = False
    critic: bool = False
    sampling: Sampling | None = None
    scored: int = 0  # sequences of a step that models score without gradient
    scoring_models: int = 0  # models that score each of them
    # Sizes of the models that score completions for their reward; None: those of the policy.
    reward_models: tuple[Ernie4_5_MoeConfig | None, ...] = ()
    part: TrainedPart | None = None  # what trains; None: all of the model
    gradient_dtype: Dtype = "float32"  # of bfloat16 weights

    def gradient_width(self, precision: Precision) -> int:
        """Return the bytes of a gradient; those of float32 weights are float32."""
        return max(BYTES[self.gradient_dtype], BYTES[precision.weights])

    @property
    def tokens(self) -> int:
        """Return the tokens that a step trains."""
        return self.updates * self.micro_batches * self.micro_batch.tokens


def recipe_workloads(recipe: Recipe, document_tokens: int | None = None) -> list[Workload]:
    """Return the phases of all stages in their order.

    document_tokens: the mean length of packed documents; without it every row is one document.
    """
    config = recipe.model.build()
    return [
        replace(load, part=count_trained(config, stage), gradient_dtype=stage.optim.gradient_dtype)
        for stage in recipe.stages
        for load in _stage_workloads(stage, document_tokens)
    ]


def _stage_workloads(stage: AnyStageConfig, document_tokens: int | None) -> Iterator[Workload]:
    if isinstance(stage, SupervisedConfig):
        yield from _supervised(stage, document_tokens)
    elif isinstance(stage, DpoConfig):
        yield _preference(stage)
    elif isinstance(stage, RewardModelConfig):
        yield _scored_pairs(stage)
    else:
        yield _reinforced(stage)


def _supervised(stage: SupervisedConfig, document_tokens: int | None) -> Iterator[Workload]:
    phases = stage.phases()
    for phase in phases:
        documents = min(document_tokens or phase.seq_len, phase.seq_len)
        batch = MicroBatch(phase.micro_batch_size, phase.seq_len, documents)
        name = stage.name if len(phases) == 1 else f"{stage.name} at {phase.seq_len}"
        yield Workload(name, batch, 1, stage.grad_accum_steps, phase.steps or stage.steps)


def _preference(stage: DpoConfig) -> Workload:
    """Return the workload of pairs, whose reference is no second model: it went before.

    Its passes, one a pair and before the first step, are counted where the first epoch meets them.
    """
    trained, length = 2 * stage.pairs_per_step, stage.seq_len - 1
    rows = min(stage.micro_batch_size, trained)
    return Workload(
        stage.name,
        MicroBatch(rows, length, length),
        micro_batches=-(-trained // rows),
        steps=stage.steps,
        loss="logprobs",
        scored=trained,
        scoring_models=int(stage.has_reference),
    )


def _scored_pairs(stage: RewardModelConfig) -> Workload:
    rows = min(stage.micro_batch_size, 2 * stage.pairs_per_step)
    batch = MicroBatch(rows, stage.seq_len, stage.seq_len)
    micro_batches, steps = stage.micro_batches_per_step, stage.steps
    return Workload(stage.name, batch, micro_batches=micro_batches, steps=steps, loss="score")


def _reinforced(stage: UpoConfig) -> Workload:
    """Return the workload of RL on prompts with completions; the last token predicts nothing."""
    rollout = stage.rollout
    sampled = (rollout.prompts_per_iteration or 0) * rollout.group_size
    trained = _trained_samples(stage, sampled)
    per_update = -(-trained // stage.policy.minibatches)
    batch = _rl_micro_batch(stage, per_update)
    critic = stage.critic is not None
    reward_models = tuple(
        _reward_model(part.model.path) for part in stage.reward.parts if part.model is not None
    )
    sampling = Sampling(
        sampled,
        rollout.group_size,
        rollout.max_prompt_tokens,
        rollout.max_new_tokens,
        rollout.batch_size,
        rollout.engine.kind,
        stage.policy.router_replay,
        rollout.dump,
        1 + rollout.refill_rounds,
    )
    return Workload(
        stage.name,
        batch,
        updates=stage.policy.update_epochs * stage.policy.minibatches,
        micro_batches=-(-per_update // batch.rows),
        steps=stage.iterations,
        loss="logprobs",
        reference=stage.needs_reference,
        critic=critic,
        sampling=sampling if sampled else None,
        scored=trained,
        # The policy scores sampled completions for their old logprobs.
        scoring_models=int(sampled > 0)
        + int(stage.needs_reference)
        + int(critic)
        + len(reward_models),
        reward_models=reward_models,
    )


def _rl_micro_batch(stage: UpoConfig, sequences: int) -> MicroBatch:
    """Return the largest micro-batch of `sequences` of full length."""
    rollout, most = stage.rollout, stage.micro_batch_tokens
    length = rollout.max_prompt_tokens + rollout.max_new_tokens - 1

    def of(rows: int) -> MicroBatch:
        shared = rows - -(-rows // rollout.group_size) if stage.share_prompts else 0
        return MicroBatch(rows, length, length, shared * rollout.max_prompt_tokens)

    rows = min(stage.micro_batch_size, sequences)
    while most is not None and rows > 1 and of(rows).tokens > most:
        rows -= 1
    return of(rows)


def _reward_model(path: str) -> Ernie4_5_MoeConfig | None:
    """Return the sizes of a reward model; None where it is not there yet, as before its run."""
    return load_config(find_model(path).weights) if Path(path).exists() else None


def _trained_samples(stage: UpoConfig, sampled: int) -> int:
    """Return the completions that an iteration learns from: all that were sampled, or pairs.

    Refills replace groups that teach nothing, unless pairs or what a critic expected tell them
    apart: then the most that an iteration can have are learned from.
    """
    pairs, rounds = stage.preference, 1
    if stage.learns_from_every_group or (pairs is not None and pairs.of_rollouts):
        rounds += stage.rollout.refill_rounds
    trained = rounds * sampled if stage.policy.coef else 0
    if pairs is not None and pairs.of_rollouts:
        prompts = rounds * (stage.rollout.prompts_per_iteration or 0)
        # Beside the policy term the two of a pair are trained anyway, but for a solution.
        trained += (pairs.of_solutions if trained else 2) * prompts
    if stage.offline is not None:
        trained += 2 * stage.offline.per_iteration
    return trained
