"""The policy of an RL stage, its reference and its critic: estimates and updates."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ernie_train import parallel
from ernie_train.core import consensus
from ernie_train.core.errors import ErnieTrainError
from ernie_train.losses import KlKind, explained_variance, kl_estimate
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.model.partial import adapter_off
from ernie_train.rl.batch import (
    MicroBatch,
    Minibatch,
    RolloutBatch,
    TokenizedCompletion,
    micro_batches,
    minibatches,
)
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.critic import Critic
from ernie_train.rl.estimators import (
    gae_advantages,
    group_relative_advantages,
    normalize_by_domain,
    sampler_weights,
    sequence_logprobs,
    sequence_values,
)
from ernie_train.rl.loss import PairTerm, UpoLoss, ValueLoss, term_norms
from ernie_train.rl.preference_data import TokenizedPair, add_pairs
from ernie_train.rl.report import mean_metrics
from ernie_train.rl.rollout import Rollout, correction_of, logprob_mismatch
from ernie_train.train.moe_health import MoeHealth
from ernie_train.train.optimizer import Optimizer, optimizer_arrays, restore_optimizer
from ernie_train.train.stage import StageRun
from ernie_train.train.trainer import StepResult, Trainer
from ernie_train.weights.adapters import from_disk, to_disk
from ernie_train.weights.checkpoint import Checkpoint


class Learner:
    """Estimates logprobs, values and advantages of a rollout, and updates policy and critic."""

    def __init__(self, config: UpoConfig, stage: StageRun) -> None:
        self.config, self.seed = config, stage.data.seed
        self.policy = stage.model
        self.policy.train()
        # The stage's starting policy: a resumed run is given it too, before its own checkpoint.
        self.reference = parallel.reference_model(self.policy) if config.needs_reference else None
        self.trainer: Trainer[Ernie4_5_MoeForCausalLM, MicroBatch] = Trainer(
            self.policy, Optimizer(self.policy, config.optim), balance=config.balance
        )
        self.critic: Trainer[Critic, MicroBatch] | None = None
        if config.critic is not None:
            critic = Critic(self.policy)
            if config.critic.path is not None:
                with consensus.fail_together():
                    critic.load_directory(stage.data.base_dir / config.critic.path)
            critic.train()
            self.critic = Trainer(
                critic, Optimizer(critic, config.critic.optim), balance=config.balance
            )
        self.loss = _policy_loss(config)
        # The most that goes through a model together.
        tokens = config.micro_batch_tokens
        self.most: dict[str, Any] = {"batch_size": config.micro_batch_size, "batch_tokens": tokens}

    @property
    def steps(self) -> tuple[int, int]:
        """Optimizer steps of policy and critic."""
        return self.trainer.step, self.critic.step if self.critic is not None else 0

    # ---- before the update -----------------------------------------------------------------------

    def prepare(
        self, rollout: Rollout, pairs: Sequence[TokenizedPair]
    ) -> tuple[RolloutBatch, dict[str, float]]:
        """Compute logprobs, values and advantages of what was sampled, and what they say.

        pairs: of the rollout's completions, or of others. Entropy and KL are means over all of the
        rollout, or over an even sample: groups without a difference are the most certain ones.
        Raises `ErnieTrainError` where sampling and update disagree on logprobs.
        """
        trained = rollout.trained(every_group=self.config.learns_from_every_group)
        batch = _assemble(rollout, trained, pairs)
        batch = replace(batch, share_prompts=self.config.share_prompts)
        by_policy, kl = self.config.policy.coef > 0, self.config.policy.kl
        measured, others = self._scored(batch, trained=by_policy)
        metrics: dict[str, float] = {}
        if rollout.groups:
            batch, metrics = self._with_old_logprobs(batch, rollout, measured, others)
        if self.reference is not None and batch.sequences:
            # Those of offline pairs are computed in each iteration, though they do not change: the
            # last bit of a logprob depends on what shares its micro-batch, and an iteration must
            # not depend on earlier ones.
            at_reference = self._scored(batch, trained=by_policy and kl is not None and kl.coef > 0)
            places = sorted(itertools.chain(*at_reference))
            with adapter_off(self.reference):
                reference = sequence_logprobs(
                    self.reference,
                    [batch.sequences[at] for at in places],
                    temperature=self.config.rollout.temperature,
                    **self.most,
                    share_prompts=self.config.share_prompts,
                ).logprobs
            spread = _spread(places, reference, len(batch.sequences))
            batch = replace(batch, ref_logprobs=spread)
        preference = self.config.preference
        if preference is not None and preference.reference == "last_iteration" and pairs:
            batch = replace(batch, pair_ref_logprobs=self._logprobs_before_update(batch))
        if rollout.groups:
            if self.reference is not None:
                distances = np.concatenate(_kl(batch, "k3", measured))
                metrics["kl"] = float(np.mean(distances, dtype=np.float64))
            if self.config.policy.coef:
                batch, more = self._with_advantages(batch, rollout)
                metrics |= more
        return batch, metrics

    def _scored(self, batch: RolloutBatch, *, trained: bool) -> tuple[list[int], list[int]]:
        """Return what metrics are means over; and what is compared beside it, or `trained` on."""
        count, most = batch.num_in_groups, self.config.measured_completions
        measured = list(range(0, count, -(-count // (most or count)) if count else 1))
        used = {at for pair in batch.pairs for at in pair}
        if trained:
            used |= {at for at in range(count) if batch.is_trained(at)}
        return measured, sorted(used.difference(measured))

    def _logprobs_before_update(self, batch: RolloutBatch) -> list[np.ndarray | None]:
        """Return the policy's logprobs of all sequences; those of the groups are known."""
        known = list(batch.old_logprobs)
        others = sequence_logprobs(
            self.policy,
            batch.sequences[len(known) :],
            temperature=self.config.rollout.temperature,
            **self.most,
        )
        return [*known, *others.logprobs]

    def _with_old_logprobs(
        self, batch: RolloutBatch, rollout: Rollout, measured: list[int], others: list[int]
    ) -> tuple[RolloutBatch, dict[str, float]]:
        completions = rollout.completions()
        parts = [measured, [at for at in others if at < len(completions)]]
        seen = [
            sequence_logprobs(
                self.policy,
                [completions[at] for at in part],
                temperature=self.config.rollout.temperature,
                **self.most,
                router_replay=self.config.policy.router_replay,
                with_entropy=True,
                share_prompts=self.config.share_prompts,
            )
            for part in parts
            if part
        ]
        found = {"entropy": seen[0].entropy, "experts_changed": seen[0].experts_changed}
        metrics = {name: value for name, value in found.items() if value is not None}
        gaps = [
            logprob_mismatch(one.logprobs, [completions[at].sampled_logprobs for at in part])
            for part, one in zip(parts, seen, strict=False)
        ]
        metrics["logprob_mismatch"] = gaps[0]
        places = [at for part in parts for at in part]
        logprobs = _spread(places, [a for one in seen for a in one.logprobs], len(completions))
        batch = replace(batch, old_logprobs=logprobs)
        correction = correction_of(self.config, float(np.max(gaps)))
        if correction is None:
            return batch, metrics
        scored = [at for at, array in enumerate(logprobs) if array is not None]
        sampled = [completions[at].sampled_logprobs for at in scored]
        known = [array for array in sampled if array is not None]
        if len(known) < len(sampled):
            raise ErnieTrainError(
                "policy.sampler_correction needs the logprobs of sampling, which "
                f"{len(sampled) - len(known)} completions lack; nothing was updated"
            )
        new = [array for array in logprobs if array is not None]
        weights, weighed = sampler_weights(new, known, correction)
        spread = _spread(scored, weights, len(completions))
        return replace(batch, sampler_weights=spread), metrics | weighed

    def _with_advantages(
        self, batch: RolloutBatch, rollout: Rollout
    ) -> tuple[RolloutBatch, dict[str, float]]:
        config, completions = self.config, rollout.completions()
        rewards, valid = rollout.rewards, rollout.valid
        if config.normalizes_by_domain:
            domains = np.array([c.domain for c in completions]).reshape(rewards.shape)
            rewards = normalize_by_domain(rewards, valid, domains)
        lengths = [c.num_sampled for c in completions]
        penalties = self._kl_penalties(batch)
        if self.critic is None or config.critic is None:
            verifier = config.reward.verifier
            verdicts = verifier.weight * rollout.marks
            advantages = group_relative_advantages(
                rewards,
                valid,
                lengths,
                scale=config.policy.advantage_scale,
                baseline=config.policy.baseline or "mean",
                verdicts=None if config.normalizes_by_domain else verdicts,
                verdict_span=abs(verifier.weight) * verifier.span,
                penalties=penalties,
            )
            return replace(batch, advantages=advantages), {}
        values = sequence_values(
            self.critic.model,
            completions,
            **self.most,
            share_prompts=config.share_prompts,
        )
        advantages, returns = gae_advantages(
            rewards,
            valid,
            values,
            gamma=config.critic.gamma,
            lam=config.critic.lam,
            policy_lam=config.critic.policy_lam,
            penalties=penalties,
        )
        mask = np.repeat(valid.reshape(-1).astype(np.float32), lengths)
        variance = explained_variance(np.concatenate(values), np.concatenate(returns), mask)
        metrics = {} if variance is None else {"value/explained_variance": variance}
        return replace(batch, values=values, advantages=advantages, returns=returns), metrics

    def _kl_penalties(self, batch: RolloutBatch) -> list[np.ndarray]:
        """Return the KL penalty of each token of the groups; empty without KL in the reward."""
        kl = self.config.policy.kl
        if kl is None or not kl.coef_in_reward:
            return []
        return [kl.coef_in_reward * estimate for estimate in _kl(batch, "k1")]

    # ---- the update ------------------------------------------------------------------------------

    def update(self, batch: RolloutBatch, iteration: int, health: MoeHealth) -> dict[str, float]:
        """Run all optimizer steps of an iteration; return the means of their metrics."""
        config, policy = self.config, self.config.policy
        warmup = config.critic.warmup_iterations if config.critic else 0
        steps = policy.update_epochs * policy.minibatches
        results: list[StepResult] = []
        values: list[StepResult] = []
        for epoch in range(policy.update_epochs):
            key = (self.seed, iteration, epoch, 11)
            for part in minibatches(batch, policy.minibatches, *key, train_groups=policy.coef > 0):
                if self.critic is not None and config.critic is not None and part.trained:
                    micro = micro_batches(batch, part.trained, [], **self.most)
                    loss = ValueLoss(config.critic.clip_range)
                    values.append(self.critic.train_step(micro, loss, config.iterations * steps))
                if iteration > warmup:
                    total = max(1, config.iterations - warmup) * steps
                    results.append(
                        self._policy_step(batch, part, iteration, total, is_first=not results)
                    )
        metrics = mean_metrics(results)
        metrics |= {f"critic/{name}": value for name, value in mean_metrics(values).items()}
        if results:
            load = self.trainer.balancer.new_load()
            for result in results:
                load.merge(result.load)
            metrics |= health.observe(iteration, load)
        return metrics

    def _policy_step(
        self, batch: RolloutBatch, part: Minibatch, iteration: int, total: int, *, is_first: bool
    ) -> StepResult:
        micro = micro_batches(batch, part.trained, part.pairs, **self.most)
        norms: dict[str, float] = {}
        every = self.config.measures_term_norms_every
        if every and is_first and (self.trainer.step == 0 or iteration % every == 0):
            norms = term_norms(self.trainer, micro, self.loss)
        result = self.trainer.train_step(micro, self.loss, total)
        result.metrics.update(norms)
        return result

    # ---- checkpoints -----------------------------------------------------------------------------

    def optimizer_arrays(self) -> dict[str, np.ndarray]:
        return optimizer_arrays(self.trainer.optimizer, lambda named: to_disk(self.policy, named))

    def state_dict(self) -> dict[str, Any]:
        """Return everything but arrays."""
        state = {"powers": self.trainer.optimizer.beta_powers(), "step": self.trainer.step}
        if self.critic is not None:
            powers = self.critic.optimizer.beta_powers()
            state |= {"critic_powers": powers, "critic_step": self.critic.step}
        return state

    def parts(self) -> dict[str, Mapping[str, np.ndarray]]:
        """Return the critic's arrays by their place in a checkpoint."""
        if self.critic is None:
            return {}
        critic = self.critic.model
        moments = optimizer_arrays(self.critic.optimizer, critic.to_disk)
        return {"critic/model": critic.arrays(), "critic/optimizer": moments}

    def restore(self, saved: Checkpoint) -> None:
        state = saved.state["learner"]
        saved.load_model(self.policy)
        restore_optimizer(
            self.trainer.optimizer,
            saved.optimizer,
            state["powers"],
            lambda named: from_disk(self.policy, named),
            checkpoint=saved.path,
            steps=state["step"],
        )
        self.trainer.step = state["step"]
        if self.critic is not None:
            critic = self.critic.model
            critic.load(saved.part("critic/model"))
            self.critic.step = steps = state["critic_step"]
            restore_optimizer(
                self.critic.optimizer,
                saved.part("critic/optimizer") if steps else {},  # unwritten before the first step
                state["critic_powers"],
                critic.from_disk,
                checkpoint=saved.path / "critic",
                steps=steps,
            )


