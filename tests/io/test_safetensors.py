"""Sharded safetensors: the format's own library reads what we write, damage is named."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from ernie_train.core.errors import ConfigError, StorageError, WeightsError
from ernie_train.io.files import digest_file
from ernie_train.io.safetensors import (
    ArraysByOtherNames,
    TensorEntry,
    TensorFiles,
    array_entries,
    convert,
    from_bfloat16,
    parse_size,
    to_bfloat16,
    write_tensor_files,
)

Referee = Callable[..., Any]


def arrays(count: int = 6, size: int = 1000) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {f"t{i}": random.standard_normal((size // 10, 10), np.float32) for i in range(count)}


def test_the_library_reads_one_file(tmp_path: Path) -> None:
    values: dict[str, np.ndarray] = arrays(3)
    values |= {"steps": np.array(7), "ids": np.arange(5, dtype=np.int32), "none": np.zeros((0, 3))}
    values["turned"] = values["t0"].T
    digests = write_tensor_files(tmp_path, "model", array_entries(values))
    assert list(digests) == ["model.safetensors"]
    assert digests["model.safetensors"] == digest_file(tmp_path / "model.safetensors")
    read = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert read.keys() == values.keys()
    for name, array in values.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    values = arrays()
    safetensors.numpy.save_file(values, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert files.keys() == values.keys()
    for name, array in values.items():
        np.testing.assert_array_equal(files[name], array)


def test_shards_and_index(tmp_path: Path) -> None:
    values = arrays(6, 1000)  # 4000 bytes each
    digests = write_tensor_files(tmp_path, "model", array_entries(values), 8000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 24000
    assert sorted(set(index["weight_map"].values())) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    for name, file in index["weight_map"].items():
        assert name in safetensors.numpy.load_file(tmp_path / file)
    assert all(digest_file(tmp_path / name) == digest for name, digest in digests.items())
    read = TensorFiles(tmp_path)
    for name, array in values.items():
        np.testing.assert_array_equal(read[name], array)


def test_files_written_at_once_are_those_written_one_by_one(tmp_path: Path) -> None:
    values = {**arrays(20, 1000), "ids": np.arange(6, dtype=np.int32)}  # eleven files
    values["turned"] = values["t3"].T
    digests = []
    for at_once, directory in ((1, tmp_path / "one"), (4, tmp_path / "four")):
        directory.mkdir()
        entries = array_entries(values)
        digests.append(write_tensor_files(directory, "x", entries, 8000, files_at_once=at_once))
    assert len(digests[0]) == 12 and digests[0] == digests[1]
    for name, digest in digests[1].items():
        assert digest_file(tmp_path / "four" / name) == digest
        assert (tmp_path / "four" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize("at_once", [1, 3])
def test_tensors_are_read_in_the_calling_thread_shortly_before(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paddle's are: another thread would have another GPU. Only files at work are in memory."""
    synced, ahead = [], []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(1))

    def produce() -> np.ndarray:
        assert threading.current_thread() is threading.main_thread()
        ahead.append(len(ahead) - len(synced))
        return np.zeros(10, np.float32)

    entries = [TensorEntry(f"t{n}", (10,), "F32", produce) for n in range(12)]
    write_tensor_files(tmp_path, "x", entries, 40, files_at_once=at_once)
    assert len(ahead) == 12 and max(ahead) <= at_once - 1


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("bad", range(8))
def test_one_file_that_cannot_be_written_ends_all(bad: int, at_once: int, tmp_path: Path) -> None:
    (tmp_path / f"x-{bad + 1:05d}-of-00008.safetensors").mkdir()
    with pytest.raises(StorageError, match=f"cannot write: Is a directory.*{bad + 1:05d}-of"):
        write_tensor_files(tmp_path, "x", array_entries(arrays(8)), 4000, files_at_once=at_once)
    running = [thread.name for thread in threading.enumerate() if "ThreadPool" in thread.name]
    assert not running


def test_a_tensor_above_the_limit_gets_its_own_shard(tmp_path: Path) -> None:
    values = {"small": np.zeros(10, np.float32), "large": np.zeros(1000, np.float32)}
    write_tensor_files(tmp_path, "model", array_entries(values), 100)
    assert len(TensorFiles(tmp_path).files) == 2


def test_mixed_dtypes_stay_aligned(tmp_path: Path) -> None:
    odd = np.arange(3, dtype=np.float32)
    entries = [
        TensorEntry("a", (3,), "BF16", lambda: odd),
        TensorEntry("b", (3,), "F32", lambda: odd),
    ]
    write_tensor_files(tmp_path, "model", entries)
    files = TensorFiles(tmp_path)
    assert files.stored["b"].offset % 4 == 0
    np.testing.assert_array_equal(files["a"], odd)
    np.testing.assert_array_equal(files["b"], odd)


def test_shape_that_was_not_announced(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="announced"):
        write_tensor_files(
            tmp_path, "model", [TensorEntry("a", (4,), "F32", lambda: np.zeros(3, np.float32))]
        )


