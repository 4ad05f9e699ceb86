"""The sweep of the main job, shrunk: its rivals' budgets, its fresh problems, figures by level."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from ernie_train.core.config import load_yaml
from ernie_train.data import Record
from ernie_train.rl.rollout import read_rollout
from tests.small_writer import save_writer
from tests.tools.evidence.in_process import one_process
from tools.data.make_data import prompt_identity
from tools.evidence import main_job, rivals, sweep
from tools.evidence.runs import ROOT

REWARD = "def score(row, text):\n    return float(len(text) % 3 > 0)\n"
RL = ("rl-logic", "rl-math-code", "rl-general")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the sweep after it has run, with one seed and small stages."""
    root = tmp_path_factory.mktemp("main_job")
    (root / "reward.py").write_text(REWARD)
    lines = (ROOT / "data/train/math.jsonl").read_text().splitlines()[:40]
    with gzip.open(ROOT / "data/problems/math.jsonl.gz", "rt") as stream:
        (root / "problems.jsonl").write_text("".join(islice(stream, 20)))
    model = save_writer(root, [json.loads(line)["messages"][0]["content"] for line in lines])
    small: dict[str, Any] = {
        "model": {"path": str(model)}, "tokenizer.path": str(model), "stages.sft.steps": 2,
        "stages.sft.validation": [], "stages.sft.validate_every_steps": None,
        "stages.sft.checkpoint": {"every_steps": 2}, "stages.sft.balance": {},
        "stages.sft.optim": {"lr": 1e-6, "schedule": "constant"},
        "stages.sft.data.0": {"path": "data/train/math.jsonl", "max_examples": 20},
    }  # fmt: skip
    for stage in RL:
        small |= {
            f"stages.{stage}.iterations": 2, f"stages.{stage}.canaries": 0,
            f"stages.{stage}.measured_completions": None,
            f"stages.{stage}.data": [{"path": "data/problems/math.jsonl.gz", "max_examples": 20}],
            f"stages.{stage}.reward": {"python": f"{root}/reward.py:score"},
            f"stages.{stage}.rollout.prompts_per_iteration": 4,
            f"stages.{stage}.rollout.group_size": 4, f"stages.{stage}.optim.lr": 1e-2,
        }  # fmt: skip
    overrides = [f"{key}={json.dumps(value)}" for key, value in small.items()]
    settings = {
        "seeds": [1], "overrides": overrides, "fresh.options.rows": 0.01,
        "measure.options.max_new_tokens": 4,
    }  # fmt: skip
    command = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    opens = patch.object(main_job, "open_model", wraps=main_job.open_model)
    with one_process(), opens as opened:
        sweep.main(["tiny_seeds", *command, "--out", str(root / "out")])
    measured = [Path(call.args[0]).relative_to(root / "out") for call in opened.call_args_list]
    (root / "out/measured.txt").write_text("\n".join(map(str, measured)))
    return root / "out"


def figures(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / name / "result.json").read_text())
    return found


def test_rivals_begin_where_rl_does_and_train_as_many_tokens(out: Path) -> None:
    groups = [
        group
        for at, stage in enumerate(RL)
        for file in sorted((out / f"pipeline-seed1/{at + 2:02d}-{stage}/rollouts").glob("*.jsonl"))
        for group in read_rollout(file)
    ]
    assert len(groups) == 3 * 2 * 4
    informative = [g for g in groups if len({c.score.value for c in g}) > 1]
    trained = sum(c.num_sampled for group in informative for c in group)
    sampled = sum(c.num_sampled for group in groups for c in group)
    pipeline = figures(out, "pipeline-seed1")
    assert (pipeline["tokens/sampled"], pipeline["tokens/trained"]) == (sampled, trained)
    start = out / "pipeline-seed1/01-sft/checkpoints/step_000002"
    for arm in ("demonstrations", "rejection"):
        recipe = load_yaml(out / f"{arm}-seed1/recipe.yaml")
        (stage,) = recipe["stages"]
        assert recipe["evaluation"] is None and recipe["export"] is None
        assert recipe["model"]["path"] == str(start)
        report = json.loads((out / f"{arm}-seed1/01-sft/data_report.json").read_text())
        step = rivals.tokens_of_step(report, stage)
        assert abs(figures(out, f"{arm}-seed1")["tokens/trained"] - trained) <= step
        assert stage["optim"]["lr"] == main_job.RATES[arm if arm != "rejection" else "accepted"]
    assert figures(out, "demonstrations-seed1")["tokens/sampled"] == 0


