"""Choose and order the documents of an epoch, then pack them into rows of one length.

Both steps are pure functions of seed and epoch. An epoch has round(w * n) samples of a source with
n documents and weight w. The integer part of w gives whole copies, the rest a sample without
replacement, another one in each epoch: weight 1 is every document once, 2 every document twice,
0.25 a quarter of them. The samples of all sources are shuffled together.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
# Rows that are packed at a time. The documents of a few hundred rows are enough to fill each row to
# within a percent; more would only cost memory and delay the first batch.
WINDOW_ROWS = 512


# ---- mixing ------------------------------------------------------------------------------------


def permutation(count: int, *key: int) -> Int64:
    """Return a random permutation of range(count), [count], that depends only on `key`.

    Sorts raw Philox output, which is the same in all versions of numpy, unlike
    `Generator.permutation`.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(raw, kind="stable").astype(np.int64)


def samples_per_epoch(size: int, weight: float) -> int:
    """Return the number of samples per epoch of a source with `size` documents."""
    return round(weight * size)


def epoch_order(
    sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int
) -> tuple[Int64, Int64]:
    """Return the order of an epoch's N samples: source index [N], document index in it [N].

    `sizes` and `weights` are the number of documents and the weight of each source.
    """
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


# ---- packing -----------------------------------------------------------------------------------


def pack_documents(lengths: Sequence[int] | Int64, capacity: int) -> list[list[int]]:
    """Pack documents into rows by best-fit decreasing; deterministic.

    Places the longest document first, each into the fullest row that has room, in O(n log n)
    comparisons.

    Args:
        lengths: tokens of each document.
        capacity: tokens of a row.

    Returns:
        The document indices of each row; every document occurs exactly once.

    Raises:
        ValueError: a length is outside of 1..capacity.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and not (sizes.min() >= 1 and sizes.max() <= capacity):
        raise ValueError(f"document lengths must lie in 1..{capacity}")
    rows: list[list[int]] = []
    # Open rows by their free space: `rooms` is the sorted list of the sizes that occur.
    rooms: list[int] = []
    rows_with_room: dict[int, list[int]] = {}
    ordered = sizes.tolist()
    for document in np.argsort(-sizes, kind="stable").tolist():
        size = ordered[document]
        at = bisect_left(rooms, size)
        if at == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rows_with_room[room], rooms[at]
        rows[row].append(document)
        left = room - size
        if left:
            if left not in rows_with_room:
                rows_with_room[left] = []
                insort(rooms, left)
            rows_with_room[left].append(row)
    return rows


def pack_in_windows(
    lengths: Int64, capacity: int, window_rows: int = WINDOW_ROWS
) -> Iterator[list[Int64]]:
    """Pack documents in windows of about `window_rows` rows, and yield the rows of each window.

    Takes the documents in the order of `lengths` [N], in tokens. A row is the indices of its
    documents. Only documents of the same window share a row, so that a large data set need not be
    packed at once.

    Raises:
        ValueError: a length is outside of 1..capacity.
    """
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        used = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, used + window_rows * capacity, side="right"))
        stop = max(stop, start + 1)
        rows = pack_documents(lengths[start:stop], capacity)
        yield [np.array(row, dtype=np.int64) + start for row in rows]
        start = stop
