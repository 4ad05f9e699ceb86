"""Which documents an epoch holds and in which order: a pure function of seed and epoch.

Weight w of a source with n documents: an epoch holds round(w * n) samples of it. The whole part of
w gives whole copies, the rest a choice without repetition that changes from epoch to epoch. So
weight 1 is every document once, 2 every document twice, 0.25 a quarter of them, all sources
together in one random order.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


def permutation(count: int, *key: int) -> Int64:
    """A random order of range(count) that depends on `key` alone.

    Raw Philox output, whose stream never changes between versions of numpy, unlike that of
    `Generator.permutation`.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(raw, kind="stable").astype(np.int64)


def samples_per_epoch(size: int, weight: float) -> int:
    """Samples that an epoch holds of a source with `size` documents."""
    return round(weight * size)


def epoch_order(
    sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int
) -> tuple[Int64, Int64]:
    """Sources [N] and document indices within the source [N] of an epoch, in training order."""
    sources: list[Int64] = []
    documents: list[Int64] = []
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        count = samples_per_epoch(size, weight)
        if count == 0:
            continue
        whole, rest = divmod(count, size)
        chosen = [np.arange(size, dtype=np.int64)] * whole
        chosen.append(permutation(size, seed, epoch, 1, source)[:rest])
        documents.append(np.concatenate(chosen))
        sources.append(np.full(count, source, dtype=np.int64))
    if not sources:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty
    order = permutation(sum(map(len, sources)), seed, epoch, 0)
    return np.concatenate(sources)[order], np.concatenate(documents)[order]
