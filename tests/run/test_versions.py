"""Recipes and run directories of other versions are taken, or refused by version in one message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_train.cli.main import main
from ernie_train.core.cpu import __version__
from ernie_train.core.errors import ConfigError
from ernie_train.run.foreign_keys import minor_version
from ernie_train.run.recipe import load_recipe, recorded_recipe
from tests.workspace import make_workspace, write_recipe

REPOSITORY = Path(__file__).resolve().parents[2]


def sft_of_020(**settings: Any) -> dict[str, Any]:
    """A stage as 0.2.0 resolved it, with the keys that matter here."""
    stage = {"name": "sft", "kind": "sft", "data": [{"path": "d", "include_thinking": True}]}
    stage |= {"seq_len": 64, "micro_batch_size": 1, "steps": 3, "normalization": "tokens"}
    return {**stage, "optim": {"lr": 1e-3}, "thinking": True, **settings}


@pytest.mark.parametrize(
    ("formats", "template"),
    [([True], "ernie_thinking"), ([False], "ernie_plain"), ([True, False], "ernie_plain")],
)
def test_a_recipe_that_0_2_0_resolved_opens_with_its_format(tmp_path, formats, template):
    stages = [sft_of_020(name=f"s{i}", thinking=one) for i, one in enumerate(formats)]
    recipe = {
        "name": "old",
        "sandbox": "strict",
        "model": {"preset": "tiny"},
        "tokenizer": {"path": "t"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"stages": stages}))
    found = recorded_recipe(tmp_path)
    assert found is not None and found.chat.template == template
    with pytest.raises(ConfigError, match=r"thinking: unknown key; .* the model's own"):
        load_recipe(tmp_path / "recipe.yaml")  # a recipe that somebody writes says it anew


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A workspace with a run of one finished stage."""
    root = tmp_path_factory.mktemp("versions")
    make_workspace(root)
    small = {"evaluation": None, "export": None}
    stage = yaml.safe_load((root / "recipe.yaml").read_text())["stages"][0]
    stage |= {"steps": 2, "validation": [], "validate_every_steps": None}
    stage["checkpoint"] = {"every_steps": 2}
    write_recipe(root, stages=[stage], **small)
    assert run(root) == 0
    return root


def run(root: Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(root / "recipe.yaml"), "--run-dir", str(root / "run")])
    return int(stopped.value.code or 0)


def as_of(version: str, root: Path, **settings: Any) -> None:
    """Make the run one of another version, which recorded these settings of its stage as well."""
    for name, change in (
        ("environment.json", {"ernie_train": version, "code": {"commit": "abc123"}}),
        ("01-sft/stage.json", {"settings": settings}),
    ):
        found = json.loads((root / "run" / name).read_text())
        for key, value in change.items():
            found[key] = found[key] | value if isinstance(value, dict) else value
        (root / "run" / name).write_text(json.dumps(found))


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
def test_a_run_of_an_earlier_version_is_refused_by_version_in_one_message(
    begun, tmp_path, capsys, version
):
    root = tmp_path / "old"
    shutil.copytree(begun, root)
    as_of(version, root, thinking=True)
    assert run(root) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert (
        f"was written by ernie_train {version} at commit abc123, and its stage sft cannot go on"
        in told
    )
    assert f"go on with ernie_train {__version__}" in told and "--from sft" in told
    assert "thinking" not in told and "(absent)" not in told


def test_a_run_of_this_version_tells_what_changed(begun, tmp_path, capsys):
    root = tmp_path / "own"
    shutil.copytree(begun, root)
    as_of(__version__, root, seq_len=127)
    assert run(root) == 2
    assert "seq_len: 127 -> 128" in " ".join(capsys.readouterr().err.split())


def test_a_run_of_an_earlier_version_without_changes_goes_on(begun, tmp_path):
    root = tmp_path / "same"
    shutil.copytree(begun, root)
    as_of("0.2.0", root)
    assert run(root) == 0


def versioned(path: Path, version: Any, **changes: Any) -> Path:
    recipe = yaml.safe_load((REPOSITORY / "recipes/own_model.yaml").read_text())
    path.write_text(yaml.safe_dump({**recipe, "version": version, **changes}))
    return path


def test_a_recipe_says_which_version_it_was_written_for(tmp_path):
    major, minor = minor_version(__version__)
    own = f"{major}.{minor}"
    for version in ("0.1", own, None):
        assert load_recipe(versioned(tmp_path / "r.yaml", version)).version == version
    later = versioned(tmp_path / "r.yaml", f"{major}.{minor + 1}")
    with pytest.raises(ConfigError, match=rf"version: .* is needed, this is ernie_train {major}"):
        load_recipe(later)
    with pytest.raises(ConfigError, match="version: "):
        load_recipe(versioned(tmp_path / "r.yaml", "yesterday"))


def test_an_old_recipe_with_mistakes_is_told_where_changes_are_listed(tmp_path):
    with pytest.raises(ConfigError) as refused:
        load_recipe(versioned(tmp_path / "r.yaml", "0.2", advantage="gae"))
    first, *others = refused.value.problems
    assert first.startswith("version: the recipe was written for ernie_train 0.2, this is")
    assert "CHANGELOG.md" in first and any("advantage" in one for one in others)
    with pytest.raises(ConfigError) as refused:
        load_recipe(versioned(tmp_path / "r.yaml", None, advantage="gae"))
    assert len(refused.value.problems) == 1
