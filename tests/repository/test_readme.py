"""What README and the pages show is accepted: recipes by the schema, the reward by the scorer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_train.core.config import load_yaml, parse_config
from ernie_train.run.foreign_keys import FOREIGN_KEYS
from ernie_train.run.recipe import Recipe, load_recipe
from ernie_train.run.stages import SftConfig
from tools import cli_reference

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Pages whose blocks of YAML are recipes, stages, or keys of either.
PAGES = [
    "README.md", "docs/writing_recipes.md", "docs/train_long_context.md", "docs/my_reward.md",
    "docs/concepts/moe_balance.md", "docs/reward_models.md", "docs/tools.md", "docs/data.md",
    "docs/chat.md", "docs/report.md", "docs/engines.md", "docs/lora.md",
    "docs/rewards.md", "docs/scaling.md",
]  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


STAGE: dict[str, Any] = {
    "name": "first", "kind": "sft", "data": [{"path": "x"}], "seq_len": 8, "micro_batch_size": 1,
    "steps": 1, "grad_accum_steps": 8, "optim": {"lr": 1e-3},
}  # fmt: skip
RL: dict[str, Any] = {
    "name": "first", "kind": "upo", "data": [{"path": "x"}], "reward": "math", "iterations": 1,
    "micro_batch_size": 8, "rollout": {"prompts_per_iteration": 4, "max_new_tokens": 8},
    "optim": {"lr": 1e-3},
}  # fmt: skip


def as_recipe(shown: Any) -> dict[str, Any]:
    """Return a whole recipe that holds what a page shows of one."""
    whole = {"name": "shown", "model": {"preset": "21b-a3b"}, "tokenizer": {"path": "x"}}
    of_recipe = {key: value for key, value in shown.items() if key in Recipe.model_fields}
    of_stage = {key: value for key, value in shown.items() if key not in of_recipe}
    if "stages" in of_recipe:
        return {**whole, **of_recipe}
    of_rl = of_stage.keys() - SftConfig.model_fields.keys()
    stage = {**(RL if of_rl else STAGE), **of_stage}
    return {**whole, "stages": [stage], **of_recipe}


def alternatives(text: str) -> list[str]:
    """Return the parts of a block that shows several ways to write one key; else all of it."""
    first = text.partition(":")[0]
    parts = re.split(rf"^(?={re.escape(first)}:)", text, flags=re.M)[1:]
    return parts if len(parts) > 1 else [text]


def shown_recipes() -> list[Any]:
    found = [(page, n) for page in PAGES for n in range(len(blocks(page, "yaml")))]
    return [pytest.param(page, n, id=f"{page}-{n}") for page, n in found]


@pytest.mark.parametrize(("page", "number"), shown_recipes())
def test_recipes_and_parts_of_recipes_are_valid(page: str, number: int, tmp_path: Path) -> None:
    text = blocks(page, "yaml")[number]
    text = f"stages:\n{text}" if text.lstrip().startswith("- name:") else text
    path = tmp_path / "recipe.yaml"
    for one in alternatives(text):
        path.write_text(one, encoding="utf-8")
        assert parse_config(Recipe, as_recipe(load_yaml(path)), page).stages


def test_the_names_of_other_algorithms_are_settings_that_there_are() -> None:
    page = (ROOT / "docs/concepts/rl.md").read_text("utf-8")
    shown = re.findall(r"`((?:policy|reward): (?:[^`.]|\\.\\d)*)`", page)
    assert len(shown) >= 6
    for text in shown:
        stage = {**RL, **yaml.safe_load(text)}
        assert parse_config(Recipe, {**as_recipe({}), "stages": [stage]}, text).stages


def test_readme_has_the_table_of_the_main_job() -> None:
    head = "| domain | SFT | rl-logic |"
    texts = (README, (ROOT / "docs/tiny.md").read_text("utf-8"))
    tables = [text[text.index(head) :].partition("\n\n")[0] for text in texts]
    assert tables[0] == tables[1] and len(tables[0].splitlines()) == 8


def test_keys_of_other_kits_are_those_that_errors_name() -> None:
    page = (ROOT / "docs/writing_recipes.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| ", page.partition("## Coming from")[2], re.M)
    assert len(rows) > 12
    for there, here in rows:
        known = re.findall(r"`(\w+)`", there)
        ours = re.findall(r"`([\w.]+)`", here)
        assert not set(known) - FOREIGN_KEYS.keys(), known
        named = [FOREIGN_KEYS[key].replace("stages[].", "S.") for key in known]
        for target in named:
            if " " not in target:
                assert target in ours, (known, target)
            elif ours:
                assert set(ours) <= set(re.findall(r"[\w.]*\w", target)), (known, target)
            else:
                assert re.match("delete it: .*(always|by itself)", target), (known, target)


def test_the_recipe_for_a_model_of_ones_own_is_valid() -> None:
    recipe = load_recipe(ROOT / "recipes/own_model.yaml")
    (stage,) = recipe.stages
    assert recipe.model.path == recipe.tokenizer.path == "my-model"
    assert stage.lora.rank == 16 and stage.data[0].path == "my-data.jsonl"


def test_the_reward_of_ones_own_works() -> None:
    (source,) = [text for text in blocks("docs/my_reward.md", "python") if "def score(" in text]
    names: dict[str, Any] = {}
    exec(source, names)
    row = {"keyword": "tea"}
    assert names["score"](row, "hm</think>\n\n<response>\ngreen tea\n</response>\n") == 1.0
    assert names["score"](row, "tea</think>\n\n<response>\ncoffee\n</response>\n").value == 0.0
    assert names["score"](row, "tea").status == "wrong"
    plain = {**row, "completion_format": {"thinking": False}}
    for text in ("I like tea.", "Tea, please!"):
        assert names["score"](plain, text) == 1.0
    assert names["score"](plain, "The team likes steam.").status == "wrong"
    assert names["score"](plain, "tea " * 51) == 0.0


def test_the_page_of_commands_is_that_of_today() -> None:
    text = cli_reference.PAGE.read_text("utf-8")
    again = "run: python -m tools.cli_reference"
    assert cli_reference.render_page(text) == text, again
    for option in ("`--nproc N`", "`--max-new-tokens N` | `1024` |", "`RECIPE` | required |"):
        assert option in text


def test_every_verb_of_the_table_is_there():
    from ernie_train.cli.main import app

    verbs = set(re.findall(r"^\| `ernie-train (\w+)", README, re.M))
    assert verbs == {command.name or command.callback.__name__
                     for command in app.registered_commands}  # fmt: skip


def without_comments(text: str) -> str:
    return re.sub(r" *#.*$", "", text, flags=re.M)


def test_the_chinese_page_has_the_commands_of_readme_and_the_quick_start() -> None:
    english = blocks("README.md", "bash") + blocks("docs/quick_start.md", "bash")
    chinese = blocks("README.zh.md", "bash")
    assert [*map(without_comments, chinese)] == [*map(without_comments, english)]


def test_the_quick_start_is_short() -> None:
    text = (ROOT / "docs/quick_start.md").read_text("utf-8")
    words = re.sub(r"<!--.*?-->", "", text, flags=re.S).split()
    assert len(words) < 400
