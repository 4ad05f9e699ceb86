"""The interface of losses: terms of the objective, and sums that are logged alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from paddle import Tensor

from ernie_train.model import RouterStats
from ernie_train.parallel import HasDecoder


class HasTokens(Protocol):
    """A micro-batch; `num_tokens` counts the real tokens that its loss sends through the model."""

    @property
    def num_tokens(self) -> int: ...


BatchT = TypeVar("BatchT", bound=HasTokens)
BatchT_contra = TypeVar("BatchT_contra", bound=HasTokens, contravariant=True)
ModelT = TypeVar("ModelT", bound=HasDecoder)
ModelT_contra = TypeVar("ModelT_contra", bound=HasDecoder, contravariant=True)


@dataclass(frozen=True)
class Mean:
    """A mean as a sum and a count, which add up over micro-batches and ranks."""

    sum: float
    count: float

    @property
    def value(self) -> float:
        """The mean; 0 over nothing."""
        return self.sum / max(self.count, 1.0)

    def joined(self, other: Mean) -> Mean:
        """Return the mean over what both are means of."""
        return Mean(self.sum + other.sum, self.count + other.count)


@dataclass(frozen=True)
class LossTerm:
    """A part of the objective: `coef * sum / count`, the count taken over the whole step.

    on_parameters: it reads parameters themselves, not outputs of a pass through the model.
    """

    name: str
    sum: Tensor
    count: float
    coef: float = 1.0
    on_parameters: bool = False


@dataclass(frozen=True)
class LossOutput:
    """Terms with gradient, metrics to log and router statistics.

    grad_anchor: a tensor that depends on every layer, such as final hidden states or logprobs.
    Under expert parallelism each backward pass starts from it too, whatever terms there are, so
    that all ranks run the all-to-alls of every layer.
    """

    terms: list[LossTerm]
    metrics: dict[str, Mean] = field(default_factory=dict)
    router_stats: list[RouterStats] = field(default_factory=list)
    grad_anchor: Tensor | None = None


class LossFn(Protocol[ModelT_contra, BatchT_contra]):
    """A loss of one micro-batch.

    `counts` returns the counts of its terms without running the model: the trainer needs those of
    the whole step before the first backward pass.
    """

    def counts(self, batch: BatchT_contra) -> dict[str, float]: ...

    def __call__(self, model: ModelT_contra, batch: BatchT_contra) -> LossOutput: ...
