"""Floating-point operations, bytes over the wire and seconds of a step.

A matrix product of [m,k] and [k,n] counts 2 m k n. Communication is counted as the bytes that a
rank sends, by ring algorithms (Patarasuk and Yuan, 2009), with experts evenly loaded and nothing
hidden behind computation.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.parallel import Recompute, recomputed_parts
from ernie_train.plan.layout import (
    Layout,
    Parameters,
    Precision,
    count_parameters,
    critic_parameters,
    moe_layers,
)
from ernie_train.plan.memory import Rollout, cache_bytes
from ernie_train.plan.work import Work

RANKS_PER_MACHINE = 8


@dataclass(frozen=True)
class Rates:
    """What a rank achieves, not its peak; each is stated in the output.

    tflops: 10^12 operations a second in training. inside_gbps, between_gbps: 10^9 bits a second
    that a rank sends to others of its machine, and beyond. memory_gb_per_s: 10^9 bytes a second
    that it reads from its memory.
    """

    tflops: float
    inside_gbps: float
    between_gbps: float
    memory_gb_per_s: float

    def seconds_to_send(self, size: float, span: int) -> float:
        """Time for `size` bytes in a group that spans `span` ranks next to one another."""
        gbps = self.inside_gbps if span <= RANKS_PER_MACHINE else self.between_gbps
        return size * 8 / (gbps * 1e9)


@dataclass(frozen=True)
class TokenFlops:
    """Operations of a token's forward pass, with `context` tokens to attend to on average."""

    layers: float
    attention: float
    head: float

    @property
    def forward(self) -> float:
        return self.layers + self.attention + self.head

    def training(self, again: float) -> float:
        """Forward, twice as much backward, and the operations `again` that are done once more."""
        return 3 * self.forward + again


def token_flops(config: Ernie4_5_MoeConfig, context: float) -> TokenFlops:
    """`context`: (L + 1) / 2 in documents of L tokens, for attention is causal."""
    numbers = range(config.num_hidden_layers)
    products = sum(_projections(config) + _experts(config, number) for number in numbers)
    scores = config.num_hidden_layers * _scores(config, context)
    return TokenFlops(products, scores, 2.0 * config.vocab_size * config.hidden_size)


def recomputed_flops(config: Ernie4_5_MoeConfig, context: float, recompute: Recompute) -> float:
    """Operations of a token in what is run again in the backward pass."""
    total = 0.0
    for number in range(config.num_hidden_layers):
        parts = recomputed_parts(recompute, number)
        if "attention" in parts:
            total += _projections(config) + _scores(config, context)
        if "experts" in parts:
            total += _experts(config, number)
    return total


def _projections(config: Ernie4_5_MoeConfig) -> float:
    """Queries, keys, values and outputs of a layer."""
    heads = config.num_attention_heads + int(config.num_key_value_heads or 0)
    return 4.0 * config.hidden_size * heads * config.attention_head_dim


def _scores(config: Ernie4_5_MoeConfig, context: float) -> float:
    """q k^T and p v of a layer."""
    return 4.0 * config.num_attention_heads * config.attention_head_dim * context


def _experts(config: Ernie4_5_MoeConfig, number: int) -> float:
    """Router, chosen and shared experts of layer `number`, or its MLP where it is dense."""
    if not config.is_moe_layer(number):
        return 6.0 * config.hidden_size * config.intermediate_size
    width = config.moe_intermediate_size * (config.moe_k + config.moe_num_shared_experts)
    return 2.0 * config.hidden_size * (config.moe_num_experts + 3 * width)


def mean_context(length: int) -> float:
    """Tokens that a token of a document attends to on average, itself included."""
    return (length + 1) / 2


