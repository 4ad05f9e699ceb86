"""LoRA (arXiv:2106.09685): its settings, and layers with pairs of matrices of low rank.

An adapted matrix W [in,out] acts as W + scale * A B with A [in,r] and B [r,out]; experts have a
pair each, stacked like their weights: A [E,in,r], B [E,r,out]. Pairs lie beside the model, not
among its parameters: `parameters()` and `state_dict()` stay those of the base.

Shapes: T tokens, R routed rows, H hidden size, V vocabulary, E experts, I expert width, r rank.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from pydantic import Field, field_validator, model_validator

from ernie_train.core.config import Positive, PositiveInt, StrictConfig
from ernie_train.model.dtypes import dtype_name
from ernie_train.model.layers import ACTIVATIONS
from ernie_train.model.moe import Experts
from ernie_train.model.token_dispatcher import is_expert_parameter
from ernie_train.model.transformer import Ernie4_5_MoeForCausalLM, LMHead

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
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
    """Share of a layer's inputs that its pair does not see in training; in `pretrain` and `sft`
    alone, not on embedding and head.
    """
    targets: Annotated[list[str], Field(min_length=1)] = ["all-linear"]
    """Modules that get a pair: names, or parts of names, with `*` for anything. `all-linear` is
    attention, MLPs, shared and routed experts; `embed_tokens` and `lm_head` on request.
    """
    rslora: bool = False
    """Scales by alpha / sqrt(rank) instead (arXiv:2312.03732)."""
    dora: bool = False
    """Refused: not implemented."""

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

    @field_validator("dora")
    @classmethod
    def _refuse_dora(cls, value: bool) -> bool:
        if value:
            raise ValueError("DoRA is not implemented; rslora: true helps with high ranks")
        return value

    @property
    def alpha_value(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """Return the factor of A B."""
        return self.alpha_value / (math.sqrt(self.rank) if self.rslora else self.rank)


# ---- pairs of matrices ---------------------------------------------------------------------------


def module_of(parameter: str) -> str:
    """Return the name of the module whose weight `parameter` is."""
    return parameter.removesuffix(".weight")


def pair_names(parameter: str) -> tuple[str, str]:
    """Return the names of A and B of an adapted parameter; the embedding's are PEFT's own."""
    kind = "lora_embedding" if parameter == EMBEDDING else "lora"
    return f"{module_of(parameter)}.{kind}_A", f"{module_of(parameter)}.{kind}_B"


def pair_shapes(
    parameter: str, shape: Sequence[int], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A [..,in,r] and B [..,r,out] for a parameter's shape in memory."""
    *outer, rows, columns = shape
    if parameter == HEAD:  # [V,H] reads H features
        rows, columns = columns, rows
    return (*outer, rows, rank), (*outer, rank, columns)


@dataclass
class Adapter:
    """State that all pairs of a model share.

    enabled: False gives the base model.
    step_key: with a pair's number it determines the dropped inputs, so that a resumed run, and a
        layer that is recomputed, drop the same.
    """

    config: LoraConfig
    pairs: dict[str, Pair] = field(default_factory=dict)  # by name of the adapted parameter
    enabled: bool = True
    step_key: int = 0

    def parameters(self) -> dict[str, Tensor]:
        """Return the matrices of all pairs by name."""
        named: dict[str, Tensor] = {}
        for parameter, pair in self.pairs.items():
            named |= dict(zip(pair_names(parameter), (pair.a, pair.b), strict=True))
        return named


@dataclass(frozen=True)
class Pair:
    """The matrices A [..,in,r] and B [..,r,out] beside one parameter."""

    a: Tensor
    b: Tensor
    adapter: Adapter
    number: int

    def __call__(self, x: Tensor, expert: int | None = None, *, training: bool) -> Tensor:
        """Return scale * dropout(x) A B of x [T,in]: [T,out]."""
        a, b = (self.a, self.b) if expert is None else (self.a[expert], self.b[expert])
        share = self.adapter.config.dropout
        if share and training:
            # Seeded by place and step: no state that a checkpoint or a recomputation must keep.
            key = (self.adapter.step_key, self.number, -1 if expert is None else expert)
            paddle.seed(zlib.crc32(repr(key).encode()))
            x = F.dropout(x, share)
        return paddle.matmul(paddle.matmul(x, a), b) * self.adapter.config.scale

    def product(self) -> Tensor:
        """Return scale * A B [..,in,out], with gradient."""
        return paddle.matmul(self.a, self.b) * self.adapter.config.scale


