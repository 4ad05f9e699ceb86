"""The sweep of the real model, on a tiny one: its arms, its rivals' budgets, its fresh problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_train.core.config import load_yaml
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.rollout import read_rollout
from ernie_train.run.recipe import load_recipe
from tests.small_writer import save_writer
from tests.tools.evidence.in_process import one_process
from tools.evidence import real_model, rivals, sweep
from tools.evidence.real_tasks import LEVELS, TASKS, UNSEEN_LEVELS, make_rows, write_rows
from tools.evidence.runs import ROOT
from tools.evidence.sweep import load_sweep

REWARD = "def score(row, text):\n    return float(len(text) % 3 > 0)\n"
ARMS = ["group", "ppo", "gold", "moe-gold", "rejection", "demonstrations"]


# ---- the file ------------------------------------------------------------------------------------


def stages() -> dict[str, UpoConfig]:
    made = load_sweep("rl_real")
    found = {}
    for arm in made.arms:
        overrides = made.overrides_of(arm, Path("/out"))
        (stage,) = load_recipe(ROOT / made.recipe, overrides).stages
        assert isinstance(stage, UpoConfig)
        found[arm] = stage
    return found


def test_arms_differ_in_what_their_titles_say_alone() -> None:
    found = stages()
    assert list(found) == ["group", "ppo", "sums", "gold", "moe-group", "moe-gold"]
    for name, twin in (("ppo", "critic"), ("sums", "preference"), ("gold", "preference"),
                       ("moe-group", "train")):  # fmt: skip
        others = {"train": ["mlp.gate"]} if twin == "train" else {}
        changed = found[name].model_copy(update={twin: getattr(found["group"], twin)})
        assert changed == found["group"], name
        assert all(getattr(found[name], key) == value for key, value in others.items())
    sums, gold = found["sums"].preference, found["gold"].preference
    assert sums is not None and gold is not None
    assert (sums.pairs, sums.is_length_normalized, sums.beta_of_loss) == (["online"], False, 0.1)
    assert (gold.pairs, gold.is_length_normalized, gold.rpo_alpha) == (["gold"], True, 0.1)
    assert found["moe-gold"].preference == gold
    assert found["moe-gold"].train == ["mlp.gate"] and not found["gold"].train


def test_every_arm_has_a_rate_and_is_in_a_table() -> None:
    made = load_sweep("rl_real")
    assert made.rates is not None and made.fresh is not None
    arms = {*made.arms, *made.derived}
    assert set(made.rates.arms) == arms
    shown = {row.arm for table in made.tables for row in (table.rows or {}).values()}
    assert shown == {*arms, "start", "moe-start"}
    assert made.fresh.options["measure"] == made.measure.options
    validation = made.rates.measure.options["problems"]
    assert validation == "{out}/rows/validation.jsonl" != made.measure.options["problems"]


# ---- the whole, in seconds -----------------------------------------------------------------------


def make_start(root: Path) -> Path:
    """Write a dense model that writes words of the tasks."""
    levels = {task: LEVELS[task][0] for task in TASKS} | UNSEEN_LEVELS
    rows = [row for task, level in levels.items() for row in make_rows(task, 20, 0, level)]
    return save_writer(root, [message["content"] for row in rows for message in row["messages"]])


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("real")
    (root / "reward.py").write_text(REWARD)
    rates = {"group": [1e-3, 1e-2], **{arm: "group" for arm in ARMS if arm != "group"}}
    rl = [
        f'stages.rl.reward={{"python": "{root}/reward.py:score"}}', "stages.rl.canaries=0",
        "stages.rl.rollout.prompts_per_iteration=4", "stages.rl.rollout.group_size=4",
    ]  # fmt: skip
    tiny = {
        "seeds": [1], "rates.arms": rates, "rates.chosen": None,
        "rates.trial": {"stages.rl.iterations": 1},
        "overrides": [*rl, "stages.rl.iterations=3"],
        "prepare.options": {
            "model": str(make_start(root)), "demonstrations": 6, "probe": 1, "validation": 1,
            "max_new_tokens": 24,
            "overrides": ["stages.sft.epochs=null", "stages.sft.steps=2"],
        },
        "fresh.options.problems": 2, "fresh.options.unseen": 1,
        "rates.measure.options.samples": 2, "rates.measure.options.ks": [1, 2],
    }  # fmt: skip
    for options in ("measure.options", "fresh.options.measure"):
        tiny |= {f"{options}.samples": 4, f"{options}.ks": [1, 4], f"{options}.max_new_tokens": 24}
    overrides = [f"{key}={json.dumps(value)}" for key, value in tiny.items()]
    return ["rl_real", *overrides, "--out", str(root / "out"), "--arms", ",".join(ARMS)]


@pytest.fixture(scope="module")
def out(command: list[str]) -> Path:
    """The directory of the sweep after it has run."""
    with one_process(real_model):
        sweep.main(command)
    return Path(command[command.index("--out") + 1])


def figures(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / name / "result.json").read_text())
    return found


def test_the_arms_of_sft_train_as_many_tokens_as_the_policy_gradient(out: Path) -> None:
    groups = [
        group
        for file in sorted((out / "group-seed1/01-rl/rollouts").glob("*.jsonl"))
        for group in read_rollout(file)
    ]
    sampled = sum(c.num_sampled for group in groups for c in group)
    informative = [g for g in groups if len({c.score.value for c in g}) > 1]
    trained = sum(c.num_sampled for group in informative for c in group)
    assert 0 < trained < sampled
    group = figures(out, "group-seed1")
    assert (group["tokens/sampled"], group["tokens/trained"]) == (sampled, trained)
    step = 0.0
    for arm in ("rejection", "demonstrations"):
        recipe = load_yaml(out / f"{arm}-seed1" / "recipe.yaml")
        report = json.loads((out / f"{arm}-seed1/01-rl/data_report.json").read_text())
        step = rivals.tokens_of_step(report, recipe["stages"][0])
        assert abs(figures(out, f"{arm}-seed1")["tokens/trained"] - trained) <= max(step / 2, step)
        assert recipe["model"]["path"] == str(out / "start")
        assert (
            recipe["stages"][0]["lora"]
            == load_yaml(out / "group-seed1/recipe.yaml")["stages"][0]["lora"]
        )
    assert figures(out, "demonstrations-seed1")["tokens/sampled"] == 0
    assert (
        figures(out, "ppo-seed1")["tokens/trained"] == figures(out, "ppo-seed1")["tokens/sampled"]
    )


def test_rejection_sampling_has_the_arms_own_first_completions_and_keeps_the_accepted(
    out: Path,
) -> None:
    def texts(directory: Path) -> list[str]:
        return [c.text for group in read_rollout(directory / "000001.jsonl") for c in group]

    theirs = out / "group-seed1/01-rl/rollouts"
    assert texts(out / "group-seed1-accepted-rl.jsonl.rollouts") == texts(theirs)
    recipe = load_yaml(out / "rejection-seed1" / "recipe.yaml")
    data = Path(recipe["stages"][0]["data"][0]["path"])
    assert data == out / "group-seed1-accepted-rl.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert rows and all(len(row["messages"][-1]["content"]) % 3 > 0 for row in rows)
    summary = json.loads(Path(f"{data}.summary.json").read_text())
    assert summary["completions"] == 3 * 4 * 4
    assert figures(out, "rejection-seed1")["tokens/sampled"] == summary["sampled_tokens"]


def test_test_problems_are_fresh_and_their_seed_is_recorded(out: Path) -> None:
    seed = json.loads((out / "test_seed.json").read_text())["seed"]
    rows = out / "rows"
    test = real_model.questions(rows / "test.jsonl")
    assert len(test) == 2 * len(TASKS)
    taken = [q for split in real_model.SEEDS for q in real_model.questions(rows / f"{split}.jsonl")]
    assert len(set(taken)) == len(taken) and not set(taken) & set(test)
    levels = json.loads((out / "levels.json").read_text())["chosen"]
    again = [row for task in TASKS for row in make_rows(task, 2, seed, levels[task], taken)]
    assert [row["messages"][1]["content"] for row in again] == test
    chosen = json.loads((out / "rates.json").read_text())
    assert (out / "rates.json").stat().st_mtime_ns <= (out / "test_seed.json").stat().st_mtime_ns
    rate = chosen["chosen"]["group"]
    recipes = {arm: load_yaml(out / f"{arm}-seed1" / "recipe.yaml") for arm in ARMS}
    assert {recipe["stages"][0]["optim"]["lr"] for recipe in recipes.values()} == {rate}
    assert recipes["moe-gold"]["model"]["path"] == str(out / "moe-start")


def test_a_level_is_the_one_at_which_the_start_solves_about_a_third(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row for level in (2, 3, 4) for row in make_rows("sum", 2, 0, level)]
    write_rows(tmp_path / "rows" / "probe.jsonl", rows)
    asked: list[str] = []

    def measured(*arguments: str) -> None:
        asked.append(arguments[-1])
        solved = {"pass@1": [1.0, 0.5, 0.5, 0.25, 0.0, 0.125]}
        Path(arguments[4]).write_text(json.dumps({"by_problem": solved}))

    monkeypatch.setattr(real_model, "run_program", measured)
    assert real_model.choose_levels(tmp_path, 24) == {"sum": 3}
    assert real_model.choose_levels(tmp_path, 24) == {"sum": 3} and len(asked) == 1
    found = json.loads((tmp_path / "levels.json").read_text())
    assert found["pass@1"] == {"sum": {"2": 0.75, "3": 0.375, "4": 0.0625}}
    assert json.loads(asked[0])["start"] == str(tmp_path / "start")


def test_figures_are_by_problem_and_the_start_is_no_distance_from_itself(out: Path) -> None:
    start = json.loads((out / "start.json").read_text())
    upcycled = json.loads((out / "moe-start.json").read_text())
    assert start["by_problem"]["kl"] == [0.0] * 10 == upcycled["by_problem"]["kl"]
    group = figures(out, "group-seed1")
    assert any(value != 0 for value in group["by_problem"]["kl"])
    counts = {key: len(values) for key, values in group["by_problem"].items()}
    assert (counts["pass@1"], counts["pass@4"]) == (10, 10)
    assert (counts["pass@1/sum"], counts["unseen"]) == (2, 3)
    table = (out / "table.md").read_text()
    assert "| UPO, solutions where all are wrong, MoE |" in table and "| KL |" in table


def test_the_same_command_again_does_nothing_twice(
    out: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"done before: {arguments}")

    before = {
        path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl") if path.parent.name != "rows"
    }
    for module in (sweep, real_model):
        monkeypatch.setattr(module, "train", refuse)
    for module in (sweep, real_model, rivals):
        monkeypatch.setattr(module, "run_program", refuse)
    table = (out / "table.md").read_text()
    seed = (out / "test_seed.json").read_text()
    sweep.main(command)
    assert (out / "table.md").read_text() == table
    assert (out / "test_seed.json").read_text() == seed
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(SystemExit, match="other measure; choose another --out"):
        sweep.main([*command, "measure.options.samples=5"])
    assert yaml.safe_load((out / "settings.json").read_text())["rates"]["best"] == "pass@1"
