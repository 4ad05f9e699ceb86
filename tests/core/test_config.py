"""Settings: what is accepted, and the message for everything that is not."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
from pydantic import Field

from ernie_train.core.config import (
    StrictConfig,
    apply_overrides,
    dump_yaml,
    parse_config,
)
from ernie_train.core.errors import ConfigError
from ernie_train.run.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


class Optim(StrictConfig):
    lr: float = Field(1e-3, gt=0, le=1)
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = Field(0, ge=0, lt=10)


class Source(StrictConfig):
    path: Path
    weight: float = 1.0


class Sft(StrictConfig):
    kind: Literal["sft"]
    name: str
    optim: Optim = Optim()
    data: list[Source] = Field(min_length=1, max_length=2)
    eval_every: int | Literal["never"] = "never"
    # Named like a tag of the union, which must not confuse paths.
    sft: int | None = None

    @pydantic.model_validator(mode="after")
    def _name_is_good(self) -> "Sft":
        if self.name == "bad":
            raise ValueError("the name must not be 'bad'")
        return self


class Pretrain(StrictConfig):
    kind: Literal["pretrain"]
    name: str = Field(pattern="^[a-z]+$")
    steps: int


class Mixture(StrictConfig):
    temperature: float = 1.0


class Recipe(StrictConfig):
    name: str
    stages: list[Annotated[Sft | Pretrain, Field(discriminator="kind")]] = []
    shares: dict[str, float] = {}
    mixture: int | Mixture = 1
    optim: Optim | None = None
    debug: bool = False


def stage(**changes: Any) -> dict[str, Any]:
    return {"kind": "sft", "name": "s", "data": [{"path": "a.jsonl"}]} | changes


def problems(**changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(Recipe, {"name": "x"} | changes, "tiny.yaml")
    assert str(caught.value).startswith("tiny.yaml: ")
    return caught.value.problems


def test_a_good_recipe_is_read() -> None:
    optim = {"lr": 1, "betas": [0.5, 1], "schedule": "wsd"}
    recipe = parse_config(Recipe, {"name": "x", "stages": [stage(optim=optim)]}, "tiny.yaml")
    (only,) = recipe.stages
    assert isinstance(only, Sft)
    assert only.optim == Optim(lr=1.0, betas=(0.5, 1.0), schedule="wsd")
    assert isinstance(only.optim.lr, float)
    assert only.data[0].path == Path("a.jsonl")
    assert recipe.mixture == 1 and recipe.optim is None


def test_numbers_arrive_bit_by_bit() -> None:
    for value in (0.1, 1 / 3, 1e-05, 5e-324, 0.30000000000000004):
        recipe = parse_config(Recipe, {"name": "x", "shares": {"a": value}}, "")
        assert recipe.shares["a"].hex() == value.hex()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": 3}, "name: must be text, got the number 3"),
        ({"name": None}, "name: must be text, got nothing (null)"),
        ({"name": ["a", "b"]}, "name: must be text, got a list of 2"),
        ({"name": {"k": 1}}, "name: must be text, got a section with the keys k"),
        ({"name": {}}, "name: must be text, got an empty section"),
        ({"debug": "yes"}, "debug: must be true or false, got the text 'yes'"),
        ({"debug": 1}, "debug: must be true or false, got the number 1"),
        ({"optim": {"lr": "1e-4"}}, "optim.lr: must be a number, got the text '1e-4'"),
        ({"optim": {"lr": True}}, "optim.lr: must be a number, got the boolean true"),
        ({"optim": {"lr": 0}}, "optim.lr: must be > 0, got the number 0"),
        ({"optim": {"lr": 2}}, "optim.lr: must be <= 1, got the number 2"),
        (
            {"optim": {"warmup_steps": -1}},
            "optim.warmup_steps: must be >= 0, got the number -1",
        ),
        ({"optim": {"warmup_steps": 10}}, "optim.warmup_steps: must be < 10, got the number 10"),
        (
            {"optim": {"warmup_steps": 1.5}},
            "optim.warmup_steps: must be a whole number, got the number 1.5",
        ),
        (
            {"optim": {"warmup_steps": False}},
            "optim.warmup_steps: must be a whole number, got the boolean false",
        ),
        (
            {"optim": {"schedule": "cosin"}},
            "optim.schedule: must be 'cosine', 'linear' or 'wsd', got the text 'cosin'; "
            "did you mean 'cosine'?",
        ),
        (
            {"optim": {"schedule": 1}},
            "optim.schedule: must be 'cosine', 'linear' or 'wsd', got the number 1",
        ),
        (
            {"optim": [1]},
            "optim: must be a section of `key: value` lines, got a list of 1",
        ),
        (
            {"optim": {"betas": [0.9, "x"]}},
            "optim.betas.1: must be a number, got the text 'x'",
        ),
        ({"optim": {"betas": 0.9}}, "optim.betas: must be a list, got the number 0.9"),
        ({"shares": {"a": "w"}}, "shares.a: must be a number, got the text 'w'"),
        ({"shares": 1}, "shares: must be a section of `key: value` lines, got the number 1"),
        (
            {"shares": {"a": float("nan")}},
            "shares.a: must be a finite number, got the number nan",
        ),
        ({"stages": 1}, "stages: must be a list, got the number 1"),
        (
            {"stages": ["sft"]},
            "stages.0: must be a section of `key: value` lines, got the text 'sft'",
        ),
        (
            {"stages": [stage(data=[])]},
            "stages.0.data: List should have at least 1 item after validation, not 0",
        ),
        (
            {"stages": [stage(data=[{"path": "a"}] * 3)]},
            "stages.0.data: List should have at most 2 items after validation, not 3",
        ),
        (
            {"stages": [stage(data=[{"path": 3}])]},
            "stages.0.data.0.path: must be text, got the number 3",
        ),
        ({"stages": [stage(name="bad")]}, "stages.0: the name must not be 'bad'"),
        (
            {"stages": [{"kind": "pretrain", "name": "A", "steps": 1}]},
            "stages.0.name: String should match pattern '^[a-z]+$', got the text 'A'",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_was_wanted(
    changes: dict[str, Any], expected: str
) -> None:
    assert problems(**changes) == [expected]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim": {"larning_rate": 1}}, "optim.larning_rate: unknown key; did you mean 'lr'?"),
        ({"optim": {"learning_rate": 1}}, "optim.learning_rate: unknown key; did you mean 'lr'?"),
        ({"optim": {"warmup": 1}}, "optim.warmup: unknown key; did you mean 'warmup_steps'?"),
        ({"stagse": []}, "stagse: unknown key; did you mean 'stages'?"),
        ({"lr": 1}, "lr: unknown key; did you mean 'stages[].optim.lr'?"),
        (
            {"stages": [stage(lr=1)]},
            "stages.0.lr: unknown key; did you mean 'stages.s.optim.lr'?",
        ),
        (
            {"stages": [stage(data=[{"path": "a", "wieght": 1}])]},
            "stages.0.data.0.wieght: unknown key; did you mean 'weight'?",
        ),
        (
            {"zzz": 1},
            "zzz: unknown key; known are name, stages, shares, mixture, optim, debug",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(changes: dict[str, Any], expected: str) -> None:
    assert problems(**changes) == [expected]


def test_paths_through_unions_hold_no_tags() -> None:
    stages = [
        stage(sft="q", optim={"lr": "x"}),
        {"kind": "sftt"},
        {"name": "kindless"},
        {"kind": "pretrain", "name": "p", "steps": "many"},
    ]
    assert problems(stages=stages) == [
        "stages.0.optim.lr: must be a number, got the text 'x'",
        "stages.0.sft: must be a whole number, got the text 'q'",
        "stages.1.kind: must be 'sft' or 'pretrain', got the text 'sftt'; did you mean 'sft'?",
        "stages.2.kind: missing; this key is required",
        "stages.3.steps: must be a whole number, got the text 'many'",
    ]


def test_a_union_of_types_says_what_all_of_them_want() -> None:
    assert problems(stages=[stage(eval_every=2.5)]) == [
        "stages.0.eval_every: must be a whole number or 'never', got the number 2.5"
    ]
    assert problems(mixture="x") == [
        "mixture: must be a whole number or a section of `key: value` lines, got the text 'x'"
    ]
    # Inside a section only the section's own errors count.
    assert problems(mixture={"temperature": "x"}) == [
        "mixture.temperature: must be a number, got the text 'x'"
    ]


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(
            Recipe, {"stages": [stage(name=1), {"kind": "x"}], "debug": 0, "nmae": "x"}, "t.yaml"
        )
    assert caught.value.problems == [
        "name: missing; this key is required",
        "stages.0.name: must be text, got the number 1",
        "stages.1.kind: must be 'sft' or 'pretrain', got the text 'x'; known are sft, pretrain",
        "debug: must be true or false, got the number 0",
        "nmae: unknown key; did you mean 'name'?",
    ]
    assert str(caught.value).startswith("t.yaml: 5 problems\n  - name: missing")


def test_long_texts_are_shortened() -> None:
    (line,) = problems(debug="x" * 500)
    assert len(line) < 120 and line.endswith("xxx...'")


def test_values_must_be_plain() -> None:
    with pytest.raises(ConfigError, match="plain values"):
        parse_config(Recipe, {"name": Path("x")}, "")


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Optim().lr = 2.0  # type: ignore[misc]


def test_a_wrong_default_is_found() -> None:
    class Broken(StrictConfig):
        steps: int = "many"  # type: ignore[assignment]

    with pytest.raises(ConfigError, match="steps: must be a whole number"):
        parse_config(Broken, {}, "")


# ---- Overrides


def recipe() -> dict[str, Any]:
    return {
        "name": "x",
        "stages": [stage(name="sft", optim={"lr": 0.1}), stage(name="rl"), stage(name="rl")],
        "empty": [],
        "plain": [1, 2],
        "section": None,
    }


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("stages.sft.optim.lr=1e-5", 1e-5),
        ("stages.0.optim.lr= 1e-5", 1e-5),
        ("stages.sft.optim.lr=fast", "fast"),
        ("stages.sft.optim.lr={a: [1, true]}", {"a": [1, True]}),
        ("stages.sft.optim.lr=", None),
        ("stages.sft.optim.lr=a=b", "a=b"),
    ],
)
def test_an_override_sets_a_value_read_as_yaml(override: str, value: Any) -> None:
    before = recipe()
    after = apply_overrides(before, [override])
    assert after["stages"][0]["optim"].pop("lr") == value
    assert before == recipe()
    del before["stages"][0]["optim"]["lr"]
    assert after == before


def test_overrides_make_sections_and_apply_in_order() -> None:
    after = apply_overrides(
        recipe(), ["a.b.c=1", "section.k=2", "plain.1=5", "a.b.c=3", "empty=[4]", "empty.0=6"]
    )
    assert after["a"] == {"b": {"c": 3}}
    assert after["section"] == {"k": 2}
    assert after["plain"] == [1, 5]
    assert after["empty"] == [6]


def test_an_override_changes_one_of_two_sections_that_an_alias_shares() -> None:
    shared = {"lr": 1.0}
    after = apply_overrides({"a": shared, "b": shared}, ["a.lr=2.0"])
    assert after == {"a": {"lr": 2.0}, "b": {"lr": 1.0}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr", "lr: expected key.path=value, like stages.sft.optim.lr=1e-4"),
        ("=1", "=1: expected key.path=value, like stages.sft.optim.lr=1e-4"),
        ("a..b=1", "a..b=1: expected key.path=value, like stages.sft.optim.lr=1e-4"),
        ("name=[1", "name: the value is no YAML: expected ',' or ']', but got '<stream end>'"),
        ("name.first=1", "name.first: name is the text 'x', it has no keys"),
        ("stages.stf.name=1", "stages.stf: no item of this name; did you mean 'sft'?"),
        ("stages.rl.name=1", "stages.rl: several items have this name; use the index"),
        ("stages.3.name=1", "stages.3: no such item; the list has 3 items, counted from 0"),
        ("stages.-1.name=1", "stages.-1: no such item; the list has 3 items, counted from 0"),
        ("empty.0=1", "empty.0: no such item; the list is empty"),
        ("stages.--1.name=1", "stages.--1: no item of this name; known are sft, rl"),
        ("stages.².name=1", "stages.²: no item of this name; known are sft, rl"),
        ("plain.x=1", "plain.x: items of this list have no name; use the index, from 0"),
    ],
)
def test_an_override_that_cannot_be_applied(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(recipe(), [override])
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(expected)


def test_all_bad_overrides_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(recipe(), ["x", "stages.9.a=1", "name=ok"])
    assert len(caught.value.problems) == 2


def test_an_override_of_an_unknown_key_is_left_to_the_schema() -> None:
    data = apply_overrides({"name": "x", "stages": [stage()]}, ["stages.s.optim.lrr=1"])
    with pytest.raises(ConfigError, match=r"stages\.0\.optim\.lrr: unknown key; did you mean 'lr'"):
        parse_config(Recipe, data, "")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_a_run_records_of_a_recipe_is_that_recipe(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe.model_dump(mode="json")), "utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
