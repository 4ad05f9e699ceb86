"""What the RL ablation begins with: rows to train on, and a policy that knows, but often slips."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ernie_train.io.run_dir import read_done
from tools.data import make_data
from tools.evidence.ablations import ROOT, Arm, train
from tools.evidence.rl_arms import DOMAIN, LOOSE_DOMAIN, Budget

START_RECIPE = "recipes/ablate_rl_start.yaml"
START_SEED = 7
SLIPPED = 0.5  # share of the start's demonstrations that end in a slip
TASKS = 2  # of the domain that is trained on
ROWS_SEED = make_data.SEED + 1  # so that they are not those of data/train
DONE = "done"


def slip(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a wrong last step: a number one too large, or the other truth value."""
    wrong = copy.deepcopy(row)
    turn = wrong["messages"][-1]
    answer = turn["content"]
    other = {"true": "false", "false": "true"}
    turn["content"] = other[answer] if answer in other else str(int(answer) + 1)
    thinking = turn["reasoning_content"]
    if thinking.endswith(answer):
        turn["reasoning_content"] = thinking.removesuffix(answer) + turn["content"]
    return wrong


def write_demonstrations(out: Path) -> None:
    """Rows of data/train, of which a share slips: SFT alone then leaves both ways in the policy."""
    for domain in (DOMAIN, LOOSE_DOMAIN):
        lines = (ROOT / "data" / "train" / f"{domain}.jsonl").read_text("utf-8").splitlines()
        rng = random.Random(f"slips/{domain}")
        rows = [json.loads(line) for line in lines]
        rows = [slip(row) if rng.random() < SLIPPED else row for row in rows]
        text = "".join(make_data.to_line(row) for row in rows)
        (out / f"{domain}.jsonl").write_text(text, encoding="utf-8")


def make_rows(out: Path, budget: Budget) -> Path:
    """Rows with verifiers that share no problem with data/test; RL uses each prompt once."""
    if not (out / DONE).exists():
        rows = str(math.ceil(budget.all_prompts / TASKS))
        options = ["--verifiable-train", "--train-rows", rows, "--seed", str(ROWS_SEED)]
        make_data.main(["--out", str(out), "--domains", DOMAIN, LOOSE_DOMAIN, *options])
        (out / DONE).touch()
    return out / "train"


def make_start(out: Path, overrides: Sequence[str]) -> Path:
    """The run directory of the start, trained if it is not there yet."""
    demonstrations, run_dir = out / "demonstrations", out / "start"
    if not (demonstrations / DONE).exists():
        demonstrations.mkdir(parents=True, exist_ok=True)
        write_demonstrations(demonstrations)
        (demonstrations / DONE).touch()
    if read_done(run_dir / "01-sft") is None:
        print("training the start", flush=True)
        data = f"stages.sft.data.0.path={demonstrations}"
        train(START_RECIPE, Arm("start", (data, *overrides)), START_SEED, run_dir)
    return run_dir
