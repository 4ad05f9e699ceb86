"""Grouped-query causal attention within documents, and against a key/value cache.

On a GPU with a FlashMask kernel, `flashmask` computes it, on a processor the native kernel where it
can be loaded. Elsewhere documents are gathered into buckets, computed by `blocked` or, beyond a
length, by `online`.

Shapes: T tokens, H hidden size, N query heads, K key/value heads, G = N/K, D head dimension,
C capacity of a cache.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernie_train import kernels
from ernie_train.core.autograd import needs_grad, once_differentiable, select_grads
from ernie_train.model.attention import blocked, flashmask, online
from ernie_train.model.batch_layout import AttentionLayout, BatchLayout, Bucket, GatheredDocuments
from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.model.dtypes import cast
from ernie_train.model.kv_cache import CacheStep, KVCache
from ernie_train.model.layers import RMSNorm, acting, is_ordinary, ordinary
from ernie_train.model.rope import RopeTables

# Most elements of cached keys that are widened to float32 at once (256 MiB).
WIDENED_ELEMENTS = 64 * 1024 * 1024


class _DocumentAttention(PyLayer):
    """softmax(q k^T / sqrt(D)) v within the gathered documents, q [T*N,D], k and v [T*K,D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: GatheredDocuments) -> Tensor:
        scale = q.shape[-1] ** -0.5
        sources = [_pad_row(x, layout.padded) for x in (q, k, v)]
        saved, outputs = [], []
        for bucket in layout.buckets:
            indices = (bucket.query_rows, bucket.key_rows, bucket.key_rows)
            gathered = [paddle.gather(x, i) for x, i in zip(sources, indices, strict=True)]
            gathered[0] = gathered[0].scale_(scale)
            output, kept = _kernel(bucket).forward(bucket, *gathered)
            saved.append((gathered, kept))
            outputs.append(output)
        ctx.layout, ctx.saved, ctx.scale = layout, saved, scale
        ctx.needs_grad = needs_grad(q, k, v)
        result = paddle.gather(_concat(outputs), layout.query_return)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (output,) = ctx.saved_tensor()
        # delta = sum over D of grad * output; on a CPU, Paddle sums rows fastest as a product.
        delta = paddle.matmul(grad * output, paddle.ones([grad.shape[-1], 1], grad.dtype))
        grad, delta = (_pad_row(x, ctx.layout.padded) for x in (grad, delta))
        dq_all, dk_all, dv_all = [], [], []
        for bucket, (gathered, kept) in zip(ctx.layout.buckets, ctx.saved, strict=True):
            tensors = (*gathered, paddle.gather(grad, bucket.query_rows))
            bucket_delta = paddle.gather(delta, bucket.query_rows)
            dq, dk, dv = _kernel(bucket).backward(bucket, kept, tensors, bucket_delta)
            dq_all.append(dq)
            dk_all.append(dk)
            dv_all.append(dv)
        ctx.saved = None
        dq = paddle.gather(_concat(dq_all), ctx.layout.query_return).scale_(ctx.scale)
        dk, dv = (_to_keys(_concat(parts), ctx.layout) for parts in (dk_all, dv_all))
        return select_grads(ctx.needs_grad, (dq, dk, dv))


def _to_keys(grads: Tensor, layout: GatheredDocuments) -> Tensor:
    """Return the gradients of keys in token order; those of a key in several documents add up."""
    if layout.key_rows is None:
        return paddle.gather(grads, layout.key_return)
    size = layout.key_return.shape[0]
    total = paddle.zeros([size + 1, grads.shape[-1]], grads.dtype)  # the last row takes padding
    return paddle.index_add(total, layout.key_rows, 0, grads)[:size]


def _kernel(bucket: Bucket) -> ModuleType:
    return online if bucket.is_long else blocked


def _pad_row(x: Tensor, padded: bool) -> Tensor:
    """Append the row of zeros that padding is gathered from."""
    return paddle.concat([x, paddle.zeros([1, x.shape[-1]], x.dtype)]) if padded else x


def _concat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else paddle.concat(parts)


class _NativeAttention(PyLayer):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
        heads = (layout.num_heads, layout.num_key_value_heads)
        result, log_sums = kernels.attention(q, k, v, layout.document_table, heads)
        ctx.save_for_backward(q, k, v, result, log_sums)
        ctx.layout, ctx.needs_grad = layout, needs_grad(q, k, v)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, result, log_sums = ctx.saved_tensor()
        layout = ctx.layout
        heads = (layout.num_heads, layout.num_key_value_heads)
        made = kernels.attention_backward(
            tuple(tensors), layout.document_table, heads, (result, log_sums), grads[0]
        )
        return select_grads(ctx.needs_grad, made)


