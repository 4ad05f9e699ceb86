"""Store encoded documents compactly: one array of tokens per source, not one list per row."""

import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

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


class Origins(Sequence[str]):
    """Hold where N documents come from, "file:line" each, in 16 bytes.

    The origin i is the text prefixes[ids[i]] and the number numbers[i], if that is not negative.
    """

    def __init__(self, prefixes: list[str], ids: Sequence[int], numbers: Sequence[int]) -> None:
        self._prefixes, self._ids, self._numbers = prefixes, ids, numbers

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        number = int(self._numbers[index])
        return self._prefixes[self._ids[index]] + (str(number) if number >= 0 else "")


class Documents:
    """Hold the encoded documents of one source; a sequence of `EncodedDocument`.

    N documents of T tokens in total are stored as tokens [T] int32, trainable [T] bool and offsets
    [N+1] int64: document i is the slice offsets[i]:offsets[i+1]. `sources` holds the origin of each
    document ("file:line"), or is empty. `checksum` is theirs, where it is known.
    """

    def __init__(
        self,
        tokens: Int32,
        trainable: Bool,
        offsets: Int64,
        sources: Sequence[str] = (),
        checksum: int | None = None,
    ) -> None:
        self.tokens, self.trainable, self.offsets = tokens, trainable, offsets
        self.sources = sources
        self._checksum = checksum

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
        if self._checksum is not None:
            return self._checksum
        value = zlib.crc32(np.ascontiguousarray(self.tokens).data)
        value = zlib.crc32(np.ascontiguousarray(self.trainable).data, value)
        return zlib.crc32(np.ascontiguousarray(self.offsets).data, value)


class DocumentBuilder:
    """Collect documents one by one, at 5 bytes per token.

    If it continues other documents, `prefixes` are those of their origins, and `before` is the
    number of their tokens.
    """

    def __init__(self, prefixes: Sequence[str] = (), before: int = 0) -> None:
        self._tokens = array("i")
        self._trainable = array("b")
        self._ends = array("q")
        self._origins = array("q")  # the prefix's id and the number of each document
        self._prefixes = {prefix: at for at, prefix in enumerate(prefixes)}
        self._before = before

    @property
    def prefixes(self) -> list[str]:
        """Return the texts of origins before their number."""
        return list(self._prefixes)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def add(self, ids: Sequence[int], trainable: Sequence[bool], source: str = "") -> None:
        self._tokens.extend(ids)
        self._trainable.extend(trainable)
        self._ends.append(self._before + len(self._tokens))
        prefix = source.rstrip("0123456789")
        digits = source[len(prefix) :]
        if digits.startswith("0"):  # no number of a line
            prefix, digits = source, ""
        number = int(digits or -1)
        self._origins.append(self._prefixes.setdefault(prefix, len(self._prefixes)))
        self._origins.append(number)

    def arrays(self) -> "dict[str, array[int]]":
        """Return tokens [T], trainable [T], ends [N] and origins [2N] as machine values."""
        return {
            "tokens": self._tokens,
            "trainable": self._trainable,
            "ends": self._ends,
            "origins": self._origins,
        }

    def successor(self) -> "DocumentBuilder":
        """Return a builder of the documents that follow these."""
        return DocumentBuilder(self.prefixes, self._before + len(self._tokens))

    def build(self) -> Documents:
        ids, numbers = np.array(self._origins, dtype=np.int64).reshape(-1, 2).T
        return Documents(
            np.array(self._tokens, dtype=np.int32),
            np.array(self._trainable, dtype=np.bool_),
            np.array([0, *self._ends], dtype=np.int64),
            Origins(self.prefixes, ids.tolist(), numbers.tolist()),
        )
