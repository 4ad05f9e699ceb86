"""Loaders one after another: every batch of each in turn, resumable between any two."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ernie_train.core.errors import CheckpointError
from ernie_train.data import (
    ConsecutiveLoaders,
    DataSource,
    EncodedDocument,
    PackedLoader,
    refit,
)
from tests.workspace import as_documents


def documents(*lengths):
    start, made = 1, []
    for length in lengths:
        ids = np.arange(start, start + length, dtype=np.int32)
        made.append(EncodedDocument(ids, np.ones(length, bool), f"file:{start}"))
        start += length
    return as_documents(made)


def loaders():
    return [
        PackedLoader([documents(*[5] * 12)], [1.0], seq_len, 2, seed=seq_len, epochs=None, pad_id=0)
        for seq_len in (5, 10, 20)
    ]


def ids(batches):
    return [batch.input_ids.tolist() for batch in batches]


def test_each_loader_gives_its_number_of_batches():
    batches = ids(ConsecutiveLoaders(loaders(), [4, 2, 3]))
    assert [len(batch[0]) for batch in batches] == [5] * 4 + [10] * 2 + [20] * 3
    one_by_one = [b for loader, n in zip(loaders(), (4, 2, 3), strict=True)
                  for b, _ in zip(ids_of(loader), range(n), strict=False)]  # fmt: skip
    assert batches == one_by_one


def ids_of(loader):
    return (batch.input_ids.tolist() for batch in loader)


@pytest.mark.parametrize("cut", range(9))
def test_it_goes_on_where_it_stood(cut):
    whole = ids(ConsecutiveLoaders(loaders(), [4, 2, 3]))
    first = ConsecutiveLoaders(loaders(), [4, 2, 3])
    iterator = iter(first)
    for _ in range(cut):
        next(iterator)
    state = json.loads(json.dumps(first.state_dict()))
    second = ConsecutiveLoaders(loaders(), [4, 2, 3])
    second.load_state_dict(state)
    assert ids(second) == whole[cut:]


def test_a_position_beyond_the_loaders_is_refused():
    state = {"at": 3, "given": 0, "loader": {}}
    with pytest.raises(CheckpointError, match="phase 4 of the data, there are 3"):
        ConsecutiveLoaders(loaders(), [4, 2, 3]).load_state_dict(state)


@pytest.mark.parametrize(
    ("overlong", "expected"),
    [("drop", [5, 6]), ("truncate", [5, 6, 6]), ("split", [5, 6, 6, 6, 3])],
)
def test_refitting_to_a_shorter_length(overlong, expected):
    """Split pieces share a token with the next: 13 = 6 + 6 + 3 - 2."""
    made = documents(5, 6, 13)
    source = DataSource(path="x", overlong=overlong)
    fitted = refit(made, source, "pretrain", 6)
    assert fitted.lengths.tolist() == expected
    assert fitted.sources[0] == "file:1"
    if overlong == "split":
        np.testing.assert_array_equal(fitted[2].ids, made[2].ids[:6])
        np.testing.assert_array_equal(fitted[4].ids, made[2].ids[10:])
    assert refit(made, source, "pretrain", 13) is made
