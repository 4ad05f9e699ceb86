"""Marks of turns that are no special tokens of the tokenizer: a sentence warns of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ernie_train.data import forgeable_turns, load_tokenizer
from ernie_train.data.chat_template import ChatTemplate
from ernie_train.data.tokenizer import Tokenizer
from tests.data.chat_families import CHATML, FAMILIES, INST, SPECIAL
from tests.data.test_chat_families import byte_level_files

PLAIN = {"colon": "'ASSISTANT:'", "trimmed": "'### Response:'"}  # families without special tokens


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, corpus: Callable[..., list[str]]) -> Path:
    root = tmp_path_factory.mktemp("forged")
    byte_level_files(root / "all", corpus(100))
    byte_level_files(root / "few", corpus(100), [*SPECIAL[:3], "<|begin_of_text|>"])
    return root


def own(directory: Path, source: str, added: Sequence[str] = ()) -> str:
    tokenizer = load_tokenizer(directory, add=added)
    template = ChatTemplate(source, tokenizer.special_tokens, "own.jinja")
    tokenizer.chat = replace(tokenizer.chat, template=template)
    return forgeable_turns(tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_families_whose_marks_are_no_special_tokens_are_warned_of(
    root: Path, name: str
) -> None:
    warning = own(root / "all", FAMILIES[name].template)
    assert (PLAIN[name] in warning) if name in PLAIN else warning == ""


def test_marks_that_the_tokenizer_does_not_have_are_named_with_the_remedy(root: Path) -> None:
    warning = own(root / "few", CHATML)
    assert warning.startswith("warning: own.jinja marks turns by <|im_end|>, <|im_start|>, which")
    assert "can forge a turn, and answers may not end" in warning
    add = ["<|im_end|>", "<|im_start|>"]
    assert warning.endswith(f"or tokenizer.add: {add}") and own(root / "few", CHATML, add) == ""
    warning = own(root / "few", INST)
    assert "[/INST], [INST], which" in warning and "tokenizer.add" not in warning


def test_marks_of_plain_words_are_shown(plain: Tokenizer, tokenizer: Tokenizer) -> None:
    assert forgeable_turns(tokenizer) == "", "ERNIE's Thinking format"
    warning = forgeable_turns(plain)
    assert "ernie_plain.jinja marks turns by plain text, 'Assistant:'" in warning
    assert "can forge a turn" in warning and "chat.template" in warning and "add" not in warning
