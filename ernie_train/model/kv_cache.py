"""Keys and values of the tokens so far, in one growing row of slots per sequence.

Sequences of different lengths share a batch: sequence b fills slots 0 to lengths[b] - 1, so there
is no padding on the left, and positions are slot indices.

Shapes: B sequences, K key/value heads, C slots of a sequence, D head dimension, T new real tokens,
Q the most new tokens of a sequence, G = N/K query heads per key/value head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.model.batch_layout import BatchLayout
from ernie_train.model.configuration import Ernie4_5_MoeConfig

_GROWTH = 32  # slots are added in multiples of this number
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


class KVCache:
    """Preallocated keys and values [B*K,C,D] of every layer in `dtype`, grown in steps."""

    def __init__(self, config: Ernie4_5_MoeConfig, batch: int, dtype: str = "float32") -> None:
        self.config = config
        self.lengths = np.zeros(batch, np.int64)
        self.rope_theta = config.rope_theta
        self.dtype = dtype
        self.capacity = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.key_rows: list[Tensor] = []  # the same memory as [B*K*C,D]
        self.value_rows: list[Tensor] = []

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def begin(self, layout: BatchLayout) -> np.ndarray:
        """Allocate slots for a batch of new tokens and return their positions [T].

        Raises `ValueError` if the batch has another number of sequences than the cache.
        """
        if layout.batch != self.batch:
            raise ValueError(f"the cache holds {self.batch} sequences, the batch {layout.batch}")
        counts = layout.row_counts
        sequence = np.repeat(np.arange(self.batch), counts)  # [T]
        offset = np.concatenate([np.arange(n) for n in counts])
        slots = self.lengths[sequence] + offset
        was_empty = not self.lengths.any()
        self._grow(int(slots.max()) + 1)
        self.step = self._index(sequence, offset, slots, was_empty)
        self.lengths = self.lengths + counts
        return slots

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [T*K,D] of the present step; return all keys and values, [B*K,C,D] each."""
        paddle.scatter_(self.key_rows[layer], self.step.slot_rows, k)
        paddle.scatter_(self.value_rows[layer], self.step.slot_rows, v)
        return self.keys[layer], self.values[layer]

    def select(self, keep: np.ndarray) -> None:
        """Keep the sequences `keep`, in that order, and drop the others."""
        heads = self.config.num_key_value_heads
        lanes = paddle.to_tensor((keep[:, None] * heads + np.arange(heads)).reshape(-1))
        self._replace(lambda x: paddle.gather(x, lanes))
        self.lengths = self.lengths[keep]

    def _grow(self, slots: int) -> None:
        if slots <= self.capacity:
            return
        heads, head_dim = self.config.num_key_value_heads, self.config.attention_head_dim
        capacity = -(-slots // _GROWTH) * _GROWTH
        room = paddle.zeros(
            [self.batch * heads, capacity - self.capacity, head_dim], dtype=self.dtype
        )
        if self.capacity == 0:
            layers = range(self.config.num_hidden_layers)
            self.keys = [room.clone() for _ in layers]
            self.values = [room.clone() for _ in layers]
            self._update_row_views()
        else:
            self._replace(lambda x: paddle.concat([x, room], axis=1))
        self.capacity = capacity

    def _replace(self, made: Callable[[Tensor], Tensor]) -> None:
        """Put `made(x)` in the place of all keys and values x, of which only one exists twice."""
        self.key_rows = self.value_rows = []  # they share the memory
        for stored in (self.keys, self.values):
            for i in range(len(stored)):
                stored[i] = made(stored[i])
        self._update_row_views()

    def _update_row_views(self) -> None:
        # Paddle's reshape shares memory, so `scatter_` into the rows writes keys and values.
        head_dim = self.config.attention_head_dim
        self.key_rows = [x.reshape([-1, head_dim]) for x in self.keys]
        self.value_rows = [x.reshape([-1, head_dim]) for x in self.values]

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
