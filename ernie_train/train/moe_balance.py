"""Balance of the experts in training: loss terms on the router, and updates without a gradient.

A coefficient of 0 adds no term and no cost: bits are those without this module. The router's weight
takes gradients of all terms; the selection bias is moved by load statistics alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import paddle
from pydantic import model_validator

from ernie_train.core import process_group
from ernie_train.core.config import NonNegative, StrictConfig
from ernie_train.losses import (
    load_balance_loss,
    router_orthogonal_gradient,
    router_orthogonal_loss,
    router_z_loss,
    selection_bias_step,
    unbiased_expert_ids,
)
from ernie_train.model import RouterStats
from ernie_train.model.moe import MoE
from ernie_train.parallel import HasDecoder
from ernie_train.train.loss_terms import LossTerm

ORTHOGONAL = "balance/orthogonal"
LOAD_BALANCE = "balance/load_balance"
Z_LOSS = "balance/z_loss"


class BalanceConfig(StrictConfig):
    """Settings that keep the experts in use; all off by default, as in ERNIE 4.5's SFT.

    Each term enters the objective as its coefficient times its sum over the MoE layers, and is
    logged as its mean over them. ERNIE 4.5's pre-training has orthogonal_coef 1e-3 (decoupled),
    load_balance_coef 1e-5 and bias_update_rate 1e-3.
    """

    orthogonal_coef: NonNegative = 0.0
    """Coefficient of the loss that keeps the router's columns orthogonal."""
    orthogonal_mode: Literal["loss", "decoupled"] = "loss"
    """`loss` adds that term to the objective; `decoupled` moves the router by `-orthogonal_coef` x
    its gradient after each update, past learning rate, moments and clipping.
    """
    load_balance_coef: NonNegative = 0.0
    """Coefficient of the load-balance loss."""
    z_loss_coef: NonNegative = 0.0
    """Coefficient of the router z-loss."""
    bias_update_rate: NonNegative = 0.0
    """Step of the auxiliary-loss-free selection bias, which no gradient moves; 0 freezes it."""

    @model_validator(mode="after")
    def _consistent(self) -> BalanceConfig:
        if self.orthogonal_mode == "decoupled" and self.orthogonal_coef == 0:
            raise ValueError("orthogonal_mode='decoupled' has no effect without orthogonal_coef")
        return self

    def active(self) -> list[str]:
        """Return the names of the settings that are not zero."""
        names = ("orthogonal_coef", "load_balance_coef", "z_loss_coef", "bias_update_rate")
        return [name for name in names if getattr(self, name) > 0]


def moe_layers(model: HasDecoder) -> dict[int, MoE]:
    """Return the MoE layers of a model by their number."""
    return {i: layer.mlp for i, layer in enumerate(model.model.layers) if layer.is_moe}


class RouterStatsAccumulator:
    """Sums of router statistics over the micro-batches of one optimizer step, then over ranks.

    tokens_per_expert [L,E] counts every choice of every real token, before any capacity limit;
    entropy [L] sums the routers' entropies in nats over `tokens` [L]; dropped [L] counts choices
    that a capacity limit dropped. L MoE layers in their order.
    """

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        self.layers = list(layers)
        self.tokens_per_expert = np.zeros((len(self.layers), num_experts))
        self.entropy, self.tokens, self.dropped = (np.zeros(len(self.layers)) for _ in range(3))

    def add(self, router_stats: Sequence[RouterStats]) -> None:
        if not router_stats:
            return
        layers, experts = len(router_stats), self.tokens_per_expert.shape[1]
        with paddle.no_grad():
            ids = paddle.stack([stats.expert_ids.reshape([-1]) for stats in router_stats])
            ids = ids + paddle.arange(layers).unsqueeze(1) * experts
            # One count and one copy to the host for all layers: each of them waits for the device,
            # a count twice more, for the smallest and the largest number. float64 holds both.
            chosen = paddle.bincount(ids.reshape([-1]), minlength=layers * experts)
            columns = [chosen.astype("float64")]
            for stats in router_stats:
                probs = stats.router_probs.detach()
                entropy = (probs * paddle.log(paddle.clip(probs, 1e-30))).sum()
                columns.append(entropy.astype("float64").reshape([1]))
            found = paddle.concat(columns).numpy()
        counts, entropies = found[:-layers].reshape(layers, experts), found[-layers:]
        for stats, count, entropy in zip(router_stats, counts, entropies, strict=True):
            at = self.layers.index(stats.layer)
            self.tokens_per_expert[at] += count
            self.entropy[at] -= entropy
            self.tokens[at] += stats.router_probs.shape[0]
            self.dropped[at] += stats.dropped

    def merge(self, other: RouterStatsAccumulator) -> None:
        """Add the sums of another step."""
        self.tokens_per_expert += other.tokens_per_expert
        self.entropy += other.entropy
        self.tokens += other.tokens
        self.dropped += other.dropped

    def reduce(self) -> None:
        """Sum over all ranks, so that each has the same values."""
        parts = (self.tokens_per_expert, self.entropy, self.tokens, self.dropped)
        flat = np.concatenate([part.reshape(-1) for part in parts])
        total = np.array(process_group.all_reduce_sum(flat.tolist()))
        for part in parts:
            part[...] = total[: part.size].reshape(part.shape)
            total = total[part.size :]


