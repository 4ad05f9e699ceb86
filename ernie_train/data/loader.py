"""Iterate over packed batches: deterministic for a seed, resumable at every batch.

Shapes: B = micro_batch_size, S = seq_len.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ernie_train.core.errors import CheckpointError, DataError
from ernie_train.data.documents import Documents
from ernie_train.data.packing import epoch_order, pack_in_windows, permutation

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Hold the arrays of a micro-batch, each [B, S].

    input_ids: int64, padded with the pad id.
    labels: int64, already shifted: the next token of the same document. The last token of a
        document and padding have the pad id, which is not trained.
    position_ids: int64, counted from 0 in each document; 0 in padding.
    document_ids: int64, counted from 1 in each row; 0 in padding.
    loss_mask: float32, 1 where the label is trained, else 0.
    """

    input_ids: Int64
    labels: Int64
    position_ids: Int64
    document_ids: Int64
    loss_mask: npt.NDArray[np.float32]

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens that are not padding."""
        return int(np.count_nonzero(self.document_ids))


class PackedLoader:
    """Iterate over packed batches.

    A row holds whole documents of one epoch. The last batch of an epoch is filled up with rows of
    padding. `len()` is the number of batches in all epochs (in the first one if `epochs` is None);
    epochs may differ by a few batches, since each is packed separately.

    Args:
        documents: the documents of each source.
        weights: the weight of each source; see `packing`.
        seq_len: S, tokens per row.
        micro_batch_size: B, rows per batch.
        seed: of the order of documents and rows.
        epochs: number of epochs; None repeats without end.
        pad_id: the token id of padding.

    Raises:
        DataError: no document is left to train on.
        ValueError: an argument does not fit the others, such as a document longer than `seq_len`.
    """

    def __init__(
        self,
        documents: Sequence[Documents],
        weights: Sequence[float],
        seq_len: int,
        micro_batch_size: int,
        *,
        seed: int,
        epochs: int | None,
        pad_id: int,
    ) -> None:
        self._documents, self._weights = list(documents), list(weights)
        self._seq_len, self._micro_batch_size = seq_len, micro_batch_size
        self._seed, self._epochs, self._pad_id = seed, epochs, pad_id
        self._sizes = [len(part) for part in self._documents]
        self._lengths = [part.lengths for part in self._documents]
        self._refuse_unusable()
        self._identity = self._make_identity()
        self._batches: dict[int, int] = {}
        self._epoch = 0
        self._batch = 0  # batches of this epoch that were yielded

    def _refuse_unusable(self) -> None:
        if len(self._documents) != len(self._weights):
            raise ValueError(f"{len(self._weights)} weights for {len(self._documents)} sources")
        if self._micro_batch_size < 1:
            raise ValueError("micro_batch_size must be positive")
        sources, _ = epoch_order(self._sizes, self._weights, self._seed, 0)
        if not len(sources):
            raise DataError(
                "there is nothing to train on: no source has a document, or the weights are so "
                "small that an epoch holds none"
            )
        longest = max(int(lengths.max()) for lengths in self._lengths if len(lengths))
        if longest > self._seq_len:
            raise ValueError(f"a document of {longest} tokens does not fit seq_len {self._seq_len}")

    def _make_identity(self) -> str:
        # The 1 was a number of shards once; without it no run that was begun would go on.
        facts = [self._seed, self._seq_len, self._micro_batch_size, 1]
        facts += [part.checksum() for part in self._documents]
        return f"{zlib.crc32(repr((facts, self._weights)).encode()):08x}"

    def batches_per_epoch(self, epoch: int = 0) -> int:
        """Return the number of batches of one epoch."""
        if epoch not in self._batches:
            rows = sum(1 for _ in self._rows(epoch))
            self._batches[epoch] = -(-rows // self._micro_batch_size)
        return self._batches[epoch]

    def __len__(self) -> int:
        return sum(self.batches_per_epoch(epoch) for epoch in range(self._epochs or 1))

    def packing_fill(self) -> float:
        """Return the share of the first epoch's rows that is not padding, 0..1."""
        sources, documents = epoch_order(self._sizes, self._weights, self._seed, 0)
        tokens = int(self._sample_lengths(sources, documents).sum())
        return tokens / (sum(1 for _ in self._rows(0)) * self._seq_len)

    def __iter__(self) -> Iterator[Batch]:
        while self._epochs is None or self._epoch < self._epochs:
            for rows in islice(self._row_groups(self._epoch), self._batch, None):
                self._batch += 1
                yield self._assemble(rows)
            self._epoch, self._batch = self._epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was yielded, as JSON values."""
        return {"epoch": self._epoch, "batch": self._batch, "identity": self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position that `state_dict` returned.

        Raises:
            CheckpointError: the documents, weights, seed or sizes have changed.
        """
        if state.get("identity") != self._identity:
            raise CheckpointError(
                "the checkpoint's data position belongs to other data: the documents, their "
                "weights, seed, seq_len or micro_batch_size changed"
            )
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])

    def _sample_lengths(self, sources: Int64, documents: Int64) -> Int64:
        lengths = np.zeros(len(sources), dtype=np.int64)
        for source, known in enumerate(self._lengths):
            chosen = sources == source
            lengths[chosen] = known[documents[chosen]]
        return lengths

    def _rows(self, epoch: int) -> Iterator[list[tuple[int, int]]]:
        """Yield the rows of an epoch in order; a row is a list of (source, document)."""
        sources, documents = epoch_order(self._sizes, self._weights, self._seed, epoch)
        lengths = self._sample_lengths(sources, documents)
        for window, rows in enumerate(pack_in_windows(lengths, self._seq_len)):
            # Packing puts long documents into the first rows; shuffle, so that training does not
            # see them in order of length.
            for at in permutation(len(rows), self._seed, epoch, 2, window).tolist():
                row = rows[at]
                yield list(zip(sources[row].tolist(), documents[row].tolist(), strict=True))

    def _row_groups(self, epoch: int) -> Iterator[list[list[tuple[int, int]]]]:
        rows = self._rows(epoch)
        while group := list(islice(rows, self._micro_batch_size)):
            yield group

    def _assemble(self, rows: list[list[tuple[int, int]]]) -> Batch:
        shape = (self._micro_batch_size, self._seq_len)
        input_ids = np.full(shape, self._pad_id, dtype=np.int64)
        labels = np.full(shape, self._pad_id, dtype=np.int64)
        position_ids = np.zeros(shape, dtype=np.int64)
        document_ids = np.zeros(shape, dtype=np.int64)
        loss_mask = np.zeros(shape, dtype=np.float32)
        for index, row in enumerate(rows):
            parts = [self._documents[source][document] for source, document in row]
            lengths = np.array([len(part.ids) for part in parts], dtype=np.int64)
            ends = np.cumsum(lengths)
            used = int(ends[-1])
            ids = np.concatenate([part.ids for part in parts])
            trained = np.concatenate([part.trainable for part in parts])
            has_next = np.ones(used, dtype=np.bool_)
            has_next[ends - 1] = False  # a label is never a token of the next document
            following = np.flatnonzero(has_next)
            input_ids[index, :used] = ids
            labels[index, following] = ids[following + 1]
            loss_mask[index, following] = trained[following + 1]
            position_ids[index, :used] = np.arange(used) - np.repeat(ends - lengths, lengths)
            document_ids[index, :used] = np.repeat(np.arange(1, len(parts) + 1), lengths)
        return Batch(input_ids, labels, position_ids, document_ids, loss_mask)


