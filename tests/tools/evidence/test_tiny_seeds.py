"""The table of the main job: what counts as a stage's lift, and the control's share of time."""

import json
from typing import Any

from ernie_train.core.config import apply_overrides, load_yaml, parse_config
from ernie_train.io.run_dir import StageDone, write_done
from ernie_train.run.recipe import Recipe
from tools.evidence import tiny_seeds

TASKS = {"logic": ["aiw"], "math": ["chain_sum"], "code": ["list_function"],
         "science": ["formula"], "tools": ["tool_choice"]}  # fmt: skip


def solved(**domains: float) -> dict[str, float]:
    found = {name: 40.0 for names in TASKS.values() for name in names}
    return {**found, **dict.fromkeys(TASKS, 40.0), "mean": 40.0, **domains}


def result(seed: int, lift: float) -> dict[str, Any]:
    stages = {
        "sft": solved(),
        "rl-logic": solved(logic=40 + lift),
        "rl-math-code": solved(logic=38 + lift, math=60),
        "rl-general": solved(logic=38 + lift, math=60, science=55),
    }
    return {"seed": seed, "solved": stages}


RESULTS = [result(1, 10.0), result(2, 14.0)]
CONTROLS = [{"seed": seed, "solved": {tiny_seeds.CONTROL: solved(logic=41.0)}} for seed in (1, 2)]


def test_a_lift_is_over_the_stage_before() -> None:
    assert tiny_seeds.lifts(RESULTS, "rl-logic", "logic") == [10.0, 14.0]
    assert tiny_seeds.lifts(RESULTS, "rl-math-code", "math") == [20.0, 20.0]
    assert tiny_seeds.lifts(RESULTS, "rl-general", "science") == [15.0, 15.0]
    lines = tiny_seeds.lift_table(RESULTS, CONTROLS).splitlines()
    # Student's t for one degree of freedom: 12.706 * 2.828 / sqrt(2).
    assert lines[2] == "| logic | rl-logic | 12.0 ± 25.4 | -2.0 ± 0.0 | 10.0 ± 25.4 | 1.0 ± 0.0 |"
    assert len(lines) == 2 + len(TASKS)


def test_the_table_has_a_line_a_task_and_the_mean() -> None:
    lines = tiny_seeds.table(RESULTS, CONTROLS).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        *(f"| `{name}`" for names in TASKS.values() for name in names),
        "| `mean`",
    ]


def test_the_control_trains_as_long_as_the_rl_stages(tmp_path: Any) -> None:
    directory = tmp_path / "01-sft"
    directory.mkdir()
    write_done(directory, StageDone({}, {}, {"checkpoint": "step_000010"}))
    seconds = {"sft": 100.0, "rl-logic": 20.0, "rl-math-code": 20.0, "rl-general": 10.0}
    arm = tiny_seeds.control_arm(tmp_path, {"seconds": seconds})
    recipe = load_yaml(tiny_seeds.ROOT / tiny_seeds.RECIPE)
    model, stages, _ = (override.partition("=")[2] for override in arm.overrides)
    assert json.loads(model)["path"] == str(directory / "checkpoints" / "step_000010")
    steps = json.loads(stages)[0]["steps"]
    assert steps == recipe["stages"][0]["steps"] // 2
    recipe |= {"stages": json.loads(stages), "model": {"preset": "tiny"}}
    parse_config(Recipe, recipe, "control")  # the stage alone is a recipe, gates and all


def test_the_recipe_has_the_stages_that_the_table_names() -> None:
    stages = [stage["name"] for stage in load_yaml(tiny_seeds.ROOT / tiny_seeds.RECIPE)["stages"]]
    assert stages == [tiny_seeds.SFT, *tiny_seeds.DOMAINS]


def test_no_gate_leaves_a_seed_out() -> None:
    recipe = load_yaml(tiny_seeds.ROOT / tiny_seeds.RECIPE)
    assert [stage["name"] for stage in recipe["stages"] if "gate" in stage] == [*tiny_seeds.DOMAINS]
    without = apply_overrides(recipe, tiny_seeds.PIPELINE.overrides)
    assert all(stage.get("gate") is None for stage in without["stages"])
    parse_config(Recipe, without, "pipeline")
