"""What a loss hands to the trainer: terms of the objective, and sums that are only shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from paddle import Tensor

from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeModel, RouterStats


class HasTokens(Protocol):
    """A micro-batch: `num_tokens` are the real tokens that its loss sends through the model."""

    @property
    def num_tokens(self) -> int: ...


class TrainedModel(Protocol):
    """What the trainer needs of a model: its configuration and its decoder layers."""

    config: Ernie4_5_MoeConfig
    model: Ernie4_5_MoeModel


BatchT = TypeVar("BatchT", bound=HasTokens)
BatchT_contra = TypeVar("BatchT_contra", bound=HasTokens, contravariant=True)
ModelT = TypeVar("ModelT", bound=TrainedModel)
ModelT_contra = TypeVar("ModelT_contra", bound=TrainedModel, contravariant=True)


@dataclass(frozen=True)
class LossTerm:
    """A part of the objective: `coef * sum / count`, the count taken over the whole step.

    of_weights: it reads parameters themselves, not what a pass through the model made of them.
    """

    name: str
    sum: Tensor
    count: float
    coef: float = 1.0
    of_weights: bool = False


@dataclass(frozen=True)
class LossOutput:
    """Terms with gradient, sums that are only shown (name -> (sum, count)), router statistics.

    `last`: something that every layer leads to, such as final hidden states or logprobs. Under
    expert parallelism each backward pass starts there too, whatever terms there are, so that all
    ranks meet in every layer.
    """

    terms: list[LossTerm]
    shown: dict[str, tuple[float, float]] = field(default_factory=dict)
    router_stats: list[RouterStats] = field(default_factory=list)
    last: Tensor | None = None


class LossFn(Protocol[ModelT_contra, BatchT_contra]):
    """Reads a batch. `counts` tells, without running the model, what the terms' counts will be."""

    def counts(self, batch: BatchT_contra) -> dict[str, float]: ...

    def __call__(self, model: ModelT_contra, batch: BatchT_contra) -> LossOutput: ...
