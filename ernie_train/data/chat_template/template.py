"""Render conversations with a model's own chat template, as `transformers` renders them.

A template is Jinja text from a model's directory, so it is foreign code: it runs in Jinja's
sandbox, and what it may compute and write is bounded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from importlib.resources import files
from itertools import takewhile
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols

from ernie_train.core.errors import DataError
from ernie_train.data.chat_template.sandbox import (
    MOST_TEXT,
    BoundedSandbox,
    bounded_range,
    bounded_rendering,
)
from ernie_train.data.completion_format import (
    IM_END,
    IM_START,
    RESPONSE_CLOSE,
    RESPONSE_OPEN,
    SENTENCE_END,
    SENTENCE_START,
    THINK_CLOSE,
    THINK_OPEN,
    TOOL_CALL_CLOSE,
    TOOL_CALL_OPEN,
    TOOL_RESPONSE_CLOSE,
    TOOL_RESPONSE_OPEN,
)

ERNIE_THINKING, ERNIE_PLAIN = "ernie_thinking", "ernie_plain"
SHIPPED_TEMPLATES = (ERNIE_THINKING, ERNIE_PLAIN)

# Tokens that structure a conversation in the ERNIE formats.
CONTROL_TOKENS = (SENTENCE_START, SENTENCE_END, IM_START, IM_END)

# The markup inside turns, which a model writes or reads; each is one token in tokenizers that
# `train_tokenizer` makes.
MARKUP_TOKENS = (
    THINK_OPEN,
    THINK_CLOSE,
    RESPONSE_OPEN,
    RESPONSE_CLOSE,
    TOOL_CALL_OPEN,
    TOOL_CALL_CLOSE,
    TOOL_RESPONSE_OPEN,
    TOOL_RESPONSE_CLOSE,
    "<system_setting>",
    "</system_setting>",
    "<global_setting>",
    "</global_setting>",
    "<tool_list>",
    "</tool_list>",
    "think_mode=True",
)

# How `transformers` 5 reads a completion of ERNIE's Thinking format back into a message.
RESPONSE_TEMPLATE: dict[str, Any] = {
    "start_anchor": f"{IM_START}assistant\n",
    "defaults": {"role": "assistant"},
    "fields": {
        "reasoning_content": {"open": THINK_OPEN, "close": THINK_CLOSE},
        "content": {"open": RESPONSE_OPEN, "close": RESPONSE_CLOSE},
        "tool_calls": {
            "open": TOOL_CALL_OPEN,
            "close": TOOL_CALL_CLOSE,
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}


@dataclass(frozen=True)
class ChatTemplate:
    """Hold a chat template and render conversations with it.

    source: the Jinja text.
    special_tokens: what the template may name: bos_token, eos_token and the like.
    origin: where it comes from, for messages.
    tool_source: the text to use instead where there are tools, of directories that name one.
    date: the day that templates which ask for it write; None: the day on which they are rendered.
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    origin: str = "chat template"
    tool_source: str | None = None
    date: date | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text of a conversation.

        Raises:
            DataError: the template refuses the conversation, fails, or writes without end.
        """
        return self.render_spans(messages, tools, add_generation_prompt=add_generation_prompt)[0]

    def render_spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the (start, end) characters of its `{% generation %}` blocks.

        Raises:
            DataError: as for `render`.
        """
        text, spans = self._rendered(messages, tools, add_generation_prompt)
        if not add_generation_prompt and self.standing_prompt:
            text = text.removesuffix(self.standing_prompt)
        return text, spans

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render as the template does: it may write a generation prompt that is not asked for."""
        spans = _Spans()
        variables = {
            **self.special_tokens,
            "messages": messages,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": self._strftime_now,
            _SPANS: spans,
        }
        try:
            with bounded_rendering():
                for chunk in self._compiled(bool(tools)).generate(variables):
                    spans.add(chunk)
        except DataError as error:
            raise DataError(f"{error} ({self.origin}{_line_of(error)})") from None
        except jinja2.TemplateError as error:
            raise DataError(f"{error} ({self.origin})") from error
        except (
            ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError,
            ValueError,
        ) as error:  # fmt: skip
            reason = "it calls itself without end" if isinstance(error, RecursionError) else error
            raise DataError(
                f"{self.origin}: it cannot render this conversation: {reason}"
            ) from error
        return "".join(spans.chunks), spans.found

    def _compiled(self, tools: bool = False) -> jinja2.Template:
        try:
            return _compile(self.tool_source if tools and self.tool_source else self.source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            line = getattr(error, "lineno", None)
            where = f", line {line}" if line else ""
            raise DataError(f"{self.origin}{where}: not a Jinja template: {error}") from error

    def check(self) -> None:
        """Compile the template.

        Raises:
            DataError: it is no Jinja template.
        """
        self._compiled()
        self._compiled(tools=True)

    @functools.cached_property
    def standing_prompt(self) -> str:
        """Return the generation prompt that is written unasked, too; "" if the template asks.

        The template released with ERNIE-4.5-21B-A3B-Thinking ends every conversation so. Behind an
        answer there then stands, in place of what a next question begins with, what the answer
        itself began with.
        """
        question, answer = (
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _SENTINEL},
        )
        try:
            if self._rendered([question], None, False) != self._rendered([question], None, True):
                return ""
            whole = self._rendered([question, answer], None, False)[0]
            longer = self._rendered([question, answer, question], None, False)[0]
        except DataError:
            return ""  # it is told where a conversation is rendered
        (before, _, behind), following = whole.partition(_SENTINEL), longer.partition(_SENTINEL)[2]
        shared = common_start(behind, following)
        headers = list(_TURN_TOKEN.finditer(shared))
        if headers and headers[-1].end() == len(shared):
            begin = headers[-1].start()  # a token that begins any turn
        else:
            begin = max([shared.rfind("\n") + 1, *(found.end() for found in headers)])
        prompt = behind[begin:]
        opening = prompt.partition("\n")[0]
        return prompt if len(shared) < len(behind) and opening and opening in before else ""

    def _strftime_now(self, pattern: str) -> str:
        now = datetime.now() if self.date is None else datetime.combine(self.date, time())
        return now.strftime(pattern)

    @property
    def asks_date(self) -> bool:
        """Return True if the template writes the date."""
        return "strftime_now" in f"{self.source}{self.tool_source}"

    @property
    def marks_generation(self) -> bool:
        """Return True if the template marks what the model writes by `{% generation %}`."""
        return "endgeneration" in self.source

    @functools.cached_property
    def has_response_tags(self) -> bool:
        """Return True if answers stand between `<response>` tags, as in ERNIE's Thinking format.

        A template that only names the tags, to take them out of earlier answers, has none.
        """
        if RESPONSE_OPEN not in self.source:
            return False
        asked, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
        return RESPONSE_OPEN in self.render([asked, answer | {"reasoning_content": "."}])

    @functools.cached_property
    def opens_thinking(self) -> bool:
        """Return True if a generation prompt ends in an open thinking part."""
        question = [{"role": "user", "content": "?"}]
        prompt = self.render(question, add_generation_prompt=True)
        return prompt.rfind(THINK_OPEN) > prompt.rfind(THINK_CLOSE)

    @property
    def fingerprint(self) -> str:
        """Return a hash that changes with the text of the template and its special tokens."""
        texts = [self.source, self.tool_source] if self.tool_source else [self.source]
        day = [str(self.date)] if self.date and self.asks_date else []
        content = json.dumps([*texts, sorted(self.special_tokens.items()), *day])
        return hashlib.sha256(content.encode()).hexdigest()


def shipped_template(name: str, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate:
    """Return one of the `SHIPPED_TEMPLATES` by its name."""
    source = files("ernie_train.data").joinpath("templates").joinpath(f"{name}.jinja")
    return ChatTemplate(source.read_text(encoding="utf-8"), special_tokens or {}, f"{name}.jinja")


def common_start(one: str, other: str) -> str:
    """Return the longest text with which both begin."""
    pairs = zip(one, other, strict=False)
    return one[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))]


_SPANS = "__generation_spans__"
_SENTINEL = "sentinel-answer"  # which no template writes
_TURN_TOKEN = re.compile(r"<\|[^<>|]+\|>")


class _Spans:
    """Collect what a template writes, and where its generation blocks begin and end."""

    def __init__(self) -> None:
        self.chunks: list[str] = []
        self.length = 0
        self.found: list[tuple[int, int]] = []

    def add(self, chunk: str) -> None:
        self.chunks.append(chunk)
        self.length += len(chunk)
        if self.length > MOST_TEXT:
            raise DataError(f"a chat template wrote more than {MOST_TEXT} characters")


class _Generation(Extension):
    """Let a template mark what the model writes, and note where that stands in the text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        spans = nodes.Name(_SPANS, "load")
        call = self.call_method("_record", [spans])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _record(self, spans: _Spans, caller: Callable[[], str]) -> str:
        text = caller()
        spans.found.append((spans.length, spans.length + len(text)))
        return text


@functools.cache
def _environment() -> BoundedSandbox:
    """Return the environment, with the settings, filters and globals that `transformers` gives."""
    environment = BoundedSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.add_filter("tojson", _to_json)
    environment.globals["range"] = bounded_range
    del environment.globals["lipsum"]  # writes as much as it is asked for
    environment.globals["raise_exception"] = _raise_exception
    return environment


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _line_of(error: BaseException) -> str:
    """Return the line of the template that raised an error, as text behind its name."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]
    return f", line {lines[-1]}" if lines else ""


# `json.dumps` makes an encoder for each call with these settings.
_JSON = json.JSONEncoder(ensure_ascii=False)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if not (ensure_ascii or indent or separators or sort_keys) and indent is None:
        return _JSON.encode(value)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
