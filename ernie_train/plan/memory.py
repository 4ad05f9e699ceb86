"""Estimate the peak memory of one rank, by part.

Weights, gradients and optimizer state are counted. Activations are shapes times coefficients,
fitted to the peaks that `tools.bench.plan` measures; docs/memory.md gives the errors.

Symbols: b bytes of a weight, H hidden size, N query heads, K key/value heads, D head dimension,
E experts, k experts of a token, I expert width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie_train.generate.prompt_experts import expert_dtype
from ernie_train.losses.cross_entropy import chunk_elements
from ernie_train.model.attention import WIDENED_ELEMENTS
from ernie_train.model.batched_experts import MOST_SLOTS_PER_ROW
from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.model.numpy_decoder import PROMPT_CHUNK_TOKENS
from ernie_train.parallel import chunk_tokens, recomputed_parts
from ernie_train.parallel.gradients import BUCKET_ELEMENTS, MAX_IN_FLIGHT
from ernie_train.parallel.recompute import PARTS
from ernie_train.plan.activations import layer_bytes, padded_rows, rows_per_token
from ernie_train.plan.layout import (
    Layout,
    Machine,
    Parameters,
    TrainedPart,
    count_parameters,
    critic_parameters,
    moe_layers,
)
from ernie_train.plan.workload import Sampling, Workload

# Tensors of the stream's and a row's gradient in a backward pass, of a chunk's logits.
STREAM_GRADIENTS, ROW_GRADIENTS = 3, 2.5
LOGITS_TENSORS = {"cross_entropy": 2, "logprobs": 5}
# Of rows in slots (model/batched_experts.py): tensors of a row's and of an expert's width in a
# backward pass. Up to MOST_SLOTS_PER_ROW pad each row.
SLOT_ROW_GRADIENTS, SLOT_EXPERT_GRADIENTS = 5, 4
NUMPY_CACHE_GROWTH = 1.2  # a layer that grows exists twice; elsewhere its keys or values alone
# CUDA context, NCCL's buffers and the workspaces of libraries: an allowance, not measured.
GPU_RESERVE_BYTES = 3e9
_FLOAT = 4


@dataclass(frozen=True)
class MemoryDemand:
    """Hold the bytes of one rank.

    gradients, activations: at the moment of a step when both together take most. Between steps, so
        while completions are sampled, there are none.
    """

    weights: float
    gradients: float
    optimizer: float
    reference: float
    critic: float
    reward_models: float
    activations: float
    rollouts: float
    recorded_experts: float
    reserve: float

    @property
    def resident(self) -> float:
        """Return the bytes that stay allocated from step to step."""
        models = self.weights + self.optimizer + self.reference + self.critic
        return models + self.reward_models + self.recorded_experts + self.reserve

    @property
    def step(self) -> float:
        """Return the most bytes that a step takes besides."""
        return self.gradients + self.activations

    @property
    def peak(self) -> float:
        return self.resident + max(self.step, self.rollouts)

    def largest_part(self) -> str:
        """Return the name of the largest part of the peak."""
        parts = dict(vars(self))
        absent = ("rollouts",) if self.step >= self.rollouts else ("gradients", "activations")
        for name in absent:
            parts.pop(name)
        return max(parts, key=lambda name: parts[name])


def memory_demand(
    config: Ernie4_5_MoeConfig, machine: Machine, layout: Layout, load: Workload
) -> MemoryDemand:
    """Return the memory of the fullest rank: the one that updates most parameters."""
    part, sampling = load.part, load.sampling
    weights, states = _model_bytes(config, machine, layout, count_parameters(config), part)
    critic = (0.0, 0.0)
    if load.critic:  # its gradients and those of the policy exist in turn
        critic = _model_bytes(config, machine, layout, critic_parameters(config))
    gradients, activations = step_bytes(config, machine, layout, load)
    return MemoryDemand(
        weights,
        gradients,
        states,
        reference=weights if load.reference and not (part and part.adapter_alone) else 0.0,
        critic=sum(critic),
        reward_models=sum(
            critic_parameters(own or config).on_rank(layout).total * machine.precision.width
            for own in load.reward_models
        ),
        activations=activations,
        rollouts=rollout_bytes(config, machine, layout, sampling)
        if sampling and sampling.by_ranks
        else 0.0,
        recorded_experts=recorded_bytes(config, sampling) if not machine.on_gpu else 0.0,
        reserve=GPU_RESERVE_BYTES if machine.on_gpu else 0.0,
    )


def _model_bytes(
    config: Ernie4_5_MoeConfig,
    machine: Machine,
    layout: Layout,
    model: Parameters,
    part: TrainedPart | None = None,
) -> tuple[float, float]:
    """Return (weights, optimizer state) of a model that trains, whole or in `part`."""
    precision, held = machine.precision, model.on_rank(layout).total
    trained = model
    if part is not None:
        held, trained = held + part.pairs.on_rank(layout).total, part.trained
    states = updated_parameters(config, layout, trained) * precision.state_width
    return held * precision.width, states


def updated_parameters(config: Ernie4_5_MoeConfig, layout: Layout, trained: Parameters) -> float:
    """Return the trained parameters whose optimizer state the fullest rank keeps.

    With `sharding` owners get whole parameters (parallel/gradients.py). One rank has the embedding,
    if that is more than an even share; of the experts' stacks, three per layer, each has as many
    as any other or one more.
    """
    own = trained.on_rank(layout)
    if not layout.sharding:
        return own.total
    largest = min(own.dense, config.vocab_size * config.hidden_size)
    dense = max(own.dense / layout.ranks, largest)
    stacks = max(1, 3 * moe_layers(config))
    return dense + -(-stacks // layout.data) * own.experts / stacks


def step_bytes(
    config: Ernie4_5_MoeConfig, machine: Machine, layout: Layout, load: Workload
) -> tuple[float, float]:
    """Return the gradients and activations of a step at the moment when they take most together.

    Layers keep their activations, or the input of a recomputed part. The loss comes on top, then
    the backward pass of each layer with its recomputed activations. That pass goes from the last
    layer to the first, frees their activations and leaves their gradients, which stay until the
    update: those of a rank's earlier micro-batches are there all along.
    """
    batch, trains_all = load.micro_batch, _trains_all(load)
    width, tokens = machine.precision.width, batch.tokens
    layers = _kept_by_layers(config, machine, layout, load)
    # Rotary tables, the last norm; every MoE layer reports router logits and probabilities.
    heads = config.num_attention_heads + config.num_key_value_heads
    stays: float = tokens * (8 * heads * config.attention_head_dim)
    stays += tokens * config.hidden_size * (_FLOAT + width)
    stays += moe_layers(config) * tokens * 2 * config.moe_num_experts * _FLOAT
    kept = stays + sum(own for own, _ in layers)
    all_gradients, head, of_layers = _gradient_bytes(config, machine, layout, load)
    several = -(-load.micro_batches // layout.ranks) > 1
    moments = [(all_gradients * several, kept + _loss_bytes(config, machine, load))]
    made = all_gradients if several else head
    through, most_sent = _reduced_bytes(config, machine, layout, load) if trains_all else (0.0, 0.0)
    on_top = _backward_bytes(config, machine, layout, load)
    for place, (own, again) in enumerate(reversed(layers)):
        moments.append((made, kept + again + on_top + min(place * through, most_sent)))
        made += of_layers[-1 - place] * (not several)
        kept -= own
    # The embedding's gradient, added to that of a tied head.
    embedding = config.vocab_size * config.hidden_size * load.gradient_width(machine.precision)
    last = embedding * trains_all * (1 + config.tie_word_embeddings - (not several))
    moments.append((all_gradients, stays + last + min(len(layers) * through, most_sent)))
    return max(moments, key=sum)


def _kept_by_layers(
    config: Ernie4_5_MoeConfig, machine: Machine, layout: Layout, load: Workload
) -> list[tuple[float, float]]:
    """Return the bytes that each layer keeps, and those that its backward pass makes again."""
    batch, layers = load.micro_batch, []
    stream = config.hidden_size * machine.precision.width  # the input of a part, or of a layer
    for number in range(config.num_hidden_layers):
        parts = recomputed_parts(layout.recompute, number)
        moe = config.is_moe_layer(number)
        padded = padded_rows(config, machine, layout, _experts_at_once(layout, batch.tokens))
        whole = layer_bytes(
            config, machine, layout, batch.document_tokens, moe, load.part, padded=padded
        )
        own = stream * bool(parts) + sum(whole[part] for part in PARTS if part not in parts)
        again = 0.0
        if "experts" in parts:  # attention is recomputed once those of experts are freed
            again = _experts_at_once(layout, batch.tokens) * whole["experts"]
            again += batch.tokens * whole["attention"] * ("attention" in parts)
        layers.append((batch.tokens * own, again))
    return layers


def _gradient_bytes(
    config: Ernie4_5_MoeConfig, machine: Machine, layout: Layout, load: Workload
) -> tuple[float, float, list[float]]:
    """Return the gradients of a rank: all, those of an untied head, and those of each layer."""
    trained = count_parameters(config) if load.part is None else load.part.trained
    own, width = trained.on_rank(layout), load.gradient_width(machine.precision)
    embedding = config.vocab_size * config.hidden_size * (load.part is None)
    head = 0 if config.tie_word_embeddings else embedding
    dense = (own.dense - embedding - head) / config.num_hidden_layers
    experts = own.experts / max(1, moe_layers(config))
    layers = [
        (dense + experts * config.is_moe_layer(number)) * width
        for number in range(config.num_hidden_layers)
    ]
    return own.total * width, head * width, layers


def _reduced_bytes(
    config: Ernie4_5_MoeConfig, machine: Machine, layout: Layout, load: Workload
) -> tuple[float, float]:
    """Return bytes of gradients that a layer sends to other ranks, and the most in transit.

    They are sent in buckets as layers finish (parallel/gradients.py), each with a buffer of its
    own; the gradient of the embedding is sent after the pass.
    """
    own = count_parameters(config).on_rank(layout)
    sent = float(own.dense - config.vocab_size * config.hidden_size) * (layout.ranks > 1)
    sent += own.experts * (layout.data > 1)
    stack = own.experts / max(1, 3 * moe_layers(config))
    width = load.gradient_width(machine.precision)
    most = MAX_IN_FLIGHT * max(BUCKET_ELEMENTS, stack) * width
    return sent / config.num_hidden_layers * width, most


def _experts_at_once(layout: Layout, tokens: int) -> int:
    return min(tokens, chunk_tokens(layout.recompute) or tokens)


def _loss_bytes(config: Ernie4_5_MoeConfig, machine: Machine, load: Workload) -> float:
    """Return the bytes of a chunk of float32 logits, and gradients of head and hidden states."""
    tokens, width = load.micro_batch.tokens, machine.precision.width
    hidden = 2 * tokens * config.hidden_size * width
    if load.loss == "score":
        return hidden
    logits = min(tokens * config.vocab_size, chunk_elements(on_gpu=machine.on_gpu))
    # The sum over chunks and a chunk's in float32, and the chunk's as it was made if narrower.
    head = 2 * _FLOAT + (width if width < _FLOAT else 0)
    head *= _trains_all(load) * config.vocab_size * config.hidden_size
    head += _widened_head(config, width) * (load.loss == "logprobs")
    return LOGITS_TENSORS[load.loss] * logits * _FLOAT + head + hidden


def _widened_head(config: Ernie4_5_MoeConfig, width: int) -> int:
    """Return bytes of the float32 copy of a narrower head, of which logprobs and samples are."""
    return _FLOAT * config.vocab_size * config.hidden_size * (width < _FLOAT)


def _trains_all(load: Workload) -> bool:
    """Return whether more than pairs of LoRA trains."""
    return load.part is None or not load.part.adapter_alone


def _backward_bytes(
    config: Ernie4_5_MoeConfig, machine: Machine, layout: Layout, load: Workload
) -> float:
    """Return bytes of gradients in a layer's backward pass: of stream, rows and experts.

    Each expert's gradient exists twice, alone and stacked, and once more where those of chunks are
    added up; that of a tied head is kept until it is added to the embedding's.
    """
    batch, trains_all = load.micro_batch, _trains_all(load)
    tokens = _experts_at_once(layout, batch.tokens)
    numbers: float = STREAM_GRADIENTS * batch.tokens
    row, width = ROW_GRADIENTS, config.moe_intermediate_size / config.hidden_size
    pairs = load.part is not None and load.part.pairs.experts
    if moe_layers(config) and not pairs and padded_rows(config, machine, layout, tokens):
        row = MOST_SLOTS_PER_ROW * (SLOT_ROW_GRADIENTS + SLOT_EXPERT_GRADIENTS * width)
    numbers += row * tokens * rows_per_token(config, layout)
    numbers += config.vocab_size * (config.tie_word_embeddings and trains_all)
    experts = config.moe_num_experts // layout.expert * config.moe_intermediate_size
    copies = 3 if tokens < batch.tokens else 2
    stacks = experts if moe_layers(config) else config.intermediate_size
    numbers += copies * 3 * trains_all * stacks
    return numbers * config.hidden_size * machine.precision.width


def cache_bytes(config: Ernie4_5_MoeConfig, sequences: int, tokens: int, width: int) -> float:
    """Return bytes of keys and values, 2 x layers x K x D x b for each token of `sequences`."""
    row = config.num_key_value_heads * config.attention_head_dim * width
    return 2.0 * config.num_hidden_layers * sequences * tokens * row


def recorded_bytes(config: Ernie4_5_MoeConfig, sampling: Sampling | None) -> float:
    """Return bytes of an iteration's recorded experts in the memory of each rank's processor.

    A prompt's are kept once for its group.
    """
    if sampling is None or not sampling.records_experts:
        return 0.0
    prompts = -(-sampling.total // sampling.group_size) * sampling.prompt_tokens
    tokens = prompts + sampling.total * sampling.new_tokens
    size = expert_dtype(config.moe_num_experts)().itemsize
    return float(size * moe_layers(config) * config.moe_k * tokens)


def rollout_bytes(
    config: Ernie4_5_MoeConfig, machine: Machine, layout: Layout, sampling: Sampling
) -> float:
    """Return bytes of the cache at full length and of a pass beside it, that of prompts too.

    On a CPU that has all experts numpy samples (model/numpy_decoder.py): on a copy of the weights,
    with a tied embedding twice, and prompts in chunks. Else equal prompts pass the model once.
    """
    width, sequences = machine.precision.width, sampling.at_once(layout.ranks)
    numpy = not (machine.on_gpu or layout.expert > 1)
    different = sequences if numpy else sampling.prompts(sequences, layout.ranks)
    copy, tokens = 0.0, different * sampling.prompt_tokens
    growth = NUMPY_CACHE_GROWTH if numpy else 1 + 1 / (2 * config.num_hidden_layers)
    if numpy:
        embedding = config.vocab_size * config.hidden_size * config.tie_word_embeddings
        copy = _FLOAT * (count_parameters(config).total + embedding)
        tokens = min(tokens, max(PROMPT_CHUNK_TOKENS, sampling.prompt_tokens))
    padded, moe = padded_rows(config, machine, layout, tokens), moe_layers(config) > 0
    layer = layer_bytes(config, machine, layout, sampling.prompt_tokens, moe, padded=padded)
    cache = cache_bytes(config, sequences, sampling.prompt_tokens + sampling.new_tokens, width)
    held = cache  # while prompts pass
    if numpy and sampling.on_rank(layout.ranks) == sequences:  # none waits until it is long
        held *= sampling.prompt_tokens / (sampling.prompt_tokens + sampling.new_tokens)
    logits: float = 2 * sequences * config.vocab_size * _FLOAT  # and probabilities
    if not numpy and width < _FLOAT:  # keys of a layer too are widened, for scores
        keys = cache / (2 * config.num_hidden_layers * width)
        copy += _widened_head(config, width)
        logits += min(WIDENED_ELEMENTS, keys) * _FLOAT
    return copy + max(held + tokens * sum(layer.values()), growth * cache + logits)
