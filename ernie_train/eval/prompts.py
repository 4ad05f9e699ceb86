"""Conversions between problems, token ids and verifiers, for evaluation and RL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ernie_train.core.errors import DataError
from ernie_train.data import Record, Tokenizer, prompt_ids, require_chat_template
from ernie_train.generate.engine import Completion

_SHOWN = 10  # wrong problems in a message


def encode_prompt(tokenizer: Tokenizer, record: Record) -> list[int]:
    """Return the ids of a problem, without its reference answer, and of the generation prompt."""
    messages = list(record.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return prompt_ids(tokenizer, messages, record.tools)


def encode_problems(
    tokenizer: Tokenizer, problems: Sequence[Record], most_tokens: int
) -> list[list[int]]:
    """Return the ids of all prompts, each of at most `most_tokens`.

    Raises:
        DataError: prompts that cannot be encoded or are longer, with file and line.
    """
    encoded: list[list[int]] = []
    wrong = []
    for record in problems:
        try:
            encoded.append(encode_prompt(tokenizer, record))
        except DataError as error:
            wrong.append(f"{record.source}: {error}")
            continue
        if len(encoded[-1]) > most_tokens:
            wrong.append(
                f"{record.source}: the prompt has {len(encoded[-1])} tokens; beside max_new_tokens "
                f"the model's max_position_embeddings leave {max(0, most_tokens)}"
            )
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise DataError("problems that cannot be asked:\n  " + "\n  ".join(wrong[:_SHOWN] + more))
    return encoded


def user_prompt(record: Record) -> str:
    """Return the text of the last user turn that is asked, for people who read samples."""
    asked = record.prompt_messages
    turns = [m for m in asked if m["role"] == "user"] or asked
    return str(turns[-1]["content"])


def completion_text(tokenizer: Tokenizer, completion: Completion) -> str:
    """Return the text of a completion without its stop token."""
    ids = completion.ids[:-1] if completion.finished else completion.ids
    return tokenizer.decode(ids)


def problem_row(record: Record, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the row that a verifier gets for a problem, with the form that answers have."""
    template = require_chat_template(tokenizer)
    facts = {
        "messages": record.messages,
        "tools": record.tools,
        "thinking": template.opens_thinking,
        "response_tags": template.has_response_tags,
    }
    return {**facts, **record.fields}
