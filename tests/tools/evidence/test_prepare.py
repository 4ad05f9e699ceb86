"""The start of the RL sweep, whose demonstrations slip, and the control of the main job."""

import json
from pathlib import Path
from typing import Any

import pytest

from ernie_train.core.config import dump_yaml, load_yaml, parse_config
from ernie_train.io.run_dir import StageDone, write_done
from ernie_train.run.recipe import Recipe
from tools.evidence import prepare
from tools.evidence.runs import ROOT


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_half_of_the_demonstrations_slip_and_no_slip_is_right(tmp_path: Path) -> None:
    prepare.write_demonstrations(tmp_path)
    for domain in ("logic", "math"):
        good = read_rows(ROOT / "data" / "train" / f"{domain}.jsonl")
        made = read_rows(tmp_path / f"{domain}.jsonl")
        changed = [pair for pair in zip(good, made, strict=True) if pair[0] != pair[1]]
        assert len(changed) / len(good) == pytest.approx(prepare.SLIPPED, abs=0.05)
        for task in {row["task"] for row in good}:
            share = [row["task"] == task for row, _ in changed]
            assert sum(share) > 0.4 * sum(row["task"] == task for row in good)
        for row, slipped in changed:
            assert row["messages"][0] == slipped["messages"][0]
            assert row["messages"][1]["content"] != slipped["messages"][1]["content"]


@pytest.mark.parametrize(
    ("thinking", "answer", "slipped"),
    [
        ("3 * 6, 3:14 2:20 1:26", "26", ("3 * 6, 3:14 2:20 1:27", "27")),
        ("9 / 3, 1:6 2:3 3:0", "3", ("9 / 3, 1:6 2:3 3:0", "4")),
        ("-1 - 3, 1:-4", "-4", ("-1 - 3, 1:-3", "-3")),
        ("true or true\ntrue", "true", ("true or true\nfalse", "false")),
    ],
)
def test_a_slip_is_in_the_last_step(thinking: str, answer: str, slipped: tuple[str, str]) -> None:
    turn = {"role": "assistant", "reasoning_content": thinking, "content": answer}
    row = {"messages": [{"role": "user", "content": "?"}, turn]}
    wrong = prepare.slip(row)["messages"][1]
    assert (wrong["reasoning_content"], wrong["content"]) == slipped
    assert turn["content"] == answer  # the row itself stays


def test_the_control_trains_as_long_as_the_rl_stages(tmp_path: Path) -> None:
    directory = tmp_path / "01-sft"
    directory.mkdir()
    write_done(directory, StageDone({}, {}, {"checkpoint": "step_000010"}))
    seconds = {"sft": 100.0, "rl-logic": 20.0, "rl-math-code": 20.0, "rl-general": 10.0}
    (tmp_path / "result.json").write_text(json.dumps({"seconds": seconds}))
    recipe = load_yaml(ROOT / "recipes" / "tiny.yaml")
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe), "utf-8")
    overrides = prepare.continued_sft(tmp_path)
    model, stages, evaluation = (override.partition("=")[2] for override in overrides)
    assert json.loads(model)["path"] == str(directory / "checkpoints" / "step_000010")
    assert json.loads(evaluation) == {**recipe["evaluation"], "untrained_examples": 0}
    (stage,) = json.loads(stages)
    assert stage["steps"] == recipe["stages"][0]["steps"] // 2
    recipe |= {"stages": [stage], "model": {"preset": "tiny"}}
    parse_config(Recipe, recipe, "control")  # the stage alone is a recipe
