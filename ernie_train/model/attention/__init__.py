"""Causal attention within packed documents, and against a key/value cache.

`layer` chooses the implementation: probabilities kept for the backward pass (`blocked`), an online
softmax for long documents (`online`), or Paddle's FlashMask on GPUs (`flashmask`).
"""

from ernie_train.model.attention.flashmask import available as flashmask_available
from ernie_train.model.attention.flashmask import (
    document_attention as flashmask_document_attention,
)
from ernie_train.model.attention.layer import (
    WIDENED_ELEMENTS,
    Attention,
    AttentionTables,
    attention_block,
    cached_attention,
    document_attention,
)

__all__ = [
    "WIDENED_ELEMENTS",
    "Attention",
    "AttentionTables",
    "attention_block",
    "cached_attention",
    "document_attention",
    "flashmask_available",
    "flashmask_document_attention",
]