def test_rejection_sampling_draws_from_the_start_for_the_prompts_of_every_stage(out: Path) -> None:
    (stage,) = load_yaml(out / "rejection-seed1/recipe.yaml")["stages"]
    files = [Path(source["path"]) for source in stage["data"]]
    assert [file.name for file in files] == [f"pipeline-seed1-accepted-{name}.jsonl" for name in RL]
    summaries = [json.loads(Path(f"{file}.summary.json").read_text()) for file in files]
    assert [summary["completions"] for summary in summaries] == [2 * 4 * 4] * 3
    sampled = sum(summary["sampled_tokens"] for summary in summaries)
    assert figures(out, "rejection-seed1")["tokens/sampled"] == sampled

    def texts(path: Path) -> list[str]:
        return [c.text for group in read_rollout(path / "000001.jsonl") for c in group]

    own = [texts(Path(f"{file}.rollouts")) for file in files]
    theirs = [
        texts(out / f"pipeline-seed1/{at:02d}-{name}/rollouts") for at, name in enumerate(RL, 2)
    ]
    assert own[0] == theirs[0]  # the same weights; later stages have others
    assert own[1] != theirs[1]


def test_problems_are_fresh_and_figures_are_by_level(out: Path) -> None:
    def prompts(directory: Path) -> set[str]:
        lines = [
            line for file in directory.glob("*.jsonl") for line in file.read_text().splitlines()
        ]
        return {prompt_identity(json.loads(line)) for line in lines}

    fresh = prompts(out / "problems/test")
    assert json.loads((out / "test_seed.json").read_text())["seed"] >= 0
    assert fresh and fresh.isdisjoint(prompts(ROOT / "data/train"))
    found = figures(out, "pipeline-seed1")
    for stage in ("sft", *RL):
        for group in ("math/1", "math/2", "math/3", "all/2", "chain_sum_2"):
            assert 0 <= found[f"{stage}/{group}"] <= found[f"{stage}/{group}/pass@8"] <= 1
        assert 0 < found[f"{stage}/length"] <= 4
    assert len(found["by_problem"]["sft/all/1"]) == len(fresh) // 2
    text = (out / "table.md").read_text()
    assert "| math |" in text and "nan" not in text


def test_every_stage_is_measured_with_its_own_weights(out: Path) -> None:
    expected = [f"pipeline-seed1/{at:02d}-{stage}" for at, stage in enumerate(("sft", *RL), 1)]
    expected += ["demonstrations-seed1/01-sft", "rejection-seed1/01-sft"]
    found = (out / "measured.txt").read_text().split("\n")
    assert [str(Path(checkpoint).parents[1]) for checkpoint in found] == expected


def test_problems_are_grouped_by_task_and_by_level() -> None:
    names = [("math", "sum"), ("math", "sum_2"), ("logic", "a_3"), ("math", "product_2")]
    rows = [Record("chat", fields={"domain": d, "task": t}) for d, t in names]
    assert main_job.groups_of(rows) == {
        "sum": [0], "math/1": [0], "all/1": [0],
        "sum_2": [1], "math/2": [1, 3], "all/2": [1, 3],
        "a_3": [2], "logic/3": [2], "all/3": [2],
        "product_2": [3],
    }  # fmt: skip
