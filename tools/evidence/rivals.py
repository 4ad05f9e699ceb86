"""Rivals of an arm of RL: SFT from its start, of as many trained tokens.

They take from a finished run what makes the comparison fair: its start, its recipe and seed for
sampling, and the tokens that its stages of RL sampled and trained on, by their dumped rollouts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_train.core.config import load_yaml, parse_config
from ernie_train.io.run_dir import read_done
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.rollout import Rollout, read_rollout
from ernie_train.run.recipe import Recipe, recorded_recipe
from ernie_train.train.stage import StageData
from ernie_train.train.supervised_data import SftConfig, prepare
from tools.evidence.runs import ROOT, run_program


def recipe_of(run_dir: Path) -> Recipe:
    """Return the recipe of a run; `ValueError` where none is recorded."""
    recipe = recorded_recipe(run_dir)
    if recipe is None:
        raise ValueError(f"{run_dir} is no run directory")
    return recipe


def start_of(run_dir: Path) -> Path:
    """Return the model that the first stage of RL began with: that of the stage before, if any."""
    recipe = recipe_of(run_dir)
    first = _stages_of_rl(recipe)[0]
    return checkpoint_of(run_dir, first - 1) if first else Path(str(recipe.model.path))


def checkpoint_of(run_dir: Path, stage: int) -> Path:
    """Return the last checkpoint of a stage, by its index; `ValueError` if it is not finished."""
    directory = run_dir / recipe_of(run_dir).stage_directory(stage)
    done = read_done(directory)
    if done is None:
        raise ValueError(f"{directory} is not finished")
    return directory / "checkpoints" / str(done.result["checkpoint"])


def _stages_of_rl(recipe: Recipe) -> list[int]:
    return [at for at, stage in enumerate(recipe.stages) if isinstance(stage, UpoConfig)]


def accepted(run_dir: Path) -> list[Path]:
    """Return a file of rows for each stage of RL: what the verifier accepts of the start's own.

    They are sampled for the stage's prompts, as many as it sampled, with its recipe and seed; in
    the first stage of RL, those of the first iteration are the same ones.
    """
    files = []
    recipe = recipe_of(run_dir)
    for at in _stages_of_rl(recipe):
        rows = run_dir.parent / f"{run_dir.name}-accepted-{recipe.stages[at].name}.jsonl"
        if not rows.exists():
            sampler = ("-m", "tools.evidence.rejection_sampling", "sample")
            stage = ("--stage", recipe.stages[at].name, "--model", str(start_of(run_dir)))
            run_program(*sampler, str(run_dir), str(rows), *stage)
        files.append(rows)
    return files


def as_sft(run_dir: Path, stage: Mapping[str, Any]) -> list[str]:
    """Return overrides for a stage of SFT from the start of `run_dir`, of its RL's tokens.

    Where `run_dir` was not evaluated or exported, the rival is not either.
    """
    recipe = recipe_of(run_dir)
    tokenizer = recipe.load_tokenizer(ROOT)
    config = parse_config(SftConfig, {**stage, "steps": 1}, "the arm of SFT")
    report = prepare(config, StageData(ROOT, tokenizer, recipe.seed)).report
    budget = sum(tokens_of_rl(run_dir)["trained"])
    steps = max(1, round(budget / tokens_of_step(report.to_dict(), stage)))
    return [
        f"model={json.dumps({'path': str(start_of(run_dir))})}",
        f"tokenizer.path={recipe.tokenizer.path}",
        f"stages={json.dumps([{**stage, 'steps': steps}])}",
        *(f"{key}=null" for key in ("evaluation", "export") if getattr(recipe, key) is None),
    ]


def tokens_of_step(report: Mapping[str, Any], stage: Mapping[str, Any]) -> float:
    """Return the trained tokens of a step of SFT, by its report of the data."""
    total = report["total"]
    held = stage["seq_len"] * stage["micro_batch_size"] * stage.get("grad_accum_steps", 1)
    return float(
        held * report["packing_fill"] * total["trainable_tokens"] / max(1, total["tokens"])
    )


def tokens_of_rl(run_dir: Path) -> dict[str, list[int]]:
    """Return the sampled and the trained tokens of each iteration of RL, by its dumped rollouts.

    Trained ones are those of the policy's term; a critic and pairs go through some of them again.
    """
    recipe = recipe_of(run_dir)
    tokens: dict[str, list[int]] = {"sampled": [], "trained": []}
    for at in _stages_of_rl(recipe):
        config = recipe.stages[at]
        assert isinstance(config, UpoConfig)
        for file in sorted((run_dir / recipe.stage_directory(at) / "rollouts").glob("*.jsonl")):
            rollout = Rollout.of(read_rollout(file), config.rollout)
            lengths = [completion.num_sampled for completion in rollout.completions()]
            trained = rollout.trained(every_group=config.learns_from_every_group).reshape(-1)
            tokens["sampled"].append(sum(lengths))
            tokens["trained"].append(sum(n for n, on in zip(lengths, trained, strict=True) if on))
    return tokens


def tokens_of(run_dir: Path) -> dict[str, float]:
    """Return the sampled and trained tokens of a finished arm, of RL or of SFT alone."""
    recipe = recipe_of(run_dir)
    if _stages_of_rl(recipe):
        return {name: float(sum(found)) for name, found in tokens_of_rl(run_dir).items()}
    directory = run_dir / recipe.stage_directory(0)
    stage = load_yaml(run_dir / "recipe.yaml")["stages"][0]
    report = json.loads((directory / "data_report.json").read_text("utf-8"))
    trained = stage["steps"] * tokens_of_step(report, stage)
    return {"sampled": float(_sampled_for(stage["data"])), "trained": trained}


def _sampled_for(sources: Sequence[Mapping[str, Any]]) -> int:
    """Return the tokens that were sampled to make rows."""
    summaries = [Path(f"{source['path']}.summary.json") for source in sources]
    return sum(
        json.loads(summary.read_text("utf-8"))["sampled_tokens"]
        for summary in summaries
        if summary.exists()
    )
