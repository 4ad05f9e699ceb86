"""The losses of RL and DPO on micro-batches: the policy's objective and the critic's error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.losses import (
    REFERENCE_FREE,
    KlInLossKind,
    PolicyObjective,
    PreferenceKind,
    completion_logratios,
    dpo_loss,
    implicit_rewards,
    ipo_loss,
    kl_loss,
    orpo_loss,
    policy_loss,
    simpo_loss,
    value_loss,
)
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rl.batch import MicroBatch
from ernie_train.rl.config import Aggregation, PairLoss
from ernie_train.rl.critic import Critic
from ernie_train.rl.estimators import critic_values, policy_logprobs
from ernie_train.train.loss_terms import LossOutput, LossTerm, Mean
from ernie_train.train.trainer import Trainer


def _tensor(array: np.ndarray | None) -> Tensor:
    if array is None:
        raise ValueError("the batch lacks an array that this loss needs")
    return paddle.to_tensor(array)


@dataclass(frozen=True)
class PairTerm:
    """The loss of pairs of completions as terms of an objective, means over the step's pairs.

    Both terms, the loss and rpo_alpha times the chosen completions' negative log-likelihood per
    token, have the coefficient `coef`.
    """

    loss: PreferenceKind = "sigmoid"
    beta: float = 0.1
    length_normalize: bool = False
    gamma: float = 0.5
    rpo_alpha: float = 0.0
    coef: float = 1.0

    @classmethod
    def of(cls, settings: PairLoss, coef: float) -> PairTerm:
        return cls(
            settings.loss,
            settings.beta_of_loss,
            settings.is_length_normalized,
            settings.gamma_of_loss,
            settings.rpo_alpha,
            coef,
        )

    def counts(self, batch: MicroBatch) -> dict[str, float]:
        names = ("preference", "nll_loss") if self.rpo_alpha else ("preference",)
        return dict.fromkeys(names, float(len(batch.pairs)))

    def __call__(
        self, logprobs: Tensor, batch: MicroBatch
    ) -> tuple[list[LossTerm], dict[str, Mean]]:
        """Return the terms of a micro-batch, and its pairs' implicit rewards.

        logprobs [N] of the sampled tokens under the policy.
        """
        given = batch.ref_logprobs if batch.pair_ref_logprobs is None else batch.pair_ref_logprobs
        reference = None if self.loss in REFERENCE_FREE else _tensor(given)
        normalize = self.length_normalize
        chosen, rejected = self._of_pairs(logprobs, reference, batch, normalize)
        pairs = float(len(batch.pairs))
        terms = [LossTerm("preference", self._losses(chosen, rejected).sum(), pairs, self.coef)]
        if self.rpo_alpha:
            likelihoods, _ = self._of_pairs(logprobs, None, batch, True)
            terms.append(
                LossTerm("nll_loss", -likelihoods.sum(), pairs, self.coef * self.rpo_alpha)
            )
        seen = implicit_rewards(chosen, rejected, beta=self.beta)
        metrics = {
            f"rewards/{name}": Mean(float(values.sum()), pairs)
            for name, values in seen._asdict().items()
        }
        return terms, metrics

    def _of_pairs(
        self, logprobs: Tensor, reference: Tensor | None, batch: MicroBatch, normalize: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the log-ratios of the pairs' chosen and rejected completions, each [P]."""
        ratios = completion_logratios(
            logprobs,
            reference,
            paddle.to_tensor(batch.sequence_ids),
            len(batch.sequences),
            length_normalize=normalize,
        )
        places = paddle.to_tensor(np.array(batch.pairs, np.int64))
        return paddle.gather(ratios, places[:, 0]), paddle.gather(ratios, places[:, 1])

    def _losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        if self.loss == "simpo":
            return simpo_loss(chosen, rejected, beta=self.beta, gamma=self.gamma)
        if self.loss == "orpo":
            return orpo_loss(chosen, rejected, beta=self.beta)
        if self.loss == "ipo":
            return ipo_loss(chosen, rejected, beta=self.beta)
        return dpo_loss(chosen, rejected, beta=self.beta)


@dataclass(frozen=True)
class DpoLoss:
    """A loss of pairs alone; its reference is the policy at the stage's start."""

    pairs: PairTerm

    def counts(self, batch: MicroBatch) -> dict[str, float]:
        return self.pairs.counts(batch)

    def __call__(self, model: Ernie4_5_MoeForCausalLM, batch: MicroBatch) -> LossOutput:
        logprobs, _, router_stats = policy_logprobs(model, batch, temperature=1.0)
        terms, metrics = self.pairs(logprobs, batch)
        return LossOutput(terms, metrics, router_stats, logprobs)


