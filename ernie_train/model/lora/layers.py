"""Layers with pairs beside their parameters, and the merge of both.

Shapes: T tokens, R routed rows, H hidden size, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ernie_train.model.layers import ACTIVATIONS, look_up
from ernie_train.model.lora.config import HEAD
from ernie_train.model.lora.pairs import Pair
from ernie_train.model.moe import Experts
from ernie_train.model.transformer import LMHead


@dataclass(frozen=True)
class _Adapted:
    """A frozen matrix [in,out] and the pair beside it: x [T,in] -> [T,out].

    ratio [out]: see `Pair.ratio`.
    """

    weight: Tensor
    pair: Pair
    ratio: Tensor | None
    expert: int | None = None

    def __call__(self, x: Tensor, bias: Tensor | None = None, *, training: bool) -> Tensor:
        seen = self.pair.drop(x, self.expert) if training else x
        low = self.pair.low_rank(seen)
        if self.ratio is None:
            return F.linear(x, self.weight, bias) + low
        y = plain = paddle.matmul(seen, self.weight)
        y = (y + low) * self.ratio.astype(y.dtype)
        if seen is not x:  # as PEFT: the magnitudes too act on what the pair sees alone
            y = y + (paddle.matmul(x, self.weight) - plain)
        return y if bias is None else y + bias


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
        if not self.is_on:
            return F.linear(x, self.weight, self.bias)
        adapted = _Adapted(self.weight, self.pair, self.pair.ratio(self.weight))
        return adapted(x, self.bias, training=self.training)


class _LoraEmbedding(_LoraLayer):
    """Ids [T] -> [T,H]; A [V,r] is looked up."""

    def forward(self, ids: Tensor) -> Tensor:
        x = look_up(ids, self.weight)
        if not self.is_on:
            return x
        pair = self.pair
        scale = pair.adapter.config.scale
        x = x + paddle.matmul(look_up(ids, pair.a), pair.b) * scale
        ratio = pair.ratio(self.weight)
        return x if ratio is None else x * ratio.astype(x.dtype)


class _LoraHead(_LoraLayer):
    """The head, as a matrix [V,H]; the loss multiplies it, so dropout does not act on it."""

    def matrix(self) -> Tensor | None:
        weight: Tensor = self.weight
        if not self.is_on:
            return weight
        adapted = weight + self.pair.product().transpose([1, 0])
        ratio = self.pair.ratio(weight, is_head=True)
        return adapted if ratio is None else adapted * ratio.astype(weight.dtype).unsqueeze(1)


class _LoraExperts(_LoraLayer):
    """Rows [R,H] sorted by expert -> [R,H], in plain operations; see `Experts`."""

    def forward(self, rows: Tensor, weights: Tensor, tokens_per_expert: list[int]) -> Tensor:
        if not self.is_on:
            return self.base(rows, weights, tokens_per_expert)
        act, training = ACTIVATIONS[self.base.hidden_act], self.training
        stacks = (self._experts(name) for name in ("gate_proj", "up_proj", "down_proj"))
        outputs, start = [], 0
        for count, gate, up, down in zip(tokens_per_expert, *stacks, strict=True):
            if count == 0:
                continue
            x, weight = (t[start : start + count] for t in (rows, weights.astype(rows.dtype)))
            inner = act(gate(x, training=training)) * up(x, training=training)
            # PEFT's adapter sees the activation before it is weighed.
            outputs.append(down(inner, training=training) * weight)
            start += count
        return paddle.concat(outputs)

    def _experts(self, name: str) -> Iterator[_Adapted]:
        """Yield the matrices of a stack."""
        stack, pair = getattr(self, name), self.pairs[name]
        ratio = pair.ratio(stack)
        ratios = [None] * len(stack) if ratio is None else paddle.unbind(ratio)
        parts = (paddle.unbind(tensor) for tensor in (stack, pair.a, pair.b))
        for expert, (weight, a, b, own) in enumerate(zip(*parts, ratios, strict=True)):
            yield _Adapted(weight, replace(pair, a=a, b=b), own, expert)


def merge(
    parameter: np.ndarray,
    product: np.ndarray,
    magnitude: np.ndarray | None,
    *,
    is_head: bool,
) -> np.ndarray:
    """Return a parameter [..,in,out] with scale * A B added and, with DoRA, its columns' lengths.

    A head is [out,in]: [V,H].
    """
    merged = parameter + (product.T if is_head else product)
    if magnitude is None:
        return merged
    axis = -1 if is_head else -2
    norms = np.sqrt(np.square(merged, dtype=np.float32).sum(axis, keepdims=True))
    scaled: np.ndarray = merged * (np.expand_dims(magnitude, axis) / norms)
    return scaled


def merge_pair(
    name: str,
    parameter: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    magnitude: np.ndarray | None,
    scale: float,
) -> np.ndarray:
    """Return the float32 parameter `name` with its pair, all arrays in float32.

    Parameter [..,in,out] (a head: [out,in]), A [..,in,r], B [..,r,out], magnitude [..,out]. A model
    that trains is written with these bits, and an adapter on disk is read with them.
    """
    product = np.matmul(a, b) * np.float32(scale)
    return merge(parameter, product, magnitude, is_head=name == HEAD)


def merged_weight(layer: nn.Layer, name: str = "weight") -> np.ndarray:
    """Return a copy of a layer's parameter with its pair, if it has one, merged."""
    weight: np.ndarray = getattr(layer, name).numpy()
    pair = getattr(layer, "pairs", {}).get(name)
    if pair is None or not pair.adapter.enabled:
        return weight
    magnitude = None if pair.lengths is None else pair.lengths.magnitude.numpy()
    return merge(weight, pair.product().numpy(), magnitude, is_head=isinstance(layer, _LoraHead))


def adapted_layer(base: nn.Layer, pairs: dict[str, Pair]) -> nn.Layer:
    """Return a layer in place of `base`; `pairs` are by the attribute that they stand beside."""
    if isinstance(base, Experts):
        return _LoraExperts(base, pairs)
    if isinstance(base, LMHead):
        return _LoraHead(base, pairs)
    return (_LoraEmbedding if isinstance(base, nn.Embedding) else _LoraLinear)(base, pairs)
