"""A small tokenizer trained on made-up sentences, and helpers that write files of rows."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ernie_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

VOCABULARY = (
    "the answer is sum of apples and oranges user assistant system who what if then else Liar "
    "knight knave true false return def import for in range print energy joule metre second "
    "response reasoning tool name arguments think steps first next finally because"
)
WORDS = VOCABULARY.split()


def made_up_texts(count: int = 800, seed: int = 3) -> list[str]:
    """Sentences, sums, lines of code and JSON, always the same."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        words = " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))
        a, b = rng.randint(0, 999), rng.randint(0, 999)
        texts.append(
            f"{words.capitalize()}. {a} + {b} = {a + b}\n"
            f'def {rng.choice(WORDS)}(x):\n    return x * {a}\n{{"name": "{rng.choice(WORDS)}"}}'
        )
    return texts


@pytest.fixture(scope="session")
def corpus() -> Callable[..., list[str]]:
    return made_up_texts


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(made_up_texts(), 600, directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="session")
def plain(tokenizer_dir: Path) -> Tokenizer:
    """The same tokenizer with the plain chat format."""
    return load_tokenizer(tokenizer_dir, template="ernie_plain")


@pytest.fixture(scope="session")
def bare(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same tokenizer from its `tokenizer.model` alone."""
    directory = tmp_path_factory.mktemp("bare")
    shutil.copy(tokenizer_dir / "tokenizer.model", directory)
    return load_tokenizer(directory)


WriteRows = Callable[[str, Sequence[Any]], Path]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """write_rows(name, rows): a JSONL file; a row that is a string is written as it is."""

    def write(name: str, rows: Sequence[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write
