"""A template that ends every conversation by a generation prompt, asked for or not.

The one released with ERNIE-4.5-21B-A3B-Thinking does so; this one is in its manner.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from ernie_train.data import encode_conversation, prompt_ids, render_chat
from ernie_train.data.chat_template import ChatTemplate
from ernie_train.data.conversation import Conversation
from ernie_train.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.chat_families import FAMILIES

OPENED = "<|im_start|>assistant\n<think>\n"
BODY = """{{- '<|im_start|>system\\n<global_setting>\\nthink_mode=True\\n</global_setting>' -}}
{{- '<|im_end|>\\n\\n' -}}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n\\n' -}}
{%- elif m.role == 'tool' -%}
{{- '<|im_start|>tool\\n<tool_output>' + m.content | tojson + '</tool_output><|im_end|>\\n\\n' -}}
{%- else -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > ns.last and (m.thoughts or loop.last) -%}
{{- '<think>\\n' + (m.thoughts or '') + '\\n</think>\\n' -}}
{%- endif -%}
{%- if m.content -%}{{- '<response>\\n' + m.content + '\\n</response>\\n' -}}{%- endif -%}
{%- for c in m.tool_calls or [] -%}
{{- '\\n<tool_call>\\n' + c.function | tojson + '\\n</tool_call>\\n' -}}
{%- endfor -%}
{{- '<|im_end|>\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
"""
STANDING = BODY + "{{- '<|im_start|>assistant\\n<think>\\n' -}}"
ASKED = BODY + "{%- if add_generation_prompt -%}" + STANDING[len(BODY) :] + "{%- endif -%}"

Message = dict[str, Any]
QUESTION: Message = {"role": "user", "content": "the sum?"}
ANSWER: Message = {"role": "assistant", "content": "12 apples", "reasoning_content": "one\n\ntwo"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING: list[Message] = [
    QUESTION,
    {"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": [CALL]},
    {"role": "tool", "content": "42"},
    ANSWER,
]
CONVERSATIONS: list[list[Message]] = [
    [QUESTION, ANSWER],
    [QUESTION, ANSWER, {"role": "user", "content": "and?"}, ANSWER],
    [QUESTION, {"role": "assistant", "content": "12 apples"}],
    CALLING,
]


@pytest.fixture
def both(tokenizer_dir: Path, tmp_path: Path) -> tuple[Tokenizer, Tokenizer]:
    """One tokenizer with the template that is always asked, and with the one that waits for it."""
    found = []
    for name, source in (("standing", STANDING), ("asked", ASKED)):
        directory = tmp_path / name
        shutil.copytree(tokenizer_dir, directory)
        (directory / "chat_template.jinja").write_text(source)
        found.append(load_tokenizer(directory))
    return found[0], found[1]


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "two", "bare", "calls"])
def test_the_same_is_trained_as_by_a_template_that_waits_to_be_asked(
    both: tuple[Tokenizer, Tokenizer], messages: list[Message]
) -> None:
    standing, asked = both
    found, expected = (encode_conversation(tokenizer, messages) for tokenizer in both)
    assert [(s.ids, s.trainable) for s in found.samples] == [
        (s.ids, s.trainable) for s in expected.samples
    ]
    assert found.notes == expected.notes
    last = found.samples[-1]
    written = [i for i, mark in zip(last.ids, last.trainable, strict=True) if mark]
    assert standing.decode(written).endswith("\n<|im_end|>")
    assert prompt_ids(standing, messages[:1]) == prompt_ids(asked, messages[:1])
    assert standing.stop_token_ids == asked.stop_token_ids
    assert standing.token_id("<|im_start|>") not in standing.stop_token_ids


def test_it_is_left_out_where_it_was_not_asked_for(both: tuple[Tokenizer, Tokenizer]) -> None:
    standing, asked = both
    assert standing.chat.template is not None
    assert standing.chat.template.standing_prompt == OPENED
    for messages in CONVERSATIONS:
        text = render_chat(standing, messages)
        assert text == render_chat(asked, messages)
        assert text.endswith("<|im_end|>\n\n")
        assert render_chat(standing, messages, add_generation_prompt=True) == text + OPENED


def test_a_conversation_goes_on_behind_a_call(both: tuple[Tokenizer, Tokenizer]) -> None:
    behind = [Conversation(tokenizer, CALLING[:3], None).ids_behind(1) for tokenizer in both]
    assert behind[0] == behind[1]
    text = '\n\n<|im_start|>tool\n<tool_output>"42"</tool_output><|im_end|>\n\n' + OPENED
    assert both[0].decode(behind[0]) == text


@pytest.mark.parametrize("name", FAMILIES)
def test_other_templates_have_none(name: str) -> None:
    assert ChatTemplate(FAMILIES[name].template, {"eos_token": "</s>"}).standing_prompt == ""


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        ("<|{{ m.role }}|>{{ m.content }}<|end|>", "<|assistant|>"),
        ("<|begin|>{{ m.role }}<|head|>{{ m.content }}<|end|>", "<|begin|>assistant<|head|>"),
        ("<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n", "<|begin|>assistant\n"),
    ],
)
@pytest.mark.parametrize("end", ["prompt", "eos", "nothing"])
def test_it_is_told_from_what_ends_a_turn_or_a_text(source: str, prompt: str, end: str) -> None:
    text = {"prompt": prompt, "eos": "<|eos|>", "nothing": ""}[end]
    template = ChatTemplate(
        "{% for m in messages %}" + source + "{% endfor %}" + f"{{{{ {text!r} }}}}"
    )
    assert template.standing_prompt == (prompt if end == "prompt" else "")
