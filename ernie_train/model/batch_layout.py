"""Layout of a batch: real tokens in one row, and its documents in buckets for attention.

Everything but attention works on single tokens, so the model drops padding at its entry and carries
hidden states as [T,H]. Attention works within documents: documents of similar length are gathered
into a bucket and attend there under a causal mask alone, which costs the sum of squared document
lengths, not the square of the pack. The index arrays are made once per batch, when a kernel first
asks for them, and serve every layer. A document may continue another, as completions do their
prompt: it attends to the other's tokens too, which everything else computes once.

Shapes: B rows, S positions, T real tokens, N query heads, K key/value heads, G = N/K query heads
per key/value head, L padded length of a bucket, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import paddle
from paddle import Tensor

# The fastest values on one thread at head dimension 32.
_BATCHED_LENGTH = 192  # up to this length a document is one block, and a bucket one batch
KEPT_LENGTH = 1024  # up to this length probabilities are kept; beyond it memory is linear
KEPT_BLOCK, _LONG_BLOCK = 128, 320  # most queries of one head in a block of scores
_ALIGNMENT = 8  # blocks are multiples of this: few different masks, aligned rows
_BUCKET_RATIO = 1.25  # lengths within one bucket differ by less than this factor


@dataclass(frozen=True)
class Document:
    """The tokens `start` to `start + length` of the row of real tokens.

    `continues` is the document whose tokens come before its own, if there is one.
    """

    start: int
    length: int
    continues: Document | None = None

    @property
    def offset(self) -> int:
        """Return the position of its first token: the length of what it continues."""
        return 0 if self.continues is None else self.continues.length

    @property
    def total(self) -> int:
        """Return the number of tokens that its last token attends to."""
        return self.offset + self.length

    def own_tokens(self, places: np.ndarray) -> np.ndarray:
        """Return the token at each place of the whole; -1 where that is not its own."""
        own = (places >= self.offset) & (places < self.total)
        return np.where(own, self.start + places - self.offset, -1)

    def all_tokens(self, places: np.ndarray) -> np.ndarray:
        """Return the token at each place of the whole; -1 beyond its end."""
        if self.continues is None:
            return self.own_tokens(places)
        return np.maximum(self.own_tokens(places), self.continues.own_tokens(places))


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length, padded to `blocks` blocks.

    A lane is one document under one key/value head; `lanes` = documents * K.
    """

    lanes: int
    blocks: int
    block: int  # queries per head and block; blocks * block = L
    group: int  # G
    query_rows: Tensor  # [lanes * blocks * G * block] rows of [T*N+1,D]; the last row is zero
    key_rows: Tensor  # [lanes * L] rows of [T*K+1,D]

    @property
    def length(self) -> int:
        return self.blocks * self.block

    @property
    def is_long(self) -> bool:
        """Return whether the probabilities are recomputed in the backward pass instead of kept."""
        return self.length > KEPT_LENGTH


@dataclass(frozen=True)
class GatheredDocuments:
    """The buckets of a batch, and the indices that bring their rows back into token order."""

    buckets: list[Bucket]
    query_return: Tensor  # [T*N] row of each (token, head) in the concatenated buckets
    key_return: Tensor  # [T*K]
    padded: bool  # whether any bucket has rows of padding
    key_rows: Tensor | None = None  # those of all buckets, if some rows are in several


@dataclass(frozen=True)
class AttentionLayout:
    """The documents of a batch for N query and K key/value heads, as the kernels take them."""

    documents: list[Document]
    num_tokens: int  # T
    num_heads: int
    num_key_value_heads: int

    @cached_property
    def gathered(self) -> GatheredDocuments:
        """Return the documents gathered into buckets."""
        return _gather_documents(self)

    @cached_property
    def document_table(self) -> np.ndarray:
        """Return [n,4] int64: start and length of each document and of what it continues."""
        both = [(d, d.continues or Document(0, 0)) for d in self.documents]
        rows = [(d.start, d.length, before.start, before.length) for d, before in both]
        return np.array(rows, np.int64)

    @cached_property
    def document_ends(self) -> Tensor:
        """Return, for each token, where its document ends, [1,1,T,1] int32.

        FlashMask (arXiv:2410.01359) reads it as the first query that may not see this key. A
        document that others continue ends with the last of them; they follow it.
        """
        ends = np.zeros(self.num_tokens, np.int64)
        for document in self.documents:
            end = document.start + document.length
            for part in filter(None, (document, document.continues)):
                ends[part.start : part.start + part.length] = end
        return paddle.to_tensor(ends.astype(np.int32).reshape(1, 1, -1, 1))


