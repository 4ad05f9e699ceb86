"""The experts that sampling chose at the positions of prompts, kept once for equal prompts.

Shapes: S tokens of a prompt, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ernie_train.core.worker_pool import shared_zeros


def expert_dtype(num_experts: int) -> type[np.integer]:
    """Return the type of recorded experts: a byte each, where that suffices."""
    return np.uint8 if num_experts <= 256 else np.int16


class PromptExperts:
    """Experts of prompts but for their last position, in memory that the processes share.

    A process prefills equal prompts once, and they share an array; those of different processes may
    have been computed with other roundings, and keep their own.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        queues: Sequence[Sequence[int]],
        like: np.ndarray,
    ) -> None:
        """`queues`: the indices of prompts of each process; `like`: experts [...,L,K]."""
        self._first: dict[int, int] = {}  # of each prompt, the first of its queue that equals it
        self._places: dict[int, slice] = {}  # of those
        end = 0
        for queue in queues:
            seen: dict[tuple[int, ...], int] = {}
            for i in queue:
                self._first[i] = first = seen.setdefault(tuple(prompts[i]), i)
                if first == i:
                    self._places[i] = slice(end, end + len(prompts[i]) - 1)
                    end += len(prompts[i]) - 1
        self._table = shared_zeros((max(end, 1), *like.shape[-2:]), like.dtype)
        self._copies: dict[int, np.ndarray] = {}

    def record(self, prefilled: Sequence[int], experts: Sequence[np.ndarray]) -> None:
        """Keep the experts [S-1,L,K] of the prompts `prefilled`, the first of their kind."""
        for i, chosen in zip(prefilled, experts, strict=True):
            self._table[self._places[i]] = chosen

    def of(self, i: int) -> np.ndarray:
        """Return the experts [S-1,L,K] of prompt `i`; equal prompts get the same array."""
        first = self._first[i]
        if first not in self._copies:
            self._copies[first] = self._table[self._places[first]].copy()
        return self._copies[first]
