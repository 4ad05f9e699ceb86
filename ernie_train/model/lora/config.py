"""Settings of LoRA and DoRA, and the names and shapes of what trains beside a parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from ernie_train.core.config import Positive, PositiveInt, StrictConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAGNITUDE = "lora_magnitude_vector"  # PEFT's name
# What other kits call the keys.
_OTHER_NAMES = {
    "r": "rank", "lora_r": "rank", "lora_rank": "rank", "lora_alpha": "alpha",
    "lora_dropout": "dropout", "target_modules": "targets", "lora_target": "targets",
    "lora_target_modules": "targets", "use_rslora": "rslora", "use_dora": "dora",
}  # fmt: skip


class LoraConfig(StrictConfig):
    """Pairs of matrices of low rank that train in place of the model's own, which are frozen."""

    rank: PositiveInt
    """Rank of a pair of matrices: columns of A, rows of B."""
    alpha: Positive | None = None
    """The product of a pair counts alpha / rank times; twice the rank, unless given."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a layer's inputs that its pair does not see in training; in `pretrain`,
    `sft` and `reward` alone, not on embedding and head.
    """
    targets: Annotated[list[str], Field(min_length=1)] = ["all-linear"]
    """Modules that get a pair: names, or parts of names, with `*` for anything. `all-linear` is
    attention, MLPs, shared and routed experts; `embed_tokens` and `lm_head` on request.
    """
    rslora: bool = False
    """Scales by alpha / sqrt(rank) instead (arXiv:2312.03732)."""
    dora: bool = False
    """Trains a magnitude for each output of a matrix beside the pair, which then turns the matrix's
    columns alone (DoRA, arXiv:2402.09353).
    """

    @model_validator(mode="before")
    @classmethod
    def _name_other_keys(cls, values: Any) -> Any:
        found = [key for key in values if key in _OTHER_NAMES] if isinstance(values, dict) else []
        if found:
            raise ValueError("; ".join(f"{key} is called {_OTHER_NAMES[key]}" for key in found))
        return values

    @field_validator(
        "targets",
        mode="before",
        json_schema_input_type=str | Annotated[list[str], Field(min_length=1)],
    )
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def alpha_value(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """Return the factor of A B."""
        return self.alpha_value / (math.sqrt(self.rank) if self.rslora else self.rank)


def module_of(parameter: str) -> str:
    """Return the name of the module whose weight `parameter` is."""
    return parameter.removesuffix(".weight")


def pair_names(parameter: str) -> tuple[str, str]:
    """Return the names of A and B of an adapted parameter; the embedding's are PEFT's own."""
    kind = "lora_embedding" if parameter == EMBEDDING else "lora"
    return f"{module_of(parameter)}.{kind}_A", f"{module_of(parameter)}.{kind}_B"


def magnitude_name(parameter: str) -> str:
    """Return the name of the magnitudes of an adapted parameter."""
    return f"{module_of(parameter)}.{MAGNITUDE}"


def pair_shapes(
    parameter: str, shape: Sequence[int], rank: int, *, dora: bool
) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of what trains beside a parameter of a shape in memory.

    That is A [..,in,r], B [..,r,out] and, with `dora`, magnitudes [..,out].
    """
    *outer, rows, columns = shape
    if parameter == HEAD:  # [V,H] reads H features
        rows, columns = columns, rows
    a, b = pair_names(parameter)
    shapes = {a: (*outer, rows, rank), b: (*outer, rank, columns)}
    return shapes | {magnitude_name(parameter): (*outer, columns)} if dora else shapes
