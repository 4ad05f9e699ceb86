"""DPO stages: rows of other kits, the losses, validation, pairs of several turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ernie_train import parallel
from ernie_train.plan.workload import recipe_workloads
from ernie_train.rl import dpo
from ernie_train.run.recipe import Recipe
from tests.rl.test_upo import run
from tests.workspace import make_workspace, metrics_without_time, write_rows


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dpo")
    make_workspace(root)
    write_rows(root / "pairs.jsonl", pairs(6))
    return root


def pairs(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"What is {a} + 1?", "chosen": f"{a + 1}. " * (1 + a % 3), "rejected": "none"}
        for a in range(first, first + count)
    ]


def recipe_of(root: Path, **changes: Any) -> dict[str, Any]:
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    stage = {
        "name": "d", "kind": "dpo", "data": str(root / "pairs.jsonl"), "seq_len": 96, "steps": 1,
        "pairs_per_step": 2, "micro_batch_size": 4, "optim": {"lr": 1e-3, "schedule": "constant"},
    } | changes  # fmt: skip
    return {**recipe, "evaluation": None, "export": None, "stages": [stage]}


def trained(root: Path, run_dir: Path, **changes: Any) -> list[dict[str, Any]]:
    """Run one stage in this process; return its metrics."""
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe_of(root, **changes)))
    assert run("run", path, "--run-dir", run_dir) == 0
    return metrics_without_time(run_dir, "01-d")


FIRST = {"role": "user", "content": "Is 8 even?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))
OF_OTHER_KITS = {
    "erniekit": {"src": ["Is 8 even?"], "tgt": [], "response": [["no"], ["yes"]], "sort": [0, 1]},
    "erniekit, later turn": {
        "src": ["Hi", "Is 8 even?"], "tgt": ["Hello"], "response": [["yes"], ["no"]],
        "sort": [2, 1],
    },
    "erniekit, system": {
        "src": ["Be brief.", "Is 8 even?"], "tgt": [], "is_system": 1,
        "response": [["yes"], ["no"]], "sort": [1, 0],
    },
    "paddleformers": {"messages": [FIRST], "chosen_response": [YES], "rejected_response": [NO]},
    "ms-swift": {"messages": [FIRST, YES], "rejected_response": "no"},
    "trl": {"prompt": [FIRST], "chosen": [YES], "rejected": [NO]},
    "trl, implicit prompt": {"chosen": [FIRST, YES], "rejected": [FIRST, NO]},
    "alpaca": {"instruction": "Is 8 even?", "input": "", "chosen": "yes", "rejected": "no"},
}  # fmt: skip


@pytest.mark.parametrize("row", OF_OTHER_KITS.values(), ids=OF_OTHER_KITS)
def test_preferences_of_other_kits_train_a_stage(root, tmp_path, row):
    write_rows(tmp_path / "rows.jsonl", [row])
    (line,) = trained(root, tmp_path / "run", data=str(tmp_path / "rows.jsonl"), seq_len=128)
    assert line["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert line["grad_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "first_loss"),
    [
        ({"length_normalize": True}, np.log(2)),
        ({"loss": "ipo"}, (1 / 4) ** 2),
        ({"loss": "ipo", "length_normalize": False}, 5.0**2),
    ],
)
def test_at_the_reference_every_loss_has_its_closed_form(root, tmp_path, settings, first_loss):
    """Beta is 2 on means over tokens and 0.1 on sums: IPO's target is 1 / (2 beta)."""
    (line,) = trained(root, tmp_path / "run", **settings)
    assert line["preference"] == pytest.approx(first_loss, rel=1e-4)


def test_simpo_keeps_no_reference_and_plan_counts_none(root, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "reference_model", lambda model: pytest.fail("a reference"))
    lines = trained(root, tmp_path / "run", loss="simpo", rpo_alpha=0.5, steps=3, pairs_per_step=6)
    assert lines[0]["loss"] == pytest.approx(
        lines[0]["preference"] + 0.5 * lines[0]["nll_loss"], rel=1e-6
    )
    assert lines[-1]["nll_loss"] < lines[0]["nll_loss"]
    for settings, reference in (({"loss": "simpo"}, False), ({"loss": "ipo"}, True)):
        (load,) = recipe_workloads(Recipe(**recipe_of(root, **settings)))
        assert (load.reference, load.scoring_models) == (reference, int(reference))


def test_dpo_has_sums_unless_told_otherwise(root):
    stage = recipe_of(root)["stages"][0]
    for changes, normalized, beta in (
        ({}, False, 0.1),
        ({"length_normalize": True}, True, 2.0),
        ({"loss": "ipo"}, True, 2.0),
        ({"loss": "simpo"}, True, 2.0),
        ({"beta": 0.3}, False, 0.3),
    ):
        config = dpo.DpoConfig(**stage, **changes)
        assert (config.is_length_normalized, config.beta_of_loss) == (normalized, beta)
