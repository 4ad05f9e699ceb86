"""The `status` verb: where a run stands."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ernie_train.core.config import load_yaml, parse_config
from ernie_train.core.errors import CheckpointError
from ernie_train.io.metrics_log import FILE_NAME, read_metrics
from ernie_train.io.run_dir import read_done
from ernie_train.launch import last_launch
from ernie_train.run.recipe import Recipe
from ernie_train.weights.checkpoint import CheckpointStore

_HEADLINE = ("loss", "validation_loss", "reward", "accuracy", "kl", "grad_norm", "lr")


def print_status(run_dir: Path, console: Console) -> None:
    """Prints a line for each stage and what comes next; `CheckpointError` if it is no run."""
    file = run_dir / "recipe.yaml"
    if not file.exists():
        raise CheckpointError(f"{run_dir}: not a run directory (it has no recipe.yaml)")
    recipe = parse_config(Recipe, load_yaml(file), str(file))
    table = Table(title=f"{recipe.name} in {run_dir}")
    for column in ("stage", "kind", "state", "step", "checkpoints", "latest metrics"):
        table.add_column(column)
    upcoming = ""
    for index, stage in enumerate(recipe.stages):
        directory = run_dir / f"{index + 1:02d}-{stage.name}"
        done = read_done(directory)
        metrics = deque(read_metrics(directory / FILE_NAME), maxlen=1)
        last = metrics[-1] if metrics else None
        steps = CheckpointStore(directory / "checkpoints").steps()
        state = "done" if done else "begun" if last or steps else "waiting"
        upcoming = upcoming or ("" if done else f"stage {stage.name}")
        shown = {k: last[k] for k in _HEADLINE if k in last} if last else {}
        table.add_row(
            stage.name,
            stage.kind,
            state,
            str(last["step"]) if last else "-",
            ", ".join(map(str, steps)) or "-",
            ", ".join(f"{name} {value:.4g}" for name, value in shown.items()),
        )
    console.print(table)
    if not upcoming and recipe.evaluation and not (run_dir / "evaluation.json").exists():
        upcoming = "evaluation"
    if not upcoming and recipe.export and not (run_dir / "export").exists():
        upcoming = "export"
    if (launched := last_launch(run_dir)) is not None:
        console.print(f"last launch: {launched}", markup=False, highlight=False)
    console.print(f"next: {upcoming or 'nothing, the run is complete'}")