@dataclass(frozen=True)
class UpoLoss:
    """policy_coef * PPO + kl_coef * KL - entropy_coef * entropy + the terms of `pairs`.

    The first three are means over the step as `aggregation` says (`max_new_tokens` is the constant
    of "constant"), the last over its pairs. Terms with a coefficient of 0 are absent. `kl_kind`
    None leaves KL out of the loss. Metrics are means over tokens, however terms are aggregated.
    """

    temperature: float
    clip_ratio: tuple[float, float]
    dual_clip: float | None = None
    objective: PolicyObjective = "ppo"
    sequence_ratio: bool = False
    router_replay: bool = False
    aggregation: Aggregation = "token"
    max_new_tokens: int = 1
    policy_coef: float = 1.0
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_kind: KlInLossKind | None = None
    pairs: PairTerm | None = None

    def counts(self, batch: MicroBatch) -> dict[str, float]:
        coefs = {"policy": self.policy_coef, "entropy_loss": self.entropy_coef}
        if self.kl_kind is not None:
            coefs["kl_loss"] = self.kl_coef
        count = self._count(batch)
        counts = {name: count for name, coef in coefs.items() if coef}
        return counts | (self.pairs.counts(batch) if self.pairs is not None else {})

    def _count(self, batch: MicroBatch) -> float:
        """Return the share of a micro-batch in what the terms of tokens are divided by."""
        tokens = batch.trained_tokens
        if self.aggregation == "token":
            return float(tokens.sum())
        sequences = float(np.count_nonzero(tokens))
        return sequences * (self.max_new_tokens if self.aggregation == "constant" else 1)

    def _weights(self, batch: MicroBatch) -> Tensor | None:
        """Return the factors [N] of the terms of tokens; None: all 1."""
        if self.aggregation != "sequence":
            return None
        per_sequence = 1 / np.maximum(batch.trained_tokens, 1)
        return paddle.to_tensor(per_sequence[batch.sequence_ids].astype(np.float32))

    def __call__(self, model: Ernie4_5_MoeForCausalLM, batch: MicroBatch) -> LossOutput:
        logprobs, entropy, router_stats = policy_logprobs(
            model,
            batch,
            temperature=self.temperature,
            with_entropy=self.entropy_coef > 0,
            router_replay=self.router_replay,
        )
        counts = self.counts(batch)
        terms: list[LossTerm] = []
        metrics: dict[str, Mean] = {}
        if float(batch.loss_mask.sum()) > 0:
            terms, metrics = self._token_terms(logprobs, entropy, batch, counts)
        if self.pairs is not None and batch.pairs:
            of_pairs, seen = self.pairs(logprobs, batch)
            terms += of_pairs
            metrics |= seen
        return LossOutput(terms, metrics, router_stats, logprobs)

    def _token_terms(
        self, logprobs: Tensor, entropy: Tensor | None, batch: MicroBatch, counts: dict[str, float]
    ) -> tuple[list[LossTerm], dict[str, Mean]]:
        mask, weights = paddle.to_tensor(batch.loss_mask), self._weights(batch)
        tokens = float(batch.loss_mask.sum())
        terms = []
        metrics: dict[str, Mean] = {}
        if "policy" in counts:
            gains = weights
            if batch.sampler_weights is not None:
                corrections = _tensor(batch.sampler_weights)
                gains = corrections if weights is None else corrections * weights
            total, clipped = policy_loss(
                logprobs,
                _tensor(batch.old_logprobs),
                _tensor(batch.advantages),
                mask,
                clip_ratio=self.clip_ratio,
                dual_clip=self.dual_clip,
                objective=self.objective,
                sequence_ids=_tensor(batch.sequence_ids) if self.sequence_ratio else None,
                weights=gains,
            )
            terms.append(LossTerm("policy", total, counts["policy"], self.policy_coef))
            metrics["clip_ratio"] = Mean(float(clipped), tokens)
        if entropy is not None and "entropy_loss" in counts:
            kept = entropy * mask
            total = (kept if weights is None else kept * weights).sum()
            terms.append(
                LossTerm("entropy_loss", total, counts["entropy_loss"], -self.entropy_coef)
            )
        if self.kl_kind is not None and "kl_loss" in counts:
            old, reference = _tensor(batch.old_logprobs), _tensor(batch.ref_logprobs)
            total, truncated = kl_loss(
                logprobs, old, reference, mask, kind=self.kl_kind, weights=weights
            )
            metrics["kl_loss/truncated"] = Mean(float(truncated), tokens)
            terms.append(LossTerm("kl_loss", total, counts["kl_loss"], self.kl_coef))
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


def term_norms(
    trainer: Trainer[Ernie4_5_MoeForCausalLM, MicroBatch],
    micro: Sequence[MicroBatch],
    loss: UpoLoss,
) -> dict[str, float]:
    """Return each term's gradient norm, and how the pairs' gradient stands to the policy term's.

    `preference/norm_ratio` is the norm of the pairs' terms over that of the policy term,
    `preference/cosine` that of the angle between them; both are missing where either has no
    gradient. Nothing is updated.
    """
    norms = trainer.term_gradient_norms(micro, loss)
    metrics = {f"grad_norm/{name}": norm for name, norm in norms.items()}
    policy, of_pairs = norms.get("policy", 0.0), {"preference", "nll_loss"} & norms.keys()
    if not (policy and norms.get("preference")):
        return metrics
    pairs = norms["preference"]
    if len(of_pairs) > 1:
        pairs = trainer.gradient_norm_of(of_pairs, micro, loss)
    # |a + b|^2 = |a|^2 + |b|^2 + 2 a.b: a pass more, and no gradient is kept beside another.
    both = trainer.gradient_norm_of({"policy", *of_pairs}, micro, loss)
    metrics["preference/norm_ratio"] = pairs / policy
    metrics["preference/cosine"] = (both**2 - policy**2 - pairs**2) / (2 * policy * pairs)
    return metrics