@dataclass
class BatchLayout:
    """Real tokens of a batch [B,S] and its documents."""

    batch: int
    length: int
    token_index: np.ndarray | None  # [T] indices into the flattened batch; None: no padding
    documents: list[Document]
    row_counts: np.ndarray  # [B] real tokens of each row
    _attention: dict[tuple[int, int], AttentionLayout] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return int(self.row_counts.sum())

    @classmethod
    def shared_prompts(cls, groups: Sequence[tuple[int, Sequence[int]]]) -> BatchLayout:
        """Return the layout of a row of prompts, each followed by what continues it.

        groups: the tokens of a prompt, and of each of its completions; a completion may have none.
        """
        documents: list[Document] = []
        start = 0
        for prompt, completions in groups:
            first = Document(start, prompt)
            documents.append(first)
            start += prompt
            for length in completions:
                if length:
                    documents.append(Document(start, length, first))
                start += length
        return cls(1, start, None, documents, np.array([start]))

    @classmethod
    def from_document_ids(cls, document_ids: np.ndarray) -> BatchLayout:
        """Read `document_ids` [B,S]: equal neighbours in a row are one document, 0 is padding."""
        batch, length = document_ids.shape
        real = document_ids != 0
        token_index = None if real.all() else np.flatnonzero(real)
        rows, columns = np.nonzero(real)
        ids = document_ids[rows, columns]
        opens = np.ones(len(ids), bool)
        # Padding ends a document too: tokens after it do not attend to tokens before it.
        opens[1:] = (
            (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1] + 1) | (ids[1:] != ids[:-1])
        )
        starts = np.flatnonzero(opens)
        lengths = np.diff(np.append(starts, len(ids)))
        documents = [Document(int(s), int(n)) for s, n in zip(starts, lengths, strict=True)]
        return cls(batch, length, token_index, documents, real.sum(1))

    @classmethod
    def full_rows(cls, batch: int, length: int) -> BatchLayout:
        """Return the layout of rows that are one document each, without padding."""
        return cls.from_document_ids(np.ones((batch, length), np.int64))

    def default_positions(self) -> np.ndarray:
        """Return positions [T] that count from 0 in every document that continues no other."""
        pieces = [document.offset + np.arange(document.length) for document in self.documents]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    def attention(self, num_heads: int, num_key_value_heads: int) -> AttentionLayout:
        """Return the layout for these head counts, cached."""
        key = (num_heads, num_key_value_heads)
        if key not in self._attention:
            self._attention[key] = AttentionLayout(self.documents, self.num_tokens, *key)
        return self._attention[key]


def _bucket_documents(documents: list[Document]) -> list[list[Document]]:
    """Group documents whose totals differ by less than `_BUCKET_RATIO`; long ones stay alone."""
    groups: list[list[Document]] = []
    for document in sorted(documents, key=lambda s: (-s.total, s.start)):
        longest = groups[-1][0].total if groups else 0
        alike = document.total == longest or (
            longest <= _BATCHED_LENGTH and document.total * _BUCKET_RATIO > longest
        )
        if groups and alike:
            groups[-1].append(document)
        else:
            groups.append([document])
    return groups


def _gather_rows(tokens: np.ndarray, heads: np.ndarray, num_heads: int, total: int) -> np.ndarray:
    """Return rows token * num_heads + head; for token -1 the zero row, `total * num_heads`."""
    return np.where(tokens < 0, total * num_heads, tokens * num_heads + heads)


def _scatter_back(rows: np.ndarray, size: int) -> np.ndarray:
    """Return the inverse [size] of the index `rows`, in which rows from `size` on are padding."""
    back = np.zeros(size, np.int64)
    real = rows < size
    back[rows[real]] = np.flatnonzero(real)
    return back


def _blocking(length: int) -> tuple[int, int]:
    """Return (blocks, block) for documents of up to `length` tokens; equal blocks pad little."""
    if length <= _BATCHED_LENGTH:
        return 1, length
    blocks = -(-length // (KEPT_BLOCK if length <= KEPT_LENGTH else _LONG_BLOCK))
    per_block = -(-length // blocks)
    return blocks, -(-per_block // _ALIGNMENT) * _ALIGNMENT


def _gather_documents(layout: AttentionLayout) -> GatheredDocuments:
    total, num_heads = layout.num_tokens, layout.num_heads
    num_key_value_heads = layout.num_key_value_heads
    group = num_heads // num_key_value_heads
    buckets, all_queries, all_keys = [], [], []
    for members in _bucket_documents(layout.documents):
        blocks, block = _blocking(members[0].total)
        places = np.arange(blocks * block)
        seen = np.stack([m.all_tokens(places) for m in members])  # [n,L]
        # What a document continues has queries of its own: here they are padding.
        tokens = np.stack([m.own_tokens(places) for m in members])
        key_heads = np.arange(num_key_value_heads)
        keys = _gather_rows(
            seen[:, None, :], key_heads[None, :, None], num_key_value_heads, total
        )  # [n,K,L]
        query_heads = key_heads[:, None] * group + np.arange(group)  # [K,G]
        queries = _gather_rows(
            tokens.reshape(len(members), 1, blocks, 1, block),
            query_heads[None, :, None, :, None],
            num_heads,
            total,
        )  # [n,K,blocks,G,block]
        all_queries.append(queries.reshape(-1))
        all_keys.append(keys.reshape(-1))
        buckets.append(
            Bucket(
                lanes=len(members) * num_key_value_heads,
                blocks=blocks,
                block=block,
                group=group,
                query_rows=paddle.to_tensor(all_queries[-1]),
                key_rows=paddle.to_tensor(all_keys[-1]),
            )
        )
    query_rows, key_rows = np.concatenate(all_queries), np.concatenate(all_keys)
    shares = any(document.continues is not None for document in layout.documents)
    return GatheredDocuments(
        buckets,
        paddle.to_tensor(_scatter_back(query_rows, total * num_heads)),
        paddle.to_tensor(_scatter_back(key_rows, total * num_key_value_heads)),
        padded=shares or bool((key_rows == total * num_key_value_heads).any()),
        key_rows=paddle.to_tensor(key_rows) if shares else None,
    )
