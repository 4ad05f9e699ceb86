"""Held-out problems: prompts in, completions scored, a table by task and domain."""

from __future__ import annotations

from typing import Any

from ernie_train.data import Record, Tokenizer, prompt_ids
from ernie_train.generate.engine import Completion


def encode_prompt(tokenizer: Tokenizer, record: Record, *, thinking: bool) -> list[int]:
    """The ids of a problem up to and with the generation prompt; a gold answer is left out."""
    messages = list(record.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return prompt_ids(tokenizer, messages, record.tools, thinking=thinking)


def completion_text(tokenizer: Tokenizer, completion: Completion) -> str:
    """The text of a completion without the stop token that ended it.

    A model may have more ids than the tokenizer; such an id reads as the unknown token.
    """
    ids = completion.ids[:-1] if completion.finished else completion.ids
    return tokenizer.decode(
        [i if i < tokenizer.vocab_size else tokenizer.pad_token_id for i in ids]
    )


def problem_row(record: Record, thinking: bool) -> dict[str, Any]:
    """What a verifier is given of a problem."""
    facts = {"messages": record.messages, "tools": record.tools, "thinking": thinking}
    return {**facts, **record.fields}
