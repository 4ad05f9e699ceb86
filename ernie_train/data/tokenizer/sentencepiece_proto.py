"""Parse the few fields of a serialized SentencePiece model that the toolkit needs.

The protobuf classes that sentencepiece 0.2.3 ships need protobuf 7, which paddlenlp does not allow,
and its Python API exposes neither user-defined pieces nor the dummy prefix. So the messages are
defined here, as in sentencepiece_model.proto (proto2); fields that are not listed are ignored.
"""

import functools
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class PieceType(IntEnum):
    """Enumerate the kinds of pieces, numbered as in sentencepiece_model.proto."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_BPE = 2  # TrainerSpec.ModelType
# Message -> fields: name, number, type, default. Enums are read as int32, to refuse unknown values.
_MESSAGES: dict[str, list[tuple[str, int, str, str]]] = {
    "SentencePiece": [
        ("piece", 1, "string", ""), ("score", 2, "float", "0"), ("type", 3, "int32", "1"),
    ],
    "TrainerSpec": [("model_type", 3, "int32", "1")],
    "NormalizerSpec": [("add_dummy_prefix", 3, "bool", "true")],
    "ModelProto": [
        ("pieces", 1, "SentencePiece", ""), ("trainer_spec", 2, "TrainerSpec", ""),
        ("normalizer_spec", 3, "NormalizerSpec", ""),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class SentencePiece:
    """Hold a token with its score and kind."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencePieceModel:
    """Hold the fields of a serialized model that the toolkit needs."""

    pieces: list[SentencePiece]
    is_bpe: bool
    add_dummy_prefix: bool


def parse_model(data: bytes) -> SentencePieceModel:
    """Parse the content of `tokenizer.model`.

    Raises:
        ValueError: the bytes are not a SentencePiece model.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = _message_class().FromString(data)
    except DecodeError as error:
        raise ValueError(str(error)) from None
    if not model.pieces:
        raise ValueError("it holds no pieces")
    pieces = [SentencePiece(p.piece, p.score, PieceType(p.type)) for p in model.pieces]
    is_bpe = model.trainer_spec.model_type == _BPE
    return SentencePieceModel(pieces, is_bpe, model.normalizer_spec.add_dummy_prefix)


def without_dummy_prefix(data: bytes) -> bytes:
    """Return the serialized model, changed so that it adds no leading space to a text.

    A message that occurs twice is merged when parsed, so appending one field is enough:
    normalizer_spec (3) { add_dummy_prefix (3): false }.
    """
    return data + b"\x1a\x02\x18\x00"


@functools.cache
def _message_class() -> Any:
    # Imported here because it takes 40 ms.
    from google.protobuf import (  # type: ignore[import-untyped]
        descriptor_pb2,
        descriptor_pool,
        message_factory,
    )

    package = "ernie_train.sentencepiece"
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package)
    kinds = descriptor_pb2.FieldDescriptorProto
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, number, kind, default in fields:
            field = described.field.add(name=name, number=number, label=kinds.LABEL_OPTIONAL)
            if kind in _MESSAGES:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".{package}.{kind}"
            else:
                field.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
                field.default_value = default
            if name == "pieces":
                field.label = kinds.LABEL_REPEATED
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindMessageTypeByName(f"{package}.ModelProto")
    return message_factory.GetMessageClass(found)
