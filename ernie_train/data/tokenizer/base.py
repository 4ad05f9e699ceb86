"""Define the interface of tokenizers, and helpers that their implementations share."""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from ernie_train.core.errors import DataError
from ernie_train.data.chat_template import ChatTemplate, common_start
from ernie_train.data.completion_format import IM_END, SENTENCE_END
from ernie_train.data.tokenizer.hf_files import TOKENIZER_FILES, write_chat_template
from ernie_train.io.files import GENERATION_CONFIG, copy_file, write_json

MARK = "\ufdd0"  # a noncharacter of Unicode, which no text contains
_GUARDS = (MARK, ";", "!", ".")  # the first that a tokenizer encodes apart from what follows
Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class ChatFormat:
    """Say how conversations become text.

    template: the model's chat template; None if it has none.
    history_reasoning: show the reasoning of earlier turns as the template does, or keep or drop it.
    control_tokens: encode a text that looks like a control token as plain text, or refuse it.
    """

    template: ChatTemplate | None = None
    history_reasoning: Literal["template", "keep", "drop"] = "template"
    control_tokens: Literal["text", "refuse"] = "text"

    @property
    def fingerprint(self) -> str:
        """Return a text that changes whenever a conversation may become another text."""
        template = self.template.fingerprint if self.template else None
        return f"{template} {self.history_reasoning} {self.control_tokens}"


