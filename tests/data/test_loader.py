"""Packed batches against a loop over single tokens, and their resumable order."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_train.core.errors import CheckpointError, DataError
from ernie_train.data.documents import DocumentBuilder, Documents, EncodedDocument
from ernie_train.data.loader import Batch, PackedLoader
from tests.workspace import as_documents

PAD = 0


def made_up(count: int, longest: int, seed: int, first_token: int = 1) -> Documents:
    """Documents whose tokens are all different, so that each can be traced."""
    rng = np.random.default_rng(seed)
    builder = DocumentBuilder()
    token = first_token
    for _ in range(count):
        length = int(rng.integers(2, longest + 1))
        trainable = (rng.random(length) < 0.5).tolist()
        builder.add(list(range(token, token + length)), trainable)
        token += length
    return builder.build()


def loader(parts: list[Documents], **changes: Any) -> PackedLoader:
    settings: dict[str, Any] = {
        "weights": [1.0] * len(parts),
        "seq_len": 32,
        "micro_batch_size": 4,
        "seed": 5,
        "epochs": 1,
        "pad_id": PAD,
        **changes,
    }
    return PackedLoader(parts, **settings)


def check_by_single_tokens(batch: Batch, documents: dict[int, EncodedDocument]) -> list[int]:
    """Walk every row token by token; returns the documents' first tokens in order."""
    found: list[int] = []
    for row in range(batch.input_ids.shape[0]):
        at, number = 0, 0
        while at < batch.input_ids.shape[1]:
            if batch.document_ids[row, at] == 0:
                assert not batch.document_ids[row, at:].any()
                assert not batch.loss_mask[row, at:].any()
                assert not batch.position_ids[row, at:].any()
                assert (batch.input_ids[row, at:] == PAD).all()
                assert (batch.labels[row, at:] == PAD).all()
                break
            number += 1
            document = documents[int(batch.input_ids[row, at])]
            found.append(int(document.ids[0]))
            for position, token in enumerate(document.ids):
                assert batch.input_ids[row, at] == token
                assert batch.position_ids[row, at] == position
                assert batch.document_ids[row, at] == number
                if position + 1 < len(document.ids):
                    assert batch.labels[row, at] == document.ids[position + 1]
                    assert batch.loss_mask[row, at] == float(document.trainable[position + 1])
                else:
                    assert batch.labels[row, at] == PAD
                    assert batch.loss_mask[row, at] == 0
                at += 1
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 120), st.integers(2, 32), st.integers(1, 5), st.integers(0, 1000))
def test_every_token_stands_where_it_belongs(
    count: int, longest: int, micro_batch_size: int, seed: int
) -> None:
    documents = made_up(count, longest, seed)
    known = {int(document.ids[0]): document for document in documents}
    batches = list(loader([documents], micro_batch_size=micro_batch_size, seed=seed))
    found = [first for batch in batches for first in check_by_single_tokens(batch, known)]
    assert sorted(found) == sorted(known)
    assert len(batches) == len(loader([documents], micro_batch_size=micro_batch_size, seed=seed))
    assert sum(batch.num_tokens for batch in batches) == len(documents.tokens)
    first = documents.trainable[documents.offsets[:-1]].sum()  # first tokens are nobody's label
    trained = sum(batch.loss_mask.sum() for batch in batches)
    assert trained == documents.trainable.sum() - first


def test_types_and_shapes() -> None:
    batch = next(iter(loader([made_up(3, 8, 0)])))
    for name in ("input_ids", "labels", "position_ids", "document_ids"):
        assert getattr(batch, name).dtype == np.int64 and getattr(batch, name).shape == (4, 32)
    assert batch.loss_mask.dtype == np.float32
    assert batch.document_ids[1:].sum() == 0  # three short documents fill one row of four


