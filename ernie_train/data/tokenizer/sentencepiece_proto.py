"""Reads the few fields we need of a serialized SentencePiece model.

The protobuf classes that the `sentencepiece` package ships ask for a newer protobuf than paddlenlp
allows, and its Python API tells neither a user-defined piece nor the dummy prefix.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class PieceType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class ModelProto:
    pieces: list[Piece]
    is_bpe: bool
    add_dummy_prefix: bool


def parse_model(data: bytes) -> ModelProto:
    """Parse `tokenizer.model`; ValueError where the bytes are not a SentencePiece model."""
    pieces: list[Piece] = []
    is_bpe = False
    add_dummy_prefix = True  # the format's default
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_piece(value))
        elif number == 2 and isinstance(value, bytes):
            is_bpe = any(key == 3 and item == 2 for key, item in _fields(value))
        elif number == 3 and isinstance(value, bytes):
            for key, item in _fields(value):
                if key == 3:
                    add_dummy_prefix = bool(item)
    if not pieces:
        raise ValueError("it holds no pieces")
    return ModelProto(pieces, is_bpe, add_dummy_prefix)


def without_dummy_prefix(data: bytes) -> bytes:
    """The same model that adds no space in front of a text.

    A message that occurs twice is merged when read, so appending one field is enough:
    normalizer_spec (3) { add_dummy_prefix (3): false }.
    """
    return data + b"\x1a\x02\x18\x00"


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, PieceType.NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = PieceType(value)
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message; fixed-width values come as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == _BYTES:
            size, position = _varint(data, position)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"unknown wire type {wire}")
        if position + size > len(data):
            raise ValueError("it ends in the middle of a field")
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("it ends in the middle of a number")