class _LoraLayer(nn.Layer):
    """A layer with the parameters of `base` under their names, and pairs beside some of them."""

    def __init__(self, base: nn.Layer, pairs: dict[str, Pair]) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple, so that its parameters are not registered twice
        self.pairs = pairs
        for name in ("weight", "bias", "gate_proj", "up_proj", "down_proj"):
            if hasattr(base, name):
                setattr(self, name, getattr(base, name))

    @property
    def base(self) -> Any:
        return self._base[0]

    @property
    def pair(self) -> Pair:
        return self.pairs["weight"]

    @property
    def is_on(self) -> bool:
        return next(iter(self.pairs.values())).adapter.enabled


class _LoraLinear(_LoraLayer):
    """x [T,in] -> [T,out]."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + self.pair(x, training=self.training) if self.is_on else y


class _LoraEmbedding(_LoraLayer):
    """Ids [T] -> [T,H]; A [V,r] is looked up."""

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.weight)
        if not self.is_on:
            return x
        pair = self.pair
        scale = pair.adapter.config.scale
        return x + paddle.matmul(F.embedding(ids, pair.a), pair.b) * scale


class _LoraHead(_LoraLayer):
    """The head, as a matrix [V,H]; the loss multiplies it, so dropout does not act on it."""

    def matrix(self) -> Tensor | None:
        weight: Tensor = self.weight
        return weight + self.pair.product().transpose([1, 0]) if self.is_on else weight


class _LoraExperts(_LoraLayer):
    """Rows [R,H] sorted by expert -> [R,H], in plain operations; see `Experts`."""

    def forward(self, rows: Tensor, weights: Tensor, tokens_per_expert: list[int]) -> Tensor:
        if not self.is_on:
            return self.base(rows, weights, tokens_per_expert)
        act = ACTIVATIONS[self.base.hidden_act]
        outputs, start = [], 0
        for expert, count in enumerate(tokens_per_expert):
            if count == 0:
                continue
            x, weight = (t[start : start + count] for t in (rows, weights.astype(rows.dtype)))
            inner = act(self._project("gate_proj", x, expert)) * self._project("up_proj", x, expert)
            # PEFT's adapter sees the activation before it is weighed.
            outputs.append(self._project("down_proj", inner, expert) * weight)
            start += count
        return paddle.concat(outputs)

    def _project(self, name: str, x: Tensor, expert: int) -> Tensor:
        y = paddle.matmul(x, getattr(self, name)[expert])
        pair = self.pairs.get(name)
        return y if pair is None else y + pair(x, expert, training=self.training)


def merged_weight(layer: nn.Layer, name: str = "weight") -> np.ndarray:
    """Return a copy of a layer's parameter with its pair, if it has one, added."""
    weight: np.ndarray = getattr(layer, name).numpy()
    pair = getattr(layer, "pairs", {}).get(name)
    if pair is None or not pair.adapter.enabled:
        return weight
    product: np.ndarray = pair.product().numpy()
    return weight + product


# ---- making them ---------------------------------------------------------------------------------


def adapted_layer(base: nn.Layer, pairs: dict[str, Pair]) -> nn.Layer:
    """Return a layer in place of `base`; `pairs` are by the attribute that they stand beside."""
    if isinstance(base, Experts):
        return _LoraExperts(base, pairs)
    if isinstance(base, LMHead):
        return _LoraHead(base, pairs)
    return (_LoraEmbedding if isinstance(base, nn.Embedding) else _LoraLinear)(base, pairs)


def new_pair(
    model: Ernie4_5_MoeForCausalLM,
    name: str,
    parameter: Tensor,
    adapter: Adapter,
    seed: int,
    number: int,
) -> Pair:
    """Return a fresh pair beside `parameter`, called `name`; see `begin_partial_training`."""
    shape = list(parameter.shape)
    local = model.model.placement.local_experts(model.config.moe_num_experts)
    if is_expert_parameter(name):
        shape[0] = model.config.moe_num_experts
    a_shape, b_shape = pair_shapes(name, shape, adapter.config.rank)
    random = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
    if name == EMBEDDING:
        arrays = np.zeros(a_shape), random.standard_normal(b_shape)
    else:
        bound = 1 / math.sqrt(a_shape[-2])
        arrays = random.uniform(-bound, bound, a_shape), np.zeros(b_shape)
    if is_expert_parameter(name):  # all are drawn, so that an expert's do not depend on the ranks
        arrays = arrays[0][local.start : local.stop], arrays[1][local.start : local.stop]
    matrices = [_parameter(array, dtype_name(parameter)) for array in arrays]
    return Pair(matrices[0], matrices[1], adapter, number)


def _parameter(array: np.ndarray, dtype: str) -> Tensor:
    parameter = paddle.create_parameter(list(array.shape), dtype)
    parameter.set_value(paddle.to_tensor(array.astype(np.float32)).astype(dtype))
    return parameter
