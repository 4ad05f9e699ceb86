"""Keys and values of the tokens so far, in one row of slots per sequence.

Sequences of different lengths share a batch: sequence b fills slots 0 to lengths[b] - 1, so there
is no padding on the left, and positions are slot indices.

Shapes: B sequences, K key/value heads, C slots of a sequence, D head dimension, T new real tokens,
Q the most new tokens of a sequence, G = N/K query heads per key/value head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.model.batch_layout import BatchLayout
from ernie_train.model.configuration import Ernie4_5_MoeConfig

_MULTIPLE = 32  # the slots of a sequence are a multiple of this number
_MASKED = -1e30


@dataclass(frozen=True)
class CacheStep:
    """Index arrays of one forward pass, shared by all layers."""

    slot_rows: Tensor  # [T*K] rows of the cache that take the new keys and values
    attends_to_cache: bool  # False if the cache was empty: new tokens attend to each other only
    query_rows: Tensor  # [B*K*G*Q] rows of the new queries [T*N,D]
    query_return: Tensor  # [T*N] rows of [B*K*G*Q] in the order of tokens and heads
    mask: Tensor  # [B*K, G*Q, C] 0 or `_MASKED`


def require_rope_theta(cached: float, present: float) -> None:
    """Raise `ValueError` if the model's present RoPE base is not that of the cached keys."""
    if cached != present:
        raise ValueError(
            f"the cache was made under rope_theta={cached}, the model now has {present}"
        )


