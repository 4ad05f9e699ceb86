"""Data and starts of sweeps, and arms that continue from another arm's run.

`PREPARE` makes data and starts once, and returns the figures of the starts; `DERIVED` returns the
overrides of an arm from the run directory of another one with the same seed.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ernie_train.core.config import load_yaml
from ernie_train.io.run_dir import read_done
from tools.data import make_data, make_needles
from tools.evidence import real_model
from tools.evidence.measure import DOMAIN, LOOSE_DOMAIN
from tools.evidence.runs import ROOT, run_program, train

NEEDLES = ROOT / "runs" / "needles"  # as recipes/long_context.yaml names it
START_RECIPE = "recipes/ablate_rl_start.yaml"
START_SEED = 7
SLIPPED = 0.5  # share of the start's demonstrations that end in a slip
TASKS = 2  # of the domain that is trained on
ROWS_SEED = make_data.SEED + 1  # so that they are not those of data/train
DONE = "done"

# Figures of each start, by the name of its row.
Starts = dict[str, dict[str, Any]]


def needles(out: Path, recipe: str) -> Starts:
    """Make the texts of recipes/long_context.yaml, unless they are there."""
    if not (NEEDLES / "tokenizer").exists():
        make_needles.main(["--out", str(NEEDLES)])
    return {}


# ---- RL ------------------------------------------------------------------------------------------


def rl_start(
    out: Path, recipe: str, *, problems: int, start: str = "", overrides: Sequence[str] = ()
) -> Starts:
    """Make rows with verifiers and a start that knows, but often slips; measure it in both domains.

    `start` is a model directory to begin with instead; `overrides` are those of the start's recipe.
    """
    stage = load_yaml(ROOT / recipe)["stages"][0]
    make_rows(out / "rows", stage["iterations"] * stage["rollout"]["prompts_per_iteration"])
    own = make_start(out, start, overrides)
    starts = {}
    for name, domain in (("start", DOMAIN), ("loose-start", LOOSE_DOMAIN)):
        file = out / f"{name}.json"
        if not file.exists():
            options = {"domain": domain, "start": str(own), "problems": problems}
            names = ("policy_in_domain", str(own), str(file))
            run_program("-m", "tools.evidence.measure", *names, json.dumps(options))
        starts[name] = json.loads(file.read_text("utf-8"))
    return starts


def make_rows(out: Path, prompts: int) -> None:
    """Write rows that share no problem with data/test; RL uses each prompt once."""
    if not (out / DONE).exists():
        rows = str(math.ceil(prompts / TASKS))
        options = ["--verifiable-train", "--train-rows", rows, "--seed", str(ROWS_SEED)]
        make_data.main(["--out", str(out), "--domains", DOMAIN, LOOSE_DOMAIN, *options])
        (out / DONE).touch()


def make_start(out: Path, given: str, overrides: Sequence[str]) -> Path:
    """Return `out/start`: a link to the given model, or a run directory, trained if not there."""
    demonstrations, run_dir = out / "demonstrations", out / "start"
    if given:
        if not run_dir.exists():
            run_dir.symlink_to(Path(given).resolve())
        return run_dir
    if not (demonstrations / DONE).exists():
        demonstrations.mkdir(parents=True, exist_ok=True)
        write_demonstrations(demonstrations)
        (demonstrations / DONE).touch()
    if read_done(run_dir / "01-sft") is None:
        print("training the start", flush=True)
        data = f"stages.sft.data.0.path={demonstrations}"
        train(START_RECIPE, [f"seed={START_SEED}", data, *overrides], run_dir)
    return run_dir


def write_demonstrations(out: Path) -> None:
    """Write rows of data/train, half of them with a slip: SFT leaves both endings in the policy."""
    for domain in (DOMAIN, LOOSE_DOMAIN):
        lines = (ROOT / "data" / "train" / f"{domain}.jsonl").read_text("utf-8").splitlines()
        rng = random.Random(f"slips/{domain}")
        rows = [json.loads(line) for line in lines]
        rows = [slip(row) if rng.random() < SLIPPED else row for row in rows]
        text = "".join(make_data.to_line(row) for row in rows)
        (out / f"{domain}.jsonl").write_text(text, encoding="utf-8")


def slip(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with a wrong last step: a number one too large, or the other truth value."""
    wrong = copy.deepcopy(row)
    turn = wrong["messages"][-1]
    answer = turn["content"]
    other = {"true": "false", "false": "true"}
    turn["content"] = other[answer] if answer in other else str(int(answer) + 1)
    thinking = turn["reasoning_content"]
    if thinking.endswith(answer):
        turn["reasoning_content"] = thinking.removesuffix(answer) + turn["content"]
    return wrong


# ---- arms from other runs ------------------------------------------------------------------------


def continued_sft(run_dir: Path) -> list[str]:
    """Return overrides for SFT from a pipeline's SFT, for the seconds of its RL stages."""
    seconds = json.loads((run_dir / "result.json").read_text("utf-8"))["seconds"]
    recipe = load_yaml(run_dir / "recipe.yaml")
    sft = recipe["stages"][0]
    name = sft["name"]
    directory = run_dir / f"01-{name}"
    done = read_done(directory)
    if done is None:
        raise ValueError(f"{directory} is not finished")
    rest = sum(seconds.values()) - seconds[name]
    # A warm restart from half the rate: the checkpoint is from the end of a cosine.
    optim = {**sft["optim"], "lr": sft["optim"]["lr"] / 2}
    steps = max(1, round(sft["steps"] * rest / seconds[name]))
    start = directory / "checkpoints" / done.result["checkpoint"]
    return [
        f"model={json.dumps({'path': str(start)})}",
        f"stages=[{json.dumps({**sft, 'steps': steps, 'optim': optim})}]",
        f"evaluation={json.dumps({**recipe['evaluation'], 'untrained_examples': 0})}",
    ]


PREPARE: dict[str, Callable[..., Starts]] = {
    "needles": needles,
    "rl_start": rl_start,
    "real_start": real_model.real_start,
    "real_test": real_model.real_test,
}
RECIPES = {  # besides the sweep's own, that results depend on
    "rl_start": [START_RECIPE],
    "real_start": [real_model.START_RECIPE],
}
DERIVED: dict[str, Callable[[Path], list[str]]] = {
    "continued_sft": continued_sft,
    **real_model.DERIVED,
}
