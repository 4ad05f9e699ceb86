"""Loaders one after another, resumable at every batch."""

from collections.abc import Iterator, Sequence
from typing import Any

from ernie_train.datasets.loader import Batch, PackedLoader
from ernie_train.errors import CheckpointError


class ConsecutiveLoaders:
    """Yields `batches[i]` batches of `loaders[i]` (None: all it has), then goes on to the next.

    Each loader must be able to give that many.
    """

    def __init__(self, loaders: Sequence[PackedLoader], batches: Sequence[int | None]) -> None:
        if len(loaders) != len(batches) or not loaders:
            raise ValueError(f"{len(batches)} numbers of batches for {len(loaders)} loaders")
        self._loaders, self._batches = list(loaders), list(batches)
        self._at = 0
        self._given = 0  # batches of the present loader that were handed out

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
        """Where this stands: the next batch is the one after those handed out."""
        loader = self._loaders[self._at].state_dict()
        return {"at": self._at, "given": self._given, "loader": loader}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; CheckpointError if the data or sizes changed."""
        if not 0 <= state["at"] < len(self._loaders):
            raise CheckpointError(
                f"the checkpoint stands in phase {state['at'] + 1} of the data, "
                f"there are {len(self._loaders)}"
            )
        self._at, self._given = int(state["at"]), int(state["given"])
        self._loaders[self._at].load_state_dict(state["loader"])
