"""Load the tokenizer of a directory with the library that reads its files best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ernie_train.core.errors import DataError, describe
from ernie_train.data.chat_template import (
    CONTROL_TOKENS,
    ERNIE_PLAIN,
    ERNIE_THINKING,
    SHIPPED_TEMPLATES,
    ChatTemplate,
    shipped_template,
)
from ernie_train.data.completion_format import IM_END, SENTENCE_END
from ernie_train.data.tokenizer.base import ChatFormat, Tokenizer
from ernie_train.data.tokenizer.hf_files import (
    TOKENIZER_FILES,
    optional_json,
    read_chat_template,
)
from ernie_train.data.tokenizer.huggingface import TOKENIZER_JSON, HuggingFaceTokenizer
from ernie_train.data.tokenizer.paddlenlp import PaddleNLPTokenizer
from ernie_train.data.tokenizer.sentencepiece import MODEL_FILE, SentencePieceTokenizer
from ernie_train.io.files import GENERATION_CONFIG


def load_tokenizer(
    path: str | Path, *, template: str | None = None, add: Sequence[str] = ()
) -> Tokenizer:
    """Load a tokenizer directory: tokenizer.json, else tokenizer.model, else by PaddleNLP.

    Args:
        path: the directory.
        template: the chat template to use instead of the directory's own: the name of a shipped
            one or a file.
        add: tokens to add behind the vocabulary; they need a tokenizer.json.

    Raises:
        DataError: the directory is missing or has no tokenizer, or a file in it is damaged.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise DataError(f"tokenizer directory {directory} does not exist")
    tokenizer = _load(directory, add)
    tokenizer.chat = ChatFormat(_template(tokenizer, template))
    tokenizer.declared_stop_ids = _declared_stops(directory)
    return tokenizer


def _load(directory: Path, add: Sequence[str]) -> Tokenizer:
    if (directory / TOKENIZER_JSON).is_file():
        return HuggingFaceTokenizer(directory, add)
    if add:
        raise DataError(f"{directory}: tokens can only be added to a {TOKENIZER_JSON}")
    if (directory / MODEL_FILE).is_file():
        return SentencePieceTokenizer(directory)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(
            f"{directory} holds no tokenizer: neither {MODEL_FILE} nor another file of "
            f"{', '.join(TOKENIZER_FILES[1:])}"
        )
    return PaddleNLPTokenizer(directory)


def _template(tokenizer: Tokenizer, name: str | None) -> ChatTemplate | None:
    """Return the template by name or file; else the directory's own; else ERNIE's, if it fits."""
    if name in SHIPPED_TEMPLATES:
        template = shipped_template(name, tokenizer.special_tokens)
        _require_tokens(tokenizer, template)
        return template
    if name is not None:
        try:
            return ChatTemplate(Path(name).read_text("utf-8-sig"), tokenizer.special_tokens, name)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"chat template {name}: {error}; it is a file, or {' or '.join(SHIPPED_TEMPLATES)}"
            ) from error
    own = read_chat_template(tokenizer.directory, tokenizer.special_tokens)
    if own is not None:
        return own
    for needed, shipped in ((IM_END, ERNIE_THINKING), (SENTENCE_END, ERNIE_PLAIN)):
        if tokenizer.token_id(needed) is not None:
            return shipped_template(shipped, tokenizer.special_tokens)
    return None


def _require_tokens(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    written = [token for token in CONTROL_TOKENS if token in template.source]
    missing = [token for token in written if tokenizer.token_id(token) is None]
    if missing:
        raise DataError(
            f"{tokenizer.directory}: the tokenizer has no token {' and no token '.join(missing)}, "
            f"which {template.origin} writes; add them by tokenizer.add, or use another template"
        )


def _declared_stops(directory: Path) -> list[int]:
    file = directory / GENERATION_CONFIG
    stops = optional_json(file).get("eos_token_id")
    if stops is None:
        return []
    found = stops if isinstance(stops, list) else [stops]
    if not all(type(stop) is int and stop >= 0 for stop in found):
        raise DataError(
            f"{file}: eos_token_id must be the id of a token or a list of them, got "
            f"{describe(stops)}"
        )
    return found
