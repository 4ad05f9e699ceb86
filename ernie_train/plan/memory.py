"""Memory of one rank at its peak, by part."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.plan.activations import Activations, Head, MicroBatch
from ernie_train.plan.decoder import decoder_bytes
from ernie_train.plan.layout import Layout, Precision, count_parameters, critic_parameters
from ernie_train.plan.shards import updated_by_rank

_CACHE_GROWTH = 32  # slots; as in model/kv_cache.py
# CUDA context, NCCL's buffers and the workspaces of libraries: an allowance, not measured.
GPU_RESERVE_BYTES = 3e9


@dataclass(frozen=True)
class Rollout:
    """Sampling of an iteration over all ranks: `batch_size` sequences at once on each."""

    sequences: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    batch_size: int

    def on_rank(self, ranks: int) -> int:
        """Sequences of the fullest rank."""
        return -(-self.sequences // ranks)

    def at_once(self, ranks: int) -> int:
        """Sequences that share a cache on the fullest rank."""
        return min(self.batch_size, self.on_rank(ranks))


@dataclass(frozen=True)
class Job:
    """What a rank has to hold for one phase of a stage."""

    micro_batch: MicroBatch
    head: Head
    reference: bool = False
    critic: bool = False
    rollout: Rollout | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. Activations and the memory of rollouts do not stand at the same time."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    critic: float
    activations: float
    rollouts: float
    reserve: float
    gradients_stay: bool = True  # while completions are sampled

    @property
    def resident(self) -> float:
        """What stays from step to step."""
        models = self.weights + self.gradients + self.optimizer
        return models + self.reference + self.critic + self.reserve

    @property
    def peak(self) -> float:
        return self.resident + max(self.activations, self._rollouts_beyond)

    def binding(self) -> str:
        """The largest part of the peak."""
        parts = {name: size for name, size in vars(self).items() if name != "gradients_stay"}
        if self.activations >= self._rollouts_beyond:
            parts.pop("rollouts")
        else:
            parts.pop("activations")
            if not self.gradients_stay:
                parts.pop("gradients")
        return max(parts, key=lambda name: parts[name])

    @property
    def _rollouts_beyond(self) -> float:
        """What rollouts take beyond the gradients whose place they have."""
        return self.rollouts - (0.0 if self.gradients_stay else self.gradients)


@dataclass(frozen=True)
class Machine:
    """A kind of rank and how it computes.

    shards_gradients: under sharding a reduced gradient is at its owner alone, until the update.
    """

    on_gpu: bool
    precision: Precision
    shards_gradients: bool = False


def rank_memory(config: Ernie4_5_MoeConfig, machine: Machine, layout: Layout, job: Job) -> Memory:
    """Memory of the fullest rank: the one that updates most parameters.

    Gradients stay allocated between steps, as Paddle keeps them, where they are not sharded.
    """
    precision = machine.precision
    activations = Activations(config, precision, layout, machine.on_gpu)
    held = count_parameters(config).on_rank(layout).total
    critic_held = critic_parameters(config).on_rank(layout).total if job.critic else 0
    updated, by_critic = updated_by_rank(config, layout), [0] * layout.ranks
    if job.critic:
        by_critic = updated_by_rank(config, layout, critic=True)
    own, critics = max(zip(updated, by_critic, strict=True), key=sum)
    weights, gradients, states = model_bytes(held, own, precision)
    critic_weights, critic_gradients, critic_states = model_bytes(critic_held, critics, precision)
    come_and_go = machine.shards_gradients and layout.sharding
    if come_and_go:  # after each update, so those of policy and critic stand in turn
        gradients, critic_gradients = max(gradients, critic_gradients), 0.0
    return Memory(
        weights,
        gradients,
        states,
        reference=weights if job.reference else 0.0,
        critic=critic_weights + critic_gradients + critic_states,
        activations=activations.peak(job.micro_batch, job.head),
        rollouts=rollout_bytes(activations, job.rollout) if job.rollout else 0.0,
        reserve=GPU_RESERVE_BYTES if machine.on_gpu else 0.0,
        gradients_stay=not come_and_go,
    )


def model_bytes(held: int, updated: int, precision: Precision) -> tuple[float, float, float]:
    """(weights, gradients, optimizer state) of a trained model, from numbers of parameters."""
    states = updated * precision.state_width
    return held * precision.width, held * precision.gradient_width, states


def cache_bytes(config: Ernie4_5_MoeConfig, sequences: int, tokens: int, width: int) -> float:
    """Keys and values of `sequences` with `tokens` slots each, in all layers."""
    slots = -(-tokens // _CACHE_GROWTH) * _CACHE_GROWTH
    row = int(config.num_key_value_heads or 0) * config.attention_head_dim * width
    return 2.0 * config.num_hidden_layers * sequences * slots * row


def rollout_bytes(activations: Activations, rollout: Rollout) -> float:
    """The cache of all completions at full length while it grows, or the prompts' first pass.

    As it grows, keys (then values) stand twice: half of the cache more. On a CPU that has all
    experts the weights stand twice: see `decoder`.
    """
    config, width = activations.config, activations.precision.width
    sequences = rollout.at_once(activations.layout.ranks)
    spread = activations.layout.expert > 1
    if not (activations.on_gpu or spread or config.moe_capacity_factor is not None):
        return decoder_bytes(config, sequences, rollout.prompt_tokens, rollout.new_tokens)
    total = rollout.prompt_tokens + rollout.new_tokens
    cache = cache_bytes(config, sequences, total, width)
    logits = 2.0 * sequences * config.vocab_size * 4  # and probabilities, float32
    prompts = -(-sequences // rollout.group_size)  # equal prompts go through the model once
    tokens = prompts * rollout.prompt_tokens
    prompt_cache = cache_bytes(config, prompts, rollout.prompt_tokens, width)
    prefill = prompt_cache + activations.prefill(tokens, rollout.prompt_tokens)
    return max(1.5 * cache + logits, prefill)