@pytest.mark.parametrize(
    ("size", "count"),
    [("5GB", 5 * 10**9), ("1.5 MB", 1500000), ("2GiB", 2**31), (4096, 4096), ("10b", 10)],
)
def test_sizes(size: int | str, count: int) -> None:
    assert parse_size(size) == count


@pytest.mark.parametrize("size", ["big", "", 0, -5, "5 TBs", "GB"])
def test_no_sizes(size: int | str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(size)


# ---- bfloat16 ----------------------------------------------------------------------------------


def special_floats() -> np.ndarray:
    random = np.random.default_rng(1)
    bits = random.integers(0, 2**32, 20000, dtype=np.uint32)
    ties = (random.integers(0, 2**16, 5000, dtype=np.uint32) << 16) | 0x8000
    named = np.array([0.0, -0.0, np.inf, -np.inf, 3.4028235e38, 1e-45, 65504.0], np.float32)
    values = np.concatenate([bits.view(np.float32), ties.view(np.float32), named])
    return values


def test_bfloat16_rounds_like_torch(referee: Referee, tmp_path: Path) -> None:
    values = special_floats()
    np.save(tmp_path / "in.npy", values)
    referee("hf_bfloat16.py", tmp_path / "in.npy", tmp_path / "out.npy")
    expected = np.load(tmp_path / "out.npy")
    bits = to_bfloat16(values)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(bits[number], expected[number])
    assert np.isnan(from_bfloat16(bits[~number])).all()


def test_bfloat16_round_trip_is_exact() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = from_bfloat16(bits)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(to_bfloat16(values)[number], bits[number])
    np.testing.assert_array_equal(convert(bits[number], "F32"), values[number])


# ---- damage ------------------------------------------------------------------------------------


def sharded(directory: Path) -> list[Path]:
    write_tensor_files(directory, "model", array_entries(arrays()), 8000)
    return sorted(directory.glob("*-of-*.safetensors"))


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such directory"):
        TensorFiles(tmp_path / "absent")


def test_no_weights_but_others(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin must be converted"):
        TensorFiles(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path)[1].unlink()
    with pytest.raises(WeightsError, match="missing: model-00002-of-00003"):
        TensorFiles(tmp_path)


def test_stale_single_file(tmp_path: Path) -> None:
    sharded(tmp_path)
    safetensors.numpy.save_file(arrays(1), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="has both"):
        TensorFiles(tmp_path)


def test_an_index_of_a_single_file(tmp_path: Path) -> None:
    """As other programs write it, mlx-lm for one."""
    safetensors.numpy.save_file(arrays(), tmp_path / "model.safetensors")
    index = {"weight_map": dict.fromkeys(arrays(), "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert TensorFiles(tmp_path).keys() == arrays().keys()


def test_index_of_other_files(tmp_path: Path) -> None:
    files = sharded(tmp_path)
    safetensors.numpy.save_file({"t0": np.zeros(3), "new": np.zeros(2)}, files[0])
    with pytest.raises(WeightsError, match=r"index does not fit.*t1.*new"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"index\.json"):
        TensorFiles(tmp_path)


def test_index_cannot_point_elsewhere(tmp_path: Path) -> None:
    text = json.dumps({"weight_map": {"a": "../other.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match="outside"):
        TensorFiles(tmp_path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    write_tensor_files(tmp_path, "model", array_entries(arrays(2, 100)))
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for length in [0, 1, 7, 8, 9, 50, 120, len(whole) // 2, len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"model\.safetensors: truncated or damaged"):
            TensorFiles(tmp_path)


def test_file_that_shrinks_while_open(tmp_path: Path) -> None:
    write_tensor_files(tmp_path, "model", array_entries(arrays(2, 100)))
    files = TensorFiles(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    last = max(files, key=lambda name: files.stored[name].offset)
    with pytest.raises(WeightsError, match=f"middle of {last}"):
        files[last]


def test_any_flipped_bit_of_a_header_is_an_error_or_harmless(tmp_path: Path) -> None:
    write_tensor_files(tmp_path, "model", array_entries(arrays(2, 100)))
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    errors = 0
    for position in range(length):
        for bit in (0, 3, 6):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                files = TensorFiles(tmp_path)
                for name in files:  # whatever it is called now, its bytes can be read
                    assert files[name] is not None
            except WeightsError:
                errors += 1
    assert errors > length  # most of the three flips of each byte are noticed


def test_a_directory_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        TensorFiles(tmp_path)


def test_writing_into_nowhere(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="absent"):
        write_tensor_files(tmp_path / "absent", "model", array_entries(arrays(1)))


def test_arrays_by_other_names_are_read_when_asked_for():
    class Counted(dict):
        asked: ClassVar[list] = []

        def __getitem__(self, key):
            self.asked.append(key)
            return super().__getitem__(key)

    arrays = ArraysByOtherNames(Counted({"m/a": np.ones(1), "m/b": np.zeros(1)}), {"a": "m/a"})
    assert "a" in arrays and "m/a" not in arrays and list(arrays) == ["a"] and len(arrays) == 1
    assert Counted.asked == []
    assert arrays["a"][0] == 1 and Counted.asked == ["m/a"]
