r"""Parse and write completions in the Thinking format.

A complete one is

    <think>\n{reasoning}\n</think>\n\n<response>\n{answer}\n</response>\n

where tool calls, `<tool_call>\n{"name": .., "arguments": {..}}\n</tool_call>\n`, may replace the
response. The generation prompt ends with `<think>\n`, so that generated text usually lacks the
opening tag.

Completions are untrusted input: parsing takes time linear in their length, and never raises.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
RESPONSE_OPEN = "<response>"
RESPONSE_CLOSE = "</response>"
TOOL_CALL_OPEN = "<tool_call>"
TOOL_CALL_CLOSE = "</tool_call>"
TOOL_RESPONSE_OPEN = "<tool_response>"
TOOL_RESPONSE_CLOSE = "</tool_response>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SENTENCE_START = "<|begin_of_sentence|>"
SENTENCE_END = "<|end_of_sentence|>"
EOS = "</s>"

_STOPS = (IM_END, SENTENCE_END, EOS)
_MAX_CLOSING_TAGS = 8
_OPENING = re.compile(f"{RESPONSE_OPEN}|{TOOL_CALL_OPEN}")


@dataclass(frozen=True)
class ToolCall:
    """Hold one `<tool_call>` block; `arguments` is None if `raw` is not a well-formed call."""

    name: str
    arguments: dict[str, Any] | None
    raw: str


@dataclass(frozen=True)
class ParsedCompletion:
    """Hold the parts of a completion.

    thinking: the reasoning without its tags; None if the completion has no thinking part.
    response: the text of the first `<response>` block; None if no such block is closed.
    tool_calls: every `<tool_call>` block that is closed, malformed ones too.
    finished_thinking: whether `</think>` was found. Without it everything is reasoning.
    stray: text outside of the blocks, unclosed blocks, further `<response>` blocks.
    """

    thinking: str | None
    response: str | None
    tool_calls: list[ToolCall] = field(default_factory=list)
    finished_thinking: bool = False
    stray: list[str] = field(default_factory=list)


def parse_completion(
    text: str, *, thinking: bool = True, tagged: bool | None = None
) -> ParsedCompletion:
    """Parse a completion. Never raises.

    A token that ends the turn ended the sampling. Its text ends the completion between blocks and
    at the end; in a block or in reasoning it is text as any other.

    Args:
        text: what the model wrote behind the generation prompt.
        thinking: True if the generation prompt opened a thinking part. Otherwise text without
            `</think>` is no reasoning, unless it opens a thinking part itself.
        tagged: True if an answer counts in `<response>` tags alone; by default as `thinking`.
    """
    text = _without_stops(text)
    tagged = thinking if tagged is None else tagged
    head, close, rest = text.partition(THINK_CLOSE)
    if not close:
        if thinking or text.lstrip().startswith(THINK_OPEN):
            return ParsedCompletion(thinking=_reasoning(text), response=None)
        rest = text
    response, calls, stray = _parse_blocks(rest)
    if not tagged:
        if not calls:
            response, stray = rest.strip(), []
        elif response is None and stray:
            response, stray = "\n".join(stray), []
    return ParsedCompletion(
        _reasoning(head) if close else None, response, calls, bool(close), stray
    )


def _without_stops(text: str) -> str:
    end = len(text)
    while True:
        place = end
        while place and text[place - 1] == "\n":
            place -= 1
        stop = next((s for s in _STOPS if text.endswith(s, 0, place)), None)
        if stop is None:
            return text[:end]
        end = place - len(stop)


def format_completion(
    reasoning: str, response: str | None = None, tool_calls: Sequence[tuple[str, Any]] = ()
) -> str:
    """Write a completion in the Thinking format, `<think>` included, to the final newline.

    `tool_calls` are (name, arguments); arguments are JSON text or a value to write as JSON.
    """
    blocks = [] if response is None else [response_block(response)]
    blocks += [tool_call_block(name, arguments) for name, arguments in tool_calls]
    return f"{THINK_OPEN}\n{reasoning}\n{THINK_CLOSE}\n\n{''.join(blocks)}"


def response_block(answer: str) -> str:
    """Return the response part of a completion."""
    return f"{RESPONSE_OPEN}\n{answer}\n{RESPONSE_CLOSE}\n"


def tool_call_block(name: str, arguments: Any) -> str:
    """Return one tool call in the format; `arguments` is JSON text or a value to write as JSON."""
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    body = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {written}}}'
    return f"{TOOL_CALL_OPEN}\n{body}\n{TOOL_CALL_CLOSE}\n"


def _reasoning(text: str) -> str:
    stripped = text.lstrip()
    if stripped.startswith(THINK_OPEN):
        text = stripped[len(THINK_OPEN) :]
    return text.strip("\n")


def _parse_blocks(text: str) -> tuple[str | None, list[ToolCall], list[str]]:
    """Parse the part after `</think>`; return (response, tool calls, stray texts)."""
    response: str | None = None
    calls: list[ToolCall] = []
    stray: list[str] = []
    position = 0
    while position < len(text):
        opening, start = _next_opening(text, position)
        if any(stop in text[position:start] for stop in _STOPS):
            break  # between blocks nothing but the end of the turn is written so
        if text[position:start].strip():
            stray.append(text[position:start].strip())
        if opening == RESPONSE_OPEN:
            body, position = _closed_body(text, start + len(opening), RESPONSE_CLOSE)
            if body is None:
                stray.append(text[start:].strip())
            elif response is None:
                response = body.strip("\n")
            else:
                stray.append(text[start:position].strip())
        elif opening == TOOL_CALL_OPEN:
            call, position = _tool_call(text, start + len(opening))
            if call is None:
                stray.append(text[start:].strip())
            else:
                calls.append(call)
        else:
            position = start
    return response, calls, stray


def _next_opening(text: str, position: int) -> tuple[str, int]:
    """Return the next opening tag and its start; ("", end of the text) if there is none."""
    found = _OPENING.search(text, position)
    return (found.group(), found.start()) if found else ("", len(text))


def _closed_body(text: str, start: int, closing: str) -> tuple[str | None, int]:
    end = text.find(closing, start)
    if end < 0:
        return None, len(text)
    return text[start:end], end + len(closing)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the JSON object of these pairs; raises ValueError if a key is given twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=unique_keys)


def _tool_call(text: str, start: int) -> tuple[ToolCall | None, int]:
    """Return the call whose body begins at `start` (None if it is not closed), and its end."""
    body, first_end = _closed_body(text, start, TOOL_CALL_CLOSE)
    if body is None:
        return None, first_end
    # A string in the JSON may contain the closing tag; the limit keeps the time linear.
    longer: str | None = body
    end = first_end
    for _ in range(_MAX_CLOSING_TAGS):
        if longer is None:
            break
        try:
            return _typed_call(_DECODER.decode(longer), longer.strip()), end
        except (ValueError, RecursionError):
            longer, end = _closed_body(text, end, TOOL_CALL_CLOSE)
            longer = None if longer is None else text[start : end - len(TOOL_CALL_CLOSE)]
    return ToolCall("", None, body.strip()), first_end


def _typed_call(value: Any, raw: str) -> ToolCall:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return ToolCall("", None, raw)
    arguments = value.get("arguments")
    if isinstance(arguments, str):  # some models write the arguments as a JSON string
        try:
            arguments = _DECODER.decode(arguments)
        except (ValueError, RecursionError):
            arguments = None
    return ToolCall(value["name"], arguments if isinstance(arguments, dict) else None, raw)
