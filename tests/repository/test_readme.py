"""What README shows is accepted: its recipes by the schema, its reward by the scorer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ernie_train.core.config import load_yaml, parse_config
from ernie_train.run.recipe import Recipe, load_recipe
from ernie_train.train.moe_balance import BalanceConfig

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def parsed(text: str, path: Path) -> Any:
    path.write_text(text, encoding="utf-8")
    return load_yaml(path)


FRAME = """name: readme
model: {preset: 21b-a3b}
tokenizer: {path: data/tokenizer}
stages:
  - {name: first, kind: sft, data: [{path: x}], seq_len: 8, micro_batch_size: 1, steps: 1,
     optim: {lr: 1.0e-3}}
"""


@pytest.mark.parametrize("number", range(len(blocks("yaml"))))
def test_recipes_and_parts_of_recipes_are_valid(number, tmp_path):
    text, path = blocks("yaml")[number], tmp_path / "recipe.yaml"
    if "balance:" in text.splitlines()[0]:
        BalanceConfig(**parsed(text, path)["balance"])
        return
    if not text.startswith("name:"):
        text = FRAME + text
    recipe = parse_config(Recipe, parsed(text, path), "README.md")
    assert recipe.stages


def test_the_recipe_for_a_model_of_ones_own_is_valid():
    recipe = load_recipe(ROOT / "recipes/own_model.yaml")
    (stage,) = recipe.stages
    assert recipe.model.path == recipe.tokenizer.path == "my-model"
    assert stage.lora.rank == 16 and stage.data[0].path == "my-data.jsonl"
    assert "recipes/own_model.yaml" in README


def test_the_reward_of_ones_own_works():
    (source,) = [text for text in blocks("python") if "def score(" in text]
    names: dict[str, Any] = {}
    exec(source, names)
    row = {"keyword": "tea"}
    assert names["score"](row, "hm</think>\n\n<response>\ngreen tea\n</response>\n") == 1.0
    assert names["score"](row, "tea</think>\n\n<response>\ncoffee\n</response>\n") == 0.0
    assert names["score"](row, "tea") == 0.0


def test_every_verb_of_the_table_is_there():
    from ernie_train.cli.main import app

    verbs = set(re.findall(r"^\| `ernie-train (\w+)", README, re.M))
    assert verbs == {command.name or command.callback.__name__
                     for command in app.registered_commands}  # fmt: skip
