"""What learns in an RL stage: the policy and its critic, over one iteration's groups and pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ernie_train import parallel
from ernie_train.core import consensus
from ernie_train.core.errors import ErnieTrainError
from ernie_train.data.mixing import permutation
from ernie_train.losses import explained_variance
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rl.batch import (
    KlInReward,
    Pairing,
    SampleBatch,
    add_gae,
    add_group_advantages,
    add_logprobs,
    add_values,
    micro_batches,
    reward_table,
)
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.critic import Critic
from ernie_train.rl.loss import UpoLoss, ValueLoss
from ernie_train.rl.report import mean_metrics
from ernie_train.rl.rollout import Group, Sample
from ernie_train.train.moe_health import MoeHealth
from ernie_train.train.optimizer import Optimizer, optimizer_arrays, restore_optimizer
from ernie_train.train.stage import StageRun
from ernie_train.train.trainer import StepResult, Trainer
from ernie_train.weights.checkpoint import Checkpoint, from_disk, to_disk

Part = tuple[list[Sample], list[Pairing]]  # what one optimizer step learns from


class Learner:
    """The policy with its reference and, for generalized advantages, its critic."""

    def __init__(self, config: UpoConfig, stage: StageRun) -> None:
        self.config, self.seed = config, stage.data.seed
        self.policy = stage.model
        self.policy.train()
        # The stage's starting policy: a resumed run is given it too, before its own checkpoint.
        self.reference = parallel.clone_model(self.policy) if config.needs_reference else None
        self.trainer: Trainer[Ernie4_5_MoeForCausalLM, SampleBatch] = Trainer(
            self.policy, Optimizer(self.policy, config.optim), balance=config.balance
        )
        self.critic: Trainer[Critic, SampleBatch] | None = None
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

    # ---- before the update -----------------------------------------------------------------------

    def evaluate_tokens(self, kept: list[Group], pairs: list[Pairing]) -> dict[str, float]:
        """Fills in logprobs, values and advantages; stops where sampling and update disagree."""
        config, metrics = self.config, {}
        options: Any = {"temperature": config.temperature, "batch_size": config.micro_batch_size}
        samples = [s for group in kept for s in group]
        if samples:
            changed = add_logprobs(self.policy, samples, "old_logprobs", **options)
            if changed is not None:
                metrics["experts_changed"] = changed
            metrics["logprob_mismatch"] = self._mismatch(samples)
        if self.reference is not None:
            # Those of offline pairs anew each time, though they do not change: the last bit of a
            # logprob depends on what shares its batch, and an iteration must not on earlier ones.
            wanted = {id(s): s for s in (*samples, *(s for pair in pairs for s in pair))}
            add_logprobs(self.reference, list(wanted.values()), "ref_logprobs", **options)
        if samples:
            metrics |= self._add_advantages(kept)
        return metrics

    def _mismatch(self, samples: Sequence[Sample]) -> float:
        """Mean exp|recomputed - sampled logprob| - 1 over the tokens."""
        gaps = [
            np.abs(s.old_logprobs - s.sampled_logprobs)
            for s in samples
            if s.old_logprobs is not None and s.sampled_logprobs is not None
        ]
        mismatch = float(np.expm1(np.concatenate(gaps).astype(np.float64)).mean()) if gaps else 0.0
        bound = self.config.max_logprob_mismatch
        # A replayed rollout may be another policy's: then the gap is what it is.
        if not mismatch <= bound and self.config.replay_rollouts is None:
            raise ErnieTrainError(
                f"the logprobs of sampling and of the update differ by {mismatch:.2e}, more than "
                f"max_logprob_mismatch={bound:g}; nothing was updated. Both must compute with one "
                "dtype and the same weights; raise the bound if the gap is known to be harmless"
            )
        return mismatch

    def _add_advantages(self, kept: list[Group]) -> dict[str, float]:
        config, kl = self.config, None
        rewards, valid = reward_table(kept, normalize=config.normalize_rewards == "domain")
        if config.kl is not None and config.kl.coef and config.kl.place == "reward":
            kl = KlInReward(config.kl.coef, config.kl.kind)
        if self.critic is None:
            add_group_advantages(kept, rewards, valid, scale=config.group_scale, kl=kl)
            return {}
        samples = [s for group in kept for s in group]
        add_values(self.critic.model, samples, batch_size=config.micro_batch_size)
        add_gae(kept, rewards, valid, gamma=config.gamma, lam=config.lam, kl=kl)
        every = SampleBatch(tuple(samples))
        values, returns = (every.gather(name).numpy() for name in ("values", "returns"))
        variance = explained_variance(values, returns, every.trained)
        return {} if variance is None else {"value/explained_variance": variance}

    # ---- the update ------------------------------------------------------------------------------

    def update(
        self, kept: list[Group], pairs: list[Pairing], number: int, health: MoeHealth
    ) -> dict[str, float]:
        """All optimizer steps of iteration `number`; the means of their metrics."""
        config = self.config
        warmup = config.critic.warmup_iterations if config.critic else 0
        steps = config.update_epochs * config.minibatches
        results: list[StepResult] = []
        values: list[StepResult] = []
        for epoch in range(config.update_epochs):
            for part in self.minibatches(kept, pairs, number, epoch):
                if self.critic is not None and config.critic is not None and part[0]:
                    batches = micro_batches(part[0], [], config.micro_batch_size)
                    loss = ValueLoss(config.critic.clip_range)
                    values.append(self.critic.train_step(batches, loss, config.iterations * steps))
                if number > warmup:
                    total = max(1, config.iterations - warmup) * steps
                    results.append(self._policy_step(part, number, total, first=not results))
        metrics = mean_metrics(results)
        metrics |= {f"critic/{name}": value for name, value in mean_metrics(values).items()}
        if results:
            load = self.trainer.balancer.new_load()
            for result in results:
                load.merge(result.load)
            metrics |= health.observe(number, load)
        return metrics

    def _policy_step(self, part: Part, number: int, total: int, *, first: bool) -> StepResult:
        batches = micro_batches(*part, self.config.micro_batch_size)
        norms: dict[str, float] = {}
        every = self.config.term_norms_every
        if first and every is not None and number % every == 0:
            norms = self.trainer.term_gradient_norms(batches, self.loss)
        result = self.trainer.train_step(batches, self.loss, total)
        result.metrics.update({f"grad_norm/{name}": norm for name, norm in norms.items()})
        return result

    def minibatches(
        self, kept: list[Group], pairs: list[Pairing], number: int, epoch: int
    ) -> list[Part]:
        """Groups and pairs in `minibatches` parts; an online pair goes where its group goes."""
        count = self.config.minibatches
        order = permutation(len(kept), self.seed, number, epoch, 11)
        home: dict[int, int] = {}
        parts: list[Part] = [([], []) for _ in range(count)]
        for at, chosen in enumerate(np.array_split(order, count)):
            for group in chosen:
                # What takes no part in the objective need not go through the model.
                wanted = (s for s in kept[group] if s.trained and self.config.policy_coef)
                parts[at][0].extend(wanted)
                home |= {id(s): at for s in kept[group]}
        strangers = 0
        for pair in pairs:
            if id(pair[0]) in home:
                parts[home[id(pair[0])]][1].append(pair)
            else:
                parts[strangers % count][1].append(pair)
                strangers += 1
        return [part for part in parts if part[0] or part[1]]

    # ---- checkpoints -----------------------------------------------------------------------------

    def optimizer_arrays(self) -> dict[str, np.ndarray]:
        return optimizer_arrays(self.trainer.optimizer, lambda named: to_disk(self.policy, named))

    def state_dict(self) -> dict[str, Any]:
        """Everything but arrays."""
        state = {"powers": self.trainer.optimizer.powers(), "step": self.trainer.step}
        if self.critic is not None:
            powers = self.critic.optimizer.powers()
            state |= {"critic_powers": powers, "critic_step": self.critic.step}
        return state

    def parts(self) -> dict[str, dict[str, np.ndarray]]:
        """The critic's arrays by where they go in a checkpoint."""
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
            restore_optimizer(
                self.critic.optimizer,
                saved.part("critic/optimizer"),
                state["critic_powers"],
                critic.from_disk,
                checkpoint=saved.path / "critic",
                steps=state["critic_step"],
            )
            self.critic.step = state["critic_step"]


def _policy_loss(config: UpoConfig) -> UpoLoss:
    kl = config.kl if config.kl is not None and config.kl.place == "loss" else None
    return UpoLoss(
        temperature=config.temperature,
        clip_ratio=(config.clip_ratio, config.clip_ratio_high or config.clip_ratio),
        policy_coef=config.policy_coef,
        entropy_coef=config.entropy_coef,
        kl_coef=kl.coef if kl else 0.0,
        kl_kind=kl.kind if kl and kl.kind != "k1" else None,
        preference_coef=config.preference_coef,
        beta=config.beta,
        has_reference=config.needs_reference,
    )
