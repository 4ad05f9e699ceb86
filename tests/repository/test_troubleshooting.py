"""docs/troubleshooting.md quotes messages and healthy ranges that the program really has."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from ernie_train.io.healthy import HEALTHY

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
# A message is a code span of several words that is neither a command nor a setting.
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def without_values(text: str) -> str:
    """Return a message with … in place of what differs."""
    return re.sub(r"\{[^{}]*\}", "…", text)


@cache
def texts_of_the_program() -> str:
    """Return all texts in the program's source, with … for the values in them, one a line."""
    found = []
    for path in sorted((ROOT / "ernie_train").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(without_values(node.value))
    return "\n".join(found)


def messages(page: str) -> list[str]:
    spans = SPAN.findall(re.sub(r"^\| metric \| healthy.*?\n\n", "", page, flags=re.S | re.M))
    return [s for s in spans if " " in s and not re.match(r"ernie-train |--|[\w./]+: |.*\{", s)]


def test_messages_are_those_of_the_program() -> None:
    quoted = messages(PAGE)
    assert len(quoted) > 12
    assert [text for text in quoted if text not in texts_of_the_program()] == []


def test_a_message_that_nothing_prints_is_found() -> None:
    assert messages("say `the model is tired of …` to `ernie-train check a`") == [
        "the model is tired of …"
    ]
    assert "the model is tired of …" not in texts_of_the_program()


def test_the_table_has_every_healthy_range_with_its_remedy() -> None:
    for healthy in HEALTHY:
        mark = " ⚠" if healthy.warns else ""
        remedy = without_values(healthy.remedy)
        assert f"| `{healthy.metric}`{mark} | {healthy.bounds} | {remedy} |" in PAGE
