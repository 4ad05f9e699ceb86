"""Memory of one rank at its peak, by part."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.plan.activations import Activations, Head, MicroBatch
from ernie_train.plan.layout import (
    Layout,
    Parameters,
    Precision,
    count_parameters,
    critic_parameters,
)

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
    """Bytes of one rank. Activations and the cache of rollouts do not stand at the same time."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    critic: float
    activations: float
    rollouts: float
    reserve: float

    @property
    def resident(self) -> float:
        """What stays from step to step."""
        models = self.weights + self.gradients + self.optimizer
        return models + self.reference + self.critic + self.reserve

    @property
    def peak(self) -> float:
        return self.resident + max(self.activations, self.rollouts)

    def binding(self) -> str:
        """The largest part of the peak."""
        parts = dict(vars(self))
        parts.pop("rollouts" if self.activations >= self.rollouts else "activations")
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class Machine:
    """A kind of rank and how it computes."""

    on_gpu: bool
    precision: Precision


def rank_memory(config: Ernie4_5_MoeConfig, machine: Machine, layout: Layout, job: Job) -> Memory:
    """Memory of the fullest rank. Gradients stay allocated between steps, as Paddle keeps them."""
    precision = machine.precision
    activations = Activations(config, precision, layout, machine.on_gpu)
    policy = model_bytes(count_parameters(config), precision, layout)
    critic = model_bytes(critic_parameters(config), precision, layout)
    return Memory(
        *policy,
        reference=policy[0] if job.reference else 0.0,
        critic=sum(critic) if job.critic else 0.0,
        activations=activations.peak(job.micro_batch, job.head),
        rollouts=rollout_bytes(activations, job.rollout) if job.rollout else 0.0,
        reserve=GPU_RESERVE_BYTES if machine.on_gpu else 0.0,
    )


def model_bytes(
    parameters: Parameters, precision: Precision, layout: Layout
) -> tuple[float, float, float]:
    """(weights, gradients, optimizer state) of a trained model on one rank."""
    held = parameters.on_rank(layout).total
    states = parameters.updated_on_rank(layout) * precision.state_width
    return held * precision.width, held * precision.gradient_width, states


def cache_bytes(config: Ernie4_5_MoeConfig, sequences: int, tokens: int, width: int) -> float:
    """Keys and values of `sequences` with `tokens` slots each, in all layers."""
    slots = -(-tokens // _CACHE_GROWTH) * _CACHE_GROWTH
    row = int(config.num_key_value_heads or 0) * config.attention_head_dim * width
    return 2.0 * config.num_hidden_layers * sequences * slots * row


def rollout_bytes(activations: Activations, rollout: Rollout) -> float:
    """The cache of all completions at full length while it grows, or the prompts' first pass.

    As it grows, keys (then values) stand twice: half of the cache more.
    """
    config, width = activations.config, activations.precision.width
    sequences = rollout.at_once(activations.layout.ranks)
    total = rollout.prompt_tokens + rollout.new_tokens
    cache = cache_bytes(config, sequences, total, width)
    logits = 2.0 * sequences * config.vocab_size * 4  # and probabilities, float32
    prompts = -(-sequences // rollout.group_size)  # equal prompts go through the model once
    tokens = prompts * rollout.prompt_tokens
    prompt_cache = cache_bytes(config, prompts, rollout.prompt_tokens, width)
    prefill = prompt_cache + activations.prefill(tokens, rollout.prompt_tokens)
    return max(1.5 * cache + logits, prefill)
