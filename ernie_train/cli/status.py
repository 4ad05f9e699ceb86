"""The verb `status`: stages of a run, their latest metrics, and what comes next.

It is asked for often, so it loads neither Paddle nor numpy: the recorded recipe is read as it
stands where this version wrote it and nobody changed it since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from ernie_train.core.cpu import __version__
from ernie_train.core.errors import CheckpointError, GateError, run_hint
from ernie_train.core.foreign_files import read_json, read_text
from ernie_train.core.yaml import load_yaml
from ernie_train.eval.gates import check_gate
from ernie_train.io.files import fingerprint
from ernie_train.io.metrics_log import FILE_NAME, read_metrics
from ernie_train.io.run_dir import (
    ENVIRONMENT,
    RECIPE,
    is_run,
    is_whole_export,
    lock_owner,
    read_done,
    read_result,
    saved_steps,
    stopped_state,
    total_steps,
)
from ernie_train.launch import last_launch

_GATE_MISSED, _NOT_JUDGED = "gate missed", "gate not judged"
_OUTSTANDING = {
    _GATE_MISSED: "stage {0} missed its gate: change the gate, or other settings and --from {0}",
    _NOT_JUDGED: "the gate of stage {0}",
}
HEADLINE = ("loss", "validation_loss", "reward", "accuracy", "kl", "entropy", "grad_norm", "lr")


def print_status(run_dir: Path, console: Console) -> None:
    """Print a line for each stage and what comes next; `CheckpointError` if it is no run."""
    recipe = _recorded_recipe(run_dir)
    table = Table(title=f"{recipe['name']} in {run_dir}")
    for column in ("stage", "kind", "state", "step", "checkpoints", "latest metrics"):
        table.add_column(column)
    missing = []
    before = None
    owner = lock_owner(run_dir)
    for index, stage in enumerate(recipe["stages"]):
        name = stage["name"]
        directory = run_dir / f"{index + 1:02d}-{name}"
        state, *cells = _stage_cells(directory, stage, is_running=owner is not None)
        if state == "done":
            result = read_result(directory / "evaluation.json")
            state, before = _state_at_gate(stage, result, before), result
        table.add_row(name, stage["kind"], state, *cells)
        if state != "done":
            missing.append(_OUTSTANDING.get(state, "stage {0}").format(name))
    if recipe["evaluation"] and not (run_dir / "evaluation.json").exists():
        missing.append("evaluation")
    if recipe["export"] and not is_whole_export(run_dir / "export", hashes=False):
        missing.append("export")
    console.print(table)
    if (launched := last_launch(run_dir)) is not None:
        console.print(f"last launch: {launched}", markup=False, highlight=False)
    if owner is not None:
        console.print(f"running: {owner}", markup=False, highlight=False)
    elif missing:
        console.print("no process runs it; the same command goes on", highlight=False)
    when = "now" if owner is not None and missing else "next"
    console.print(f"{when}: {missing[0] if missing else 'nothing, the run is complete'}")


def _recorded_recipe(run_dir: Path) -> Mapping[str, Any]:
    """Return the resolved recipe of a run; validated, which takes Paddle, unless it is known."""
    path = run_dir / RECIPE
    if not is_run(run_dir):
        raise CheckpointError(
            f"{run_dir}: not a run directory (it has no recipe.yaml){run_hint(run_dir)}"
        )
    if _is_as_written_here(run_dir):
        return load_yaml(path)
    from ernie_train.run.recipe import recorded_recipe

    recipe = recorded_recipe(run_dir)
    return {} if recipe is None else recipe.model_dump(mode="json")


def _is_as_written_here(run_dir: Path) -> bool:
    """Return whether this version recorded the recipe and nobody has changed it since."""
    try:
        facts = read_json(run_dir / ENVIRONMENT)
        recorded = (facts.get("ernie_train"), facts.get("recipe"))
        return recorded == (__version__, fingerprint(read_text(run_dir / RECIPE)))
    except (OSError, ValueError, AttributeError):
        return False


def _state_at_gate(
    stage: Mapping[str, Any], result: dict[str, Any] | None, before: dict[str, Any] | None
) -> str:
    """Return the state of a finished stage: its gate may be missed, or not be judged yet.

    A reward model's stage judges its gate by held-out pairs before it is finished.
    """
    if stage.get("gate") is None or stage["kind"] == "reward":
        return "done"
    if result is None:
        return _NOT_JUDGED
    gate = SimpleNamespace(**stage["gate"])
    try:
        check_gate(gate, stage["name"], result["trained"], before and before["trained"])
    except GateError:
        return _GATE_MISSED
    return "done"


def _stage_cells(
    directory: Path, settings: Mapping[str, Any], *, is_running: bool
) -> tuple[str, str, str, str]:
    """Return state, step, checkpoints and latest metrics of a stage."""
    rows = deque(read_metrics(directory / FILE_NAME), maxlen=1)
    last = rows[0] if rows else {}
    steps = saved_steps(directory / "checkpoints")
    total, step = total_steps(settings), last.get("step")
    step = step if type(step) is int else None
    if read_done(directory):
        state = "done"
    elif not last and not steps:
        state = "waiting"
    elif is_running:
        state = "running"
    else:
        state = stopped_state(steps[-1] if steps else None, step or 0, total)
    reached = "-" if step is None else f"{step:,} of {total:,}" if total else f"{step:,}"
    shown = [f"{name} {last[name]:.4g}" for name in HEADLINE if name in last]
    times = last.get("time", {})
    if "tokens_per_second" in times:
        shown.append(f"{times['tokens_per_second']:,.0f} tokens/s")
    elif "seconds" in times:
        shown.append(f"{times['seconds']:.1f} s a step")
    return state, reached, ", ".join(map(str, steps)) or "-", ", ".join(shown)
