"""What the sweep `tiny_seeds` needs beside its file: problems, rivals of RL, figures by level.

The rivals begin where RL does and train as many tokens: SFT goes on with the demonstrations, or
with what the verifier accepts of the start's own completions of RL's prompts.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie_train.cli.model import open_model
from ernie_train.core.config import load_yaml
from ernie_train.data import Record
from ernie_train.eval.evaluation import EvalConfig
from ernie_train.eval.problems import load_problems
from tools.data import make_data
from tools.data.tasks.base import level_of
from tools.evidence import rivals
from tools.evidence.passes import solve
from tools.evidence.runs import write_json

FRESH_SPLITS = ("test", "hard")
TEST_SEED = "test_seed.json"
SAMPLES = 8
# Warm restarts, since the start is from the end of a cosine; the better of 3e-4 and 1e-3 on the
# problems of data/validation.
RATES = {"demonstrations": 1.0e-3, "accepted": 3.0e-4}

Figures = dict[str, Any]


# ---- problems ------------------------------------------------------------------------------------


def fresh_problems(out: Path, recipe: str, *, rows: float) -> dict[str, dict[str, Any]]:
    """Draw a seed nobody has seen; make test problems of it, of trained levels and beyond.

    They are `rows` times as many as those of data/test and data/hard. The seed comes from the
    operating system, once, and stays in `test_seed.json`, which kept results bring along. The hash
    of a problem decides its split, so none of them is in a training row.
    """
    file, made = out / TEST_SEED, out / "problems" / "MADE"
    if not file.exists():
        write_json(file, {"seed": secrets.randbelow(2**31)})
    if not made.exists():
        seed = json.loads(file.read_text("utf-8"))["seed"]
        options = ["--out", str(out / "problems"), "--seed", str(seed)]
        make_data.main([*options, "--splits", *FRESH_SPLITS, "--rows", str(rows)])
        made.touch()
    return {}


# ---- rivals --------------------------------------------------------------------------------------


def on_demonstrations(run_dir: Path) -> list[str]:
    """Return overrides for more SFT on the demonstrations that made the start."""
    return _as_sft(run_dir, _sft_of(run_dir)["data"], RATES["demonstrations"])


def on_accepted(run_dir: Path) -> list[str]:
    """Return overrides for SFT on what the verifier accepts of the start's own completions."""
    data = [{"path": str(rows)} for rows in rivals.accepted(run_dir)]
    return _as_sft(run_dir, data, RATES["accepted"])


def _sft_of(run_dir: Path) -> dict[str, Any]:
    stage: dict[str, Any] = load_yaml(run_dir / "recipe.yaml")["stages"][0]
    return stage


def _as_sft(run_dir: Path, data: Sequence[dict[str, Any]], rate: float) -> list[str]:
    sft = _sft_of(run_dir)
    stage = {**sft, "data": data, "optim": {**sft["optim"], "lr": rate}, "validation": []}
    stage |= {"checkpoint": {"every_steps": 10_000, "keep_last": 1}, "validate_every_steps": None}
    return rivals.as_sft(run_dir, stage)


DERIVED: dict[str, Callable[[Path], list[str]]] = {
    "main_job_demonstrations": on_demonstrations,
    "main_job_accepted": on_accepted,
}


# ---- figures -------------------------------------------------------------------------------------


def measured(run_dir: Path, *, problems: str, max_new_tokens: int = 128) -> Figures:
    """Return pass@1 and pass@8 of a run after each of its stages, lengths, and its tokens.

    As `sft/math/2` and `sft/math/2/pass@8`, means over a domain's problems of a level, and over
    those of a task, `sft/chain_sum_2`, and of all, `sft/all/2`. Those that are not of a task have
    their values by problem. `sft/length` is the mean number of tokens of a completion.
    """
    rows = [row for split in FRESH_SPLITS for row in load_problems(str(Path(problems) / split))]
    config = EvalConfig(max_new_tokens, samples=SAMPLES, temperature=1.0, k=(1, SAMPLES))
    figures: Figures = {"by_problem": {}}
    recipe = rivals.recipe_of(run_dir)
    for at, stage in enumerate(recipe.stages):
        model, tokenizer = open_model(rivals.checkpoint_of(run_dir, at))
        model.eval()
        values = solve(model, tokenizer, rows, config)
        figures[f"{stage.name}/length"] = float(np.mean(values["length"]))
        for group, mine in groups_of(rows).items():
            for key, name in (("pass@1", group), (f"pass@{SAMPLES}", f"{group}/pass@{SAMPLES}")):
                solved = [values[key][row] for row in mine]
                figures[f"{stage.name}/{name}"] = float(np.mean(solved))
                if "/" in group:
                    figures["by_problem"][f"{stage.name}/{name}"] = solved
    return figures | {f"tokens/{name}": n for name, n in rivals.tokens_of(run_dir).items()}


def groups_of(problems: Sequence[Record]) -> dict[str, list[int]]:
    """Return the places of each task's problems, of a domain's by level, and of all by level."""
    groups: dict[str, list[int]] = {}
    for at, problem in enumerate(problems):
        task = str(problem.fields["task"])
        level = level_of(task)
        for name in (task, f"{problem.fields['domain']}/{level}", f"all/{level}"):
            groups.setdefault(name, []).append(at)
    return groups
