"""Puts documents of different lengths into rows of one length, whole and wasting little."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

# Rows that are packed at a time. Packing needs documents to choose from, a few hundred rows' worth
# fill a row to within a percent; more would only cost memory and delay the first batch.
WINDOW_ROWS = 512


def pack_documents(
    lengths: Sequence[int] | npt.NDArray[np.int64], capacity: int
) -> list[list[int]]:
    """Best-fit decreasing: the longest document first, into the fullest row that has room.

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
    lengths: npt.NDArray[np.int64], capacity: int, window_rows: int = WINDOW_ROWS
) -> Iterator[list[npt.NDArray[np.int64]]]:
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
