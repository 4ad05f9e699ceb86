"""Store encoded documents compactly: one array of tokens per source, not one list per row."""

import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class EncodedDocument:
    """Hold the ids [L] int32 of a document and the mask trainable [L] of tokens to be predicted."""

    ids: Int32
    trainable: Bool
    source: str = ""


class Documents:
    """Hold the encoded documents of one source; a sequence of `EncodedDocument`.

    N documents of T tokens in total are stored as tokens [T] int32, trainable [T] bool and offsets
    [N+1] int64: document i is the slice offsets[i]:offsets[i+1]. `sources` holds the origin of each
    document ("file:line"), or is empty.
    """

    def __init__(
        self, tokens: Int32, trainable: Bool, offsets: Int64, sources: Sequence[str] = ()
    ) -> None:
        self.tokens, self.trainable, self.offsets = tokens, trainable, offsets
        self.sources = sources

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> EncodedDocument:
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        part = slice(self.offsets[index], self.offsets[index + 1])
        source = self.sources[index] if len(self.sources) else ""
        return EncodedDocument(self.tokens[part], self.trainable[part], source)

    def __iter__(self) -> Iterator[EncodedDocument]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> Int64:
        """Return the number of tokens of each document, [N]."""
        return np.diff(self.offsets)

    def select(self, chosen: Bool) -> "Documents":
        """Return the documents where `chosen` [N] is true, in the same order."""
        lengths = self.lengths
        kept = np.repeat(chosen, lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths[chosen])]).astype(np.int64)
        sources = [s for s, keep in zip(self.sources, chosen, strict=False) if keep]
        return Documents(self.tokens[kept], self.trainable[kept], offsets, sources)

    def checksum(self) -> int:
        """Return a CRC-32 of the tokens, masks and boundaries."""
        value = zlib.crc32(np.ascontiguousarray(self.tokens).data)
        value = zlib.crc32(np.ascontiguousarray(self.trainable).data, value)
        return zlib.crc32(np.ascontiguousarray(self.offsets).data, value)


class DocumentBuilder:
    """Collect documents one by one, at 5 bytes per token."""

    def __init__(self) -> None:
        self._tokens = array("i")
        self._trainable = array("b")
        self._offsets = array("q", [0])
        self._sources: list[str] = []

    def add(self, ids: Sequence[int], trainable: Sequence[bool], source: str = "") -> None:
        self._tokens.extend(ids)
        self._trainable.extend(trainable)
        self._offsets.append(len(self._tokens))
        self._sources.append(source)

    def build(self) -> Documents:
        return Documents(
            np.array(self._tokens, dtype=np.int32),
            np.array(self._trainable, dtype=np.bool_),
            np.array(self._offsets, dtype=np.int64),
            self._sources,
        )