def _rounded(slots: int) -> int:
    return -(-slots // _MULTIPLE) * _MULTIPLE


def _first_rows(memory: Tensor, lanes: int, slots: int) -> Tensor:
    """Return the first rows of `memory` [rows,D] as [lanes,slots,D], which share it."""
    return memory[: lanes * slots].reshape([lanes, slots, memory.shape[1]])


class KVCache:
    """Keys and values [B*K,C,D] of every layer in `dtype`, and the memory they lie in.

    `slots`: the most that a sequence will fill, for which memory is taken at once; without it, or
    beyond it, memory is added when it is needed. C is no more than a quarter above what the longest
    sequence fills, as attention reads all of it.
    """

    def __init__(
        self, config: Ernie4_5_MoeConfig, batch: int, dtype: str = "float32", slots: int = 0
    ) -> None:
        self.config = config
        self.lengths = np.zeros(batch, np.int64)
        self.rope_theta = config.rope_theta
        self.dtype = dtype
        self.capacity = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.key_rows: list[Tensor] = []  # the same memory as [B*K*C,D]
        self.value_rows: list[Tensor] = []
        self._most = _rounded(slots)
        # [rows,D] for each layer's keys and values; the tensors above are the first rows of it, so
        # that they change their shape without other memory.
        self._memory: list[Tensor] = []
        self._starting: np.ndarray | None = None  # the sequences that the next pass begins

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def start(self, sequences: np.ndarray) -> None:
        """Empty `sequences` [n]; the next pass has n rows, their tokens, and leaves the others."""
        self.lengths[sequences] = 0
        self._starting = sequences

    def begin(self, layout: BatchLayout) -> np.ndarray:
        """Allocate slots for a batch of new tokens and return their positions [T].

        Raises `ValueError` if the batch has another number of sequences than the cache, or than
        `start` was given.
        """
        rows = np.arange(self.batch) if self._starting is None else self._starting
        if layout.batch != len(rows):
            raise ValueError(f"the cache expects {len(rows)} sequences, the batch {layout.batch}")
        counts = layout.row_counts
        sequence = np.repeat(rows, counts)  # [T]
        offset = np.concatenate([np.arange(n) for n in counts])
        slots = self.lengths[sequence] + offset
        was_empty = not self.lengths[rows].any()
        self._starting = None
        self._grow(int(slots.max()) + 1)
        self.step = self._index(sequence, offset, slots, was_empty)
        self.lengths[rows] += counts
        return slots

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [T*K,D] of the present step; return all keys and values, [B*K,C,D] each."""
        paddle.scatter_(self.key_rows[layer], self.step.slot_rows, k)
        paddle.scatter_(self.value_rows[layer], self.step.slot_rows, v)
        return self.keys[layer], self.values[layer]

    def copy(self, sources: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> None:
        """Make each of `targets` [n] a copy of the first `lengths` slots of its source."""
        self._copy(sources, targets, int(lengths.max()))
        self.lengths[targets] = lengths

    def rewind(self, sequences: np.ndarray) -> None:
        """Take the last token of `sequences` back: the next one has its slot."""
        self.lengths[sequences] -= 1

    def select(self, keep: np.ndarray) -> None:
        """Keep the sequences `keep`, in that order, and drop the others; no new memory is taken."""
        if len(keep):
            self._copy(keep, np.arange(len(keep)), int(self.lengths[keep].max()))
        self.lengths = self.lengths[keep]
        self._update_views()

    def _copy(self, sources: np.ndarray, targets: np.ndarray, slots: int) -> None:
        """Copy the first `slots` of sources elsewhere; all are read before one is written."""
        moved = sources != targets
        if not moved.any():
            return
        read, written = (paddle.to_tensor(self._rows(x[moved], slots)) for x in (sources, targets))
        for rows in (*self.key_rows, *self.value_rows):
            paddle.scatter_(rows, written, paddle.gather(rows, read))

    def _rows(self, sequences: np.ndarray, slots: int) -> np.ndarray:
        """Return the rows of the first `slots` of `sequences` [n], [n*K*slots]."""
        heads = self.config.num_key_value_heads
        lanes = sequences[:, None] * heads + np.arange(heads)  # [n,K]
        rows: np.ndarray = lanes[:, :, None] * self.capacity + np.arange(slots)
        return rows.reshape(-1)

    def _grow(self, slots: int) -> None:
        """Make room for `slots`; one layer's keys or values at a time exist twice."""
        if slots <= self.capacity:
            return
        before, capacity = self.capacity, _rounded(max(slots, self.capacity * 5 // 4))
        self.capacity = min(capacity, self._most) if slots <= self._most else capacity
        lanes = self.batch * self.config.num_key_value_heads
        rows, head_dim = lanes * max(self.capacity, self._most), self.config.attention_head_dim
        self._drop_views()  # they would keep memory that is replaced
        for i in range(2 * self.config.num_hidden_layers):
            if before == 0:
                self._memory.append(paddle.zeros([rows, head_dim], dtype=self.dtype))
                continue
            held = _first_rows(self._memory[i], lanes, before)
            if self._memory[i].shape[0] >= lanes * self.capacity:
                held = held.clone()
            else:
                self._memory[i] = paddle.zeros([rows, head_dim], dtype=self.dtype)
            _first_rows(self._memory[i], lanes, self.capacity)[:, :before] = held
        self._update_views()

    def _drop_views(self) -> None:
        self.keys, self.values, self.key_rows, self.value_rows = [], [], [], []

    def _update_views(self) -> None:
        # Paddle's slices and reshapes share memory, so `scatter_` into the rows writes keys and
        # values.
        lanes = self.batch * self.config.num_key_value_heads
        views = [_first_rows(memory, lanes, self.capacity) for memory in self._memory]
        if views and views[0].data_ptr() != self._memory[0].data_ptr():
            raise RuntimeError("Paddle copies slices here: remove FLAGS_use_stride_kernel")
        layers = self.config.num_hidden_layers
        self.keys, self.values = views[:layers], views[layers:]
        rows = [view.reshape([-1, view.shape[2]]) for view in views]
        self.key_rows, self.value_rows = rows[:layers], rows[layers:]

    def _index(
        self, sequence: np.ndarray, offset: np.ndarray, slots: np.ndarray, was_empty: bool
    ) -> CacheStep:
        """Return the indices of a step; `sequence`, `offset` in the step and `slots` are [T]."""
        heads = self.config.num_key_value_heads
        group = self.config.num_attention_heads // heads
        head = np.arange(heads)
        rows = (sequence[:, None] * heads + head) * self.capacity + slots[:, None]  # [T,K]
        empty = paddle.zeros([0], "int64")
        slot_rows = paddle.to_tensor(rows.reshape(-1))
        if was_empty:
            return CacheStep(slot_rows, False, empty, empty, empty)
        widest = int(offset.max()) + 1
        token = np.zeros((self.batch, widest), np.int64)
        token[sequence, offset] = np.arange(len(sequence))
        query_head = head[:, None] * group + np.arange(group)  # [K,G]
        total_heads = heads * group
        query = token[:, None, None, :] * total_heads + query_head[None, :, :, None]  # [B,K,G,Q]
        place = (sequence[:, None, None] * heads + head[:, None]) * group + np.arange(group)
        place = place * widest + offset[:, None, None]  # [T,K,G]
        last = np.zeros((self.batch, widest), np.int64)
        last[sequence, offset] = slots
        # Made on the device: for all heads it is as large as the scores.
        hidden = paddle.arange(self.capacity) > paddle.to_tensor(last[:, None, :, None])
        mask = hidden.astype(self.dtype) * _MASKED  # [B,1,Q,C]
        mask = paddle.expand(mask, [self.batch, total_heads, widest, self.capacity])
        return CacheStep(
            slot_rows,
            True,
            paddle.to_tensor(query.reshape(-1)),
            paddle.to_tensor(place.reshape(-1)),
            mask.reshape([self.batch * heads, group * widest, self.capacity]),
        )