def _kl(batch: RolloutBatch, kind: KlKind, places: Sequence[int] | None = None) -> list[np.ndarray]:
    """Return the KL estimate of each token of the groups, or at `places`, before the update."""
    pairs = list(zip(batch.old_logprobs, batch.ref_logprobs, strict=False))  # of pairs come behind
    chosen = pairs if places is None else [pairs[at] for at in places]
    return [
        kl_estimate(old, ref, kind) for old, ref in chosen if old is not None and ref is not None
    ]


def _spread(
    places: Sequence[int], arrays: Sequence[np.ndarray], count: int
) -> list[np.ndarray | None]:
    """Return `arrays` at their `places` among `count`; None elsewhere."""
    found: list[np.ndarray | None] = [None] * count
    for at, array in zip(places, arrays, strict=True):
        found[at] = array
    return found


def _assemble(
    rollout: Rollout, trained: np.ndarray, pairs: Sequence[TokenizedPair]
) -> RolloutBatch:
    """Line sequences and pairs up: completions of the groups, then those of pairs elsewhere."""
    sequences: list[TokenizedCompletion] = list(rollout.completions())
    places = add_pairs(sequences, pairs)
    num_groups, group_size = trained.shape
    return RolloutBatch(sequences, places, num_groups, group_size, policy_mask=trained.reshape(-1))


def _policy_loss(config: UpoConfig) -> UpoLoss:
    policy, preference = config.policy, config.preference
    kl = policy.kl
    return UpoLoss(
        temperature=config.rollout.temperature,
        clip_ratio=policy.clip_range,
        dual_clip=policy.dual_clip if policy.has_dual_clip else None,
        objective=policy.objective,
        sequence_ratio=policy.ratio == "sequence",
        router_replay=policy.router_replay,
        aggregation=policy.aggregation,
        max_new_tokens=config.rollout.max_new_tokens,
        policy_coef=policy.coef,
        entropy_coef=policy.entropy_coef,
        kl_coef=kl.coef if kl else 0.0,
        kl_kind=kl.kind_in_loss if kl else None,
        pairs=PairTerm.of(preference, preference.coef) if preference else None,
    )
