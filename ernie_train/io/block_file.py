"""Keep float32 arrays that are long to compute in one file, which grows by whole blocks of them.

    a line of JSON       what they were computed from: name -> hash or value
    block after block    the arrays of a block, float32, and a CRC-32 of them

A kill or a power cut loses the block at work. For one process; the others are told what it reads.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ernie_train.core.errors import CheckpointError, storage_errors
from ernie_train.core.foreign_files import parse_json
from ernie_train.io.files import write_text
from ernie_train.io.run_dir import differences

_CRC_BYTES = 4


class BlockFile:
    """A file of blocks that is read up to its last whole one, and written on from there."""

    def __init__(self, path: Path) -> None:
        self.path, self.end = path, 0  # of the whole blocks so far, in bytes

    def begin(self, made_of: Mapping[str, str], stage: str) -> None:
        """Write the first line, or raise `CheckpointError` where it says something else.

        `stage` is for the message.
        """
        if not self.path.exists():
            write_text(self.path, json.dumps(dict(made_of)) + "\n")
        with storage_errors("cannot read", self.path), self.path.open("rb") as stream:
            line = stream.readline()
        self.end = len(line)
        try:
            before = parse_json(line)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}: damaged ({error}); delete it, and it is computed again"
            ) from None
        if changes := differences(before, dict(made_of)):
            raise CheckpointError(
                f"{self.path} was computed from something else: {'; '.join(changes)}. Give another "
                f"--run-dir, or --from {stage} to repeat the stage"
            )

    def read(self, lengths: Sequence[int]) -> list[np.ndarray] | None:
        """Return the next block, of arrays of these lengths; None where no whole one follows."""
        size = 4 * sum(lengths)
        with storage_errors("cannot read", self.path), self.path.open("rb") as stream:
            stream.seek(self.end)
            content = stream.read(size + _CRC_BYTES)
        values = content[:size]
        if content != values + _crc(values):  # cut off, or what a power cut left
            return None
        self.end += len(content)
        return np.split(np.frombuffer(values, "<f4"), np.cumsum(lengths)[:-1])

    def append(self, arrays: Sequence[np.ndarray]) -> None:
        """Write a block behind the whole ones, in the place of whatever is there."""
        values = np.concatenate(arrays).astype("<f4").tobytes()
        with storage_errors("cannot write", self.path), self.path.open("r+b") as stream:
            stream.seek(self.end)
            self.end += stream.write(values + _crc(values))
            stream.truncate()


def _crc(values: bytes) -> bytes:
    return zlib.crc32(values).to_bytes(_CRC_BYTES, "little")
