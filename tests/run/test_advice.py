"""Advice to the author of a recipe: other kits' keys, names of hubs, settings not meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import pydantic
import pytest
import yaml

from ernie_train.cli.main import main
from ernie_train.core.config import parse_config, schemas_in
from ernie_train.core.errors import ConfigError, UserError, did_you_mean
from ernie_train.core.yaml import parse_yaml
from ernie_train.data import load_tokenizer, train_tokenizer
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.run.check import recipe_warnings
from ernie_train.run.foreign_keys import FOREIGN_KEYS, FOREIGN_KINDS
from ernie_train.run.recipe import Recipe, load_recipe
from ernie_train.run.sources import tokenizer_directory
from ernie_train.weights import save_pretrained
from ernie_train.weights.model_directory import find_model
from tests.workspace import make_workspace


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("advice"))


def test_every_path_in_the_table_of_foreign_keys_exists():
    for key, target in FOREIGN_KEYS.items():
        schemas = [Recipe]
        for name in target.replace("[]", "").split(".") if " " not in target else ():
            fields = [s.model_fields[name] for s in schemas if name in s.model_fields]
            assert fields, f"{key}: {target} has no {name}"
            schemas = [found for field in fields for found in schemas_in(field.annotation)]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("stages.sft.learning_rate=1", "unknown key; did you mean 'stages.sft.optim.lr'?"),
        ("learning_rate=1e-4", "did you mean 'stages[].optim.lr'?"),
        ("stages.sft.per_device_train_batch_size=4", "did you mean 'stages.sft.micro_batch_size'?"),
        ("stages.sft.optim.learning_rate=1", "did you mean 'stages.sft.optim.lr'?"),
        ("stages.0.optim.learning_rate=1", "did you mean 'stages.sft.optim.lr'?"),
        ("report_to=wandb", "did you mean 'metrics'?"),
        ("use_wandb=true", "did you mean 'metrics'?"),
        ("sandbox=strict", "sandbox: unknown key; delete it: programs of a model always run in a"),
        ("output_dir=x", "--run-dir"),
        ("model_name_or_path=x", "did you mean 'model.path'?"),
        ("lora={}", "did you mean 'stages[].lora'?"),
        ("stages.sft.weight_decay=0", "did you mean 'stages.sft.optim.weight_decay'?"),
        ("stages.sft.micro_batch_sise=2", "did you mean 'micro_batch_size'?"),
        ("zzz=1", "known are name, version, seed"),
    ],
)  # fmt: skip
def test_the_key_that_was_meant(recipe, override, hint):
    with pytest.raises(ConfigError) as failed:
        load_recipe(recipe, [override])
    assert hint in str(failed.value)


@pytest.mark.parametrize("kind", FOREIGN_KINDS)
def test_the_kind_of_a_stage_elsewhere_names_the_settings_that_it_is_here(recipe, kind):
    with pytest.raises(ConfigError, match=r"stages\.0\.kind: must be .*write kind: upo") as failed:
        load_recipe(recipe, [f"stages.0.kind={kind}"])
    advice = str(failed.value).partition("write ")[2]
    assert advice == FOREIGN_KINDS[kind].partition("write ")[2]
    settings = {"kind": "upo", **(parse_yaml(advice.partition(" with ")[2], "advice") or {})}
    stage = {
        "name": "rl", "data": [{"path": "x"}], "reward": "math", "iterations": 9,
        "micro_batch_size": 8, "rollout": {"prompts_per_iteration": 4, "max_new_tokens": 8},
        "optim": {"lr": 1e-3}, **settings,
    }  # fmt: skip
    made = yaml.safe_load(recipe.read_text()) | {"stages": [stage], "evaluation": None}
    assert parse_config(Recipe, made, "advice").stages


def test_every_path_may_begin_at_the_home_directory(monkeypatch):
    """No shell expands `~` in a recipe, nor in an override."""
    monkeypatch.setenv("HOME", "/home/me")
    names = {"path", "data", "validation", "template", "few_shot", "replay", "stand_in"}
    schemas: list[type[pydantic.BaseModel]] = [Recipe]
    seen = set()
    for schema in schemas:
        for name, field in schema.model_fields.items():
            inner = list(schemas_in(field.annotation))
            schemas += [found for found in inner if found not in schemas]
            if name in names and not inner and field.annotation is not int:  # parallel.data
                seen.add(name)
                kind = pydantic.TypeAdapter(Annotated[field.annotation, None, *field.metadata])
                assert kind.validate_python("~/x") == "/home/me/x", (schema, name)
    assert seen == names


def test_words_that_are_not_near_are_not_suggested():
    assert "did you mean" not in did_you_mean("lora", ["balance", "gate", "optim"])
    assert "did you mean" not in did_you_mean("learn", ["gate", "balance", "lr"])


def test_a_name_of_a_hub_is_told_to_be_downloaded(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="hf download someone/Some-Model --local-dir"):
        find_model("someone/Some-Model")
    with pytest.raises(UserError, match="hf download someone/some"):
        load_recipe(recipe, ["tokenizer.path=someone/some"]).load_tokenizer(tmp_path)
    elsewhere = ["/nowhere/at/all", "runs/nope", "./someone/some", "someone/some/more"]
    (tmp_path / "mine").mkdir()
    for path in (*elsewhere, "mine/nope", "models/ERNIE-4.5-21B-A3B-Thinking"):
        with pytest.raises(UserError) as failed:
            find_model(path)
        assert "download" not in str(failed.value)


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        ([], None),
        (["stages.sft.optim.lr=0.5"], r"stages\.0\.optim\.lr=0\.5 is far above"),
        (["stages.sft.optim.warmup_steps=99"], "warmup_steps=99 does not end within"),
    ],
)  # fmt: skip
def test_settings_that_are_unlikely_to_be_meant(recipe, overrides, warning):
    loaded = load_recipe(recipe, overrides)
    lines = recipe_warnings(loaded, loaded.load_tokenizer(recipe.parent))
    assert len(lines) == (warning is not None)
    assert warning is None or re.search(warning, lines[0])


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize("warmup", [99, 1])
def test_a_warm_up_that_outlasts_the_epochs_is_told_once(recipe, tmp_path, capsys, verb, warmup):
    """How many steps epochs have is known when their data are read."""
    settings = ["steps=null", "epochs=1", f"optim.warmup_steps={warmup}", "validation=[]",
                "validate_every_steps=null", "checkpoint={every_steps: 99}"]  # fmt: skip
    place = ["--run-dir", str(tmp_path)] if verb == "run" else []
    overrides = [f"stages.sft.{setting}" for setting in settings]
    with pytest.raises(SystemExit) as ended:
        main([verb, str(recipe), *place, *overrides, "evaluation=null", "export=null"])
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    line = r"warning: stages\.sft\.optim\.warmup_steps=99 does not end within the \d+ steps of 1 ep"
    assert len(re.findall(line, told)) == (warmup == 99), told


def test_a_tokenizer_of_another_vocabulary_than_the_models(recipe, tmp_path):
    tokenizer = load_tokenizer(recipe.parent / "tokenizer")
    config = Ernie4_5_MoeConfig.preset(
        "tiny", vocab_size=384, hidden_size=32, num_hidden_layers=1, head_dim=8,
        moe_num_experts=2, moe_k=1,
    )  # fmt: skip
    save_pretrained(Ernie4_5_MoeForCausalLM(config), tmp_path / "model", tokenizer)
    loaded = load_recipe(recipe, [f"model={{path: {tmp_path / 'model'}}}"])
    assert recipe_warnings(loaded, tokenizer) == []
    other = train_tokenizer(["something else entirely 2024 1724"] * 9, 300, tmp_path / "other")
    (line,) = recipe_warnings(loaded, other)
    assert "has another vocabulary" in line
    assert f"tokenizer.path={tmp_path / 'model'}" in line


def test_the_tokenizer_of_a_run_is_found(tmp_path):
    checkpoint = tmp_path / "01-sft/checkpoints/step_000001"
    checkpoint.mkdir(parents=True)
    own = tmp_path / "tokenizer"
    own.mkdir()
    for place, mark in ((tmp_path, "recipe.yaml"), (checkpoint, "state.json"),
                        (tmp_path / "01-sft", "stage.json")):  # fmt: skip
        (place / mark).touch()
        assert tokenizer_directory(place).resolve() == own
    assert tokenizer_directory(own) == own


def test_a_selection_bias_that_moves_in_rl_is_told():
    root = Path(__file__).resolve().parents[2]
    tokenizer = load_tokenizer(root / "data/tokenizer")
    moved = load_recipe(
        root / "recipes/tiny.yaml", ["stages.rl-logic.balance.bias_update_rate=0.01"]
    )
    (warning,) = recipe_warnings(moved, tokenizer)
    assert "stages.1.balance.bias_update_rate=0.01" in warning and "freezes it" in warning
    assert recipe_warnings(load_recipe(root / "recipes/tiny.yaml"), tokenizer) == []
