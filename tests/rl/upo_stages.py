"""Recipes of small RL stages, and runs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_train.cli.main import main
from tests.workspace import rows, write_rows

REWARD = '''
def score(row, completion):
    """Wants plus signs, which an untrained model writes now and then."""
    return 1.0 if "+" in completion else 0.0
'''


def write_prompts(root: Path) -> list[dict[str, Any]]:
    """Write problems of three difficulties with their solutions to prompts.jsonl; return them."""
    made = rows(40, 7)
    for number, row in enumerate(made):
        solution = f"<think>\n+\n</think>\n\n<response>\n{row['answer']}\n</response>"
        row["messages"][1]["content"] = solution
        row["difficulty"] = 1 + number % 3
    write_rows(root / "prompts.jsonl", made)
    return made


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes` in them, section by section; None takes a key out."""
    result = dict(values)
    for key, change in changes.items():
        if isinstance(change, dict) and isinstance(result.get(key), dict):
            change = merged(result[key], change)
        result[key] = change
    return {key: value for key, value in result.items() if value is not None}


def stage(root: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "name": "rl", "kind": "upo", "data": [{"path": str(root / "prompts.jsonl")}],
        "reward": {"python": str(root / "reward.py") + ":score"}, "canaries": 0, "iterations": 4,
        "rollout": {
            "prompts_per_iteration": 6, "group_size": 4, "max_new_tokens": 10,
            "max_prompt_tokens": 64,
        },
        "policy": {"minibatches": 2},
        "micro_batch_size": 8, "optim": {"lr": 3e-3, "schedule": "constant", "weight_decay": 0.0},
        "checkpoint": {"every_steps": 100},
    }  # fmt: skip
    return merged(values, changes)


GAE = {
    "critic": {
        "optim": {"lr": 1e-3, "schedule": "constant"}, "lam": 0.95, "warmup_iterations": 0,
    },
    "policy": {"kl": {"coef": 0.01, "place": "reward"}, "update_epochs": 2},
    "preference": {
        "coef": 0.2, "pairs": ["online", "offline", "hint", "shorter"], "rpo_alpha": 0.1,
        "reference": "last_iteration", "pair_reward": {"name": "format", "share": 0.5},
        "margin": 0.1, "hint": {"samples": 2}, "offline": {"prompts": 20, "per_iteration": 2},
    },
    "audit_reward": {"name": "exact", "share": 0.25},
    "balance": {"bias_update_rate": 0.001}, "curriculum": {"start": 1, "raise_at": 0.3},
    "rollout": {
        "refill_rounds": 1, "max_new_tokens": 24, "skip_solved": {"rate": 0.5, "after": 1}
    },
}  # fmt: skip


ONLINE_PAIRS = {"coef": 0.2, "pairs": "online"}
OFFLINE_ONLY = {
    "rollout": {"prompts_per_iteration": None}, "policy": {"coef": 0.0, "minibatches": 1},
    "preference": {
        "coef": 1.0, "pairs": "offline", "offline": {"prompts": 4, "per_iteration": 1}
    },
}  # fmt: skip


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


def run_stage(workspace: Path, directory: Path, **changes) -> int:
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    recipe["stages"] = [stage(workspace, **changes)]
    path = workspace / f"{directory.name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return run("run", path, "--run-dir", directory)


# ---- what is refused -----------------------------------------------------------------------------


ONLINE = {"coef": 0.1, "pairs": "online"}


def rl_files(directory: Path) -> dict[str, bytes]:
    saved = directory / "01-rl/checkpoints/step_000004"
    files = [p for p in saved.rglob("*") if p.is_file() and p.name != "MANIFEST.json"]
    found = {str(path.relative_to(saved)): path.read_bytes() for path in files}
    found["samples"] = (directory / "01-rl/samples.jsonl").read_bytes()
    return found
