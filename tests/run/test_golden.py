"""Golden curves: a few steps of `tiny` in every kind of stage, compared with committed ones.

A refactor keeps them. Each stage starts from the same random weights and takes few small steps, so
that rounding, which differs between processors, does not route tokens to other experts: with other
BLAS kernels and two threads the curves moved by 1e-5 at most. A change that is meant to move them
writes them again and says why: ERNIE_TRAIN_WRITE_GOLDEN=1 ./run-tests tests/run/test_golden.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_train.cli.main import main
from tests.workspace import REPOSITORY, write_rows

CURVES = Path(__file__).parent / "golden" / "curves.json"
RELATIVE = 2e-3
BALANCE = {"load_balance_coef": 1e-2, "orthogonal_coef": 1e-3}
SHOWN = {
    "pretrain": ("loss", "grad_norm", "lr", "balance/load_balance"),
    "sft": ("loss", "grad_norm", "lr", "validation_loss"),
    "dpo": ("preference", "rewards/margins", "grad_norm"),
    "upo": ("reward", "policy", "preference", "kl", "entropy", "grad_norm"),
    "upo-gae": ("reward", "policy", "critic/value_loss", "kl", "entropy", "grad_norm"),
}


def stages(root: Path) -> list[dict[str, Any]]:
    """One stage of each kind; UPO with and without a critic."""
    optim = {"lr": 3e-4, "warmup_steps": 2}
    rl: dict[str, Any] = {
        "kind": "upo", "data": [{"path": "data/train", "tasks": ["logic", "math"]}],
        "reward": {"python": f"{root}/reward.py:score"}, "canaries": 0, "iterations": 2,
        "rollout": {"prompts_per_iteration": 8, "group_size": 4, "max_new_tokens": 24},
        "policy": {"minibatches": 2}, "micro_batch_size": 8,
        "optim": {"lr": 1e-4, "schedule": "constant"},
    }  # fmt: skip
    return [
        {
            "name": "pretrain", "kind": "pretrain", "data": [{"path": f"{root}/text.jsonl"}],
            "micro_batch_size": 4, "grad_accum_steps": 2, "balance": BALANCE,
            "rope_schedule": [
                {"rope_theta": 1e4, "seq_len": 64, "steps": 4},
                {"rope_theta": 2e4, "seq_len": 128, "steps": 4, "micro_batch_size": 2},
            ],
            "optim": {**optim, "schedule": "wsd", "decay_fraction": 0.2},
        },
        {
            "name": "sft", "kind": "sft",
            "data": [{"path": f"data/train/{domain}.jsonl", "max_examples": 60}
                     for domain in ("math", "tools")],
            "validation": [{"path": "data/validation", "max_examples": 10}],
            "seq_len": 512, "micro_batch_size": 1, "steps": 8, "validate_every_steps": 4,
            "normalization": "token_balanced", "balance": BALANCE,
            "optim": {**optim, "schedule": "cosine"},
        },
        {
            "name": "dpo", "kind": "dpo", "data": f"{root}/pairs.jsonl", "seq_len": 256,
            "steps": 6, "pairs_per_step": 8, "micro_batch_size": 8,
            "optim": {"lr": 1e-4, "schedule": "constant"},
        },
        {**rl, "name": "upo", "preference": {"coef": 0.1, "pairs": "online"}},
        {
            **rl, "name": "upo-gae", "balance": BALANCE,
            "rollout": {**rl["rollout"], "refill_rounds": 1},
            "policy": {
                "minibatches": 2, "update_epochs": 2, "entropy_coef": 1e-3,
                "kl": {"coef": 0.01, "kind": "k1", "place": "reward"},
            },
            "critic": {"optim": {"lr": 1e-3, "schedule": "constant"}, "warmup_iterations": 1},
        },
    ]  # fmt: skip


def write_inputs(root: Path) -> None:
    sums = [(a, b) for a in range(20) for b in range(20)]
    text = [{"text": f"The sum of {a} and {b} is {a + b}. " * (1 + a * b % 7)} for a, b in sums]
    write_rows(root / "text.jsonl", text)
    pairs = [
        {
            "prompt": f"What is {a} + {b}?",
            "chosen": f"<think>\n{a} + {b}\n</think>\n\n<response>\n{a + b}\n</response>",
            "rejected": "<think>\nno idea\n</think>\n\n<response>\nnone\n</response>",
        }
        for a, b in sums[:30]
    ]
    write_rows(root / "pairs.jsonl", pairs)
    # Half of the completions of random weights hold an "e".
    score = 'return 1.0 if "e" in completion else 0.0'
    (root / "reward.py").write_text(f"def score(row, completion):\n    {score}\n")


def trained(root: Path, stage: dict[str, Any]) -> list[dict[str, float]]:
    """The shown metrics of a run of this stage alone, a row a step."""
    recipe = {
        "name": "golden", "seed": 7, "model": {"preset": "tiny"}, "evaluation": None,
        "tokenizer": {"path": "data/tokenizer"}, "stages": [stage], "export": None,
        "parallel": {"data": 1},
    }  # fmt: skip
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(path), "--run-dir", str(root / "run")])
    assert not stopped.value.code
    lines = (root / "run" / f"01-{stage['name']}" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{name: row[name] for name in SHOWN[stage["name"]] if name in row} for row in rows]


@pytest.mark.parametrize("name", SHOWN)
def test_the_curve_of_a_stage_is_kept(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(REPOSITORY)
    write_inputs(tmp_path)
    (stage,) = [s for s in stages(tmp_path) if s["name"] == name]
    rows = trained(tmp_path, stage)
    curves = json.loads(CURVES.read_text())
    if os.environ.get("ERNIE_TRAIN_WRITE_GOLDEN"):
        curves[name] = [{n: float(f"{v:.6g}") for n, v in row.items()} for row in rows]
        CURVES.write_text(json.dumps(curves, indent=1) + "\n")
    assert len(rows) == len(curves[name])
    for step, (row, expected) in enumerate(zip(rows, curves[name], strict=True), 1):
        assert set(row) == set(expected), f"step {step}"
        for metric, value in expected.items():
            close = pytest.approx(value, rel=RELATIVE, abs=1e-4)
            assert row[metric] == close, f"{metric} at step {step}"
