"""Where the tokens of a batch lie: real tokens in one row, documents in blocks for attention.

Everything but attention works on tokens alone, so the model drops padding at its door and carries
hidden states as [T,H]. Attention works within documents: documents of similar length are gathered
into a bucket and attend there under a causal mask alone. Its cost is the sum of squared document
lengths, not the square of the pack. The index arrays are made once per batch, where a kernel wants
them, and serve every layer.

Shapes: B rows, S positions, T real tokens, N query heads, K key/value heads, G = N/K query heads
per key/value head, L padded length of a bucket, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import paddle
from paddle import Tensor

# Measured on one thread at head dimension 32.
_BATCHED_LENGTH = 192  # up to here a whole document is one block, and a bucket is one batch
KEPT_LENGTH = 1024  # up to here probabilities are kept; beyond it memory is linear in the length
KEPT_BLOCK, _LONG_BLOCK = 128, 320  # most queries of one head that are scored at once
_ALIGNMENT = 8  # blocks are multiples of it: few sizes of masks, aligned rows
_BUCKET_RATIO = 1.25  # lengths within one bucket differ by less than this factor


@dataclass(frozen=True)
class Segment:
    """A document: `length` neighbours from `start` on in the row of real tokens."""

    start: int
    length: int


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length, gathered: `lanes` = documents x K, each of `blocks` blocks."""

    lanes: int
    blocks: int
    block: int  # queries of one head in a block; blocks * block = L
    group: int  # G
    query_rows: Tensor  # [lanes * blocks * G * block] rows of [T*N+1,D]; the last row is zero
    key_rows: Tensor  # [lanes * L] rows of [T*K+1,D]

    @property
    def length(self) -> int:
        return self.blocks * self.block

    @property
    def is_long(self) -> bool:
        """Whether its probabilities are too many to be kept for the backward pass."""
        return self.length > KEPT_LENGTH


@dataclass(frozen=True)
class Gathering:
    """The buckets of a batch and the way back from gathered rows to tokens."""

    buckets: list[Bucket]
    query_return: (
        Tensor  # [T*N] where each (token, head) lies in the buckets' rows, one after another
    )
    key_return: Tensor  # [T*K]
    padded: bool  # whether any bucket holds rows that are no token


@dataclass(frozen=True)
class AttentionLayout:
    """The documents of a batch under N query and K key/value heads, as the kernels want them."""

    segments: list[Segment]
    num_tokens: int  # T
    num_heads: int
    num_key_value_heads: int

    @cached_property
    def gathering(self) -> Gathering:
        """Documents gathered into buckets."""
        return _gather_documents(self)

    @cached_property
    def document_ends(self) -> Tensor:
        """[1,1,T,1] int32: where the document of each token ends, so which query is the first that
        may not see this key (FlashMask, arXiv:2410.01359)."""
        lengths = [segment.length for segment in self.segments]
        ends = np.repeat([segment.start + segment.length for segment in self.segments], lengths)
        return paddle.to_tensor(ends.astype(np.int32).reshape(1, 1, -1, 1))


@dataclass
class BatchLayout:
    """Real tokens of a batch [B,S] and its documents."""

    batch: int
    length: int
    token_index: np.ndarray | None  # [T] positions in the flattened batch; None: all are real
    segments: list[Segment]
    row_counts: np.ndarray  # [B] real tokens of each row
    _attention: dict[tuple[int, int], AttentionLayout] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return int(self.row_counts.sum())

    @classmethod
    def from_document_ids(cls, document_ids: np.ndarray) -> BatchLayout:
        """Reads `document_ids` [B,S]: equal neighbours in a row are one document, 0 is padding."""
        batch, length = document_ids.shape
        real = document_ids != 0
        token_index = None if real.all() else np.flatnonzero(real)
        rows, columns = np.nonzero(real)
        ids = document_ids[rows, columns]
        opens = np.ones(len(ids), bool)
        # A hole of padding ends a document too: what stands behind it does not see what was before.
        opens[1:] = (
            (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1] + 1) | (ids[1:] != ids[:-1])
        )
        starts = np.flatnonzero(opens)
        lengths = np.diff(np.append(starts, len(ids)))
        segments = [Segment(int(s), int(n)) for s, n in zip(starts, lengths, strict=True)]
        return cls(batch, length, token_index, segments, real.sum(1))

    @classmethod
    def full_rows(cls, batch: int, length: int) -> BatchLayout:
        """Every row is one document without padding."""
        return cls.from_document_ids(np.ones((batch, length), np.int64))

    def default_positions(self) -> np.ndarray:
        """Positions [T] that count from 0 in every document."""
        pieces = [np.arange(segment.length) for segment in self.segments]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    def attention(self, num_heads: int, num_key_value_heads: int) -> AttentionLayout:
        """The layout for these head counts, the same object every time."""
        key = (num_heads, num_key_value_heads)
        if key not in self._attention:
            self._attention[key] = AttentionLayout(self.segments, self.num_tokens, *key)
        return self._attention[key]


def _bucket_segments(segments: list[Segment]) -> list[list[Segment]]:
    """Groups documents whose lengths differ by less than `_BUCKET_RATIO`; long ones stay alone."""
    groups: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: (-s.length, s.start)):
        longest = groups[-1][0].length if groups else 0
        alike = segment.length == longest or (
            longest <= _BATCHED_LENGTH and segment.length * _BUCKET_RATIO > longest
        )
        if groups and alike:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def _gather_rows(tokens: np.ndarray, heads: np.ndarray, num_heads: int, total: int) -> np.ndarray:
    """Row numbers token * num_heads + head; the zero row `total * num_heads` where token is -1."""
    return np.where(tokens < 0, total * num_heads, tokens * num_heads + heads)


def _scatter_back(rows: np.ndarray, size: int) -> np.ndarray:
    back = np.zeros(size, np.int64)
    real = rows < size
    back[rows[real]] = np.flatnonzero(real)
    return back


def _blocking(length: int) -> tuple[int, int]:
    """(blocks, block) for documents of up to `length` tokens; blocks alike leave little padding."""
    if length <= _BATCHED_LENGTH:
        return 1, length
    blocks = -(-length // (KEPT_BLOCK if length <= KEPT_LENGTH else _LONG_BLOCK))
    per_block = -(-length // blocks)
    return blocks, -(-per_block // _ALIGNMENT) * _ALIGNMENT


def _gather_documents(layout: AttentionLayout) -> Gathering:
    total, num_heads = layout.num_tokens, layout.num_heads
    num_key_value_heads = layout.num_key_value_heads
    group = num_heads // num_key_value_heads
    buckets, all_queries, all_keys = [], [], []
    for members in _bucket_segments(layout.segments):
        blocks, block = _blocking(members[0].length)
        offsets = np.arange(blocks * block)
        starts = np.array([m.start for m in members])[:, None]
        lengths = np.array([m.length for m in members])[:, None]
        tokens = np.where(offsets < lengths, starts + offsets, -1)  # [n,L]
        key_heads = np.arange(num_key_value_heads)
        keys = _gather_rows(
            tokens[:, None, :], key_heads[None, :, None], num_key_value_heads, total
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
    return Gathering(
        buckets,
        paddle.to_tensor(_scatter_back(query_rows, total * num_heads)),
        paddle.to_tensor(_scatter_back(key_rows, total * num_key_value_heads)),
        padded=bool((key_rows == total * num_key_value_heads).any()),
    )
