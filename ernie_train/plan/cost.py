"""Estimate floating-point operations, bytes sent between ranks and seconds of a step.

A matrix product of [m,k] and [k,n] counts 2 m k n. Communication is the bytes that a rank sends, by
ring algorithms (Patarasuk and Yuan, 2009), with experts evenly loaded. Seconds are added up:
communication is counted without overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.parallel import Recompute, recomputed_parts
from ernie_train.plan.layout import (
    Layout,
    Precision,
    count_parameters,
    critic_parameters,
    moe_layers,
)
from ernie_train.plan.memory import cache_bytes
from ernie_train.plan.workload import Sampling, Workload

RANKS_PER_MACHINE = 8


@dataclass(frozen=True)
class Rates:
    """Hold the rates that a rank achieves, not its peaks; every plan prints them.

    tflops: 10^12 operations a second in training. inside_gbps, between_gbps: 10^9 bits a second
    that a rank sends to others of its machine, and beyond. memory_gb_per_s: 10^9 bytes a second
    that it reads from its memory. layer_us: microseconds in which the kernels of a layer start.
    """

    tflops: float
    inside_gbps: float
    between_gbps: float
    memory_gb_per_s: float
    layer_us: float

    def seconds_to_compute(self, flops: float) -> float:
        return flops / (self.tflops * 1e12)

    def seconds_to_send(self, size: float, span: int) -> float:
        """Return the time for `size` bytes in a group of `span` consecutive ranks."""
        gbps = self.inside_gbps if span <= RANKS_PER_MACHINE else self.between_gbps
        return size * 8 / (gbps * 1e9)


@dataclass(frozen=True)
class TokenFlops:
    """Count a token's operations in a forward pass: products with weights, attention, LM head."""

    layers: float
    attention: float
    head: float

    @property
    def forward(self) -> float:
        return self.layers + self.attention + self.head

    def training(self, recomputed: float) -> float:
        """Return forward, twice as much backward, and the operations that are `recomputed`."""
        return 3 * self.forward + recomputed


def token_flops(config: Ernie4_5_MoeConfig, context: float) -> TokenFlops:
    """Return the operations of a token that attends to `context` tokens on average."""
    numbers = range(config.num_hidden_layers)
    products = sum(_projections(config) + _experts(config, number) for number in numbers)
    scores = config.num_hidden_layers * _scores(config, context)
    return TokenFlops(products, scores, 2.0 * config.vocab_size * config.hidden_size)


def mean_context(length: int) -> float:
    """Return the mean number of tokens that a token of a document attends to, itself included."""
    return (length + 1) / 2


def recomputed_flops(config: Ernie4_5_MoeConfig, context: float, recompute: Recompute) -> float:
    """Return a token's operations that the backward pass recomputes."""
    total = 0.0
    for number in range(config.num_hidden_layers):
        parts = recomputed_parts(recompute, number)
        if "attention" in parts:
            total += _projections(config) + _scores(config, context)
        if "experts" in parts:
            total += _experts(config, number)
    return total


def _projections(config: Ernie4_5_MoeConfig) -> float:
    """Return a token's operations in queries, keys, values and outputs of a layer."""
    heads = config.num_attention_heads + config.num_key_value_heads
    return 4.0 * config.hidden_size * heads * config.attention_head_dim


def _scores(config: Ernie4_5_MoeConfig, context: float) -> float:
    """Return a token's operations in q k^T and p v of a layer."""
    return 4.0 * config.num_attention_heads * config.attention_head_dim * context


def _experts(config: Ernie4_5_MoeConfig, number: int) -> float:
    """Return a token's operations in router and experts of layer `number`, or in its MLP."""
    if not config.is_moe_layer(number):
        return 6.0 * config.hidden_size * config.intermediate_size
    width = config.moe_intermediate_size * (config.moe_k + config.moe_num_shared_experts)
    return 2.0 * config.hidden_size * (config.moe_num_experts + 3 * width)


