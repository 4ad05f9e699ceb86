"""Recipes that come with the package run by name, from any directory, installed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_train.core.errors import ConfigError
from ernie_train.io import shipped
from ernie_train.run.recipe import load_recipe

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["checkout", "installed"])
def share(request, tmp_path, monkeypatch) -> Path:
    """The directory of recipes and data; the working directory is another one."""
    monkeypatch.chdir(tmp_path)
    if request.param == "checkout":
        return REPOSITORY
    package = tmp_path / "site/ernie_train"
    for name in ("recipes/tiny.yaml", "data/tokenizer"):
        place = package / "share" / name
        place.parent.mkdir(parents=True)
        place.symlink_to(REPOSITORY / name)
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    return package / "share"


def test_a_shipped_recipe_finds_its_data_from_anywhere(share):
    recipe = load_recipe("tiny", ["seed=3", "stages.sft.steps=5"])
    assert recipe.seed == 3
    assert recipe.tokenizer.path == str(share / "data/tokenizer")
    asked = load_recipe(share / "recipes/tiny.yaml", ["seed=3", "stages.sft.steps=5"])
    assert asked.tokenizer.path == "data/tokenizer", "a file is read as it is written"


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = yaml.safe_load((REPOSITORY / "recipes/tiny.yaml").read_text()) | {"name": "own"}
    Path("tiny").write_text(yaml.safe_dump(own))
    assert load_recipe("tiny").name == "own"


def test_held_out_problems_are_found_from_anywhere(share, tmp_path):
    assert shipped.shared_path("data/tokenizer") == share / "data/tokenizer"
    (tmp_path / "data/tokenizer").mkdir(parents=True)
    assert shipped.shared_path("data/tokenizer") == Path("data/tokenizer")


def test_a_directory_of_that_name_does_not(tmp_path, monkeypatch):
    """Such as an earlier run's."""
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert load_recipe("tiny").name == "tiny"


@pytest.mark.parametrize("name", ["tinny", "recipes/tiny.yml", "tiny.yaml", "./tiny"])
def test_what_is_missing_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such file") as refused:
        load_recipe(name)
    assert ("tiny, tools" in str(refused.value)) == (name == "tinny")


def test_the_build_takes_along_what_recipes_name(monkeypatch):
    built: dict[str, Any] = {}
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("setuptools.setup", lambda **settings: built.update(settings))
    exec(compile(Path("setup.py").read_text(), "setup.py", "exec"), {})
    for name in shipped.SHARED_DIRECTORIES:
        package = f"ernie_train.share.{name}"
        assert package in built["packages"]
        assert built["package_dir"][package] == name
        assert built["package_data"][package] == ["**/*"]
    others = built["package_data"]["ernie_train"]
    package = REPOSITORY / "ernie_train"
    taken = {path for pattern in others for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file()}
    missing = [p for p in files - taken if p.suffix != ".py" and p.parent.name != "__pycache__"]
    assert not missing, "files beside the modules have to be named in setup.py"
