"""A tokenizer in the Thinking format, and turns as a model writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ernie_train.data import Tokenizer, load_tokenizer
from ernie_train.data.completion_format import response_block, tool_call_block

TOKENIZER = Path(__file__).resolve().parents[2] / "data/tokenizer"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TOKENIZER)


def calls(*made: tuple[str, Any]) -> str:
    """A turn that calls tools, behind the generation prompt."""
    blocks = [tool_call_block(name, arguments) for name, arguments in made]
    return "I need tools\n</think>\n\n" + "".join(blocks)


def answer(text: str) -> str:
    return f"I know\n</think>\n\n{response_block(text)}"


def as_json(value: Any) -> str:
    return json.dumps(value)