class MoeBalance:
    """Applies a `BalanceConfig` to one model."""

    def __init__(self, model: HasDecoder, config: BalanceConfig) -> None:
        self.config = config
        self.layers = moe_layers(model)
        self.top_k = model.model.config.moe_k
        self.num_experts = model.model.config.moe_num_experts

    def counts(self, num_tokens: int) -> dict[str, float]:
        """Return the counts of the terms of a micro-batch with `num_tokens` real tokens.

        The load-balance loss is not linear in tokens, so it is taken per micro-batch and weighted
        by its tokens; the orthogonal one does not depend on the batch and counts once for each.
        """
        counts: dict[str, float] = {}
        if not self.layers:
            return counts
        if self._orthogonal_in_loss:
            counts[ORTHOGONAL] = 1.0
        if self.config.load_balance_coef:
            counts[LOAD_BALANCE] = float(num_tokens)
        if self.config.z_loss_coef:
            counts[Z_LOSS] = float(num_tokens)
        return counts

    @property
    def _orthogonal_in_loss(self) -> bool:
        return self.config.orthogonal_coef > 0 and self.config.orthogonal_mode == "loss"

    def terms(self, router_stats: Sequence[RouterStats]) -> list[LossTerm]:
        """Return the terms of one micro-batch, from what its forward pass reported."""
        config, terms, layers = self.config, [], len(self.layers)
        if self.layers and self._orthogonal_in_loss:
            losses = [router_orthogonal_loss(moe.gate.weight) for moe in self.layers.values()]
            mean = sum(losses[1:], losses[0]) / layers
            coef = config.orthogonal_coef * layers
            terms.append(LossTerm(ORTHOGONAL, mean, 1.0, coef, on_parameters=True))
        if config.load_balance_coef and router_stats:
            terms.append(self._by_tokens(LOAD_BALANCE, router_stats, config.load_balance_coef))
        if config.z_loss_coef and router_stats:
            terms.append(self._by_tokens(Z_LOSS, router_stats, config.z_loss_coef))
        return terms

    def _by_tokens(self, name: str, router_stats: Sequence[RouterStats], coef: float) -> LossTerm:
        layers = len(self.layers)
        losses, tokens = [], 0
        for stats in router_stats:
            if name == Z_LOSS:
                loss = router_z_loss(stats.router_logits)
            else:
                ids = unbiased_expert_ids(stats.router_probs, self.top_k)
                loss = load_balance_loss(stats.router_probs, ids, self.num_experts)
            losses.append(loss * (stats.router_probs.shape[0] / layers))
            tokens += stats.router_probs.shape[0]
        return LossTerm(name, sum(losses[1:], losses[0]), tokens / layers, coef * layers)

    def new_load(self) -> RouterStatsAccumulator:
        return RouterStatsAccumulator(list(self.layers), self.num_experts)

    def after_step(self, load: RouterStatsAccumulator) -> dict[str, float]:
        """Update what takes no gradient of the loss: orthogonal routers (decoupled), biases.

        `load` must be summed over all ranks, so that every rank moves its copies alike. Returns
        metrics: the mean over the layers of the orthogonal loss before the update.
        """
        metrics: dict[str, float] = {}
        decoupled = self.config.orthogonal_mode == "decoupled" and self.config.orthogonal_coef > 0
        if self.layers and decoupled:
            values = []
            for moe in self.layers.values():
                value, gradient = router_orthogonal_gradient(moe.gate.weight)
                values.append(value)
                with paddle.no_grad():
                    moe.gate.weight.subtract_(gradient * self.config.orthogonal_coef)
            metrics[ORTHOGONAL] = sum(values) / len(values)
        with paddle.no_grad():
            if self.config.bias_update_rate and self.layers:
                steps = selection_bias_step(load.tokens_per_expert, self.config.bias_update_rate)
                for moe, step in zip(self.layers.values(), steps, strict=True):
                    bias = moe.moe_statics.e_score_correction_bias
                    moved = bias.numpy() + step.reshape(bias.shape)
                    # Without the mean, which changes no choice and would only drift.
                    bias.set_value(moved - moved.mean(dtype=np.float64).astype(np.float32))
        return metrics
