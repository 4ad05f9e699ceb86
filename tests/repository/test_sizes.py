"""Sizes that a reader can hold: files of at most 400 lines, functions that fit a screen."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 400, 60


def too_long(path: Path) -> list[str]:
    """Name a file, and functions in it, that are too long."""
    text = path.read_text(encoding="utf-8")
    lines, found = len(text.splitlines()), []
    if lines > MOST_LINES_OF_A_FILE:
        found.append(f"{path.name} has {lines} lines")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > MOST_LINES_OF_A_FUNCTION:
                found.append(f"{path.name}:{node.lineno} {node.name} has {size} lines")
    return found


@pytest.mark.parametrize("place", ["ernie_train", "tests", "tools"])
def test_files_and_functions_are_short(place: str) -> None:
    found = [line for path in sorted((REPOSITORY / place).rglob("*.py")) for line in too_long(path)]
    assert found == []


def test_what_is_too_long_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    path.write_text("def f():\n" + "    pass\n" * 60 + "\n" * 340)
    assert too_long(path) == ["long.py has 401 lines", "long.py:1 f has 61 lines"]
    path.write_text("def f():\n" + "    pass\n" * 59 + "\n" * 340)
    assert too_long(path) == []