def test_weights_repeat_and_thin_out_sources() -> None:
    parts = [made_up(40, 8, 0), made_up(40, 8, 1, 10_000), made_up(40, 8, 2, 20_000)]
    known = {int(d.ids[0]): d for part in parts for d in part}
    once = loader(parts, weights=[2.0, 0.25, 1.0])
    found = [first for batch in once for first in check_by_single_tokens(batch, known)]
    counts = [sum(1 for f in found if f // 10_000 == part) for part in range(3)]
    assert counts == [80, 10, 40]
    assert sorted(f for f in found if f < 10_000) == sorted(2 * [int(d.ids[0]) for d in parts[0]])


def fingerprint(batch: Batch) -> bytes:
    return batch.input_ids.tobytes() + batch.loss_mask.tobytes()


def test_same_seed_same_batches_and_epochs_differ() -> None:
    parts = [made_up(300, 30, 0)]
    first, second = ([fingerprint(b) for b in loader(parts, epochs=2)] for _ in range(2))
    assert first == second
    assert len(first) == len(loader(parts, epochs=2))
    per_epoch = loader(parts).batches_per_epoch(0)
    assert sorted(first[:per_epoch]) != sorted(first[per_epoch:])
    assert [fingerprint(b) for b in loader(parts, seed=6)] != first[:per_epoch]


@pytest.mark.parametrize("epochs", [3, None])
def test_resuming_at_every_batch_goes_on_exactly(epochs: int | None) -> None:
    parts = [made_up(150, 30, 0), made_up(60, 12, 1, 10_000)]
    changes: dict[str, Any] = {"weights": [1.0, 0.5], "epochs": epochs}
    total = len(loader(parts, weights=[1.0, 0.5], epochs=3))
    whole_loader = loader(parts, **changes)
    iterator, states, whole = iter(whole_loader), [whole_loader.state_dict()], []
    for _ in range(total):
        whole.append(fingerprint(next(iterator)))
        states.append(whole_loader.state_dict())
    for at in range(0, total, 7):
        resumed = loader(parts, **changes)
        resumed.load_state_dict(states[at])
        stream = iter(resumed)
        assert [fingerprint(next(stream)) for _ in range(total - at)] == whole[at:]
    if epochs is not None:
        assert next(iterator, None) is None


def test_a_position_in_other_data_is_refused() -> None:
    parts = [made_up(50, 30, 0)]
    state = loader(parts).state_dict()
    other_mask = Documents(parts[0].tokens, ~parts[0].trainable, parts[0].offsets)
    others: list[tuple[list[Documents], dict[str, Any]]] = [
        ([made_up(51, 30, 0)], {}),
        ([other_mask], {}),
        (parts, {"weights": [0.9]}),
        (parts, {"seed": 6}),
        (parts, {"seq_len": 33}),
        (parts, {"micro_batch_size": 2}),
    ]
    for documents, changes in others:
        with pytest.raises(CheckpointError, match="belongs to other data"):
            loader(documents, **changes).load_state_dict(state)
    loader(parts, epochs=None).load_state_dict(state)  # more epochs are the same data


def test_large_data_is_packed_in_windows() -> None:
    documents = made_up(20_000, 30, 0)
    whole = loader([documents], micro_batch_size=8)
    assert whole.packing_fill() > 0.97
    assert sum(batch.num_tokens for batch in whole) == len(documents.tokens)


def test_unusable_settings_are_refused() -> None:
    part = made_up(5, 8, 0)
    with pytest.raises(DataError, match="nothing to train on"):
        loader([part], weights=[0.01])
    with pytest.raises(DataError, match="nothing to train on"):
        loader([DocumentBuilder().build()])
    with pytest.raises(ValueError, match="does not fit seq_len 4"):
        loader([made_up(50, 8, 0)], seq_len=4)
    with pytest.raises(ValueError, match="2 weights for 1"):
        loader([part], weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="micro_batch_size"):
        loader([part], micro_batch_size=0)


def test_documents_are_slices_of_one_array() -> None:
    documents = made_up(6, 9, 0)
    again = as_documents(list(documents))
    assert again.checksum() == documents.checksum()
    assert [len(d.ids) for d in documents] == documents.lengths.tolist()
    assert documents[-1].ids.tolist() == documents[5].ids.tolist()
    assert documents.tokens.dtype == np.int32
    with pytest.raises(IndexError):
        documents[6]
