"""What a recipe's stages ask of the ranks: micro-batches, passes through the model, rollouts.

Lengths are the longest that the recipe allows: packed rows are full and completions reach their
limit, so memory and time are bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ernie_train.plan.activations import MicroBatch
from ernie_train.plan.memory import Job, Rollout
from ernie_train.run.recipe import Recipe
from ernie_train.run.stages import AnyStageConfig, DpoConfig, UpoConfig
from ernie_train.train.supervised_data import SupervisedConfig


@dataclass(frozen=True)
class Work:
    """A phase of a stage, counted over all ranks.

    A step is an optimizer step; in RL it is an iteration, which has `updates` of them.
    """

    name: str
    job: Job
    updates: int  # optimizer steps of a step
    micro_batches: int  # of one update
    steps: int | None  # None: until its epochs end
    scored: int = 0  # sequences that go through models without a gradient in a step
    scoring_models: int = 0  # through how many each goes

    @property
    def tokens(self) -> int:
        """Tokens that a step trains."""
        return self.updates * self.micro_batches * self.job.micro_batch.tokens


def recipe_work(recipe: Recipe, document_tokens: int | None = None) -> list[Work]:
    """The phases of all stages in their order.

    document_tokens: the mean length of packed documents; without it every row is one document.
    """
    return [work for stage in recipe.stages for work in stage_work(stage, document_tokens)]


def stage_work(stage: AnyStageConfig, document_tokens: int | None) -> Iterator[Work]:
    if isinstance(stage, SupervisedConfig):
        yield from _supervised(stage, document_tokens)
    elif isinstance(stage, DpoConfig):
        yield _preference(stage)
    else:
        yield _reinforced(stage)


def _supervised(stage: SupervisedConfig, document_tokens: int | None) -> Iterator[Work]:
    phases = stage.phases()
    for phase in phases:
        documents = min(document_tokens or phase.seq_len, phase.seq_len)
        batch = MicroBatch(phase.micro_batch_size, phase.seq_len, documents)
        name = stage.name if len(phases) == 1 else f"{stage.name} at {phase.seq_len}"
        steps = phase.steps or stage.steps
        yield Work(name, Job(batch, "cross_entropy"), 1, stage.grad_accum_steps, steps)


def _preference(stage: DpoConfig) -> Work:
    trained, length = 2 * stage.pairs_per_step, stage.seq_len - 1
    rows = min(stage.micro_batch_size, trained)
    job = Job(MicroBatch(rows, length, length), "logprobs", True, False, None)
    return Work(stage.name, job, 1, -(-trained // rows), stage.steps, trained, 1)


def _reinforced(stage: UpoConfig) -> Work:
    """Samples are a prompt and a completion, less the last token, which predicts nothing."""
    config = stage.rollout
    length = config.max_prompt_tokens + config.max_new_tokens - 1
    sampled = (config.prompts_per_iteration or 0) * config.group_size
    trained = _trained_samples(stage, sampled)
    updates = stage.policy.update_epochs * stage.policy.minibatches
    per_update = -(-trained // stage.policy.minibatches)
    rollout = None
    if sampled:
        rollout = Rollout(
            sampled,
            config.group_size,
            config.max_prompt_tokens,
            config.max_new_tokens,
            config.batch_size,
        )
    critic = stage.critic is not None
    rows = min(stage.micro_batch_size, per_update)
    return Work(
        stage.name,
        Job(MicroBatch(rows, length, length), "logprobs", stage.needs_reference, critic, rollout),
        updates,
        -(-per_update // rows),
        stage.iterations,
        trained,
        # The policy gives the old logprobs, even those of pairs alone only the reference's.
        int(sampled > 0) + int(stage.needs_reference) + int(critic),
    )


def _trained_samples(stage: UpoConfig, sampled: int) -> int:
    """Completions that an iteration learns from, once each: all that were sampled, or pairs."""
    trained = sampled if stage.policy.coef else 0
    if not trained and stage.preference is not None and stage.preference.uses_online:
        trained = 2 * (stage.rollout.prompts_per_iteration or 0)
    if stage.offline is not None:
        trained += 2 * stage.offline.per_iteration
    return trained
