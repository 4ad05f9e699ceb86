"""Files of blocks: what is read again, and what is not believed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ernie_train.core.errors import CheckpointError
from ernie_train.io.block_file import BlockFile

BLOCKS = [
    [np.linspace(-1, 0, length, dtype=np.float32) / block for length in lengths]
    for block, lengths in enumerate(([3, 1, 4], [2], [7, 7]), start=1)
]


def added(path: Path, count: int = 3, made_of: str = "pairs") -> int:
    """Read the first `count` blocks, write those that lack; return how many were written."""
    file, written = BlockFile(path), 0
    file.begin({"data": made_of}, "d")
    for arrays in BLOCKS[:count]:
        found = file.read([len(array) for array in arrays])
        if found is None:
            file.append(arrays)
            written += 1
        else:
            assert [f.tobytes() for f in found] == [a.tobytes() for a in arrays]
    return written


def test_blocks_are_added_behind_those_that_are_there(tmp_path):
    path = tmp_path / "file"
    assert [added(path, count) for count in (2, 2, 3, 1, 3)] == [2, 0, 1, 0, 0]
    head, _, content = path.read_bytes().partition(b"\n")
    assert head == b'{"data": "pairs"}'
    assert len(content) == sum(4 * sum(map(len, arrays)) + 4 for arrays in BLOCKS)


@pytest.mark.parametrize(
    ("damage", "lacks"), [("cut", 1), ("zeros", 1), ("flipped", 2), ("longer", 0), ("begun", 3)]
)
def test_what_a_kill_or_a_power_cut_left_is_written_anew(tmp_path, damage, lacks):
    path = tmp_path / "file"
    added(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-4 * 14 - 4 - 5] ^= 1  # in the second block
    damaged = {
        "cut": whole[:-9], "zeros": whole[:-9] + bytes(9), "flipped": flipped,
        "longer": whole + b"\0\0", "begun": whole.partition(b"\n")[0] + b"\n",
    }  # fmt: skip
    path.write_bytes(damaged[damage])
    assert added(path) == lacks
    assert path.read_bytes()[: len(whole)] == whole and added(path) == 0


def test_a_file_of_something_else_and_a_damaged_one_are_refused(tmp_path):
    path = tmp_path / "file"
    added(path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"something else: data: pairs -> others\. Give anot"):
        added(path, made_of="others")
    assert path.read_bytes() == before
    path.write_bytes(b'{"data": "pai')
    with pytest.raises(CheckpointError, match=r"damaged .*; delete it, and it is computed again"):
        added(path)
