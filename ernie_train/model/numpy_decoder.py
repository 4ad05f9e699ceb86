"""The forward pass that sampling takes on a CPU: prompts once, then a token a sequence and step.

The same function as the model's own forward pass, in numpy, without a gradient and without
statistics of the router. A `Decoder` copies the weights, so it must be made anew when they change.

Shapes: B sequences, S tokens of the longest prompt of a chunk, T = B*S or B tokens, H hidden size,
V vocabulary, N query heads, K key/value heads, G = N/K, D head dimension, C slots of a sequence,
c slots in use, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import paddle

from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.model.numpy_layers import (
    ACTIVATIONS_IN_NUMPY,
    Experts,
    Mlp,
    Norm,
    Product,
    Rope,
    exp_,
    rotate_,
    side_by_side,
)
from ernie_train.model.token_dispatcher import LocalDispatcher
from ernie_train.model.transformer import DecoderLayer, Ernie4_5_MoeForCausalLM

_GROWTH = 32  # slots are added in multiples of this
_MASKED = np.float32(-1e30)
# Of prompts that are computed together, so that what a layer makes stays small.
_CHUNK_TOKENS = 2048
_CHUNK_RATIO = 1.25  # the longest prompt of a chunk is at most this much longer than the shortest
_QUERY_BLOCK = 128  # most queries of a head that are scored at once

# Logits [B,V] of the next token and the experts that each MoE layer chose [B,k] at the last one.
Prediction = tuple[np.ndarray, list[np.ndarray]]
# (number of the layer, rotated queries, keys and values [T,(N+2K)*D]) -> [T,N*D]
_Attend = Callable[[int, np.ndarray], np.ndarray]


def can_decode(model: Ernie4_5_MoeForCausalLM) -> bool:
    """Whether `Decoder` computes this model: float32 on a CPU, all experts here, none overflowing.

    A capacity limit drops tokens by what their neighbours chose, which only the model's own forward
    pass does.
    """
    moe = [layer.mlp for layer in model.model.layers if layer.is_moe]
    weight = model.model.norm.weight
    return (
        weight.place.is_cpu_place()
        and weight.dtype == paddle.float32
        and model.config.moe_capacity_factor is None
        and all(type(mlp.dispatcher) is LocalDispatcher for mlp in moe)
    )


class DecoderCache:
    """Keys and values of sequences; sequence b fills its slots 0..lengths[b]-1."""

    def __init__(
        self, config: Ernie4_5_MoeConfig, batch: int, slots: int, rope_theta: float
    ) -> None:
        self.rope_theta = rope_theta
        heads, head_dim = int(config.num_key_value_heads or 0), int(config.head_dim or 0)
        self.lengths = np.zeros(batch, np.int64)
        # A layer's [B,2,K,C,D]: keys, values. Free slots must be finite: masked, they weigh 0.
        shape = (batch, 2, heads, -(-slots // _GROWTH) * _GROWTH, head_dim)
        self.layers = [np.zeros(shape, np.float32) for _ in range(config.num_hidden_layers)]

    @property
    def capacity(self) -> int:
        return int(self.layers[0].shape[3])

    def advance(self) -> np.ndarray:
        """Makes room for one new token of every sequence; returns their positions [B]."""
        positions = self.lengths
        if int(positions.max()) >= self.capacity:
            # By a share, or long completions would be copied too often.
            added = max(_GROWTH, self.capacity // 4 // _GROWTH * _GROWTH)
            room = ((0, 0), (0, 0), (0, 0), (0, added), (0, 0))
            for number, layer in enumerate(self.layers):
                self.layers[number] = np.pad(layer, room)
        self.lengths = positions + 1
        return positions

    def select(self, keep: np.ndarray) -> None:
        """Keeps the sequences numbered by `keep`, in that order; the others leave the batch."""
        size = len(keep)
        if size > len(self.lengths):
            self.layers = [layer[keep] for layer in self.layers]
        else:
            moves = np.flatnonzero(keep != np.arange(size))
            for number, layer in enumerate(self.layers):
                layer[moves] = layer[keep[moves]]
                self.layers[number] = layer[:size]
        self.lengths = self.lengths[keep]


class Decoder:
    """Logits of next tokens under the weights that the model has now."""

    def __init__(self, model: Ernie4_5_MoeForCausalLM) -> None:
        self.config = config = model.config
        self.embedding = model.model.embed_tokens.weight.numpy()
        self.rope_theta = model.model.rope_theta
        self.rope = Rope(self.rope_theta, int(config.head_dim or 0))
        self.layers = [_Layer(layer, config) for layer in model.model.layers]
        self.norm = Norm(model.model.norm)
        weight, bias = model.head()
        self.head = Product(weight.numpy().T, None if bias is None else bias.numpy())
        # Else an activation is Paddle's, which a forked process must not call.
        self.without_paddle = config.hidden_act in ACTIVATIONS_IN_NUMPY

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Prediction, DecoderCache]:
        """What follows each prompt, and the cache to go on with.

        Neighbours of similar length are computed together, so sorted prompts take less time.
        """
        slots = max(map(len, prompts)) + 1
        cache = DecoderCache(self.config, len(prompts), slots, self.rope_theta)
        cache.lengths[:] = [len(prompt) for prompt in prompts]
        parts = [self._prefill_chunk(prompts, rows, cache) for rows in _chunks(cache.lengths)]
        logits, experts = zip(*parts, strict=True)
        joined = [np.concatenate(layer) for layer in zip(*experts, strict=True)]
        return (np.concatenate(logits), joined), cache

    def __call__(self, tokens: np.ndarray, cache: DecoderCache) -> Prediction:
        """Appends `tokens` [B] to the sequences of `cache`.

        Raises `ValueError` for a cache that was made under another RoPE base.
        """
        if cache.rope_theta != self.rope_theta:
            raise ValueError(
                f"the cache was made under rope_theta={cache.rope_theta}, "
                f"the model now has {self.rope_theta}"
            )
        positions = cache.advance()
        batch, used = np.arange(len(tokens)), int(positions.max()) + 1
        free = np.arange(used) > positions[:, None]  # [B,c]
        mask = np.where(free, _MASKED, np.float32(0))[:, None, None] if free.any() else None
        heads = 2 * int(self.config.num_key_value_heads or 0)

        def attend(number: int, qkv: np.ndarray) -> np.ndarray:
            kept = cache.layers[number]  # [B,2,K,C,D]
            shape = (len(tokens), 2, heads // 2, kept.shape[-1])
            query_size = qkv.shape[1] - heads * kept.shape[-1]
            kept[batch, :, :, positions] = qkv[:, query_size:].reshape(shape)
            # Query heads of one key/value head are neighbours: [B,N*D] -> [B,K,G,D]
            q = qkv[:, :query_size].reshape(len(tokens), heads // 2, -1, kept.shape[-1])
            output = _attention(q, kept[:, 0, :, :used], kept[:, 1, :, :used], mask)
            return output.reshape(len(tokens), -1)

        return self._forward(tokens, positions, attend, None)

    def _prefill_chunk(
        self, prompts: Sequence[Sequence[int]], rows: slice, cache: DecoderCache
    ) -> Prediction:
        """Prompts padded on the right: no real token sees later ones, free slots stay unseen."""
        lengths = cache.lengths[rows]
        batch, width = len(lengths), int(lengths.max())
        tokens = np.zeros((batch, width), np.int64)
        for row, prompt in enumerate(prompts[rows]):
            tokens[row, : len(prompt)] = prompt
        heads, head_dim = int(self.config.num_key_value_heads or 0), int(self.config.head_dim or 0)

        def attend(number: int, qkv: np.ndarray) -> np.ndarray:
            # [B*S,(N+2K)*D] -> [B,N+2K,S,D]
            split = qkv.reshape(batch, width, -1, head_dim).swapaxes(1, 2)
            q, kv = split[:, : -2 * heads], split[:, -2 * heads :]
            kept = cache.layers[number][rows, :, :, :width]
            kept[:] = kv.reshape(kept.shape)
            output = _causal_attention(q.reshape(batch, heads, -1, width, head_dim), kept)
            # [B,N,S,D] -> [B*S,N*D]
            by_head = output.reshape(batch, -1, width, head_dim)
            return by_head.swapaxes(1, 2).reshape(batch * width, -1)

        last = np.arange(batch) * width + lengths - 1
        positions = np.tile(np.arange(width), batch)
        return self._forward(tokens.reshape(-1), positions, attend, last)

    def _forward(
        self, tokens: np.ndarray, positions: np.ndarray, attend: _Attend, last: np.ndarray | None
    ) -> Prediction:
        """Tokens at positions, [T] each; predicts at the tokens `last` [B], None for all."""
        rotations = self.rope.at(positions)
        x = self.embedding.take(tokens, 0)
        experts = []
        for number, layer in enumerate(self.layers):
            x = x + layer.attention(x, rotations, number, attend)
            if last is not None and number + 1 == len(self.layers):
                x = x[last]  # of what no later layer attends to, only these are asked for
            y, chosen = layer.mlp(x)
            x += y
            if chosen is not None:
                experts.append(chosen if last is None or len(chosen) == len(last) else chosen[last])
        return self.head(self.norm(x)), experts


class _Layer:
    """A `DecoderLayer`."""

    def __init__(self, layer: DecoderLayer, config: Ernie4_5_MoeConfig) -> None:
        self.input_norm = Norm(layer.input_layernorm)
        self.post_norm = Norm(layer.post_attention_layernorm)
        attention = layer.self_attn
        self.o = Product(*side_by_side(attention.o_proj))
        weight, bias = side_by_side(attention.q_proj, attention.k_proj, attention.v_proj)
        head_dim = int(config.head_dim or 0)
        # Queries carry the 1 / sqrt(D) of the scores.
        queries = slice(config.num_attention_heads * head_dim)
        weight[:, queries] *= head_dim**-0.5
        if bias is not None:
            bias[queries] *= head_dim**-0.5
        self.qkv = Product(weight, bias)
        self.rotated = weight.shape[1] - int(config.num_key_value_heads or 0) * head_dim
        self.experts = Experts(layer.mlp) if layer.is_moe else None
        self.dense = None if layer.is_moe else Mlp(layer.mlp, config.hidden_act)

    def attention(
        self, x: np.ndarray, rotations: np.ndarray, number: int, attend: _Attend
    ) -> np.ndarray:
        """x [T,H] -> what attention adds to it."""
        qkv = self.qkv(self.input_norm(x))
        rotate_(qkv[:, : self.rotated], rotations)
        return self.o(attend(number, qkv))

    def mlp(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """x [T,H] -> what the MLP adds to it, and the experts chosen [T,k], None if dense."""
        x = self.post_norm(x)
        if self.dense is not None:
            return self.dense(x), None
        assert self.experts is not None
        return self.experts(x)


def _attention(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray | None
) -> np.ndarray:
    """Queries [B,K,n,D], keys and values [B,K,c,D], a mask to add to [B,K,n,c] -> [B,K,n,D]."""
    scores = np.matmul(q, keys.swapaxes(2, 3))
    if mask is not None:
        scores += mask
    weights = exp_(scores)
    output: np.ndarray = np.matmul(weights, values)
    output /= weights.sum(-1, keepdims=True)  # D numbers a query instead of c
    return output


def _causal_attention(q: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """q [B,K,G,S,D] attends to keys and values `kept` [B,2,K,S,D] -> [B,K,G,S,D]."""
    batch, heads, group, width, head_dim = q.shape
    output = np.empty_like(q)
    for start in range(0, width, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, width)
        seen = np.arange(end) > np.arange(start, end)[:, None]
        mask = np.tile(np.where(seen, _MASKED, np.float32(0)), (group, 1))  # [G*n,end]
        block = q[:, :, :, start:end].reshape(batch, heads, -1, head_dim)
        part = _attention(block, kept[:, 0, :, :end], kept[:, 1, :, :end], mask)
        output[:, :, :, start:end] = part.reshape(batch, heads, group, -1, head_dim)
    return output


def _chunks(lengths: np.ndarray) -> Iterator[slice]:
    """Neighbours of similar length, as many as `_CHUNK_TOKENS` hold."""
    start = 0
    while start < len(lengths):
        end, least, most = start, lengths[start], lengths[start]
        while end < len(lengths):
            least, most = min(least, lengths[end]), max(most, lengths[end])
            if most > _CHUNK_RATIO * least or (end + 1 - start) * most > _CHUNK_TOKENS:
                break
            end += 1
        end = max(end, start + 1)
        yield slice(start, end)
        start = end
