"""Read and write numpy arrays in sharded safetensors files, one tensor at a time.

numpy has no bfloat16; here an array of dtype uint16 holds the bits of bfloat16 numbers, as
`paddle.Tensor.numpy()` returns them. Nothing in this module depends on a model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import ConfigError, WeightsError, storage_errors
from ernie_train.core.foreign_files import open_regular, read_json
from ernie_train.io.files import FileDigest, digest_file, write_json
from ernie_train.io.threads import GoOn, in_threads

# dtype name in safetensors -> dtype in numpy
NUMPY_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_STORED_DTYPES = {np.dtype(v): k for k, v in NUMPY_DTYPES.items() if k != "U16"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20,
          "GIB": 2**30}  # fmt: skip


def parse_size(size: int | str) -> int:
    """Convert "5GB", "200 MiB" or a plain number to bytes.

    Raises:
        ConfigError: it is not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]?I?B|)\s*", str(size).upper())
    amount = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if amount <= 0:
        raise ConfigError(f"max_shard_size must be a size like '5GB' or bytes, not {size!r}")
    return amount


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, to nearest, ties to even; return the bits as uint16.

    The shape is kept, and NaN stays NaN.
    """
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of each NaN
        rounded = np.asarray(array, np.float32).astype(ml_dtypes.bfloat16, order="C")
    return rounded.view(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Convert bits of bfloat16 (uint16) to float32, exactly.

    Done by a shift: ml_dtypes 0.5.4 took twenty times as long (0.24 s for 17 million numbers).
    """
    wide = bits.astype("<u4")
    wide <<= 16
    return wide.view("<f4")


def stored_dtype(dtype: np.dtype) -> str:
    """Return the name of a numpy dtype in safetensors; uint16 counts as bfloat16.

    Raises:
        WeightsError: safetensors has no such dtype.
    """
    name = _STORED_DTYPES.get(np.dtype(dtype).newbyteorder("<"))
    if name is None:
        raise WeightsError(f"arrays of dtype {dtype} cannot be stored")
    return name


def convert(array: np.ndarray, dtype: str) -> np.ndarray:
    """Convert an array to a contiguous one of a stored dtype ("F32", "BF16", ...).

    Raises:
        WeightsError: a number is too large for float16.
    """
    source = stored_dtype(array.dtype)
    if source != dtype:
        if source == "BF16":
            array = from_bfloat16(array)
        if dtype == "BF16":
            return to_bfloat16(array)
        if dtype == "F16" and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
            raise WeightsError(
                f"{np.abs(array).max():.3g} is too large for float16; bfloat16 or float32 hold it"
            )
    return np.asarray(array, dtype=NUMPY_DTYPES[dtype], order="C")


# ---- writing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorEntry:
    """Describe a tensor to be written; `produce` is called just before it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # "F32", "BF16", ...
    produce: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(NUMPY_DTYPES[self.dtype]).itemsize


def array_entries(arrays: Mapping[str, np.ndarray]) -> list[TensorEntry]:
    """Return entries that store the arrays in their own dtypes.

    Raises:
        WeightsError: safetensors has no such dtype.
    """
    return [
        TensorEntry(name, tuple(array.shape), stored_dtype(array.dtype), partial(np.asarray, array))
        for name, array in arrays.items()
    ]


def write_tensor_files(
    directory: Path,
    stem: str,
    entries: list[TensorEntry],
    max_shard_size: int | str = "5GB",
    *,
    files_at_once: int = 1,
) -> dict[str, FileDigest]:
    """Write `<stem>.safetensors`, or several such files with an index.

    One tensor is in memory at a time; of several `files_at_once` all tensors of these files are. A
    tensor larger than `max_shard_size` gets its own file. Every rank must call it, with the tensors
    that it alone writes; rank 0 writes the index.

    Returns:
        The digests of this rank's files, by file name.

    Raises:
        ConfigError: `max_shard_size` is not a size.
        StorageError: a file cannot be written.
        WeightsError: an entry produced another shape than it announced.
    """
    shards = [shard for shard in _split(entries, parse_size(max_shard_size)) if shard]
    if process_group.is_main() and not shards:
        shards = [[]]  # write one file even if there are no tensors
    held = [[(entry.name, entry.nbytes) for entry in shard] for shard in shards]
    told = process_group.all_gather_objects(held)
    every = [shard for part in told for shard in part]
    count, before = len(every), sum(map(len, told[: process_group.rank()]))
    names = [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    names = names if count > 1 else [f"{stem}.safetensors"]
    with consensus.fail_together():
        own = dict(zip(names[before:], shards, strict=False))
        files: Iterable[tuple[Path, list[TensorEntry]]] = [(directory / n, own[n]) for n in own]
        at_once = min(files_at_once, len(own))
        if at_once > 1:
            files = ((path, _produced(shard)) for path, shard in files)
        written = in_threads(lambda file, go_on: _write_file(*file, go_on), files, at_once)
        digests = dict(zip(own, written, strict=True))
        if count > 1 and process_group.is_main():
            index = directory / f"{stem}.safetensors.index.json"
            write_json(index, _index(dict(zip(names, every, strict=True))))
            digests[index.name] = digest_file(index)
    return digests


def _index(held: Mapping[str, list[tuple[str, int]]]) -> dict[str, Any]:
    """Return the content of an index; `held` maps a file to its (tensor name, bytes)."""
    total = sum(nbytes for tensors in held.values() for _, nbytes in tensors)
    weight_map = {name: file for file, tensors in held.items() for name, _ in tensors}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _split(entries: list[TensorEntry], limit: int) -> list[list[TensorEntry]]:
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _produced(entries: list[TensorEntry]) -> list[TensorEntry]:
    """Return entries that any thread may write: what Paddle holds is read in the calling one."""
    return [replace(entry, produce=partial(np.asarray, entry.produce())) for entry in entries]


def _write_file(path: Path, entries: list[TensorEntry], go_on: GoOn) -> FileDigest:
    # Wide numbers first: then every tensor is aligned, as the safetensors library writes them.
    entries = sorted(entries, key=lambda entry: -np.dtype(NUMPY_DTYPES[entry.dtype]).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end],
        }  # fmt: skip
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    sha = hashlib.sha256()
    size = 0
    with storage_errors("cannot write", path), path.open("wb") as stream:

        def put(data: bytes | memoryview) -> None:
            nonlocal size
            stream.write(data)
            sha.update(data)
            size += len(data)

        put(len(head).to_bytes(8, "little"))
        put(head)
        for entry in entries:
            go_on()
            try:
                array = convert(entry.produce(), entry.dtype)
            except WeightsError as error:
                raise WeightsError(f"{entry.name}: {error}") from None
            if array.shape != entry.shape:
                raise WeightsError(f"{entry.name}: {array.shape} announced as {entry.shape}")
            put(array.reshape(-1).view(np.uint8).data)
        # Not later by rank 0: it may be on another machine, and others are hashed meanwhile.
        stream.flush()
        os.fsync(stream.fileno())
    return FileDigest(size, sha.hexdigest())


# ---- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """Locate a tensor on disk: its file and offset, dtype and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


