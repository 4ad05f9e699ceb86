"""A turn is shown in its parts, in whatever pieces it comes; nothing in it is a command."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_train.cli.turn_view import ANSWER, CALL, THINKING, TokenText, TurnParts, TurnView
from ernie_train.core.terminal import Terminal
from ernie_train.data import load_tokenizer
from tests.core.test_terminal import HOSTILE, controls
from tests.environments.conftest import TOKENIZER, answer, calls

TEXTS = ["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>", "<",
         "</", "<thin", "a", " b", "\n", "\n\n", "<b>", "1 < 2", "\N{PILE OF POO}"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


def parts_of(pieces, kind=THINKING):
    parts = TurnParts(kind)
    found: list[list[str]] = []
    for part in [*(p for piece in pieces for p in parts.add(piece)), *parts.end()]:
        if part.is_first:
            found.append([part.kind, ""])
        assert found[-1][0] == part.kind
        found[-1][1] += part.text
    return [tuple(part) for part in found]


@pytest.mark.parametrize(
    ("text", "kind", "parts"),
    [
        ("so\n</think>\n\n<response>\n4\n\nor 5\n</response>\n", THINKING,
         [(THINKING, "so"), (ANSWER, "4\n\nor 5")]),
        ('x</think>\n<tool_call>\n{"a": "<b>"}\n</tool_call>\n<tool_call>{}</tool_call>', THINKING,
         [(THINKING, "x"), (CALL, '{"a": "<b>"}'), (CALL, "{}")]),
        ("4 < 5 <resp", ANSWER, [(ANSWER, "4 < 5 <resp")]),
        ("<think>\nx\n</think>4 ", ANSWER, [(THINKING, "x"), (ANSWER, "4")]),
        (" \n ", THINKING, []),
    ],
)  # fmt: skip
def test_parts_are_apart_without_tags_and_outer_space(text, kind, parts):
    assert parts_of([text], kind) == parts
    assert parts_of(list(text), kind) == parts


@given(st.lists(st.sampled_from(TEXTS)), st.data())
def test_parts_do_not_depend_on_the_pieces(texts, data):
    text = "".join(texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parts_of(pieces) == parts_of([text])


def test_tokens_give_the_text_that_decodes_them_all_and_no_broken_character(tokenizer):
    text = " \N{PILE OF POO} caf\u00e9 \u4f60\u597d <think>\n  1 + 2\n"
    ids = tokenizer.encode(text)
    stream = TokenText(tokenizer)
    pieces = [stream.add(i) for i in ids]
    assert "" in pieces, "a character of several bytes is held back"
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.end() == tokenizer.decode(ids)
    half = TokenText(tokenizer)
    cut = tokenizer.encode("\N{PILE OF POO}")[:-1]
    assert "".join(half.add(i) for i in cut) + half.end() == tokenizer.decode(cut)


def shown(tokenizer, text, *, folded=False, terminal=False):
    out = io.StringIO()
    console = Terminal(file=out, force_terminal=terminal, width=80)
    view = TurnView(console, tokenizer, opens_thinking=True, folded=folded)
    for token in tokenizer.encode(text):
        view.add(token)
    view.end()
    return out.getvalue(), view


def test_reasoning_is_dim_or_folded_and_calls_are_named(tokenizer):
    turn = calls(("calculator", {"expression": "1"}))
    text, view = shown(tokenizer, turn)
    assert text == (
        'I need tools\n\ncall: {"name": "calculator", "arguments": {"expression": "1"}}\n'
    )
    folded, view = shown(tokenizer, answer("4"), folded=True)
    assert folded == "thinking ... (/thinking shows it)\n\n4\n"
    assert view.thinking == "I know"
    styled, _ = shown(tokenizer, answer("4"), terminal=True)
    assert styled.startswith("\x1b[2;3mI") and styled.endswith("4\n")


@pytest.mark.parametrize("around", ["{}", "{}</think>x", "x</think>{}", "x</think><tool_call>{}"])
def test_nothing_in_a_turn_is_a_command_of_the_terminal(tokenizer, around):
    text, _ = shown(tokenizer, around.replace("{}", HOSTILE.replace("\ud800", "")))
    assert controls(text) == [] and "\\x1b" in text
