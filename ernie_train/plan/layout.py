"""Enumerate layouts of a job over ranks, and count the parameters that each rank holds.

World size = expert x data. Dense parameters are on every rank; each routed expert is on `data`
ranks. GB are 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from ernie_train.core.errors import UserError
from ernie_train.model import is_expert_parameter
from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.model.lora import LoraConfig
from ernie_train.model.partial import Selection, trained_sizes
from ernie_train.parallel.recompute import PARTS, Recompute, RecomputeConfig
from ernie_train.train.stage import StageConfig
from ernie_train.weights.layout import parameter_shapes

GB = 1e9
Dtype = Literal["float32", "bfloat16"]
CHUNK_TOKENS = 16384  # `recompute.chunk_tokens` to try for longer micro-batches
BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Layout:
    """Hold the settings of `parallel:`; `sharding` splits optimizer state over ranks."""

    expert: int
    data: int
    sharding: bool
    recompute: Recompute

    @property
    def ranks(self) -> int:
        return self.expert * self.data

    @property
    def recompute_label(self) -> str:
        """Return what is recomputed, in words."""
        if isinstance(self.recompute, bool):
            return "layers" if self.recompute else "no"
        parts, layers = self.recompute.parts, self.recompute.layers
        words = " and ".join(parts) if len(parts) < len(PARTS) else "layers"
        words += "" if layers is None else f", first {layers}"
        chunk = self.recompute.chunk_tokens
        return words if chunk is None else f"{words}, chunks of {chunk}"

    def as_yaml(self) -> str:
        """Return the layout as a line of a recipe."""
        recompute = str(self.recompute).lower()
        if isinstance(self.recompute, RecomputeConfig):
            settings = [f"parts: [{', '.join(self.recompute.parts)}]"]
            numbers = {name: getattr(self.recompute, name) for name in ("layers", "chunk_tokens")}
            settings += [f"{name}: {number}" for name, number in numbers.items() if number]
            recompute = f"{{{', '.join(settings)}}}"
        return (
            f"parallel: {{expert: {self.expert}, data: {self.data}, "
            f"sharding: {str(self.sharding).lower()}, recompute: {recompute}}}"
        )


@dataclass(frozen=True)
class Precision:
    """Hold the type of weights and activations.

    float32 weights are their own masters; bfloat16 ones have float32 masters in the optimizer.
    """

    weights: Dtype

    @property
    def width(self) -> int:
        """Return the bytes of a weight, and of most activations."""
        return BYTES[self.weights]

    @property
    def state_width(self) -> int:
        """Return bytes of optimizer state per parameter: two moments, a master if needed."""
        return 8 if self.weights == "float32" else 12


@dataclass(frozen=True)
class Machine:
    """Describe a kind of rank: its device and its types."""

    on_gpu: bool
    precision: Precision


@dataclass(frozen=True)
class Parameters:
    """Count parameters: routed experts, and all others (router and shared experts too)."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        return self.dense + self.experts

    def on_rank(self, layout: Layout) -> Parameters:
        """Return the parameters that one rank of `layout` holds."""
        return Parameters(self.dense, self.experts // layout.expert)


@dataclass(frozen=True)
class TrainedPart:
    """Count what a stage trains of a model: all of it, and LoRA pairs, which add to the weights."""

    trained: Parameters
    pairs: Parameters
    rank: int = 0  # of the pairs
    dora: bool = False  # whether magnitudes lie beside them

    @property
    def adapter_alone(self) -> bool:
        """Return whether only pairs train, so that the model without them is the reference."""
        return self.trained == self.pairs


def count_trained(config: Ernie4_5_MoeConfig, stage: StageConfig) -> TrainedPart | None:
    """Return what a stage trains of a model; None for all of it.

    Raises `ConfigError` for names that match nothing.
    """
    selection = stage.selection(parameter_shapes(config))
    return None if selection is None else count_part(config, selection, stage.lora)


def count_part(
    config: Ernie4_5_MoeConfig, selection: Selection, lora: LoraConfig | None
) -> TrainedPart:
    """Return the size of a selected part of a model."""
    sizes = trained_sizes(parameter_shapes(config), selection, lora)

    def count(names: Collection[str]) -> Parameters:
        experts = sum(sizes[name] for name in names if is_expert_parameter(name))
        return Parameters(sum(sizes[name] for name in names) - experts, experts)

    pairs = count(sizes.keys() - set(selection.whole))
    if lora is None:
        return TrainedPart(count(list(sizes)), pairs)
    return TrainedPart(count(list(sizes)), pairs, lora.rank, lora.dora)


def moe_layers(config: Ernie4_5_MoeConfig) -> int:
    """Return the number of MoE layers."""
    return sum(config.is_moe_layer(index) for index in range(config.num_hidden_layers))


def count_parameters(config: Ernie4_5_MoeConfig) -> Parameters:
    """Return the parameters of a model, by arithmetic on its configuration."""
    total, _ = config.num_parameters()
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    experts = moe_layers(config) * config.moe_num_experts * expert
    return Parameters(total - experts, experts)


def critic_parameters(config: Ernie4_5_MoeConfig) -> Parameters:
    """Return a critic's parameters: a scalar head [H] and bias instead of the vocabulary's."""
    own = count_parameters(config)
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    head += config.vocab_size if config.lm_head_has_bias else 0
    return Parameters(own.dense - head + config.hidden_size + 1, own.experts)


def layouts(
    config: Ernie4_5_MoeConfig,
    ranks: int,
    expert: int | None = None,
    own: Recompute = False,
    tokens: int = 0,
) -> Iterator[Layout]:
    """Yield every layout of `ranks` ranks; with `expert` only those of that expert degree.

    Each is yielded with nothing, attention, experts and whole layers recomputed, and with `own`; if
    a micro-batch has more `tokens` than `CHUNK_TOKENS`, with experts in chunks as well. Raises
    `UserError` for a degree that does not divide the experts or the ranks.
    """
    experts = config.moe_num_experts if moe_layers(config) else 1
    if expert is not None and (experts % expert or ranks % expert):
        raise UserError(
            f"--expert {expert} must divide the {experts} experts of a layer and the {ranks} ranks"
        )
    choices: list[Recompute] = [False, *(RecomputeConfig(parts=(p,)) for p in PARTS), True]
    if tokens > CHUNK_TOKENS and config.moe_capacity_factor is None:
        choices.append(RecomputeConfig(parts=("experts",), chunk_tokens=CHUNK_TOKENS))
        choices.append(RecomputeConfig(chunk_tokens=CHUNK_TOKENS))
    if own not in (*choices, RecomputeConfig()):
        choices.append(own)
    degrees = [n for n in range(1, experts + 1) if experts % n == 0 and ranks % n == 0]
    for degree in degrees if expert is None else [expert]:
        for sharding in (False, True) if ranks > 1 else (False,):
            for recompute in choices:
                yield Layout(degree, ranks // degree, sharding, recompute)
