"""Load tokenizer directories that have neither `tokenizer.json` nor `tokenizer.model`."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ernie_train.core.errors import DataError
from ernie_train.core.foreign_files import read_bytes
from ernie_train.data.chat_template import CONTROL_TOKENS, MARKUP_TOKENS
from ernie_train.data.tokenizer.base import (
    Offsets,
    Tokenizer,
    WholeTokens,
    check_unicode,
    decode_known,
)

_UNFINISHED = "\ufffd"  # what the bytes of an unfinished character decode to


class PaddleNLPTokenizer(Tokenizer):
    """Wrap the tokenizer that PaddleNLP's AutoTokenizer loads from a directory.

    Raises:
        DataError: PaddleNLP cannot load it, or it has no eos token.
    """

    def __init__(self, directory: Path) -> None:
        from paddlenlp.transformers import AutoTokenizer  # takes seconds to import

        self.directory = directory
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(directory))
        except (ValueError, OSError, KeyError, TypeError, RuntimeError) as error:
            raise DataError(
                f"PaddleNLP cannot load a tokenizer from {directory}: {error}"
            ) from error
        added: dict[str, int] = dict(self._tokenizer.added_tokens_encoder)
        self._ids: dict[str, int] = {**self._tokenizer.get_vocab(), **added}
        self.vocab_size = max(self._ids.values()) + 1
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise DataError(f"the tokenizer in {directory} names no eos_token")
        pad, bos = self._tokenizer.pad_token_id, self._tokenizer.bos_token_id
        self.eos_token_id = int(eos)
        self.pad_token_id = self.eos_token_id if pad is None else int(pad)
        self.bos_token_id = self.eos_token_id if bos is None else int(bos)
        named = self._tokenizer.special_tokens_map
        self.special_tokens = {role: t for role, t in named.items() if isinstance(t, str)}
        special = {t for t in self._tokenizer.all_special_tokens if t in self._ids}
        self._whole = WholeTokens(added | {text: self._ids[text] for text in special})
        special -= set(MARKUP_TOKENS)
        self.control_tokens = frozenset(special | (set(CONTROL_TOKENS) & set(self._ids)))
        self._control_ids = {self._ids[text] for text in self.control_tokens}

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        check_unicode(text)
        return self._whole.encode(text, self._encode_rest)

    def _encode_rest(self, text: str) -> tuple[list[int], Offsets]:
        """Return ids, and offsets by the length of what the ids decode to so far.

        Ids that decode to exactly the next part of the text are not decoded again: the time is
        linear in the text, where the tokenizer decodes to what it encoded.
        """
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        offsets, begin, settled, first = [], 0, 0, 0
        for n in range(len(ids)):
            decoded = self._decode_rest(ids[first : n + 1])
            end = min(settled + len(decoded), len(text))
            offsets.append((begin, end))
            begin = end
            # An unfinished character may look like one of the text until the next id.
            finished = decoded and not decoded.endswith(_UNFINISHED)
            if finished and text[settled:end] == decoded:
                settled, first = end, n + 1
        return ids, offsets

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        drop = self._control_ids if skip_special_tokens else set()
        return decode_known(
            ids, self.vocab_size, lambda known: self._whole.decode(known, self._decode_rest, drop)
        )

    def _decode_rest(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def token_id(self, piece: str) -> int | None:
        return self._ids.get(piece)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(sorted(self._ids.items())).encode())
        digest.update(str((self.pad_token_id, self.bos_token_id, self.eos_token_id)).encode())
        merges = self.directory / "merges.txt"
        if merges.exists():
            digest.update(read_bytes(merges))
        return digest.hexdigest()
