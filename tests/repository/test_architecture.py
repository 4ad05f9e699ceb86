"""docs/architecture.md names packages, files and functions that exist, in walks that stay short."""

import ast
import re
from pathlib import Path

import pytest

from tests.repository.test_layers import PACKAGE, PACKAGES

PAGE = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
HOP = re.compile(r"^\| (\d+) \| `([\w/]+\.py)` `([\w.]+)`", re.MULTILINE)
WALKS = ("## A batch, from row to checkpoint", "## A rollout, from prompt to update")
MOST_HOPS = 20


def hops(title: str) -> list[tuple[str, str, str]]:
    section = PAGE.partition(title)[2].partition("\n## ")[0]
    return HOP.findall(section)


def defines(path: Path, name: str) -> bool:
    """Whether a module defines `function`, `Class` or `Class.method`."""
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [
            n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part
        ]
        if not found:
            return False
        body = found[0].body
    return True


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_is_short_and_leads_through_what_there_is(title: str) -> None:
    found = hops(title)
    assert [int(number) for number, _, _ in found] == list(range(1, len(found) + 1))
    assert 10 < len(found) <= MOST_HOPS
    missing = [f"{file} {name}" for _, file, name in found if not defines(PACKAGE / file, name)]
    assert missing == []


def test_the_table_lists_the_packages_in_their_order() -> None:
    rows = re.findall(r"^\| `(\w+)/` \|", PAGE, re.MULTILINE)
    assert rows == [name for name in PACKAGES if "." not in name]


def test_a_function_that_is_not_there_is_found_out() -> None:
    assert defines(PACKAGE / "train" / "trainer.py", "Trainer.train_step")
    assert not defines(PACKAGE / "train" / "trainer.py", "Trainer.step_train")
    assert not defines(PACKAGE / "train" / "trainer.py", "train_step")
