"""Read a run directory without asking that anything in it is whole.

Files that are missing or damaged, and lines that are, become remarks. Text keeps its control
characters here: the page writes them out.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie_train.core.errors import ErnieTrainError, UserError, run_hint
from ernie_train.core.foreign_files import open_regular, parse_json, read_json, read_text
from ernie_train.core.yaml import parse_yaml
from ernie_train.io.metrics_log import FILE_NAME
from ernie_train.io.run_dir import DONE, lock_owner, saved_steps

RECIPE, ENVIRONMENT, EVALUATION = "recipe.yaml", "environment.json", "evaluation.json"
SAMPLES, SOLVED = "samples.jsonl", "evaluation_samples.jsonl"
LONGEST_LINE_BYTES = 2**22
MOST_METRICS = 2000  # names in a stage; a hostile file could hold one for each step
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_LARGEST_STEP = 2**53

Remark = Callable[[str], None]


@dataclass
class Curves:
    """Hold a stage's metrics by name: steps, and the values at them; timings as `time/NAME`."""

    steps: dict[str, array[float]] = field(default_factory=dict)
    values: dict[str, array[float]] = field(default_factory=dict)
    last_step: int = 0
    lines: int = 0

    def add(self, step: int, name: str, value: float) -> None:
        if name not in self.steps:
            if len(self.steps) >= MOST_METRICS:
                return
            self.steps[name], self.values[name] = array("d"), array("d")
        self.steps[name].append(step)
        self.values[name].append(value)

    def last(self, name: str) -> float | None:
        """Return the last value of a metric, None if it was never logged."""
        return self.values[name][-1] if name in self.values else None

    def at(self, name: str, step: int) -> float | None:
        """Return the last value of a metric that was logged at a step."""
        steps, values = self.steps.get(name, ()), self.values.get(name, ())
        return next((v for s, v in zip(steps[::-1], values[::-1], strict=True) if s == step), None)


@dataclass
class StageFiles:
    """Hold what a stage's directory says; `settings` are those of the recipe, {} if unknown."""

    directory: Path
    name: str
    settings: dict[str, Any]
    curves: Curves
    done: dict[str, Any] | None
    data_report: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    saved: int | None = None  # step of the last checkpoint

    @property
    def kind(self) -> str:
        return str(self.settings.get("kind", "unknown"))

    @property
    def has_begun(self) -> bool:
        return self.curves.lines > 0 or self.done is not None or self.directory.is_dir()


@dataclass
class RunFiles:
    """Hold what a run directory says, and remarks on what it does not."""

    path: Path
    name: str
    recipe: dict[str, Any]
    recipe_text: str
    environment: dict[str, Any] | None
    stages: list[StageFiles]
    evaluation: dict[str, Any] | None
    receipt: dict[str, Any] | None
    is_running: bool
    remarks: list[str]

    @property
    def is_complete(self) -> bool:
        """Return True if all that the recipe asks for is there."""
        asked = {"evaluation": self.evaluation, "export": self.receipt}
        whole = all(found for name, found in asked.items() if self.recipe.get(name))
        return bool(self.stages) and all(stage.done for stage in self.stages) and whole


def read_run(run_dir: Path) -> RunFiles:
    """Read a run directory, whatever is missing or damaged in it.

    Raises:
        UserError: it is no directory, or nothing in it is of a run.
    """
    if not run_dir.is_dir():
        what = run_hint(run_dir) or "; a report is made of a run directory"
        raise UserError(f"{run_dir}: no such directory{what}")
    remarks: list[str] = []
    recipe, recipe_text = _recipe(run_dir, remarks.append)
    stages = _stages(run_dir, recipe, remarks.append)
    if not stages and not recipe:
        raise UserError(f"{run_dir}: not a run directory (it has no {RECIPE} and no stages)")
    ended = all(stage.done for stage in stages)  # else nothing after them is missing
    return RunFiles(
        path=run_dir,
        name=str(recipe.get("name") or run_dir.resolve().name),
        recipe=recipe,
        recipe_text=recipe_text,
        environment=_object(run_dir / ENVIRONMENT, remarks.append),
        stages=stages,
        evaluation=_object(
            run_dir / EVALUATION, remarks.append, asked=ended and bool(recipe.get("evaluation"))
        ),
        receipt=_object(
            run_dir / "export/export_receipt.json",
            remarks.append,
            asked=ended and bool(recipe.get("export")),
        ),
        is_running=lock_owner(run_dir) is not None,
        remarks=remarks,
    )


