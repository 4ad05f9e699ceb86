"""Conversions between problems, token ids and verifiers, for evaluation and RL."""

from __future__ import annotations

from typing import Any

from ernie_train.data import Record, Tokenizer, prompt_ids
from ernie_train.generate.engine import Completion


def encode_prompt(tokenizer: Tokenizer, record: Record, *, thinking: bool) -> list[int]:
    """Return the ids of a problem, without its reference answer, and of the generation prompt."""
    messages = list(record.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return prompt_ids(tokenizer, messages, record.tools, thinking=thinking)


def user_prompt(record: Record) -> str:
    """Return the text of the last user turn that is asked, for people who read samples."""
    asked = record.prompt_messages
    turns = [m for m in asked if m["role"] == "user"] or asked
    return str(turns[-1]["content"])


def completion_text(tokenizer: Tokenizer, completion: Completion) -> str:
    """Return the text of a completion without its stop token.

    A model's vocabulary may be larger than the tokenizer's; ids beyond it decode as padding.
    """
    ids = completion.ids[:-1] if completion.finished else completion.ids
    return tokenizer.decode(
        [i if i < tokenizer.vocab_size else tokenizer.pad_token_id for i in ids]
    )


def problem_row(record: Record, thinking: bool) -> dict[str, Any]:
    """Return the row that a verifier gets for a problem."""
    facts = {"messages": record.messages, "tools": record.tools, "thinking": thinking}
    return {**facts, **record.fields}