def document_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    """Compute causal attention of every token within its own document.

    q [T*N,D], k and v [T*K,D] have one row per token and head, tokens outermost; query head n reads
    key/value head n // G. Returns [T*N,D].
    """
    if flashmask.available(q):
        return flashmask.document_attention(q, k, v, layout)
    if kernels.usable(q, k, v):
        return _NativeAttention.apply(q, k, v, layout)
    # These kernels mix in masks and sums of float32, and FlashMask keeps scores in it too.
    q32, k32, v32 = (cast(x, paddle.float32) for x in (q, k, v))
    return cast(_DocumentAttention.apply(q32, k32, v32, layout.gathered), q.dtype)


def cached_attention(q: Tensor, step: CacheStep, keys: Tensor, values: Tensor) -> Tensor:
    """Attend from new tokens q [T*N,D] to cached keys and values [B*K,C,D]; no gradient.

    Scores and probabilities are float32, as in FlashMask: in bfloat16 a score of 20 is off by 0.06.
    """
    lanes, slots, head_dim = keys.shape
    queries = cast(paddle.gather(q, step.query_rows), paddle.float32)
    queries = queries.reshape([lanes, -1, head_dim]).scale_(head_dim**-0.5)
    if keys.dtype == paddle.float32:
        output = _attend(queries, keys, values, step.mask)
    else:
        size = max(1, WIDENED_ELEMENTS // (slots * head_dim))
        parts = (slice(start, start + size) for start in range(0, lanes, size))
        output = _concat([_attend(queries[p], keys[p], values[p], step.mask[p]) for p in parts])
    return paddle.gather(output.reshape([-1, head_dim]), step.query_return)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    scores = paddle.matmul(queries, cast(keys, paddle.float32), transpose_y=True)
    probs = F.softmax(scores.add_(cast(mask, paddle.float32)))
    return paddle.matmul(cast(probs, values.dtype), values)


@ordinary
class Attention(nn.Layer):
    """Projections, rotary embedding and attention of one layer."""

    def __init__(self, config: Ernie4_5_MoeConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = config.attention_head_dim
        bias = None if config.use_bias else False
        query_size = self.num_heads * self.head_dim
        key_size = self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias_attr=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias_attr=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias_attr=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias_attr=bias)

    def forward(self, x: Tensor, tables: AttentionTables, cache: KVCache | None = None) -> Tensor:
        """Compute x [T,H] -> [T,H]."""
        q = tables.rope.rotate(self.q_proj(x).reshape([-1, self.head_dim]))
        k = tables.rope.rotate(self.k_proj(x).reshape([-1, self.head_dim]))
        v = self.v_proj(x).reshape([-1, self.head_dim])
        if cache is not None:
            keys, values = cache.append(self.layer, k, v)
        if cache is not None and cache.step.attends_to_cache:
            output = cached_attention(q, cache.step, keys, values)
        else:
            output = document_attention(q, k, v, tables.layout)
        return self.o_proj(output.reshape([x.shape[0], -1]))


class AttentionTables:
    """Batch layout and rotary tables of one forward pass, shared by the attention of all layers."""

    def __init__(self, config: Ernie4_5_MoeConfig, batch: BatchLayout, rope: RopeTables) -> None:
        self.rope = rope
        self.layout = batch.attention(config.num_attention_heads, config.num_key_value_heads)


def attention_block(
    norm: RMSNorm, attention: Attention, x: Tensor, tables: AttentionTables
) -> Tensor | None:
    """Return x + attention(norm(x)) for x [T,H]; None where it is not computed here."""
    own = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    projections = [acting(m) for m in own]
    if not (is_ordinary(norm, attention, *projections) and kernels.usable(x, norm.weight)):
        return None
    layout = tables.layout
    shape = kernels.AttentionShape(
        layout.document_table,
        (layout.num_heads, layout.num_key_value_heads),
        attention.head_dim,
        norm.eps,
    )
    weights = (p.weight for p in projections)
    rope = tables.rope
    return _AttentionBlock.apply(x, rope.cos, rope.sin, shape, norm.weight, *weights)


class _AttentionBlock(PyLayer):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        shape: kernels.AttentionShape,
        *parameters: Tensor,
    ) -> Tensor:
        out, saved = kernels.attention_block(x, parameters, (cos, sin), shape)
        ctx.save_for_backward(x, *parameters, cos, sin, *saved)
        ctx.shape, ctx.needs_grad = shape, needs_grad(x, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensor()
        needs_x, *trains = ctx.needs_grad
        dx, made = kernels.attention_block_backward(
            x, rest[:5], (rest[5], rest[6]), ctx.shape, rest[7:], grads[0], trains
        )
        return dx if needs_x else None, None, None, *made
