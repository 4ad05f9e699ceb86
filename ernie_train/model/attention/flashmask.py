"""Paddle's FlashMask kernel for packed documents on a GPU (arXiv:2410.01359).

The whole batch is one row of T tokens. A column-wise index gives the end of each key's document, so
the kernel skips blocks between documents and no mask is built. It has not been run on a GPU: tests
check the index, the choice of the kernel and the call against a dense stand-in.

Shapes: T tokens, N query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

from functools import cache

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie_train.core import devices
from ernie_train.model.batch_layout import AttentionLayout

_MAX_HEAD_DIM = 256


def available(x: Tensor) -> bool:
    """Return whether the kernel takes `x` [..,D]: by its device, dtype and head dimension."""
    head_dim = x.shape[-1]
    return (
        x.place.is_gpu_place()
        and x.dtype in (paddle.bfloat16, paddle.float16)
        and head_dim <= _MAX_HEAD_DIM
        and head_dim % 8 == 0
        and _registered()
    )


@cache
def _registered() -> bool:
    return devices.kernel_available("flashmask_attention", "gpu")


def document_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    """Compute causal attention within documents: q [T*N,D], k and v [T*K,D] -> [T*N,D]."""
    head_dim = q.shape[-1]
    queries = q.reshape([1, layout.num_tokens, layout.num_heads, head_dim])
    keys, values = (
        x.reshape([1, layout.num_tokens, layout.num_key_value_heads, head_dim]) for x in (k, v)
    )
    output = F.flashmask_attention(
        queries, keys, values, startend_row_indices=layout.document_ends, causal=True
    )
    return output.reshape([-1, head_dim])
