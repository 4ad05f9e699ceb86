"""Load, train and use SentencePiece tokenizers.

ERNIE's ids: `<unk>` = pad 0, `<s>` 1, `</s>` 2. Encoding adds neither bos nor a leading space, so
that texts can be encoded separately and their ids joined wherever the boundary is a separate token
(special tokens, markup, the newline).
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from ernie_train.core.errors import DataError
from ernie_train.core.foreign_files import read_bytes
from ernie_train.data.chat_template import (
    CONTROL_TOKENS,
    ERNIE_THINKING,
    MARKUP_TOKENS,
    shipped_template,
)
from ernie_train.data.completion_format import EOS
from ernie_train.data.tokenizer.base import (
    ChatFormat,
    Offsets,
    Tokenizer,
    WholeTokens,
    check_unicode,
    decode_known,
)
from ernie_train.data.tokenizer.hf_files import (
    TOKENIZER_FILES,
    TokenizerConfig,
    special_tokens,
    write_huggingface_files,
)
from ernie_train.data.tokenizer.sentencepiece_proto import (
    PieceType,
    parse_model,
    without_dummy_prefix,
)
from ernie_train.io.files import atomic_write

MODEL_FILE = "tokenizer.model"
UNK, BOS = "<unk>", "<s>"


class SentencePieceTokenizer(Tokenizer):
    """Tokenize with a `tokenizer.model` and the added tokens of the files beside it.

    Raises:
        DataError: a file is damaged, a special token is missing, or the model adds a leading space.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        model_path = directory / MODEL_FILE
        try:
            data = self._model_bytes = read_bytes(model_path)
            self._proto = parse_model(data)
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(without_dummy_prefix(data))
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{model_path} is not a SentencePiece model: {error}") from error
        config = TokenizerConfig.read(directory)
        if self._proto.add_dummy_prefix and config.content.get("add_prefix_space") is not False:
            raise DataError(
                f"{model_path} puts a space in front of every text, which ERNIE tokenizers do not; "
                'if the model was trained without it, write "add_prefix_space": false into '
                "tokenizer_config.json"
            )
        self._added = {
            text: token_id
            for text, token_id in config.added_tokens().items()
            if not self._is_user_defined(text, token_id)
        }
        self._set_special_tokens(config)

    def _set_special_tokens(self, config: TokenizerConfig) -> None:
        pieces = self._proto.pieces
        ids = {piece.text: token_id for token_id, piece in enumerate(pieces)} | self._added
        whole = {p.text for p in pieces if p.type in (PieceType.CONTROL, PieceType.UNKNOWN)}
        whole |= {*self._added, *special_tokens(self._proto)}
        self._ids = ids
        self._whole = WholeTokens({text: ids[text] for text in whole})
        self.vocab_size = max(ids.values()) + 1
        ernie = {"bos_token": BOS, "eos_token": EOS, "pad_token": UNK}
        self.special_tokens = {**ernie, **config.special_tokens}
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            self._required(self.special_tokens[role]) for role in ernie
        )
        special = set(special_tokens(self._proto))
        special |= {text for text in self._added if text in CONTROL_TOKENS}
        flagged = config.special_added() & ids.keys() - set(MARKUP_TOKENS)
        self._flagged = flagged - special - set(self.special_tokens.values())
        special |= flagged
        self.control_tokens = frozenset(special)
        self._special_ids = {ids[text] for text in special}

    def _is_user_defined(self, text: str, token_id: int) -> bool:
        pieces = self._proto.pieces
        if not 0 <= token_id < len(pieces):
            return False
        return pieces[token_id].text == text and pieces[token_id].type is PieceType.USER_DEFINED

    def _required(self, piece: str) -> int:
        if piece not in self._ids:
            raise DataError(f"{self.directory / MODEL_FILE} has no piece {piece!r}")
        return self._ids[piece]

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        try:
            return self._whole.encode(text, self._encode_rest)
        except (RuntimeError, UnicodeEncodeError):
            check_unicode(text)
            raise

    def _encode_rest(self, text: str) -> tuple[list[int], Offsets]:
        pieces = self._processor.encode(text, return_type="proto").pieces
        # The library counts bytes; all bytes of a character that is spelled in bytes belong to it.
        chars = [at for at, char in enumerate(text) for _ in char.encode()] + [len(text)]
        offsets: Offsets = []
        for piece in pieces:
            start = chars[piece.begin]
            offsets.append((start, max(chars[piece.end], start + 1)))
        return [piece.id for piece in pieces], offsets

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        drop = self._special_ids if skip_special_tokens else set()
        return decode_known(
            ids,
            self.vocab_size,
            lambda known: self._whole.decode(known, self._processor.decode, drop),
        )

    def token_id(self, piece: str) -> int | None:
        return self._ids.get(piece)

    def _complete_files(self, out_dir: Path) -> None:
        if not (out_dir / "tokenizer.json").exists():
            roles = {role: t for role, t in self.special_tokens.items() if t in self._ids}
            write_huggingface_files(out_dir, self._proto, self._added, self.control_tokens, roles)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._model_bytes)
        digest.update(json.dumps(sorted(self._added.items())).encode())
        digest.update(str((self.pad_token_id, self.bos_token_id, self.eos_token_id)).encode())
        if self._flagged:  # they are encoded as plain text where the data has them
            digest.update(json.dumps(sorted(self._flagged)).encode())
        return digest.hexdigest()


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, out_dir: str | Path
) -> SentencePieceTokenizer:
    """Train a BPE tokenizer with ERNIE's special tokens and write it, Hugging Face files included.

    Deterministic: it uses one thread and all texts. Files of another tokenizer in `out_dir` are
    replaced.

    Raises:
        DataError: `vocab_size` is too small or too large for the texts.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,  # pad is unk, as in ERNIE
            unk_surface=UNK,
            user_defined_symbols=[*CONTROL_TOKENS, *MARKUP_TOKENS, "\n"],
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,  # indentation of code
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            character_coverage=0.9998,
            max_sentence_length=2**20,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"cannot train a tokenizer of {vocab_size} pieces on these texts: {error}"
        ) from error
    for name in TOKENIZER_FILES:
        (out_dir / name).unlink(missing_ok=True)
    with atomic_write(out_dir / MODEL_FILE) as stream:
        stream.write(model.getvalue())
    tokenizer = SentencePieceTokenizer(out_dir)
    tokenizer.chat = ChatFormat(shipped_template(ERNIE_THINKING, tokenizer.special_tokens))
    tokenizer.save_pretrained(out_dir)
    return tokenizer


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    # A newline is a separate piece, so no piece spans two lines, and each line is trained alone.
    for text in texts:
        yield from filter(None, text.split("\n"))
