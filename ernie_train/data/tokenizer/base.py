"""Define the interface of tokenizers, and helpers that their implementations share."""

import functools
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from ernie_train.core.errors import DataError
from ernie_train.data.completion_format import IM_END, SENTENCE_END
from ernie_train.data.tokenizer.hf_files import TOKENIZER_FILES


class Tokenizer(ABC):
    """Define the interface of a tokenizer.

    vocab_size: larger than every id; a model's vocabulary must be at least as large.
    control_tokens: texts whose tokens would end or forge a turn; rows must not contain them.
    """

    vocab_size: int
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int
    control_tokens: frozenset[str]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; no bos or eos is added, special tokens in it are recognized.

        Raises:
            DataError: `text` contains half of a surrogate pair.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of `ids`; `skip_special_tokens` omits unk, bos, eos and turn tokens."""

    @abstractmethod
    def token_id(self, piece: str) -> int | None:
        """Return the id of a token of the vocabulary, given as text; None if there is none."""

    @abstractmethod
    def save_pretrained(self, out_dir: str | Path, *, thinking: bool = True) -> None:
        """Write the files that `transformers` needs, with the Thinking or plain chat template."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that changes whenever the ids of a text may change."""

    @property
    def stop_token_ids(self) -> list[int]:
        """Return the ids that end a completion: `<|im_end|>`, eos and `<|end_of_sentence|>`."""
        found = [self.token_id(IM_END), self.eos_token_id, self.token_id(SENTENCE_END)]
        return list(dict.fromkeys(i for i in found if i is not None))

    @functools.cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Return a pattern that finds the control tokens in a text."""
        return re.compile("|".join(map(re.escape, sorted(self.control_tokens, key=len)[::-1])))


class WholeTokens:
    """Encode and decode texts that are always one token; all other text is left to a library.

    They are split off here because libraries differ: SentencePiece never encodes text as a control
    piece, and PaddleNLP strips spaces and newlines around special tokens. This class does what
    `transformers` does: it recognizes them and keeps the spaces.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = dict(ids)
        self._names = {token_id: text for text, token_id in self.ids.items()}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text: str, encode_rest: Callable[[str], list[int]]) -> list[int]:
        if self._pattern.search(text) is None:
            return encode_rest(text)
        ids: list[int] = []
        for part in self._pattern.split(text):
            if part in self.ids:
                ids.append(self.ids[part])
            elif part:
                ids += encode_rest(part)
        return ids

    def decode(
        self, ids: Sequence[int], decode_rest: Callable[[list[int]], str], drop: Collection[int]
    ) -> str:
        out: list[str] = []
        run: list[int] = []
        for token_id in map(int, ids):
            if token_id not in self._names:
                run.append(token_id)
                continue
            if run:
                out.append(decode_rest(run))
                run = []
            if token_id not in drop:
                out.append(self._names[token_id])
        if run:
            out.append(decode_rest(run))
        return "".join(out)


def copy_tokenizer_files(source: Path, out_dir: Path) -> None:
    """Copy the files of a tokenizer directory; do nothing if both directories are the same."""
    if source.resolve() == out_dir.resolve():
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out_dir / name)
        else:
            (out_dir / name).unlink(missing_ok=True)  # left by another tokenizer


def check_unicode(text: str) -> None:
    """Check that `text` can be encoded as UTF-8.

    Raises:
        DataError: it contains half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start + 1} of the text is not valid Unicode ({error.reason})"
        ) from error
