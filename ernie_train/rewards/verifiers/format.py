"""Grade the format: 1 for a completion with the structure of the Thinking format."""

from typing import Any

from ernie_train.data import completion_format as tags
from ernie_train.data.completion_format import ParsedCompletion
from ernie_train.rewards.score import Score, read_completion

_TAGS = (
    tags.THINK_OPEN, tags.THINK_CLOSE, tags.RESPONSE_OPEN, tags.RESPONSE_CLOSE,
    tags.TOOL_CALL_OPEN, tags.TOOL_CALL_CLOSE, tags.TOOL_RESPONSE_OPEN, tags.TOOL_RESPONSE_CLOSE,
    tags.IM_START, tags.SENTENCE_START,
)  # fmt: skip


def score(
    row: dict[str, Any],
    completion: str,
    *,
    tokens: int | None = None,
    max_tokens: int | None = None,
) -> Score:
    """Return 0 without the structure; else 1, less 0.5 for stray text or tags and 0.5 for length.

    The structure is finished thinking (if the row's model thinks), then either one response that is
    not empty or well-formed tool calls. `tokens` is the completion's length in tokens. Raises
    ValueError if `max_tokens` is given without `tokens`.
    """
    if max_tokens is not None and tokens is None:
        raise ValueError("max_tokens needs the number of tokens of each completion")
    parsed = read_completion(row, completion)
    if isinstance(parsed, Score):
        return parsed
    answered = bool(parsed.response and parsed.response.strip())
    if answered == bool(parsed.tool_calls):
        return Score.wrong("neither a response nor tool calls, or both")
    if any(call.arguments is None for call in parsed.tool_calls):
        return Score.wrong("a tool call is not valid JSON with a name and arguments")
    value, faults = 1.0, []
    if parsed.stray or _has_tags(parsed):
        value -= 0.5
        faults.append("text or tags outside of their place")
    if tokens is not None and max_tokens is not None and tokens > max_tokens:
        value -= 0.5
        faults.append(f"{tokens} tokens, more than {max_tokens}")
    return Score.marked(value, "; ".join(faults))


def _has_tags(parsed: ParsedCompletion) -> bool:
    texts = (parsed.thinking or "", parsed.response or "")
    return any(tag in text for text in texts for tag in _TAGS)