class Tokenizer(ABC):
    """Define the interface of a tokenizer.

    directory: the directory that it was loaded from.
    vocab_size: larger than every id; a model's vocabulary must be at least as large.
    control_tokens: texts whose tokens would end or forge a turn.
    special_tokens: roles such as "eos_token" -> text, for the chat template.
    chat: the format of conversations.
    declared_stop_ids: further ids that end a completion, by generation_config.json.
    """

    directory: Path
    vocab_size: int
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int
    control_tokens: frozenset[str]
    special_tokens: Mapping[str, str]
    chat: ChatFormat = ChatFormat()
    declared_stop_ids: Sequence[int] = ()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; no bos or eos is added, special tokens in it are recognized.

        Raises:
            DataError: `text` contains half of a surrogate pair.
        """
        return self.encode_with_offsets(text)[0]

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Return the ids of `text`, and the (start, end) of each one's characters in it.

        Raises:
            DataError: `text` contains half of a surrogate pair.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of `ids`; `skip_special_tokens` omits unk, bos, eos and turn tokens.

        Ids beyond the vocabulary, which a model may have more of, become U+FFFD.
        """

    @abstractmethod
    def token_id(self, piece: str) -> int | None:
        """Return the id of a token of the vocabulary, given as text; None if there is none."""

    def save_pretrained(self, out_dir: str | Path) -> None:
        """Write the files that `transformers` needs, with the chat template.

        Declared stop ids are written to generation_config.json, where loading finds them.
        """
        out_dir = Path(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        _copy_files(self.directory, out_dir)
        self._complete_files(out_dir)
        write_chat_template(out_dir, self.chat.template)
        if self.declared_stop_ids:
            write_json(out_dir / GENERATION_CONFIG, {"eos_token_id": [*self.declared_stop_ids]})

    def _complete_files(self, out_dir: Path) -> None:  # noqa: B027 - not every kind needs it
        """Write what a copy of the tokenizer's files lacks or has wrong; by default nothing."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that changes whenever the ids of a text may change."""

    @functools.cached_property
    def stop_token_ids(self) -> list[int]:
        """Return the ids that end a completion.

        They are `<|im_end|>`, eos, `<|end_of_sentence|>`, those of generation_config.json, and the
        token by which the chat template ends a turn.
        """
        found = [self.token_id(IM_END), self.eos_token_id, self.token_id(SENTENCE_END)]
        found += [*self.declared_stop_ids, *map(self.token_id, self._turn_ends())]
        return list(dict.fromkeys(i for i in found if i is not None and i < self.vocab_size))

    def _turn_ends(self) -> list[str]:
        """Return the control tokens by which the template ends a last turn and an earlier one."""
        if self.chat.template is None:
            return []
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!!!"}
        try:
            last = self.chat.template.render([question, answer])
            earlier = self.chat.template.render([question, answer, question])
        except DataError:
            return []  # it is told where a conversation is rendered
        answers = [text[text.rfind("!!!") :] for text in (last, common_start(last, earlier))]
        return [found[-1] for text in answers if (found := self.control_pattern.findall(text))]

    @functools.cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Return a pattern that finds the control tokens in a text."""
        tokens = sorted(self.control_tokens, key=len)[::-1]
        return re.compile("|".join(map(re.escape, tokens)) if tokens else r"(?!)")

    def mark_control_tokens(self, text: str, where: str) -> str:
        """Make every control token in a foreign text recognizable as plain text.

        A `MARK` behind its first character keeps it apart from the tokens that a chat template
        writes; `encode_marked` removes it.

        Raises:
            DataError: the recipe refuses control tokens in texts; `where` and the token are named.
        """
        found = self.control_pattern.search(text)
        if found is None and MARK not in text:
            return text
        if found and self.chat.control_tokens == "refuse":
            raise DataError(f"{where} contains the control token {found.group()}")
        text = text.replace(MARK, "")
        return self.control_pattern.sub(lambda m: m.group()[0] + MARK + m.group()[1:], text)

    def encode_marked(self, text: str) -> tuple[list[int], Offsets]:
        """Return ids and offsets of a text in which plain control tokens are marked.

        The offsets count the characters of the text without marks.

        Raises:
            DataError: the tokenizer cannot encode what follows a mark as the middle of a text.
        """
        first, *others = text.split(MARK)  # behind a token's first character: no half is a token
        ids, offsets = self.encode_with_offsets(first)
        length = len(first)
        for part in filter(None, others):
            part_ids, places = self._encode_behind(part)
            ids += part_ids
            offsets += [(start + length, stop + length) for start, stop in places]
            length += len(part)
        return ids, offsets

    def _encode_behind(self, part: str) -> tuple[list[int], Offsets]:
        """Return ids and offsets of a text that goes on where another one ended.

        A guard in front of it takes what a tokenizer puts at the start of every text, such as
        the space of Llama 2. Its ids are left out; that is exact where it has ids of its own.
        """
        for guard in _GUARDS:
            ids, offsets = self.encode_with_offsets(guard + part)
            size = len(guard)
            own = sum(stop <= size for _, stop in offsets)
            if own and all(start >= size for start, _ in offsets[own:]):
                return ids[own:], [(start - size, stop - size) for start, stop in offsets[own:]]
        raise DataError(
            f"the tokenizer in {self.directory} cannot encode {part[:20]!r} in the middle of a "
            "text: leave out the control token that it is part of"
        )

    def encode_plain(self, text: str, where: str) -> list[int]:
        """Return the ids of a text that is no conversation.

        Raises:
            DataError: it contains a control token and the recipe refuses those.
        """
        return self.encode_marked(self.mark_control_tokens(text, where))[0]


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

    def encode(
        self, text: str, encode_rest: Callable[[str], tuple[list[int], Offsets]]
    ) -> tuple[list[int], Offsets]:
        """Return ids and offsets."""
        ids: list[int] = []
        offsets: Offsets = []
        position = 0
        for part in self._pattern.split(text):
            if part in self.ids:
                ids.append(self.ids[part])
                offsets.append((position, position + len(part)))
            elif part:
                piece_ids, places = encode_rest(part)
                ids += piece_ids
                offsets += [(start + position, stop + position) for start, stop in places]
            position += len(part)
        return ids, offsets

    def decode(
        self, ids: Sequence[int], decode_rest: Callable[[list[int]], str], drop: Collection[int]
    ) -> str:
        out: list[str] = []
        for is_whole, run in groupby(map(int, ids), self._names.__contains__):
            if is_whole:
                out += [self._names[token_id] for token_id in run if token_id not in drop]
            else:
                out.append(decode_rest(list(run)))
        return "".join(out)


def decode_known(ids: Sequence[int], vocab_size: int, decode: Callable[[list[int]], str]) -> str:
    """Decode ids, with U+FFFD for each that is beyond the vocabulary."""
    runs = groupby(map(int, ids), lambda token_id: 0 <= token_id < vocab_size)
    return "".join(decode([*run]) if known else "\ufffd" * len([*run]) for known, run in runs)


def unmark(text: str) -> str:
    """Return a text without the marks of `Tokenizer.mark_control_tokens`."""
    return text.replace(MARK, "")


def _copy_files(source: Path, out_dir: Path) -> None:
    """Copy the files of a tokenizer directory; do nothing if both directories are the same."""
    if source.resolve() == out_dir.resolve():
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            copy_file(source / name, out_dir / name)
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
