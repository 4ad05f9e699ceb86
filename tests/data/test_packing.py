"""Packing and mixing: every document exactly once, no row overfull, nearly no waste."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_train.data.packing import (
    epoch_order,
    pack_documents,
    pack_in_windows,
    permutation,
    samples_per_epoch,
)

packable = st.integers(1, 300).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=200))
)


@given(packable)
def test_every_document_once_and_no_row_overfull(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    rows = pack_documents(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < total <= capacity for total in used)
    # A document opens a row only where it fits no other, so no two rows could be merged.
    assert len(rows) <= 1 or sum(sorted(used)[:2]) > capacity


@given(packable, st.integers(1, 5))
def test_windows_keep_every_document_once(case: tuple[int, list[int]], window: int) -> None:
    capacity, lengths = case
    windows = list(pack_in_windows(np.array(lengths, dtype=np.int64), capacity, window))
    flat = [int(i) for rows in windows for row in rows for i in row]
    assert sorted(flat) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for rows in windows for row in rows)
    spans = [sorted(int(i) for row in rows for i in row) for rows in windows]
    assert all(a[-1] < b[0] for a, b in pairwise(spans))
    for rows in windows[:-1]:
        assert sum(lengths[i] for row in rows for i in row) <= window * capacity


def test_best_fit_takes_the_fullest_row_with_room() -> None:
    assert pack_documents([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]
    assert pack_documents([], 10) == []


@pytest.mark.parametrize("bad", [[0], [11], [-1], [5, 11]])
def test_lengths_outside_of_a_row_are_refused(bad: list[int]) -> None:
    with pytest.raises(ValueError, match=r"1\.\.10"):
        pack_documents(bad, 10)


@pytest.mark.parametrize("capacity", [512, 4096])
def test_short_documents_fill_rows_to_97_percent(capacity: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 0.6, 20_000), 5, capacity).astype(np.int64)
    rows = sum(len(rows) for rows in pack_in_windows(lengths, capacity))
    assert lengths.sum() / (rows * capacity) > 0.97


def test_packing_is_fast() -> None:
    rng = np.random.default_rng(0)
    started = time.process_time()
    pack_documents(rng.integers(1, 8192, 100_000), 8192)
    assert time.process_time() - started < 5  # 0.2 s here; a quadratic search takes minutes


@pytest.mark.parametrize(
    ("size", "weight", "count"), [(10, 1, 10), (10, 2.5, 25), (10, 0.25, 2), (3, 0.1, 0), (0, 2, 0)]
)
def test_weights_are_copies_of_documents(size: int, weight: float, count: int) -> None:
    assert samples_per_epoch(size, weight) == count
    sources, documents = epoch_order([7, size], [1.0, weight], seed=3, epoch=0)
    assert len(sources) == 7 + count
    assert sorted(documents[sources == 0]) == list(range(7))
    times = np.bincount(documents[sources == 1], minlength=size)
    if count:
        assert times.sum() == count and times.max() - times.min() <= 1


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        pairs = epoch_order([50, 20], [1.0, 0.5], seed, epoch)
        return list(zip(*(part.tolist() for part in pairs), strict=True))

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)
    chosen = {frozenset(pair for pair in order(1, epoch) if pair[0] == 1) for epoch in range(5)}
    assert len(chosen) == 5  # a fractional weight draws anew in each epoch


def test_permutations_never_change() -> None:
    # A resumed run must shuffle as the run that was interrupted, on any version of numpy.
    assert permutation(8, 7, 0).tolist() == [4, 3, 6, 2, 1, 0, 5, 7]
    assert sorted(permutation(1000, 1)) == list(range(1000))


@given(st.integers(2, 6), st.integers(0, 2**63))
def test_permutations_are_not_biased_to_a_place(count: int, seed: int) -> None:
    assert sorted(permutation(count, seed)) == list(range(count))
