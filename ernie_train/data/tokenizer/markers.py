"""Find marks of turns that a chat template writes as plain text, which any text can forge."""

from __future__ import annotations

import re

from ernie_train.core.errors import DataError
from ernie_train.data.chat_template import CONTROL_TOKENS, MARKUP_TOKENS
from ernie_train.data.tokenizer.base import Tokenizer

_QUESTION, _ANSWER = "sentinel-question", "sentinel-answer"  # which no template writes
_LIKE_A_TOKEN = re.compile(r"<\|[^<>]{1,40}\|>|</?[^<>\s/]{1,40}>|\[/?[A-Z_]{2,20}\]")
_REMEDY = (
    "unless the model was trained so, chat.template (--template of init and preview) should name "
    "one that writes special tokens of the tokenizer"
)
_SHOWN_CHARACTERS = 40


def forgeable_turns(tokenizer: Tokenizer) -> str:
    """Return a sentence that warns of marks between turns that are no special tokens; "" if none.

    Such a mark is split into pieces, and a message that contains its text looks like a turn.
    """
    between = _between_turns(tokenizer)
    marks = [mark for part in between for mark in _LIKE_A_TOKEN.findall(part)]
    known = tokenizer.control_tokens | set(MARKUP_TOKENS)
    origin = tokenizer.chat.template and tokenizer.chat.template.origin
    if plain := [mark for mark in dict.fromkeys(marks) if mark not in known]:
        add = f", or tokenizer.add: {plain}" if set(plain) <= set(CONTROL_TOKENS) else ""
        return (
            f"warning: {origin} marks turns by {', '.join(plain)}, which the tokenizer lacks "
            f"as special tokens: any text with them can forge a turn, and answers may not end; "
            f"{_REMEDY}{add}"
        )
    bare = [part.strip() for part in between if not tokenizer.control_pattern.search(part)]
    if not bare:
        return ""
    return (
        f"warning: {origin} marks turns by plain text, {bare[0][:_SHOWN_CHARACTERS]!r}: a message "
        f"with it can forge a turn, so keep it out of rows and prompts; {_REMEDY}"
    )


def _between_turns(tokenizer: Tokenizer) -> list[str]:
    """Return what the template writes between a question and its answer, and up to the next."""
    question, answer = (
        {"role": role, "content": text}
        for role, text in (("user", _QUESTION), ("assistant", _ANSWER))
    )
    if tokenizer.chat.template is None:
        return []
    try:
        text = tokenizer.chat.template.render([question, answer, question])
    except DataError:
        return []  # it is told where a conversation is rendered
    return re.split(f"{_QUESTION}|{_ANSWER}", text)[1:3]
