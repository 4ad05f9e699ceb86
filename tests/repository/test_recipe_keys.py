"""What is made from the schema of recipes is up to date, and catches mistakes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from ernie_train.core.yaml import load_yaml
from tools import recipe_reference
from tools.recipe_reference import PAGE, ROOT, SCHEMA, recipe_keys, render_page

RECIPES = sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("tools/evidence/recipes/*.yaml")])
KEYS = recipe_keys()


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    found = json.loads(SCHEMA.read_text("utf-8"))
    Draft202012Validator.check_schema(found)
    return Draft202012Validator(found)


def test_the_page_and_the_schema_are_those_of_today() -> None:
    again = "run: python -m tools.recipe_reference"
    text = PAGE.read_text("utf-8")
    assert render_page(text) == text, again
    assert SCHEMA.read_text("utf-8") == recipe_reference.schema_text(), again


def test_every_key_is_on_the_page_with_type_default_and_meaning() -> None:
    rows: dict[str, list[str]] = {}
    section = ""
    for line in PAGE.read_text("utf-8").splitlines():
        section = line[3:].strip("` ") if line.startswith("## ") else section
        if line.startswith("| `"):
            name, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            rows[f"{section}.{name.strip('` ')}"] = cells
    for key in KEYS:
        cells = rows[f"{key.section}.{key.name}"]
        assert len(cells) == 3 and all(cells), key
        assert cells[2][0] in "`(" or not cells[2][0].islower(), key


def test_types_defaults_and_stages_of_some_keys() -> None:
    text = PAGE.read_text("utf-8")
    for row in (
        "| `seed` | integer >= 0, < 2147483648 | `0` |",
        "| `clip_grad_norm` | number > 0 | `1.0` |",
        '| `schedule` | `cosine`, `linear`, `constant` or `wsd` | `"cosine"` |',
        "| `gate` | section | none |",
        "| `train` | text or list of text | `[]` |",
    ):
        assert row in text, row
    rollout = text.partition("## `stages[].rollout`\n")[2].partition("| key |")[0]
    assert rollout.strip() == "Stages of kind `upo`."
    assert "Stages of kind" not in text.partition("## `stages[].optim`")[2].partition("| key |")[0]


def test_a_section_that_is_missing_or_unknown_is_told() -> None:
    text = PAGE.read_text("utf-8")
    before, _, after = text.partition("## `stages[].gate`")
    with pytest.raises(SystemExit, match=r"add a heading ## `NAME` with a table for stages\[\]"):
        render_page(before + "## " + after.partition("\n## ")[2])
    with pytest.raises(SystemExit, match="no section of a recipe is called 'nonsense'"):
        render_page(text + "\n## `nonsense`\n\n| key | type | default | meaning |\n| --- |\n")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_name_the_schema_and_are_valid(path: Path, schema: Draft202012Validator) -> None:
    mark, _, named = path.read_text("utf-8").partition("\n")[0].partition("=")
    assert mark == recipe_reference.MODELINE.partition("=")[0]
    assert (path.parent / named).resolve() == ROOT / "recipes/schema.json"
    assert [error.message for error in schema.iter_errors(load_yaml(path))] == []


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return recipes/tiny.yaml with one setting changed."""
    data = copy.deepcopy(load_yaml(ROOT / "recipes/tiny.yaml"))
    holder: Any = data
    *above, last = path.split(".")
    for part in above:
        holder = holder[int(part) if part.isdigit() else part]
    holder[last] = value
    return data


TINY = load_yaml(ROOT / "recipes/tiny.yaml")
RL = next(i for i, stage in enumerate(TINY["stages"]) if stage["kind"] == "upo")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("sed", 1),
        ("seed", "one"),
        ("model.moe_num_expert", 4),
        ("stages.0.optim.learning_rate", 0.1),
        ("stages.0.micro_batch_size", 0),
        ("stages.0.kind", "stf"),
        ("stages.0.lora", {"rnk": 4}),
        (f"stages.{RL}.rollout.group_sizes", 4),
        (f"stages.{RL}.reward", {"nam": "row"}),
        (f"stages.{RL}.policy.kl", {"coef": 0.1, "kind": "k4"}),
    ],
)
def test_a_mistake_is_caught(schema: Draft202012Validator, path: str, value: Any) -> None:
    assert list(schema.iter_errors(changed(path, value)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.num_experts", 4),
        ("stages.0.train", "mlp"),
        ("stages.0.lora", {"rank": 4, "targets": "all-linear"}),
        (f"stages.{RL}.reward", "row"),
        (f"stages.{RL}.reward", [{"name": "row"}, {"name": "format"}]),
        (f"stages.{RL}.reward", {"parts": [{"name": "row"}], "max_excluded_fraction": 0.1}),
        (f"stages.{RL}.audit_reward", {"name": "exact", "share": 0.5}),
        (f"stages.{RL}.environment", {"tools": ["calculator", {"python": "a.py"}]}),
    ],
)
def test_short_forms_are_valid(schema: Draft202012Validator, path: str, value: Any) -> None:
    assert [error.message for error in schema.iter_errors(changed(path, value))] == []