class ConsecutiveLoaders:
    """Yield `batches[i]` batches of `loaders[i]` (None: all), then those of the next loader.

    Each loader must have that many batches.

    Raises:
        ValueError: there is no loader, or not one number of batches per loader.
    """

    def __init__(self, loaders: Sequence[PackedLoader], batches: Sequence[int | None]) -> None:
        if len(loaders) != len(batches) or not loaders:
            raise ValueError(f"{len(batches)} numbers of batches for {len(loaders)} loaders")
        self._loaders, self._batches = list(loaders), list(batches)
        self._at = 0
        self._given = 0  # batches of the current loader that were yielded

    def __iter__(self) -> Iterator[Batch]:
        while self._at < len(self._loaders):
            limit = self._batches[self._at]
            batches = iter(self._loaders[self._at])
            while limit is None or self._given < limit:
                batch = next(batches, None)
                if batch is None:
                    break
                self._given += 1
                yield batch
            if self._at == len(self._loaders) - 1:
                return
            self._at, self._given = self._at + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was yielded, as JSON values."""
        loader = self._loaders[self._at].state_dict()
        return {"at": self._at, "given": self._given, "loader": loader}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position that `state_dict` returned.

        Raises:
            CheckpointError: the loaders, or the data of the current one, have changed.
        """
        if not 0 <= state["at"] < len(self._loaders):
            raise CheckpointError(
                f"the checkpoint stands in phase {state['at'] + 1} of the data, "
                f"there are {len(self._loaders)}"
            )
        self._at, self._given = int(state["at"]), int(state["given"])
        self._loaders[self._at].load_state_dict(state["loader"])