class ArraysByOtherNames(Mapping[str, np.ndarray]):
    """Rename arrays of a mapping; `names` maps new to old names. Arrays are read on access."""

    def __init__(self, arrays: Mapping[str, np.ndarray], names: Mapping[str, str]) -> None:
        self.arrays, self.names = arrays, names

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[self.names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class TensorFiles(Mapping[str, np.ndarray]):
    """Read the tensors of a directory's `<stem>*.safetensors` by name, each on access.

    bfloat16 is converted to float32. Files are read, not memory-mapped: a file that is truncated
    meanwhile is an error and not a crash, and memory holds only the arrays in use.

    Raises:
        WeightsError: files are missing, truncated or contradict each other.
    """

    def __init__(self, directory: Path, stem: str = "model") -> None:
        self.directory = directory
        self.files, listed = _find_files(directory, stem)
        self.stored: dict[str, StoredTensor] = {}
        for file in self.files:
            for name, tensor in _read_header(file).items():
                if name in self.stored:
                    raise WeightsError(f"{name} is both in {self.stored[name].file} and in {file}")
                self.stored[name] = tensor
        if listed is not None:
            _check_index(directory, listed, self.stored)

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.bits(name)
        return from_bfloat16(array) if self.stored[name].dtype == "BF16" else array

    def bits(self, name: str) -> np.ndarray:
        """Return a tensor as stored; uint16 holds the bits of bfloat16."""
        tensor = self.stored[name]
        count = math.prod(tensor.shape)
        try:
            with open_regular(tensor.file) as stream:
                array = np.fromfile(
                    stream, NUMPY_DTYPES[tensor.dtype], count=count, offset=tensor.offset
                )
        except OSError as error:
            raise WeightsError(f"{tensor.file}: cannot be read: {error.strerror}") from None
        if array.size != count:
            raise WeightsError(f"{tensor.file}: ends in the middle of {name}: truncated")
        return array.reshape(tensor.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _find_files(directory: Path, stem: str) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files of a stem, and the index (tensor -> file name) if there is one.

    Raises:
        WeightsError: there are no files, or the index is damaged or names missing files.
    """
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if not directory.is_dir():
        raise WeightsError(f"{directory}: no such directory")
    if single.exists() and not index.exists():
        return [single], None
    if not index.exists():
        others = [p.name for p in directory.glob("*") if p.suffix in (".bin", ".pdparams", ".pt")]
        hint = f"; {', '.join(sorted(others))} must be converted first" if others else ""
        raise WeightsError(f"{directory} has no {single.name} and no {index.name}{hint}")
    try:
        listed = read_json(index)["weight_map"]
        names = sorted(set(listed.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: damaged: no weight_map can be read ({error})") from None
    foreign = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if foreign:
        raise WeightsError(f"{index}: names files outside its directory: {foreign}")
    if single.exists() and names != [single.name]:
        raise WeightsError(f"{directory} has both {single.name} and {index.name}: delete the stale")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise WeightsError(f"{index} names files that are missing: {', '.join(missing)}")
    return [directory / name for name in names], listed


def _check_index(
    directory: Path, listed: Mapping[str, str], stored: Mapping[str, StoredTensor]
) -> None:
    absent = [n for n, file in listed.items() if n not in stored or stored[n].file.name != file]
    extra = [name for name in stored if name not in listed]
    if absent or extra:
        shown = ", ".join((absent + extra)[:20])
        raise WeightsError(
            f"{directory}: the index does not fit its files: {len(absent)} tensors are not in the "
            f"file it names, {len(extra)} are not in the index: {shown}"
        )


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        with open_regular(path) as stream:
            # The library validates the header and the length of the file.
            with safetensors.safe_open(path, framework="numpy"):
                pass
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path}: truncated or damaged ({error})") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from None
    header.pop("__metadata__", None)
    unknown = {entry["dtype"] for entry in header.values()} - NUMPY_DTYPES.keys()
    if unknown:
        raise WeightsError(f"{path}: dtype {', '.join(sorted(unknown))} cannot be read")
    return {
        name: StoredTensor(
            path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }
