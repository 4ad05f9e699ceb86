"""Write the tokenizer files that `transformers` 4.57 and 5.x both load to the same ids.

`transformers` 4.57 returns wrong ids for a `tokenizer.model` alone, so `tokenizer.json` and
`tokenizer_config.json` are written too; both versions then agree with SentencePiece.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ernie_train.core import foreign_files
from ernie_train.core.errors import DataError
from ernie_train.data.chat_template import CHAT_TEMPLATE, CONTROL_TOKENS, PLAIN_CHAT_TEMPLATE
from ernie_train.data.completion_format import SENTENCE_END, SENTENCE_START
from ernie_train.data.tokenizer.sentencepiece_proto import (
    PieceType,
    SentencePiece,
    SentencePieceModel,
)
from ernie_train.io.files import write_json, write_text

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


def write_huggingface_files(
    out_dir: Path, proto: SentencePieceModel, added: Mapping[str, int] | None = None
) -> None:
    """Write the files of a tokenizer, except `tokenizer.model` and the chat template.

    `added`: tokens beyond those of the proto, with their ids.

    Raises:
        DataError: the model is not BPE, or the added tokens leave a gap in the ids.
    """
    added = added or {}
    special = special_tokens(proto) + [text for text in added if text in CONTROL_TOKENS]
    whole = {piece.text: i for i, piece in enumerate(proto.pieces) if _is_whole(piece)}
    whole.update(added)
    _write_tokenizer_json(out_dir / "tokenizer.json", proto, whole, special)
    named = _named_tokens(proto)
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizerFast",
        "legacy": False,
        "add_prefix_space": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **named,
        "additional_special_tokens": [t for t in special if t not in named.values()],
        "added_tokens_decoder": {
            str(token_id): _added_token(text, text in special) for text, token_id in whole.items()
        },
    }
    write_json(out_dir / "tokenizer_config.json", config)
    write_json(
        out_dir / "special_tokens_map.json",
        {**named, "additional_special_tokens": config["additional_special_tokens"]},
    )


def write_chat_template(out_dir: Path, thinking: bool) -> None:
    """Write the Thinking or plain chat template to both files in which libraries look for it."""
    template = CHAT_TEMPLATE if thinking else PLAIN_CHAT_TEMPLATE
    write_text(out_dir / "chat_template.jinja", template)
    path = out_dir / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    write_json(path, {**config, "chat_template": template})


def special_tokens(proto: SentencePieceModel) -> list[str]:
    """Return the pieces that `skip_special_tokens` omits: unk, control pieces and turn tokens."""
    return [
        piece.text
        for piece in proto.pieces
        if piece.type in (PieceType.UNKNOWN, PieceType.CONTROL) or piece.text in CONTROL_TOKENS
    ]


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that contains one JSON object.

    Raises:
        DataError: it contains anything else.
    """
    try:
        return foreign_files.read_json(path)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON of a tokenizer: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _is_whole(piece: SentencePiece) -> bool:
    return piece.type in (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED)


def _added_token(text: str, special: bool) -> dict[str, Any]:
    return {
        "content": text,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": special,
    }


def _named_tokens(proto: SentencePieceModel) -> dict[str, str]:
    """Return role -> special token as in ERNIE: pad is unk, cls and sep are the plain chat's."""
    texts = {piece.text for piece in proto.pieces}
    unknown = next(p.text for p in proto.pieces if p.type is PieceType.UNKNOWN)
    named = {"unk_token": unknown, "pad_token": unknown}
    roles = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "cls_token": SENTENCE_START,
        "sep_token": SENTENCE_END,
    }
    return named | {role: text for role, text in roles.items() if text in texts}


def _write_tokenizer_json(
    path: Path, proto: SentencePieceModel, whole: Mapping[str, int], special: list[str]
) -> None:
    from tokenizers import (  # type: ignore[import-untyped]
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
    )

    if not proto.is_bpe:
        raise DataError(
            "tokenizer.model is not a BPE model, so no tokenizer.json can be made from it; "
            "put the tokenizer.json that belongs to it into the same directory"
        )
    vocabulary = {piece.text: token_id for token_id, piece in enumerate(proto.pieces)}
    unknown = next(p.text for p in proto.pieces if p.type is PieceType.UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(proto),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(p.type is PieceType.BYTE for p in proto.pieces),
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    for text, token_id in sorted(whole.items(), key=lambda item: item[1]):
        token = AddedToken(text, normalized=False, special=text in special)
        if text in special:
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])
        if tokenizer.token_to_id(text) != token_id:
            raise DataError(
                f"the added token {text!r} has id {token_id}, but the ids before it leave a gap, "
                "which tokenizer.json cannot express; put your own tokenizer.json beside it"
            )
    tokenizer.save(str(path))


def _merges(proto: SentencePieceModel) -> list[tuple[str, str]]:
    """Return all pairs of pieces that form a piece, in the order in which SentencePiece merges."""
    mergeable = {
        piece.text: token_id
        for token_id, piece in enumerate(proto.pieces)
        if piece.type is PieceType.NORMAL
    }
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for text, token_id in mergeable.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in mergeable and right in mergeable:
                rank = -proto.pieces[token_id].score
                merges.append((rank, mergeable[left], mergeable[right], (left, right)))
    return [pair for *_, pair in sorted(merges)]
