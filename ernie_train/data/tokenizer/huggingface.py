"""Use a `tokenizer.json` through the `tokenizers` library, whichever class its directory names."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken  # type: ignore[import-untyped]
from tokenizers import Tokenizer as Backend

from ernie_train.core.errors import DataError
from ernie_train.data.chat_template import CONTROL_TOKENS, MARKUP_TOKENS
from ernie_train.data.tokenizer.base import (
    Offsets,
    Tokenizer,
    check_unicode,
    decode_known,
)
from ernie_train.data.tokenizer.hf_files import CONFIG_FILE, TokenizerConfig, optional_json
from ernie_train.io.files import write_json, write_text

TOKENIZER_JSON = "tokenizer.json"


class HuggingFaceTokenizer(Tokenizer):
    """Tokenize as the `tokenizer.json` of a directory says.

    added: tokens to add behind its own, each encoded as one id.

    Raises:
        DataError: a file is damaged, or no eos_token is named.
    """

    def __init__(self, directory: Path, added: Sequence[str] = ()) -> None:
        self.directory = directory
        path = directory / TOKENIZER_JSON
        config = TokenizerConfig.read(directory)
        try:
            self._backend = Backend.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"{path} is not a tokenizer: {error}") from error
        if dropout := getattr(self._backend.model, "dropout", None):
            raise DataError(
                f"{path}: its model has dropout {dropout:g}, by which a text has other ids each "
                "time; a run could not be repeated. Write null there"
            )
        self._backend.no_truncation()
        self._backend.no_padding()
        self._add(config.added_tokens(), config.special_added())
        self._added = [text for text in added if self._backend.token_to_id(text) is None]
        self._add(dict.fromkeys(added))
        names: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(names.values(), default=-1) + 1
        self.special_tokens = config.special_tokens
        ids = config.special_ids(self._backend.token_to_id)
        self.bos_token_id, self.eos_token_id, self.pad_token_id = ids
        special = {
            t.content for t in self._backend.get_added_tokens_decoder().values() if t.special
        }
        special |= {text for text in config.special_tokens.values() if text in names}
        special |= set(CONTROL_TOKENS) & names.keys()
        self.control_tokens = frozenset(special - set(MARKUP_TOKENS))
        self._control_ids = {names[text] for text in self.control_tokens}

    def _add(self, tokens: Mapping[str, int | None], special: Collection[str] = ()) -> None:
        for text, token_id in tokens.items():
            known = self._backend.token_to_id(text)
            if known is None:
                added = AddedToken(text, normalized=False, special=text in special)
                self._backend.add_tokens([added])
                known = self._backend.token_to_id(text)
            if token_id is not None and known != token_id:
                raise DataError(
                    f"{self.directory}: tokenizer_config.json gives the token {text!r} the id "
                    f"{token_id}, tokenizer.json the id {known}"
                )

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            check_unicode(text)
            raise
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        def decode(known: list[int]) -> str:
            if skip_special_tokens:
                known = [i for i in known if i not in self._control_ids]
            return str(self._backend.decode(known, skip_special_tokens=False))

        return decode_known(ids, self.vocab_size, decode)

    def token_id(self, piece: str) -> int | None:
        found = self._backend.token_to_id(piece)
        return None if found is None else int(found)

    def _complete_files(self, out_dir: Path) -> None:
        config = optional_json(out_dir / CONFIG_FILE)
        if config.pop("auto_map", None):  # a class in a file of code, which is not copied
            write_json(
                out_dir / CONFIG_FILE, config | {"tokenizer_class": "PreTrainedTokenizerFast"}
            )
        if self._added:
            write_text(out_dir / TOKENIZER_JSON, self._backend.to_str(pretty=True))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._backend.to_str().encode())
        digest.update(str((self.pad_token_id, self.bos_token_id, self.eos_token_id)).encode())
        return digest.hexdigest()