@dataclass(frozen=True)
class StepCost:
    """Hold the cost of one step on the fullest rank, bytes sent and seconds by kind."""

    flops_per_token: float
    sent: dict[str, float]
    seconds: dict[str, float]
    busy_ranks: int  # ranks that have a micro-batch

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def largest_part(self) -> str:
        """Return the kind that takes most of the time."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def step_cost(
    config: Ernie4_5_MoeConfig, precision: Precision, layout: Layout, rates: Rates, load: Workload
) -> StepCost:
    """Return operations, bytes and seconds of one step of `load`."""
    batch, ranks = load.micro_batch, layout.ranks
    context = mean_context(batch.document_tokens)
    flops = token_flops(config, context)
    again = recomputed_flops(config, context, layout.recompute)
    # The backward pass of logprobs recomputes the logits.
    per_token = flops.training(again + flops.head * (load.loss == "logprobs"))
    per_token -= 3 * flops.head * (load.loss == "score")
    if load.part is not None:  # frozen weights take no gradient, but a head's is made all the same
        per_token -= flops.layers
    per_token += flops.training(again) - 3 * flops.head if load.critic else 0.0
    trained = load.updates * -(-load.micro_batches // ranks) * batch.tokens  # of the fullest rank
    others = len(load.reward_models)
    scored = (load.scoring_models - others) * (1 - batch.shared) * -(-load.scored // ranks)
    # Reward models read all that is sampled, as conversations of their own, which share nothing.
    scored += others * -(-(load.sampling.total if load.sampling else load.scored) // ranks)
    scored *= batch.seq_len
    exchanges = _exchanges(config, layout.recompute) * (2 if load.critic else 1)
    exchange = _exchange_bytes(config, precision, layout)
    sent = {"all-to-all": exchange * (exchanges * trained + 2 * scored)}
    sent |= _update_bytes(config, precision, layout, load)
    seconds = {
        "compute": rates.seconds_to_compute(trained * per_token + scored * flops.forward),
        "all-to-all": rates.seconds_to_send(sent["all-to-all"], layout.expert),
        "gradients": rates.seconds_to_send(sent["gradients"], ranks),
        "weights": rates.seconds_to_send(sent["weights"], ranks),
    }
    if load.sampling is not None and load.sampling.by_ranks:
        sent["rollouts"], seconds["rollouts"] = _sampling_cost(
            config, precision, layout, rates, load.sampling
        )
    return StepCost(per_token, sent, seconds, min(ranks, load.micro_batches))


def _exchange_bytes(config: Ernie4_5_MoeConfig, precision: Precision, layout: Layout) -> float:
    """Return a token's bytes in one exchange of every MoE layer: k rows, less local ones."""
    share = min(1.0, config.moe_capacity_factor or 1.0) * (1 - 1 / layout.expert)
    return moe_layers(config) * config.moe_k * config.hidden_size * precision.width * share


def _exchanges(config: Ernie4_5_MoeConfig, recompute: Recompute) -> float:
    """Return the exchanges of a trained token, the mean over MoE layers: 4, 6 if recomputed."""
    moe = [n for n in range(config.num_hidden_layers) if config.is_moe_layer(n)]
    again = sum("experts" in recomputed_parts(recompute, number) for number in moe)
    return 4 + 2 * again / max(1, len(moe))


def _update_bytes(
    config: Ernie4_5_MoeConfig, precision: Precision, layout: Layout, load: Workload
) -> dict[str, float]:
    """Return bytes of gradients reduced and, with `sharding`, of updated weights gathered.

    A ring all-reduce of n ranks sends 2 (n-1)/n of the data; a reduce-scatter, or the gathering,
    (n-1)/n.
    """
    numbers = 0.0
    trained = count_parameters(config) if load.part is None else load.part.trained
    for model in (trained, critic_parameters(config))[: 1 + load.critic]:
        own = model.on_rank(layout)
        numbers += own.dense * (1 - 1 / layout.ranks) + own.experts * (1 - 1 / layout.data)
    numbers *= load.updates
    return {
        "gradients": numbers * load.gradient_width(precision) * (1 if layout.sharding else 2),
        "weights": numbers * precision.width * layout.sharding,
    }


def _sampling_cost(
    config: Ernie4_5_MoeConfig, precision: Precision, layout: Layout, rates: Rates, load: Sampling
) -> tuple[float, float]:
    """Return bytes sent and seconds of sampling all rounds of completions to their full length.

    A token of every sequence takes as long as reading all weights and the cache, or as its
    operations at the rate of training, whichever is more, and as starting the layers' kernels.
    """
    on_rank, at_once = load.on_rank(layout.ranks), load.at_once(layout.ranks)
    turns = max(1.0, on_rank / at_once)  # a lane whose sequence has ended takes the next one
    mean_length = load.prompt_tokens + load.new_tokens // 2
    read = count_parameters(config).on_rank(layout).total * precision.width
    reading = read + cache_bytes(config, at_once, mean_length, precision.width)
    computing = rates.seconds_to_compute(at_once * token_flops(config, mean_length).forward)
    prompts = load.prompts(on_rank, layout.ranks) * load.prompt_tokens
    first = prompts * token_flops(config, mean_context(load.prompt_tokens)).forward
    tokens = on_rank * load.new_tokens + prompts
    sent = 2 * _exchange_bytes(config, precision, layout) * tokens
    a_token = max(reading / (rates.memory_gb_per_s * 1e9), computing)
    a_token += config.num_hidden_layers * rates.layer_us / 1e6
    seconds = turns * load.new_tokens * a_token
    seconds += rates.seconds_to_compute(first) + rates.seconds_to_send(sent, layout.expert)
    return load.rounds * sent, load.rounds * seconds
