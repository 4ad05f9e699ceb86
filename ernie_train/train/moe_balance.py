"""Balance of the experts in training: loss terms on the router, and updates without a gradient.

A coefficient of 0 adds no term and no cost: bits are those without this module. The router's weight
takes gradients of all terms; the selection bias is moved by load statistics alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import paddle
from paddle import Tensor
from pydantic import model_validator

from ernie_train.core import process_group
from ernie_train.core.config import NonNegative, StrictConfig
from ernie_train.losses import (
    count_tokens_per_expert,
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
from ernie_train.parallel.collectives import get_collectives
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
    load_balance_type: Literal["aux_loss", "global_aux_loss"] = "aux_loss"
    """Tokens among which that loss balances: `aux_loss` those of each micro-batch by itself,
    `global_aux_loss` those of the whole step so far, on all ranks; named as in Megatron.
    """
    z_loss_coef: NonNegative = 0.0
    """Coefficient of the router z-loss."""
    bias_update_rate: NonNegative = 0.0
    """Step of the auxiliary-loss-free selection bias, which no gradient moves; 0 freezes it."""

    @model_validator(mode="after")
    def _consistent(self) -> BalanceConfig:
        if self.orthogonal_mode == "decoupled" and self.orthogonal_coef == 0:
            raise ValueError("orthogonal_mode='decoupled' has no effect without orthogonal_coef")
        if self.load_balance_type == "global_aux_loss" and self.load_balance_coef == 0:
            raise ValueError(
                "load_balance_type='global_aux_loss' has no effect without load_balance_coef"
            )
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
            chosen = count_tokens_per_expert([stats.expert_ids for stats in router_stats], experts)
            # One copy to the host for all layers, for which it waits; float64 holds all exactly.
            columns = [chosen.reshape([-1]).astype("float64")]
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


class GlobalCounts:
    """Tokens that chose each expert of each MoE layer in a step so far, on all ranks: int64 [L,E].

    Balanced within each micro-batch, which may be one sequence, experts cannot specialize in what a
    sequence is about; among the tokens of a whole step they can (arXiv:2501.11873). As there, the
    counts of all ranks are added in every pass and kept until the step ends: the first of several
    micro-batches sees those of one pass, the last those of all. Counts of the whole previous step
    would be a step late, wanting at the first one and part of every checkpoint; those of the whole
    present one would take a forward pass more. The price: how many micro-batches one pass has, and
    so what early ones see, depends on the number of ranks.
    """

    def __init__(self, layers: int, num_experts: int) -> None:
        self._sum = paddle.zeros([layers, num_experts], "int64")

    def add(self, of_pass: Tensor | None) -> Tensor:
        """Add what a pass counted, [L,E] or None for nothing; return the sum over all so far.

        Every rank must call it once in each pass.
        """
        own = paddle.zeros_like(self._sum) if of_pass is None else of_pass
        if process_group.world_size() > 1:
            added = get_collectives().all_reduce(own.reshape([-1]), experts=False).wait()
            own = added.reshape(own.shape)
        self._sum = self._sum + own
        return self._sum


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

    def new_global_counts(self) -> GlobalCounts | None:
        """Return the counts of a step that begins; None where each micro-batch has its own."""
        if not self.layers or self.config.load_balance_type == "aux_loss":
            return None
        return GlobalCounts(len(self.layers), self.num_experts)

    def terms(
        self, router_stats: Sequence[RouterStats], counts: GlobalCounts | None = None
    ) -> list[LossTerm]:
        """Return the terms of one micro-batch, from what its forward pass reported.

        counts: those of the step, to which the micro-batch is added.
        """
        config, terms, layers = self.config, [], len(self.layers)
        if self.layers and self._orthogonal_in_loss:
            losses = [router_orthogonal_loss(moe.gate.weight) for moe in self.layers.values()]
            mean = sum(losses[1:], losses[0]) / layers
            coef = config.orthogonal_coef * layers
            terms.append(LossTerm(ORTHOGONAL, mean, 1.0, coef, on_parameters=True))
        if config.load_balance_coef and router_stats:
            losses = self._load_balance_losses(router_stats, counts)
            terms.append(
                self._by_tokens(LOAD_BALANCE, losses, router_stats, config.load_balance_coef)
            )
        if config.z_loss_coef and router_stats:
            losses = [router_z_loss(stats.router_logits) for stats in router_stats]
            terms.append(self._by_tokens(Z_LOSS, losses, router_stats, config.z_loss_coef))
        return terms

    def _load_balance_losses(
        self, router_stats: Sequence[RouterStats], counts: GlobalCounts | None
    ) -> list[Tensor]:
        probs = [stats.router_probs for stats in router_stats]
        ids = [unbiased_expert_ids(of_layer, self.top_k) for of_layer in probs]
        chosen = count_tokens_per_expert(ids, self.num_experts)
        if counts is not None:
            chosen = counts.add(chosen)
        return [
            load_balance_loss(of_layer, tokens, self.top_k)
            for of_layer, tokens in zip(probs, chosen, strict=True)
        ]

    def _by_tokens(
        self, name: str, losses: list[Tensor], router_stats: Sequence[RouterStats], coef: float
    ) -> LossTerm:
        """Return the mean of the layers' losses as a term that weighs by tokens."""
        layers = len(self.layers)
        tokens = [stats.router_probs.shape[0] for stats in router_stats]
        parts = [loss * (count / layers) for loss, count in zip(losses, tokens, strict=True)]
        return LossTerm(name, sum(parts[1:], parts[0]), sum(tokens) / layers, coef * layers)

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
