"""What the toolkit asks of a tokenizer, whoever made it."""

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
    """What the toolkit asks of a tokenizer.

    vocab_size: every id is below it; a model's vocabulary must be at least as large.
    control_tokens: texts that become tokens which end or forge a turn; rows must not contain them.
    """

    vocab_size: int
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int
    control_tokens: frozenset[str]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, nothing added; special tokens written out in it become their ids."""

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`; `skip_special_tokens` leaves out unk, bos, eos and the turn tokens."""

    @abstractmethod
    def token_id(self, piece: str) -> int | None:
        """The id of exactly this piece; None where the vocabulary lacks it."""

    @abstractmethod
    def save_pretrained(self, out_dir: str | Path, *, thinking: bool = True) -> None:
        """Write every file that `transformers` needs; the chat template is the one trained with."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes whenever an id may change."""

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end a completion: end of turn (Thinking), `</s>`, end of a plain turn."""
        found = [self.token_id(IM_END), self.eos_token_id, self.token_id(SENTENCE_END)]
        return list(dict.fromkeys(i for i in found if i is not None))

    @functools.cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Finds a control token in a text."""
        return re.compile("|".join(map(re.escape, sorted(self.control_tokens, key=len)[::-1])))


class WholeTokens:
    """Texts that are always one token, found before anything else is tokenized.

    Libraries differ here: SentencePiece never makes a control piece out of text, PaddleNLP strips
    the spaces and newlines around a special token; transformers does neither, and nor do we.
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
    """Copy the files of a tokenizer directory; nothing happens where both are the same."""
    if source.resolve() == out_dir.resolve():
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out_dir / name)
        else:
            (out_dir / name).unlink(missing_ok=True)  # of an older tokenizer; it would contradict


def check_unicode(text: str) -> None:
    """Raise DataError where `text` holds half of a surrogate pair, which UTF-8 cannot write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start + 1} of the text is not valid Unicode ({error.reason})"
        ) from error
