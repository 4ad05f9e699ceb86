"""Pairs of matrices of low rank beside a model's parameters, with DoRA the lengths of its columns.

Shapes: T tokens, V vocabulary, E experts, r rank; a matrix is [in,out], the head [out,in].
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie_train.core.errors import ConfigError
from ernie_train.model.dtypes import dtype_name, zero_parameter
from ernie_train.model.lora.config import (
    EMBEDDING,
    HEAD,
    LoraConfig,
    magnitude_name,
    module_of,
    pair_names,
    pair_shapes,
)
from ernie_train.model.token_dispatcher import is_expert_parameter
from ernie_train.model.transformer import Ernie4_5_MoeForCausalLM


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
        """Return the matrices, and magnitudes, of all pairs by name."""
        named: dict[str, Tensor] = {}
        for parameter, pair in self.pairs.items():
            named |= dict(zip(pair_names(parameter), (pair.a, pair.b), strict=True))
            if pair.lengths is not None:
                named[magnitude_name(parameter)] = pair.lengths.magnitude
        return named


@dataclass(frozen=True)
class Lengths:
    """The trained magnitudes [..,out] of a matrix, and its frozen columns' squared norms."""

    magnitude: Tensor
    squares: Tensor


@dataclass(frozen=True)
class Pair:
    """The matrices A [..,in,r] and B [..,r,out] beside one parameter, with DoRA its lengths too."""

    a: Tensor
    b: Tensor
    adapter: Adapter
    number: int
    lengths: Lengths | None = None

    def low_rank(self, x: Tensor) -> Tensor:
        """Return scale * x A B of x [T,in]: [T,out]."""
        return paddle.matmul(paddle.matmul(x, self.a), self.b) * self.adapter.config.scale

    def drop(self, x: Tensor, expert: int | None = None) -> Tensor:
        """Return x with the share of inputs that the pair does not see in training at zero."""
        share = self.adapter.config.dropout
        if not share:
            return x
        # Seeded by place and step: no state that a checkpoint or a recomputation must keep.
        key = (self.adapter.step_key, self.number, -1 if expert is None else expert)
        paddle.seed(zlib.crc32(repr(key).encode()))
        return F.dropout(x, share)

    def product(self) -> Tensor:
        """Return scale * A B [..,in,out], with gradient."""
        return paddle.matmul(self.a, self.b) * self.adapter.config.scale

    def ratio(self, weight: Tensor, *, is_head: bool = False) -> Tensor | None:
        """Return magnitude / |W + scale * A B| of the columns of W [..,in,out]; None without DoRA.

        The norms are constants to the gradient (section 4.3 of the paper). They come of
        |W|^2 + 2 s W.(A B) + s^2 |A B|^2, which no matrix [in,out] is made for.
        """
        if self.lengths is None:
            return None
        scale = self.adapter.config.scale
        with paddle.no_grad():
            a, b = self.a.astype("float32"), self.b.astype("float32")
            crossed = paddle.matmul(self.a, weight, transpose_x=True, transpose_y=is_head)
            inner = 2 * crossed.astype("float32")  # [..,r,out]
            inner += scale * paddle.matmul(paddle.matmul(a, a, transpose_x=True), b)
            squares = self.lengths.squares + scale * (inner * b).sum(-2)
            inverse = paddle.rsqrt(squares)
        return self.lengths.magnitude * inverse


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
    rank = adapter.config.rank
    a_shape, b_shape = pair_shapes(name, shape, rank, dora=False).values()
    random = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
    if name == EMBEDDING:
        arrays = np.zeros(a_shape), random.standard_normal(b_shape)
    else:
        bound = 1 / math.sqrt(a_shape[-2])
        arrays = random.uniform(-bound, bound, a_shape), np.zeros(b_shape)
    if is_expert_parameter(name):  # all are drawn, so that an expert's do not depend on the ranks
        arrays = arrays[0][local.start : local.stop], arrays[1][local.start : local.stop]
    matrices = [_parameter(array, dtype_name(parameter)) for array in arrays]
    lengths = _lengths(name, parameter) if adapter.config.dora else None
    return Pair(matrices[0], matrices[1], adapter, number, lengths)


def _parameter(array: np.ndarray, dtype: str) -> Tensor:
    parameter = zero_parameter(array.shape, dtype)
    parameter.set_value(paddle.to_tensor(array.astype(np.float32)).astype(dtype))
    return parameter


def _lengths(name: str, parameter: Tensor) -> Lengths:
    """Return the lengths of a matrix's columns as they are; in float32, whatever its dtype.

    Rounded magnitudes would change the model before the first step.

    Raises:
        ConfigError: a column is zero, so that it has no direction.
    """
    axis = -1 if name == HEAD else -2
    with paddle.no_grad():
        stack = paddle.unbind(parameter) if is_expert_parameter(name) else [parameter]
        found = [paddle.square(matrix.astype("float32")).sum(axis) for matrix in stack]
        squares = paddle.stack(found) if is_expert_parameter(name) else found[0]
    array = squares.numpy()
    if zeros := int((array == 0).sum()):
        raise ConfigError(
            f"lora.dora: {zeros} of the {array.size} columns of {name} are zero, and a column of "
            f"length 0 has no direction; freeze: [{module_of(name)}] leaves it out, dora: false "
            "adapts it"
        )
    return Lengths(_parameter(np.sqrt(array), "float32"), squares)