@dataclass(frozen=True)
class StepCost:
    """One step of the fullest rank. Bytes and seconds by kind; `flops` are those of a token."""

    flops_per_token: float
    sent: dict[str, float]
    seconds: dict[str, float]
    busy_ranks: int  # ranks that have a micro-batch

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def binding(self) -> str:
        """What takes most of the time."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def step_cost(
    config: Ernie4_5_MoeConfig, precision: Precision, layout: Layout, rates: Rates, work: Work
) -> StepCost:
    """Operations, bytes and seconds of one step of `work`."""
    batch, ranks = work.job.micro_batch, layout.ranks
    context = mean_context(batch.document_tokens)
    flops = token_flops(config, context)
    again = recomputed_flops(config, context, layout.recompute)
    # The backward pass of logprobs makes the logits again.
    per_token = flops.training(again + flops.head * (work.job.head == "logprobs"))
    per_token += flops.training(again) - 3 * flops.head if work.job.critic else 0.0
    micro_batches = work.updates * -(-work.micro_batches // ranks)
    trained = micro_batches * batch.tokens  # of the fullest rank
    scored = -(-work.scored // ranks) * batch.seq_len * work.scoring_models
    exchange = _exchange_per_token(config, precision, layout)
    passes = _passes(config, layout.recompute) * (2 if work.job.critic else 1)
    sent = {"all-to-all": exchange * (passes * trained + 2 * scored)}
    sent |= _update_bytes(config, precision, layout, work)
    seconds = {
        "compute": (trained * per_token + scored * flops.forward) / (rates.tflops * 1e12),
        "all-to-all": rates.seconds_to_send(sent["all-to-all"], layout.expert),
    }
    for kind in ("gradients", "weights"):
        seconds[kind] = rates.seconds_to_send(sent[kind], ranks)
    if work.job.rollout is not None:
        sent["rollouts"], seconds["rollouts"] = _rollout(
            config, precision, layout, rates, work.job.rollout
        )
    return StepCost(per_token, sent, seconds, min(ranks, work.micro_batches))


def _exchange_per_token(config: Ernie4_5_MoeConfig, precision: Precision, layout: Layout) -> float:
    """Bytes that one exchange in every MoE layer sends for a token: k rows, less those at home."""
    share = min(1.0, config.moe_capacity_factor or 1.0) * (1 - 1 / layout.expert)
    row = config.hidden_size * precision.width
    return moe_layers(config) * config.moe_k * row * share


def _passes(config: Ernie4_5_MoeConfig, recompute: Recompute) -> float:
    """Exchanges of a trained token, the mean over the MoE layers: there and back, both ways.

    Experts that are run again go there and back once more.
    """
    mixtures = [n for n in range(config.num_hidden_layers) if config.is_moe_layer(n)]
    again = sum("experts" in recomputed_parts(recompute, number) for number in mixtures)
    return 4 + 2 * again / max(1, len(mixtures))


def _update_bytes(
    config: Ernie4_5_MoeConfig, precision: Precision, layout: Layout, work: Work
) -> dict[str, float]:
    """Gradients reduced and, where optimizer state is sharded, updated weights gathered.

    A ring all-reduce of n ranks sends 2 (n-1)/n of the data; a reduce-scatter, or the gathering,
    (n-1)/n.
    """
    reduced = gathered = 0.0
    models = [count_parameters(config)]
    models += [critic_parameters(config)] if work.job.critic else []
    for model in models:
        share = _sent_share(model.on_rank(layout), layout)
        reduced += share * precision.gradient_width * (1 if layout.sharding else 2)
        gathered += share * precision.width if layout.sharding else 0.0
    return {"gradients": reduced * work.updates, "weights": gathered * work.updates}


def _sent_share(own: Parameters, layout: Layout) -> float:
    """Parameters that a rank sends once around: dense to all ranks, experts to their copies."""
    return own.dense * (1 - 1 / layout.ranks) + own.experts * (1 - 1 / layout.data)


def _rollout(
    config: Ernie4_5_MoeConfig, precision: Precision, layout: Layout, rates: Rates, rollout: Rollout
) -> tuple[float, float]:
    """Bytes sent and seconds of sampling all completions to their full length.

    A token of every sequence takes as long as reading all weights and the cache, or as its
    operations at the rate of training, whichever is more.
    """
    on_rank, at_once = rollout.on_rank(layout.ranks), rollout.at_once(layout.ranks)
    batches = -(-on_rank // at_once)
    mean_length = rollout.prompt_tokens + rollout.new_tokens // 2
    weights = count_parameters(config).on_rank(layout).total * precision.width
    cache = cache_bytes(config, at_once, mean_length, precision.width)
    reading = (weights + cache) / (rates.memory_gb_per_s * 1e9)
    flops = token_flops(config, mean_length).forward
    computing = at_once * flops / (rates.tflops * 1e12)
    prompts = -(-on_rank // rollout.group_size) * rollout.prompt_tokens
    first = prompts * token_flops(config, mean_context(rollout.prompt_tokens)).forward
    tokens = on_rank * rollout.new_tokens + prompts
    sent = 2 * _exchange_per_token(config, precision, layout) * tokens
    seconds = batches * rollout.new_tokens * max(reading, computing)
    seconds += first / (rates.tflops * 1e12) + rates.seconds_to_send(sent, layout.expert)
    return sent, seconds
