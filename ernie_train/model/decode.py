"""One new token for every cached sequence, in few operations: what sampling spends its time in.

The same function as the model's forward pass, computed without a gradient, without statistics of
the router and with the experts in one batched product. It reads the parameters where they are.

Shapes: B sequences, H hidden size, N query heads, K key/value heads, G = N/K, D head dimension,
C capacity of the cache, E experts, k experts per token, I expert width, c rows an expert has room
for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie_train.model.attention import Attention
from ernie_train.model.kv_cache import KVCache, TokenStep
from ernie_train.model.mlp import ACTIVATIONS, MLP
from ernie_train.model.moe import LocalDispatcher, MoE
from ernie_train.model.norm import RMSNorm
from ernie_train.model.rope import RopeTables
from ernie_train.model.transformer import DecoderLayer, Ernie4_5_MoeForCausalLM

# The operations on one expert alone cost as much time as this many floating-point operations more.
# Measured on one thread: 25 microseconds at 70 GFLOP/s.
_FLOPS_OF_A_CALL = 1.75e6


def can_decode(model: Ernie4_5_MoeForCausalLM) -> bool:
    """Whether `Decoder` computes this model: float32 on a CPU, all experts here, none overflowing.

    On a GPU, reading the router's choice would stall every layer. A capacity limit drops tokens by
    what their neighbours chose, which only the model's own forward pass does.
    """
    moe = [layer.mlp for layer in model.model.layers if layer.is_moe]
    weight = model.model.norm.weight
    return (
        weight.place.is_cpu_place()
        and weight.dtype == paddle.float32
        and model.config.moe_capacity_factor is None
        and all(type(mlp.dispatcher) is LocalDispatcher for mlp in moe)
    )


class Decoder:
    """Steps of a model whose parameters do not change meanwhile."""

    def __init__(self, model: Ernie4_5_MoeForCausalLM) -> None:
        self.embedding = model.model.embed_tokens.weight
        self.rope_theta = model.model.rope_theta
        self.rope = _Rope(model)
        self.layers = [_Layer(layer, i) for i, layer in enumerate(model.model.layers)]
        self.norm = _Norm(model.model.norm)

    def __call__(self, tokens: np.ndarray, cache: KVCache) -> tuple[Tensor, list[np.ndarray]]:
        """Appends `tokens` [B] to the sequences of `cache`, which `model.new_cache` made.

        Returns the hidden states [B,H] after the last norm, and the experts chosen by each MoE
        layer, [B,k] each.
        """
        cache.require_base(self.rope_theta)
        step = cache.advance()
        rotations = self.rope(step.positions, cache.capacity)
        x = paddle.gather(self.embedding, paddle.to_tensor(tokens))
        experts = []
        for layer in self.layers:
            x, chosen = layer(x, rotations, cache, step)
            if chosen is not None:
                experts.append(chosen)
        return self.norm(x), experts


@dataclass(frozen=True)
class _Rotations:
    """Cosines and sines of one step: scaled ones of the queries [B*K,G,D], of the keys [B*K,D]."""

    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]
    rotation: Tensor  # [D,D]


class _Rope:
    """Looks up the rotations of positions in tables for all heads, which grow with the cache."""

    def __init__(self, model: Ernie4_5_MoeForCausalLM) -> None:
        config = model.config
        self.theta, self.head_dim = model.model.rope_theta, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.key_heads = int(config.num_key_value_heads or 0)
        self.length = 0

    def __call__(self, positions: Tensor, capacity: int) -> _Rotations:
        """Rotations at `positions` [B], all below `capacity`."""
        if capacity > self.length:
            self._grow(capacity)
        dim, group = self.head_dim, self.heads // self.key_heads
        query, key = (
            [paddle.gather(table, positions).reshape(shape) for table in tables]
            for tables, shape in ((self.query, [-1, group, dim]), (self.key, [-1, dim]))
        )
        return _Rotations((query[0], query[1]), (key[0], key[1]), self.rotation)

    def _grow(self, capacity: int) -> None:
        tables = RopeTables.build(paddle.arange(capacity), self.theta, self.head_dim)
        # Queries carry the 1 / sqrt(D) of the scores.
        scale = self.head_dim**-0.5
        self.query = [x.reshape([capacity, -1]) * scale for x in tables.for_heads(self.heads)]
        self.key = [x.reshape([capacity, -1]) for x in tables.for_heads(self.key_heads)]
        self.rotation, self.length = tables.rotation, capacity


class _Norm:
    """RMSNorm of x [B,H]."""

    def __init__(self, norm: RMSNorm) -> None:
        size = norm.weight.shape[0]
        self.weight = norm.weight.reshape([1, size])
        self.mean = paddle.full([size, 1], 1.0 / size, "float32")
        self.eps = norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        inverse_rms = paddle.rsqrt(paddle.matmul(x * x, self.mean) + self.eps)
        # The outer product costs less than two broadcasts.
        return x * paddle.matmul(inverse_rms, self.weight)


class _Linear:
    """x W + b."""

    def __init__(self, linear: paddle.nn.Linear) -> None:
        self.weight, self.bias = linear.weight, linear.bias

    def __call__(self, x: Tensor) -> Tensor:
        y = paddle.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class _Layer:
    """A `DecoderLayer`."""

    def __init__(self, layer: DecoderLayer, number: int) -> None:
        self.number = number
        self.input_norm = _Norm(layer.input_layernorm)
        self.post_norm = _Norm(layer.post_attention_layernorm)
        attention: Attention = layer.self_attn
        self.q, self.k = _Linear(attention.q_proj), _Linear(attention.k_proj)
        self.v, self.o = _Linear(attention.v_proj), _Linear(attention.o_proj)
        self.mlp: _Experts | _Dense = (_Experts if layer.is_moe else _Dense)(layer.mlp)

    def __call__(
        self, x: Tensor, rotations: _Rotations, cache: KVCache, step: TokenStep
    ) -> tuple[Tensor, np.ndarray | None]:
        """x [B,H] -> x [B,H] and the experts chosen [B,k]; None for a dense layer."""
        x = x + self._attend(self.input_norm(x), rotations, cache, step)
        y, chosen = self.mlp(self.post_norm(x))
        return x + y, chosen

    def _attend(self, x: Tensor, rotations: _Rotations, cache: KVCache, step: TokenStep) -> Tensor:
        # Query heads of one key/value head are neighbours: [B,N*D] -> [B*K,G,D]
        q = _rotate(self.q(x), *rotations.query, rotations.rotation)
        k = _rotate(self.k(x), *rotations.key, rotations.rotation)
        keys, values = cache.store(self.number, step.slot_rows, k, self.v(x).reshape(k.shape))
        scores = paddle.matmul(q, keys, transpose_y=True).add_(step.mask)
        output = paddle.matmul(F.softmax(scores), values)
        return self.o(output.reshape([x.shape[0], -1]))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rotation: Tensor) -> Tensor:
    """`x * cos + (x R) * sin` in the shape of the tables."""
    x = x.reshape(cos.shape)
    return paddle.matmul(x, rotation).multiply_(sin).add_(x * cos)


class _Mlp:
    """A gated `MLP`."""

    def __init__(self, mlp: MLP) -> None:
        self.gate, self.up = _Linear(mlp.gate_proj), _Linear(mlp.up_proj)
        self.down, self.act = _Linear(mlp.down_proj), mlp.act

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)).multiply_(self.up(x)))


class _Dense:
    """The MLP of a layer without experts."""

    def __init__(self, mlp: MLP) -> None:
        self.mlp = _Mlp(mlp)

    def __call__(self, x: Tensor) -> tuple[Tensor, None]:
        return self.mlp(x), None


class _Experts:
    """A `MoE` layer, routed on the host: few tokens make small index arrays."""

    def __init__(self, moe: MoE) -> None:
        config = moe.config
        self.top_k, self.num_experts = config.moe_k, config.moe_num_experts
        self.norm_min = config.moe_norm_min
        self.router = moe.gate.weight
        self.bias = moe.moe_statics.e_score_correction_bias.numpy()
        experts = moe.experts
        self.weights = (experts.gate_proj, experts.up_proj, experts.down_proj)
        self.act = ACTIVATIONS[config.hidden_act]
        self.flops_per_row = 6.0 * config.hidden_size * config.moe_intermediate_size
        self.shared = None if moe.shared_experts is None else _Mlp(moe.shared_experts)

    def __call__(self, x: Tensor) -> tuple[Tensor, np.ndarray]:
        """x [B,H] -> output [B,H] and the experts chosen [B,k]."""
        probs = F.softmax(paddle.matmul(x, self.router)).numpy()
        chosen = np.argpartition(-(probs + self.bias), self.top_k - 1, -1)[:, : self.top_k]
        weights = probs[np.arange(len(probs))[:, None], chosen]
        weights = weights / np.maximum(weights.sum(-1, keepdims=True), self.norm_min)
        rows, place = self._through_experts(x.numpy(), chosen.reshape(-1))
        # [B,1,k] @ [B,k,H] -> [B,1,H]
        routed = np.matmul(weights[:, None], rows.take(place, 0).reshape([*chosen.shape, -1]))
        output = paddle.to_tensor(routed[:, 0])
        if self.shared is not None:
            output = output.add_(self.shared(x))
        return output, chosen

    def _through_experts(self, x: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x [B,H], the experts of all pairs [B*k] -> outputs, and the row of each pair in them."""
        counts = np.bincount(pairs, minlength=self.num_experts)
        room = int(counts.max())
        order = np.argsort(pairs, kind="stable")  # pairs (token, choice) sorted by expert
        place = np.empty_like(order)
        padding = self.num_experts * room - len(pairs)
        if padding * self.flops_per_row > np.count_nonzero(counts) * _FLOPS_OF_A_CALL:
            place[order] = np.arange(len(order))
            return self._one_by_one(paddle.to_tensor(x.take(order // self.top_k, 0)), counts), place
        start = np.arange(self.num_experts) * room - np.cumsum(counts) + counts
        place[order] = np.arange(len(order)) + np.repeat(start, counts)
        token = np.zeros(self.num_experts * room, np.int64)
        token[place] = np.arange(len(pairs)) // self.top_k
        return self._together(x.take(token, 0).reshape([self.num_experts, room, -1])), place

    def _together(self, rows: np.ndarray) -> np.ndarray:
        """Rows [E,c,H], as many for every expert, through all experts in three products."""
        gate, up, down = self.weights
        x = paddle.to_tensor(rows)
        inner = self.act(paddle.matmul(x, gate)).multiply_(paddle.matmul(x, up))
        output: np.ndarray = paddle.matmul(inner, down).numpy()
        return output.reshape([-1, rows.shape[-1]])

    def _one_by_one(self, rows: Tensor, counts: np.ndarray) -> np.ndarray:
        """Rows sorted by expert, `counts` [E] of each: for a load so uneven that padding costs."""
        gate, up, down = self.weights
        outputs, start = [], 0
        for expert in np.flatnonzero(counts).tolist():
            mine = rows[start : start + int(counts[expert])]
            inner = self.act(paddle.matmul(mine, gate[expert]))
            inner = inner.multiply_(paddle.matmul(mine, up[expert]))
            outputs.append(paddle.matmul(inner, down[expert]))
            start += int(counts[expert])
        output: np.ndarray = paddle.concat(outputs).numpy()
        return output
