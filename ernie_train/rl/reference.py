"""Logprobs of given pairs under the starting policy: computed once, before the first step.

So no second model stands beside the one that trains. They are kept in one file of the stage:

    a line of JSON       what they were computed from: name -> hash or value
    block after block    float32 logprobs of its completions' sampled tokens, and a CRC-32 of them

A block is the completions of a step, or the held-out ones. The file grows by whole blocks, whose
bits depend neither on the number of ranks nor on when a run was stopped. Logprobs are kept by token
and not as sums: those of policy and reference are large and nearly equal, so a difference of
float32 sums would lose the digits that the loss is of.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import CheckpointError, Interrupted, storage_errors
from ernie_train.core.foreign_files import parse_json
from ernie_train.core.terminal import ProgressDisplay, Terminal
from ernie_train.io.files import write_text
from ernie_train.io.run_dir import differences
from ernie_train.rl.batch import TokenizedCompletion

Block = Sequence[TokenizedCompletion]
_CRC_BYTES = 4


def reference_logprobs(
    path: Path,
    blocks: Sequence[Block],
    made_of: Mapping[str, str],
    compute: Callable[[Block], list[np.ndarray]],
    *,
    stage: str,
    bar: bool = False,
) -> dict[TokenizedCompletion, np.ndarray]:
    """Return the logprobs [sampled tokens] of the completions of all blocks.

    The file has those of the first blocks, or none yet; `compute` makes the others, which are
    appended. Every rank must call it; rank 0 alone reads and writes. `stage` and `bar` are for
    messages and progress. Raises `CheckpointError` where the file is `made_of` something else, and
    `Interrupted` as `compute` does.
    """
    found: dict[TokenizedCompletion, np.ndarray] = {}
    file, known = _BlockFile(path), 0
    consensus.run_on_main(partial(file.begin, made_of, stage))
    for block in blocks:
        lengths = [sequence.num_sampled for sequence in block]
        kept = consensus.run_on_main(partial(file.read, lengths))
        if kept is None:
            break
        found.update(zip(block, kept, strict=True))
        known += 1
    if known == len(blocks):
        return found
    total = sum(map(len, blocks))
    display = ProgressDisplay(
        Terminal(quiet=not process_group.is_main()), bar=bar, total=total, first=len(found),
        label=f"{stage}: reference", unit="completion",
    )  # fmt: skip
    with closing(display):
        for block in blocks[known:]:
            try:
                logprobs = compute(block)
            except Interrupted:
                raise Interrupted(
                    f"stopped on a signal; reference log-probabilities of {len(found)} of {total} "
                    "completions are kept"
                ) from None
            consensus.run_on_main(partial(file.append, logprobs))
            found.update(zip(block, logprobs, strict=True))
            display.update(len(found))
    return found


def hash_blocks(blocks: Sequence[Block]) -> str:
    """Return a hash of the tokens of all completions, and of how they are dealt into blocks."""
    found = hashlib.sha256()
    for block in blocks:
        found.update(f"{len(block)};".encode())
        for sequence in block:
            ids, mask = sequence.prompt_ids + sequence.completion_ids, sequence.sampled_mask
            found.update(f"{len(sequence.prompt_ids)},{len(ids)},{mask is None};".encode())
            found.update(np.asarray(ids, np.int32).tobytes())
            found.update(b"" if mask is None else np.asarray(mask, np.bool_).tobytes())
    return found.hexdigest()


class _BlockFile:
    """The file of logprobs, read and then written block after block; for rank 0 alone."""

    def __init__(self, path: Path) -> None:
        self.path, self.end = path, 0  # of the whole blocks so far, in bytes

    def begin(self, made_of: Mapping[str, str], stage: str) -> None:
        """Write the first line, or compare it."""
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
