"""Choose and order the documents of an epoch, then pack them into rows of one length.

Both are pure functions of seed and epoch. Weight w of a source with n documents: an epoch holds
round(w * n) samples of it. The whole part of w gives whole copies, the rest a choice without
repetition that changes from epoch to epoch. So weight 1 is every document once, 2 every document
twice, 0.25 a quarter of them; all sources are in one random order.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
# Rows that are packed at a time. Packing needs documents to choose from, a few hundred rows' worth
# fill a row to within a percent; more would only cost memory and delay the first batch.
WINDOW_ROWS = 512


# ---- mixing ------------------------------------------------------------------------------------


def permutation(count: int, *key: int) -> Int64:
    """Return a random order of range(count) that depends on `key` alone.

    Raw Philox output, whose stream never changes between versions of numpy, unlike that of
    `Generator.permutation`.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(raw, kind="stable").astype(np.int64)


def samples_per_epoch(size: int, weight: float) -> int:
    """Return how many samples an epoch holds of a source with `size` documents."""
    return round(weight * size)


def epoch_order(
    sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int
) -> tuple[Int64, Int64]:
    """Return an epoch's sources [N] and document indices within them [N], in training order."""
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
    """Pack best-fit decreasing: the longest document first, into the fullest row that has room.

    Returns the documents' indices row by row, each exactly once; equal input gives equal rows.
    O(n log n) comparisons. Raises ValueError for a length outside of 1..capacity.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and not (sizes.min() >= 1 and sizes.max() <= capacity):
        raise ValueError(f"document lengths must lie in 1..{capacity}")
    rows: list[list[int]] = []
    # Rows by the room left in them: `rooms` are the sizes that occur, in order.
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
    """Pack documents in the order given, about `window_rows` rows at a time.

    lengths: [N]. Yields one window's rows, each the indices of its documents. Only documents of
    the same window share a row, so a large data set is never packed at once.
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
