"""The verbs `run`, in this process or as ranks that it starts and supervises, and `status`.

Importing this module loads no Paddle: the process that supervises ranks does without it.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ernie_train.core import consensus
from ernie_train.core.config import apply_overrides, load_yaml
from ernie_train.core.errors import CheckpointError, GateError
from ernie_train.io.metrics_log import FILE_NAME, read_metrics
from ernie_train.io.run_dir import read_done, refuse_if_in_use
from ernie_train.launch import LaunchSettings, last_launch, supervise

_GATE_MISSED, _NOT_JUDGED = "gate missed", "gate not judged"
_OUTSTANDING = {
    _GATE_MISSED: "stage {0} missed its gate: change the gate, or other settings and --from {0}",
    _NOT_JUDGED: "the gate of stage {0}",
}
_HEADLINE = ("loss", "validation_loss", "reward", "accuracy", "kl", "grad_norm", "lr")


@dataclass(frozen=True)
class RunCommand:
    """Arguments of the verb `run`; `first`, `last` and `extend` are --from, --until, --extend."""

    recipe: Path
    overrides: Sequence[str]
    run_dir: Path | None
    first: str | None
    last: str | None
    extend: bool
    referee: str | None  # an interpreter

    def run_here(self, console: Console) -> None:
        """Run the recipe in this process, which may be one of several ranks."""
        from ernie_train.run.earlier import Selection
        from ernie_train.run.pipeline import Pipeline
        from ernie_train.run.recipe import load_recipe

        with consensus.fail_together():
            loaded = load_recipe(self.recipe, list(self.overrides))
        directory = self._directory(loaded.name)
        console.print(f"recipe {self.recipe} -> {directory}", highlight=False)
        pipeline = Pipeline(loaded, directory, console, self.referee)
        pipeline.run(Selection(self.first, self.last, self.extend))

    def launch(self, settings: LaunchSettings, console: Console, *, debug: bool) -> int:
        """Run the recipe as ranks; return the exit status. Loads no Paddle."""
        # The ranks validate the recipe, which takes Paddle; only name and device are needed here.
        values = apply_overrides(load_yaml(self.recipe), list(self.overrides))
        name, hide_gpus = values.get("name"), values.get("device") == "cpu"
        directory = self._directory(name) if isinstance(name, str) else self.run_dir
        if directory is not None and settings.nnodes == 1:  # ranks of other nodes may hold it
            refuse_if_in_use(directory)

        def command(stages_set_aside: bool) -> list[str]:
            python = [sys.executable, "-u", "-m", "ernie_train", *(["--debug"] if debug else [])]
            return [*python, "run", *self.rank_arguments(stages_set_aside)]

        return supervise(command, replace(settings, hide_gpus=hide_gpus), directory, console)

    def rank_arguments(self, stages_set_aside: bool) -> list[str]:
        """Return the arguments of `run` for a rank.

        Without --from once its stages are set aside: a restart continues them.
        """
        options = {
            "--run-dir": self.run_dir,
            "--from": None if stages_set_aside else self.first,
            "--until": self.last,
            "--referee": self.referee,
        }
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        given += ["--extend"] if self.extend else []  # a second time it finds nothing to do
        return [*given, "--", str(self.recipe), *self.overrides]

    def _directory(self, name: str) -> Path:
        return self.run_dir or Path("runs") / name


def print_status(run_dir: Path, console: Console) -> None:
    """Print a line for each stage and what comes next; `CheckpointError` if it is no run."""
    from ernie_train.run.export import is_whole_export
    from ernie_train.run.finalize import read_result
    from ernie_train.run.recipe import recorded_recipe

    recipe = recorded_recipe(run_dir)
    if recipe is None:
        raise CheckpointError(f"{run_dir}: not a run directory (it has no recipe.yaml)")
    table = Table(title=f"{recipe.name} in {run_dir}")
    for column in ("stage", "kind", "state", "step", "checkpoints", "latest metrics"):
        table.add_column(column)
    missing = []
    before = None
    for index, stage in enumerate(recipe.stages):
        directory = run_dir / recipe.stage_directory(index)
        state, *cells = _stage_cells(directory)
        if state == "done":
            result = read_result(directory / "evaluation.json")
            state, before = _state_at_gate(stage, result, before), result
        table.add_row(stage.name, stage.kind, state, *cells)
        if state != "done":
            missing.append(_OUTSTANDING.get(state, "stage {0}").format(stage.name))
    if recipe.evaluation and not (run_dir / "evaluation.json").exists():
        missing.append("evaluation")
    if recipe.export and not is_whole_export(run_dir / "export", hashes=False):
        missing.append("export")
    console.print(table)
    if (launched := last_launch(run_dir)) is not None:
        console.print(f"last launch: {launched}", markup=False, highlight=False)
    console.print(f"next: {missing[0] if missing else 'nothing, the run is complete'}")


def _state_at_gate(stage: Any, result: dict[str, Any] | None, before: dict[str, Any] | None) -> str:
    """Return the state of a finished stage: its gate may be missed, or not be judged yet."""
    from ernie_train.eval.gates import check_gate

    if stage.gate is None:
        return "done"
    if result is None:
        return _NOT_JUDGED
    try:
        check_gate(stage.gate, stage.name, result["trained"], before and before["trained"])
    except GateError:
        return _GATE_MISSED
    return "done"


def _stage_cells(directory: Path) -> tuple[str, str, str, str]:
    """Return state, step, checkpoints and latest metrics of a stage."""
    from ernie_train.weights.checkpoint import CheckpointStore

    rows = deque(read_metrics(directory / FILE_NAME), maxlen=1)
    last = rows[0] if rows else {}
    steps = CheckpointStore(directory / "checkpoints").steps()
    state = "done" if read_done(directory) else "begun" if last or steps else "waiting"
    shown = [f"{name} {last[name]:.4g}" for name in _HEADLINE if name in last]
    times = last.get("time", {})
    if "tokens_per_second" in times:
        shown.append(f"{times['tokens_per_second']:,.0f} tokens/s")
    elif "seconds" in times:
        shown.append(f"{times['seconds']:.1f} s a step")
    return state, str(last.get("step", "-")), ", ".join(map(str, steps)) or "-", ", ".join(shown)
