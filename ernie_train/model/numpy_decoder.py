"""The forward pass of sampling on a CPU: prefill of the prompts, then one token per sequence.

Computes what the model's forward pass computes, in numpy, without gradients and router statistics.
A `NumpyDecoder` copies the weights, so a new one is needed after they change.

Shapes: B sequences, S tokens of the longest prompt of a chunk, T = B*S or B tokens, H hidden size,
V vocabulary, N query heads, K key/value heads, G = N/K, D head dimension, C slots of a sequence,
c slots in use, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import paddle

from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.model.kv_cache import require_rope_theta
from ernie_train.model.lora import merged_weight
from ernie_train.model.numpy_layers import (
    NUMPY_ACTIVATIONS,
    NumpyLinear,
    NumpyMLP,
    NumpyMoE,
    NumpyRMSNorm,
    NumpyRope,
    apply_rope_,
    fuse_linears,
    shifted_exp_,
)
from ernie_train.model.token_dispatcher import LocalDispatcher
from ernie_train.model.transformer import DecoderLayer, Ernie4_5_MoeForCausalLM

_MULTIPLE = 32  # the slots of a sequence are a multiple of this number
_MASKED = np.float32(-1e30)
PROMPT_CHUNK_TOKENS = 2048  # most prompt tokens, with padding, in one pass: bounds the activations
_CHUNK_RATIO = 1.25  # the longest prompt of a chunk is at most this much longer than the shortest
_QUERY_BLOCK = 128  # most queries of a head in one block of scores

# Logits [B,V] of the next token and, per MoE layer, the experts [B,k] of the position they are
# computed at.
Prediction = tuple[np.ndarray, list[np.ndarray]]
# (index of the layer, rotated queries, keys and values [T,(N+2K)*D]) -> [T,N*D]
_Attend = Callable[[int, np.ndarray], np.ndarray]


def can_decode(model: Ernie4_5_MoeForCausalLM) -> bool:
    """Return whether `NumpyDecoder` computes this model.

    It must be float32 on a CPU, with all experts in this process.
    """
    moe = [layer.mlp for layer in model.model.layers if layer.is_moe]
    weight = model.model.norm.weight
    return (
        weight.place.is_cpu_place()
        and weight.dtype == paddle.float32
        and all(type(mlp.dispatcher) is LocalDispatcher for mlp in moe)
    )


class DecoderCache:
    """Keys and values of B sequences; sequence b fills its slots 0..lengths[b]-1."""

    def __init__(
        self, config: Ernie4_5_MoeConfig, batch: int, most: int, rope_theta: float
    ) -> None:
        """`most`: the slots that a sequence fills at most; the cache grows towards them."""
        self.rope_theta, self.most = rope_theta, most
        heads, head_dim = config.num_key_value_heads, config.attention_head_dim
        self.lengths = np.zeros(batch, np.int64)
        # Per layer [B,2,K,C,D]: keys and values. Free slots are masked to weight 0, and 0 * NaN is
        # NaN: they must be finite.
        shape = (batch, 2, heads, 0, head_dim)
        self.layers = [np.zeros(shape, np.float32) for _ in range(config.num_hidden_layers)]

    @property
    def capacity(self) -> int:
        return int(self.layers[0].shape[3])

    def start(self, sequences: np.ndarray, lengths: np.ndarray) -> None:
        """Give `sequences` [n] other contents of `lengths` tokens, which `layers` receive later."""
        self._grow(int(lengths.max()) + 1)
        self.lengths[sequences] = lengths

    def advance(self) -> np.ndarray:
        """Add a slot for one new token of every sequence; return their positions [B]."""
        positions = self.lengths
        self._grow(int(positions.max()) + 1)
        self.lengths = positions + 1
        return positions

    def rewind(self, sequences: np.ndarray) -> None:
        """Take the last token of `sequences` back: the next one has its slot."""
        self.lengths[sequences] -= 1

    def copy(self, sources: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> None:
        """Make each of `targets` [n] a copy of the first `lengths` slots of its source."""
        self._copy(sources, targets, int(lengths.max()))
        self.lengths[targets] = lengths

    def select(self, keep: np.ndarray) -> None:
        """Keep the sequences `keep`, in that order, and drop the others."""
        if len(keep):
            self._copy(keep, np.arange(len(keep)), int(self.lengths[keep].max()))
        self.layers = [layer[: len(keep)] for layer in self.layers]
        self.lengths = self.lengths[keep]

    def _copy(self, sources: np.ndarray, targets: np.ndarray, slots: int) -> None:
        """Copy the first `slots` of sources elsewhere; all are read before one is written."""
        moved = sources != targets
        for layer in self.layers if moved.any() else ():
            layer[targets[moved], :, :, :slots] = layer[sources[moved], :, :, :slots]

    def _grow(self, slots: int) -> None:
        if slots <= self.capacity:
            return
        # By a quarter of the capacity, so that the copies of long completions stay few.
        wanted = max(slots, min(self.capacity * 5 // 4, self.most))
        added = -(-wanted // _MULTIPLE) * _MULTIPLE - self.capacity
        room = ((0, 0), (0, 0), (0, 0), (0, added), (0, 0))
        for i, layer in enumerate(self.layers):
            self.layers[i] = np.pad(layer, room)


class NumpyDecoder:
    """Computes logits of next tokens from a copy of the model's present weights."""

    def __init__(self, model: Ernie4_5_MoeForCausalLM) -> None:
        self.config = config = model.config
        self.embedding = merged_weight(model.model.embed_tokens)
        self.rope_theta = model.model.rope_theta
        self.rope = NumpyRope(self.rope_theta, config.attention_head_dim)
        self.layers = [_NumpyDecoderLayer(layer, config) for layer in model.model.layers]
        self.norm = NumpyRMSNorm(model.model.norm)
        weight, bias = model.head()
        self.head = NumpyLinear(weight.numpy().T, None if bias is None else bias.numpy())
        # A forked process must not call Paddle, which computes the other activations.
        self.without_paddle = config.hidden_act in NUMPY_ACTIVATIONS

    def new_cache(self, batch: int, slots: int) -> DecoderCache:
        """Return a cache for `batch` sequences of at most `slots` tokens, to be filled."""
        return DecoderCache(self.config, batch, slots, self.rope_theta)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cache: DecoderCache,
        sequences: np.ndarray,
        recorded: list[np.ndarray] | None = None,
    ) -> Prediction:
        """Make `sequences` [n] of `cache` those of `prompts`; return the prediction after each.

        Neighbours of similar length run in one chunk, so prompts sorted by length take less time.

        recorded: a list that receives, for each prompt, the experts [S-1,L,k] of its
            positions but the last, whose experts are in the prediction; L MoE layers.
        """
        lengths = np.array([len(prompt) for prompt in prompts])
        cache.start(sequences, lengths)
        parts = [
            self._prefill_chunk(prompts[chunk], cache, sequences[chunk], recorded)
            for chunk in _chunks(lengths)
        ]
        logits, experts = zip(*parts, strict=True)
        return np.concatenate(logits), [np.concatenate(x) for x in zip(*experts, strict=True)]

    def __call__(self, tokens: np.ndarray, cache: DecoderCache) -> Prediction:
        """Append `tokens` [B] to the sequences of `cache` and predict the next ones.

        Raises `ValueError` for a cache that was filled under another RoPE base.
        """
        require_rope_theta(cache.rope_theta, self.rope_theta)
        positions = cache.advance()
        batch, used = np.arange(len(tokens)), int(positions.max()) + 1
        free = np.arange(used) > positions[:, None]  # [B,c]
        mask = np.where(free, _MASKED, np.float32(0))[:, None, None] if free.any() else None
        heads = 2 * self.config.num_key_value_heads

        def attend(index: int, qkv: np.ndarray) -> np.ndarray:
            kept = cache.layers[index]  # [B,2,K,C,D]
            shape = (len(tokens), 2, heads // 2, kept.shape[-1])
            query_size = qkv.shape[1] - heads * kept.shape[-1]
            kept[batch, :, :, positions] = qkv[:, query_size:].reshape(shape)
            # Query heads of one key/value head are neighbours: [B,N*D] -> [B,K,G,D]
            q = qkv[:, :query_size].reshape(len(tokens), heads // 2, -1, kept.shape[-1])
            output = _attention(q, kept[:, 0, :, :used], kept[:, 1, :, :used], mask)
            return output.reshape(len(tokens), -1)

        return self._forward(tokens, positions, attend, None)

    def _prefill_chunk(
        self,
        prompts: Sequence[Sequence[int]],
        cache: DecoderCache,
        sequences: np.ndarray,
        recorded: list[np.ndarray] | None,
    ) -> Prediction:
        """Run prompts padded on the right: causal attention keeps padding from the real tokens."""
        lengths = cache.lengths[sequences]
        batch, width = len(lengths), int(lengths.max())
        tokens = np.zeros((batch, width), np.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        heads, head_dim = self.config.num_key_value_heads, self.config.attention_head_dim

        def attend(index: int, qkv: np.ndarray) -> np.ndarray:
            # [B*S,(N+2K)*D] -> [B,N+2K,S,D]
            split = qkv.reshape(batch, width, -1, head_dim).swapaxes(1, 2)
            q, kv = split[:, : -2 * heads], split[:, -2 * heads :]
            kv = kv.reshape(batch, 2, heads, width, head_dim)
            cache.layers[index][sequences, :, :, :width] = kv
            output = _causal_attention(q.reshape(batch, heads, -1, width, head_dim), kv)
            # [B,N,S,D] -> [B*S,N*D]
            by_head = output.reshape(batch, -1, width, head_dim)
            return by_head.swapaxes(1, 2).reshape(batch * width, -1)

        last = np.arange(batch) * width + lengths - 1
        positions = np.tile(np.arange(width), batch)
        everywhere: list[np.ndarray] | None = None if recorded is None else []
        prediction = self._forward(tokens.reshape(-1), positions, attend, last, everywhere)
        if recorded is not None and everywhere:
            table = np.stack(everywhere, 1).reshape(batch, width, len(everywhere), -1)
            recorded += [table[row, : n - 1] for row, n in enumerate(lengths)]
        return prediction

    def _forward(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        attend: _Attend,
        last: np.ndarray | None,
        everywhere: list[np.ndarray] | None = None,
    ) -> Prediction:
        """Run `tokens` at `positions`, both [T]; predict at the indices `last` [B], or at all.

        everywhere: receives the experts [T,k] of each MoE layer at all positions.
        """
        rotations = self.rope.at(positions)
        x = self.embedding.take(tokens, 0)
        experts = []
        for index, layer in enumerate(self.layers):
            x = x + layer.attn_block(x, rotations, index, attend)
            chosen_everywhere = None
            if last is not None and index + 1 == len(self.layers):
                if everywhere is not None:
                    chosen_everywhere = layer.route(x)
                x = x[last]  # no later layer attends to the others
            y, chosen = layer.mlp_block(x)
            x += y
            if chosen is not None:
                if everywhere is not None:
                    everywhere.append(chosen if chosen_everywhere is None else chosen_everywhere)
                experts.append(chosen if last is None or len(chosen) == len(last) else chosen[last])
        return self.head(self.norm(x)), experts


class _NumpyDecoderLayer:
    """`DecoderLayer`: attention block and MLP block, without the residual additions."""

    def __init__(self, layer: DecoderLayer, config: Ernie4_5_MoeConfig) -> None:
        self.input_norm = NumpyRMSNorm(layer.input_layernorm)
        self.post_norm = NumpyRMSNorm(layer.post_attention_layernorm)
        attention = layer.self_attn
        self.o = NumpyLinear(*fuse_linears(attention.o_proj))
        weight, bias = fuse_linears(attention.q_proj, attention.k_proj, attention.v_proj)
        head_dim = config.attention_head_dim
        # The factor 1 / sqrt(D) of the scores is folded into the weights of the queries.
        queries = slice(config.num_attention_heads * head_dim)
        weight[:, queries] *= head_dim**-0.5
        if bias is not None:
            bias[queries] *= head_dim**-0.5
        self.qkv = NumpyLinear(weight, bias)
        self.rotated = weight.shape[1] - config.num_key_value_heads * head_dim
        self.experts = NumpyMoE(layer.mlp) if layer.is_moe else None
        self.dense = None if layer.is_moe else NumpyMLP(layer.mlp, config.hidden_act)

    def attn_block(
        self, x: np.ndarray, rotations: np.ndarray, index: int, attend: _Attend
    ) -> np.ndarray:
        """Return what attention adds to x [T,H]."""
        qkv = self.qkv(self.input_norm(x))
        apply_rope_(qkv[:, : self.rotated], rotations)
        return self.o(attend(index, qkv))

    def mlp_block(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return what the MLP adds to x [T,H], and the expert ids [T,k], None if dense."""
        x = self.post_norm(x)
        if self.dense is not None:
            return self.dense(x), None
        assert self.experts is not None
        return self.experts(x)

    def route(self, x: np.ndarray) -> np.ndarray | None:
        """Return the experts [T,k] that x [T,H] would take, None if dense; compute no MLP."""
        return None if self.experts is None else self.experts.route(self.post_norm(x))[0]


def _attention(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray | None
) -> np.ndarray:
    """Attend from q [B,K,n,D] to keys and values [B,K,c,D] -> [B,K,n,D].

    `mask`, of a shape that broadcasts to [B,K,n,c], is added to the scores.
    """
    scores = np.matmul(q, keys.swapaxes(2, 3))
    if mask is not None:
        scores += mask
    weights = shifted_exp_(scores)
    output: np.ndarray = np.matmul(weights, values)
    output /= weights.sum(-1, keepdims=True)  # divides D numbers per query, not c
    return output


def _causal_attention(q: np.ndarray, kv: np.ndarray) -> np.ndarray:
    """Attend causally: q [B,K,G,S,D], keys and values `kv` [B,2,K,S,D] -> [B,K,G,S,D]."""
    batch, heads, group, width, head_dim = q.shape
    output = np.empty_like(q)
    for start in range(0, width, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, width)
        later = np.arange(end) > np.arange(start, end)[:, None]
        mask = np.tile(np.where(later, _MASKED, np.float32(0)), (group, 1))  # [G*n,end]
        block = q[:, :, :, start:end].reshape(batch, heads, -1, head_dim)
        part = _attention(block, kv[:, 0, :, :end], kv[:, 1, :, :end], mask)
        output[:, :, :, start:end] = part.reshape(batch, heads, group, -1, head_dim)
    return output


def _chunks(lengths: np.ndarray) -> Iterator[slice]:
    """Yield slices of neighbours of similar length that fit into `PROMPT_CHUNK_TOKENS`."""
    start = 0
    while start < len(lengths):
        end, least, most = start, lengths[start], lengths[start]
        while end < len(lengths):
            least, most = min(least, lengths[end]), max(most, lengths[end])
            if most > _CHUNK_RATIO * least or (end + 1 - start) * most > PROMPT_CHUNK_TOKENS:
                break
            end += 1
        end = max(end, start + 1)
        yield slice(start, end)
        start = end
