"""The losses of RL and DPO on micro-batches: the policy's objective and the critic's error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.losses import (
    KlInLossKind,
    completion_logratios,
    dpo_loss,
    implicit_rewards,
    kl_estimate,
    kl_loss,
    policy_loss,
    value_loss,
)
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rl.batch import MicroBatch
from ernie_train.rl.critic import Critic
from ernie_train.rl.estimators import critic_values, policy_logprobs
from ernie_train.train.loss_terms import LossOutput, LossTerm, Mean


def _tensor(array: np.ndarray | None) -> Tensor:
    if array is None:
        raise ValueError("the batch lacks an array that this loss needs")
    return paddle.to_tensor(array)


def preference_term(
    logprobs: Tensor, batch: MicroBatch, *, beta: float, coef: float
) -> tuple[LossTerm, dict[str, Mean]]:
    """Return DPO on the pairs of a micro-batch, and the implicit rewards (arXiv:2305.18290).

    logprobs [N] of the sampled tokens under the policy.
    """
    ratios = completion_logratios(
        logprobs,
        _tensor(batch.ref_logprobs),
        paddle.to_tensor(batch.sequence_ids),
        len(batch.sequences),
    )
    places = np.array(batch.pairs, np.int64)
    chosen, rejected = (paddle.gather(ratios, paddle.to_tensor(places[:, i])) for i in (0, 1))
    total = dpo_loss(chosen, rejected, beta=beta).sum()
    seen = implicit_rewards(chosen, rejected, beta=beta)
    pairs = float(len(batch.pairs))
    metrics = {
        "rewards/accuracies": Mean(float(seen.accuracies.sum()), pairs),
        "rewards/margins": Mean(float(seen.margins.sum()), pairs),
        "rewards/chosen": Mean(float(seen.chosen.sum()), pairs),
        "rewards/rejected": Mean(float(seen.rejected.sum()), pairs),
    }
    return LossTerm("preference", total, pairs, coef), metrics


@dataclass(frozen=True)
class DpoLoss:
    """-log sigmoid(beta * margin of the log-ratios), a mean over the pairs of the step."""

    beta: float

    def counts(self, batch: MicroBatch) -> dict[str, float]:
        return {"preference": float(len(batch.pairs))}

    def __call__(self, model: Ernie4_5_MoeForCausalLM, batch: MicroBatch) -> LossOutput:
        logprobs, _, router_stats = policy_logprobs(model, batch, temperature=1.0)
        term, metrics = preference_term(logprobs, batch, beta=self.beta, coef=1.0)
        return LossOutput([term], metrics, router_stats, logprobs)


@dataclass(frozen=True)
class UpoLoss:
    """policy_coef * PPO + kl_coef * KL - entropy_coef * entropy + preference_coef * DPO.

    The first three are means over the trained tokens of the step, the last over its pairs. Terms
    with a coefficient of 0 are absent. `kl_kind` None leaves KL out of the loss.
    """

    temperature: float
    clip_ratio: tuple[float, float]
    policy_coef: float = 1.0
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_kind: KlInLossKind | None = None
    preference_coef: float = 0.0
    beta: float = 0.1
    has_reference: bool = False

    def counts(self, batch: MicroBatch) -> dict[str, float]:
        tokens = float(batch.loss_mask.sum())
        coefs = {"policy": self.policy_coef, "entropy": self.entropy_coef}
        if self.kl_kind is not None:
            coefs["kl_loss"] = self.kl_coef
        counts = {name: tokens for name, coef in coefs.items() if coef}
        if self.preference_coef:
            counts["preference"] = float(len(batch.pairs))
        return counts

    def __call__(self, model: Ernie4_5_MoeForCausalLM, batch: MicroBatch) -> LossOutput:
        logprobs, entropy, router_stats = policy_logprobs(
            model, batch, temperature=self.temperature, with_entropy=True
        )
        counts = self.counts(batch)
        terms: list[LossTerm] = []
        metrics: dict[str, Mean] = {}
        if float(batch.loss_mask.sum()) > 0:
            terms, metrics = self._token_terms(logprobs, entropy, batch, counts)
        if self.preference_coef and batch.pairs:
            term, seen = preference_term(logprobs, batch, beta=self.beta, coef=self.preference_coef)
            terms.append(term)
            metrics |= seen
        return LossOutput(terms, metrics, router_stats, logprobs)

    def _token_terms(
        self, logprobs: Tensor, entropy: Tensor | None, batch: MicroBatch, counts: dict[str, float]
    ) -> tuple[list[LossTerm], dict[str, Mean]]:
        mask = paddle.to_tensor(batch.loss_mask)
        tokens = float(batch.loss_mask.sum())
        terms = []
        metrics: dict[str, Mean] = {}
        if "policy" in counts:
            total, clipped = policy_loss(
                logprobs,
                _tensor(batch.old_logprobs),
                _tensor(batch.advantages),
                mask,
                clip_ratio=self.clip_ratio,
            )
            terms.append(LossTerm("policy", total, tokens, self.policy_coef))
            metrics["clip_ratio"] = Mean(float(clipped), tokens)
        if entropy is not None:
            summed = (entropy * mask).sum()
            metrics["entropy"] = Mean(float(summed), tokens)
            if "entropy" in counts:
                terms.append(LossTerm("entropy", summed, tokens, -self.entropy_coef))
        if self.has_reference:
            reference = _tensor(batch.ref_logprobs)
            estimate = kl_estimate(logprobs.detach(), reference, "k3") * mask
            metrics["kl"] = Mean(float(estimate.sum()), tokens)
            if "kl_loss" in counts and self.kl_kind is not None:
                summed = kl_loss(logprobs, reference, mask, kind=self.kl_kind)
                terms.append(LossTerm("kl_loss", summed, tokens, self.kl_coef))
        return terms, metrics


@dataclass(frozen=True)
class ValueLoss:
    """The critic's clipped squared error, a mean over the trained tokens of the step."""

    clip_range: float | None

    def counts(self, batch: MicroBatch) -> dict[str, float]:
        return {"value_loss": float(batch.loss_mask.sum())}

    def __call__(self, model: Critic, batch: MicroBatch) -> LossOutput:
        values, router_stats = critic_values(model, batch)
        total = value_loss(
            values,
            _tensor(batch.values),
            _tensor(batch.returns),
            paddle.to_tensor(batch.loss_mask),
            clip_range=self.clip_range,
        )
        term = LossTerm("value_loss", total, float(batch.loss_mask.sum()))
        return LossOutput([term], {}, router_stats, values)