def iter_rows(path: Path, remark: Remark) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file; lines that are none, or are too long, become one remark.

    A last line without a newline is still being written and is passed over.
    """
    damaged: list[int] = []
    try:
        with open_regular(path) as stream:
            number, skipping = 0, False
            while line := stream.readline(LONGEST_LINE_BYTES):
                whole = line.endswith(b"\n")
                if not skipping:
                    number += 1
                    row = _row(line) if whole else None
                    if row is not None:
                        yield row
                    elif whole or len(line) == LONGEST_LINE_BYTES:
                        damaged.append(number)
                skipping = not whole
    except FileNotFoundError:
        return
    except OSError as error:
        remark(f"{_place(path)}: cannot be read: {error.strerror or error}")
    if damaged:
        remark(f"{_place(path)}: {len(damaged)} damaged lines left out, the first is {damaged[0]}")


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _place(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _recipe(run_dir: Path, remark: Remark) -> tuple[dict[str, Any], str]:
    try:
        text = read_text(run_dir / RECIPE, 2**22)
    except FileNotFoundError:
        remark(f"{RECIPE} is missing: names of stages are those of directories, gates are unknown")
        return {}, ""
    except (OSError, ValueError) as error:
        remark(f"{RECIPE} cannot be read: {error}")
        return {}, ""
    try:
        value = parse_yaml(text, RECIPE)
    except ErnieTrainError as error:
        remark(f"damaged: {error}")
        return {}, text
    if not isinstance(value, dict):
        remark(f"{RECIPE} holds no settings")
        return {}, text
    return value, text


def _object(path: Path, remark: Remark, *, asked: bool = True) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except FileNotFoundError:
        if asked:
            remark(f"{_place(path)} is missing, or not written yet")
    except (OSError, ValueError) as error:
        remark(f"{_place(path)}: damaged ({error})")
    return None


def _stages(run_dir: Path, recipe: dict[str, Any], remark: Remark) -> list[StageFiles]:
    """Return the stages of the recipe, else those that there are directories of."""
    listed = recipe.get("stages")
    settings = [s for s in listed if isinstance(s, dict)] if isinstance(listed, list) else []
    named = [(f"{at:02d}-{s.get('name')}", s) for at, s in enumerate(settings, start=1)]
    if not named:
        found = sorted(p.parent.name for p in run_dir.glob(f"[0-9][0-9]-*/{FILE_NAME}"))
        named = [(name, {}) for name in found]
    return [_stage(run_dir / _file_name(name), values, remark) for name, values in named]


def _file_name(name: str) -> str:
    """Return a name that a directory may have; recipes that a program wrote have no other."""
    return (
        Path(name.replace("\0", "")).name.encode("utf-8", "replace")[:255].decode(errors="ignore")
    )


def _stage(directory: Path, settings: dict[str, Any], remark: Remark) -> StageFiles:
    begun = directory.is_dir()
    asks = bool(settings.get("gate")) and settings.get("kind") != "reward"  # which measures itself
    done = _object(directory / DONE, remark, asked=False)
    curves = read_curves(directory / FILE_NAME, remark)
    if begun and not curves.lines:
        remark(f"{directory.name}/{FILE_NAME}: no metrics yet")
    return StageFiles(
        directory=directory,
        name=str(settings.get("name") or directory.name[3:]),
        settings=settings,
        curves=curves,
        done=done,
        data_report=_object(directory / "data_report.json", remark, asked=begun),
        evaluation=_object(directory / EVALUATION, remark, asked=done is not None and asks),
        saved=_last_saved(directory),
    )


def _last_saved(directory: Path) -> int | None:
    with suppress(OSError):
        return max(saved_steps(directory / "checkpoints"), default=None)
    return None


def read_curves(path: Path, remark: Remark) -> Curves:
    """Read a metrics.jsonl; values that are no numbers are left out and counted in a remark."""
    curves, odd = Curves(), 0
    for row in iter_rows(path, remark):
        step, timings = row.pop("step", None), row.pop("time", {})
        if type(step) is not int or not 0 <= step < _LARGEST_STEP:
            odd += 1
            continue
        curves.lines, curves.last_step = curves.lines + 1, max(curves.last_step, step)
        times = timings if isinstance(timings, dict) else {}
        for prefix, values in (("", row), ("time/", times)):
            for name, value in values.items():
                number = _number(value)
                if number is None:
                    odd += 1
                else:
                    curves.add(step, prefix + name, number)
    if odd:
        remark(f"{_place(path)}: {odd} values are no numbers and left out")
    if len(curves.steps) >= MOST_METRICS:
        remark(f"{_place(path)}: only the first {MOST_METRICS} names of metrics are read")
    return curves


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _SPECIAL.get(value) if isinstance(value, str) else None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
