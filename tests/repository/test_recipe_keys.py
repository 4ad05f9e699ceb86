"""docs/recipes.md documents every key of a recipe, with its default, and no other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.recipe_keys import Key, recipe_keys

PAGE = Path(__file__).resolve().parents[2] / "docs/recipes.md"
KEYS = recipe_keys()


def shown_default(key: Key) -> str:
    field = key.owner.model_fields.get(key.name)
    if field is None or field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "none"
    return "section" if isinstance(default, BaseModel) else f"`{json.dumps(default)}`"


def documented(text: str) -> dict[tuple[str, str], tuple[str, str]]:
    """(section, key) -> (default, meaning), from the tables with these columns."""
    rows = {}
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        heading = part.partition("\n")[0].strip("` ")
        table = part.partition("| key | default | meaning |\n")[2].partition("\n\n")[0]
        for name, default, meaning in re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", table, re.M):
            rows[heading, name] = (default, meaning)
    return rows


ROWS = documented(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.path)
def test_every_key_is_documented_with_its_default(key: Key) -> None:
    row = ROWS.get((key.section, key.name))
    assert row is not None, (
        f"docs/recipes.md: add a row `{key.name}` to the table of section ## `{key.section}`"
    )
    default, meaning = row
    assert default == shown_default(key)
    assert meaning.strip()


def test_no_other_key_is_documented() -> None:
    assert sorted(set(ROWS) - {(key.section, key.name) for key in KEYS}) == []
