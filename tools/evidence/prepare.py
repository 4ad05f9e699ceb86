"""Data and starts of sweeps, and arms that continue from another arm's run.

`PREPARE` makes data and starts once, and returns the figures of the starts; `DERIVED` returns the
overrides of an arm from the run directory of another one with the same seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ernie_train.io.run_dir import read_done
from tools.data import make_data, make_needles
from tools.evidence import main_job, real_model
from tools.evidence.measure import DOMAIN, LOOSE_DOMAIN
from tools.evidence.runs import ROOT, run_program, train

NEEDLES = ROOT / "runs" / "needles"  # as recipes/long_context.yaml names it
START_RECIPE = "tools/evidence/recipes/ablate_rl_start.yaml"
START_SEED = 7
MADE = "MADE"  # marks a directory of rows as whole

# Figures of each start, by the name of its row.
Starts = dict[str, dict[str, Any]]


def needles(out: Path, recipe: str) -> Starts:
    """Make the texts of recipes/long_context.yaml, unless they are there."""
    if not (NEEDLES / "tokenizer").exists():
        make_needles.main(["--out", str(NEEDLES)])
    return {}


# ---- RL ------------------------------------------------------------------------------------------


def rl_start(out: Path, recipe: str, *, start: str = "", overrides: Sequence[str] = ()) -> Starts:
    """Make a start by SFT on demonstrations of the first level of two domains.

    The prompts are those of data/problems, with worked solutions for the arms that learn from them.
    `start` is a model directory to begin with instead; `overrides` are those of the start's recipe.
    """
    made = out / "rows" / MADE  # beside an interrupted command's part of them it is missing
    if not made.exists():
        options = ["--domains", DOMAIN, LOOSE_DOMAIN, "--splits", "problems", "--solutions"]
        make_data.main(["--out", str(out / "rows"), *options])
        made.touch()
    make_start(out, start, overrides)
    return {}


def rl_test(out: Path, recipe: str, *, problems: int) -> Starts:
    """Make test problems of a fresh seed, and measure the start on them in both domains."""
    main_job.fresh_problems(out, recipe, rows=1.0)
    held_out = str(out / "problems" / "test")
    starts = {}
    for name, domain in (("start", DOMAIN), ("loose-start", LOOSE_DOMAIN)):
        file = out / f"{name}.json"
        if not file.exists():
            start = str(out / "start")
            given = {"domain": domain, "start": start, "problems": problems, "held_out": held_out}
            names = ("policy_in_domain", start, str(file))
            run_program("-m", "tools.evidence.measure", *names, json.dumps(given))
        starts[name] = json.loads(file.read_text("utf-8"))
    return starts


def make_start(out: Path, given: str, overrides: Sequence[str]) -> None:
    """Make `out/start`: a link to the given model, or a run directory, trained if not there."""
    run_dir = out / "start"
    if given:
        if not run_dir.exists():
            run_dir.symlink_to(Path(given).resolve())
    elif read_done(run_dir / "01-sft") is None:
        print("training the start", flush=True)
        train(START_RECIPE, [f"seed={START_SEED}", *overrides], run_dir)


PREPARE: dict[str, Callable[..., Starts]] = {
    "needles": needles,
    "rl_start": rl_start,
    "rl_test": rl_test,
    "main_job_problems": main_job.fresh_problems,
    "real_start": real_model.real_start,
    "real_test": real_model.real_test,
}
RECIPES = {  # besides the sweep's own, that results depend on
    "rl_start": [START_RECIPE],
    "real_start": [real_model.START_RECIPE],
}
DERIVED: dict[str, Callable[[Path], list[str]]] = {
    **main_job.DERIVED,
    **real_model.DERIVED,
}
