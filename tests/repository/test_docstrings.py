"""Docstrings say what a thing does: none begins with a question word."""

import ast

from tests.repository.test_layers import PACKAGE

RIDDLES = ("What", "Whether", "Where", "How", "Who", "Which")


def test_no_docstring_begins_with_a_question_word() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                words = (ast.get_docstring(node) or "").split(maxsplit=1)
                if words and words[0] in RIDDLES:
                    found.append(f"{path.name}: {getattr(node, 'name', 'module')}")
    assert found == []
