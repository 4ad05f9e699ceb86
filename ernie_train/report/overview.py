"""Tables of the report: stages with their gates, health, evaluation, and facts as they are."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from ernie_train.core.terminal import format_duration, one_line, printable, shorten
from ernie_train.eval.gates import evaluation_metrics, gate_problems
from ernie_train.io.healthy import HEALTHY, HealthyRange
from ernie_train.io.run_dir import stopped_state, total_steps
from ernie_train.report.run_files import RunFiles, StageFiles

LONGEST_TEXT = 4000  # characters of a completion or a value
_MOST_ITEMS, _DEEPEST = 60, 6


def shown(value: object, longest: int = 200) -> str:
    """Return a text or number as one harmless line."""
    return one_line(value if isinstance(value, str) else f"{value}", longest)


def shown_text(value: object, longest: int = LONGEST_TEXT) -> str:
    """Return a text of several lines, harmless and of bounded length."""
    return printable(shorten(value if isinstance(value, str) else f"{value}", longest))


class StageRow(NamedTuple):
    """One line of the table of stages."""

    name: str
    kind: str
    state: str
    steps: str
    share: float | None  # done, 0 to 1
    duration: str
    speed: str
    gate: str
    gate_state: str  # passed, missed, open, none


def stage_rows(run: RunFiles) -> list[StageRow]:
    """Return the table of stages."""
    rows, before = [], None
    for at, stage in enumerate(run.stages):
        after = run.stages[at + 1 :]
        gate, gate_state = _gate(stage, before)
        before = stage.evaluation or before
        total = _total_steps(stage)
        last = stage.curves.last_step
        speed = stage.curves.last("time/tokens_per_second")
        each = stage.curves.last("time/seconds")
        rows.append(
            StageRow(
                name=shown(stage.name, 80),
                kind=shown(stage.kind, 40),
                state=_state(run, stage, any(other.has_begun for other in after)),
                steps=f"{last:,} of {total:,}" if total else f"{last:,}",
                share=1.0 if stage.done else min(1.0, last / total) if total else None,
                duration=_duration(stage),
                speed=f"{speed:,.0f} tokens/s" if speed else f"{each:.1f} s a step" if each else "",
                gate=gate,
                gate_state=gate_state,
            )
        )
    return rows


def _state(run: RunFiles, stage: StageFiles, later_begun: bool) -> str:
    if stage.done is not None:
        return "done"
    if not stage.has_begun:
        return "waiting"
    if run.is_running and not later_begun:
        return "running"
    return stopped_state(stage.saved, stage.curves.last_step, _total_steps(stage))


def _total_steps(stage: StageFiles) -> int | None:
    done = (stage.done or {}).get("result", {})
    ended = total_steps(done) if isinstance(done, dict) else None
    return total_steps(stage.settings) or ended


def _duration(stage: StageFiles) -> str:
    """Return the time of all steps, without pauses between two starts."""
    seconds = stage.curves.values.get("time/seconds")
    if not seconds:
        return ""
    values = np.asarray(seconds)
    return format_duration(min(float(values[np.isfinite(values)].sum()), 1e12))


def _gate(stage: StageFiles, before: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return a stage's gate in words, and how it stands: passed, missed, open, none."""
    gate = _mapping(stage.settings.get("gate"))
    if not gate:
        return "", "none"
    metric = str(gate.get("metric"))
    text = shown(f"{metric} at least {gate.get('at_least')}")
    if stage.kind == "reward":
        return _own_gate(stage, metric, text)
    earlier = _mapping(before).get("trained")
    try:
        trained = _mapping(stage.evaluation)["trained"]
        told = f"{text}: {evaluation_metrics(trained)[metric]:.3f}"
        missed = gate_problems(SimpleNamespace(**gate), trained, earlier)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return f"{text}: not judged yet", "open"  # or the evaluation is damaged
    return (shown("; ".join([told, *missed]), 1000), "missed") if missed else (told, "passed")


def _own_gate(stage: StageFiles, metric: str, text: str) -> tuple[str, str]:
    """Return the gate of a stage that measures itself: it is finished only if it passes."""
    if stage.done is None:
        last = stage.curves.last(metric)
        return f"{text}: {'not judged yet' if last is None else f'{last:.3f} so far'}", "open"
    checkpoint = str(_mapping(stage.done.get("result")).get("checkpoint"))
    step = re.fullmatch(r"step_(\d{6,18})", checkpoint)
    found = stage.curves.at(metric, int(step[1])) if step else None
    return text if found is None else f"{text}: {found:.3f}", "passed"


# ---- health


class HealthCell(NamedTuple):
    """A metric of one stage against its healthy range."""

    value: str  # the last one
    state: str  # ok, left (and came back), out


class HealthRow(NamedTuple):
    """A metric with its healthy range, and a cell for each stage; None where it has none."""

    metric: str
    bounds: str
    cells: list[HealthCell | None]


class Health(NamedTuple):
    """The health of a run: rows of metrics over the stages, and remedies for what left a range."""

    stages: list[str]
    rows: list[HealthRow]
    remedies: list[tuple[str, str]]  # state, what happened and what helps


def health_of(run: RunFiles) -> Health:
    """Compare the metrics of every stage with their healthy ranges."""
    stages = [stage for stage in run.stages if stage.curves.lines]
    rows = []
    for metric in dict.fromkeys(healthy.metric for healthy in HEALTHY):
        ranges = [healthy for healthy in HEALTHY if healthy.metric == metric]
        cells = [_health_cell(stage, ranges) for stage in stages]
        if any(cells):
            rows.append(HealthRow(metric, " and ".join(r.bounds for r in ranges), cells))
    found = (_remedy(stage, healthy) for stage in stages for healthy in HEALTHY)
    remedies = sorted((f for f in found if f is not None), key=lambda f: f[0] != "out")
    return Health([shown(stage.name, 80) for stage in stages], rows, remedies)


def _health_cell(stage: StageFiles, ranges: Sequence[HealthyRange]) -> HealthCell | None:
    values = stage.curves.values.get(ranges[0].metric)
    if values is None:
        return None
    inside = [all(healthy.holds(value) for healthy in ranges) for value in values]
    state = "ok" if all(inside) else "left" if inside[-1] else "out"
    return HealthCell(f"{values[-1]:.3g}", state)


def _remedy(stage: StageFiles, healthy: HealthyRange) -> tuple[str, str] | None:
    if healthy.metric not in stage.curves.values:
        return None
    values, steps = stage.curves.values[healthy.metric], stage.curves.steps[healthy.metric]
    wrong = [(step, v) for step, v in zip(steps, values, strict=True) if not healthy.holds(v)]
    if not wrong:
        return None
    (first, _), (last, value) = wrong[0], wrong[-1]
    text = (
        f"{stage.name}, {healthy.metric}: outside {len(wrong)} of {len(values)} times, first at "
        f"step {first:.0f}. Step {last:.0f}: {healthy.remedy.format(value)}"
    )
    return "left" if healthy.holds(values[-1]) else "out", shown(text, 1000)


# ---- evaluation


class TaskRow(NamedTuple):
    """A task's share of problems solved in each column; low and high are None where not given."""

    task: str
    problems: str
    cells: list[tuple[float, float | None, float | None] | None]


def evaluation_table(runs: Sequence[RunFiles]) -> tuple[list[str], list[TaskRow]]:
    """Return the columns (chance, untrained, stages, end; of each run), and a row a task."""
    columns: list[tuple[str, dict[str, dict[str, Any]]]] = []
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        columns += [(prefix + name, tasks) for name, tasks in _columns_of(run) if tasks]
    names = sorted({name for _, tasks in columns for name in tasks})[:_MOST_ITEMS]
    rows = [
        TaskRow(
            shown(name, 80),
            next((shown(t[name].get("problems", "")) for _, t in columns if name in t), ""),
            [_cell(tasks.get(name)) for _, tasks in columns],
        )
        for name in names
    ]
    return [shown(column, 80) for column, _ in columns], rows


def _columns_of(run: RunFiles) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """Return what is known of a run's tasks; the end is left out if it is the last stage's."""
    end = _tasks(run.evaluation, "trained")
    after = [(f"after {s.name}", _tasks(s.evaluation, "trained")) for s in run.stages]
    known = end or next((tasks for _, tasks in after if tasks), {})
    chance = {name: {"accuracy": task.get("baseline")} for name, task in known.items()}
    found = [("chance", chance), ("untrained", _tasks(run.evaluation, "untrained")), *after]
    return found if after and after[-1][1] == end else [*found, ("end", end)]


def _tasks(evaluation: Mapping[str, Any] | None, which: str) -> dict[str, dict[str, Any]]:
    tasks = _mapping(_mapping(evaluation).get(which)).get("tasks")
    rows = [t for t in tasks if isinstance(t, dict)] if isinstance(tasks, list) else []
    return {str(task.get("task")): task for task in rows}


def _cell(task: Mapping[str, Any] | None) -> tuple[float, float | None, float | None] | None:
    if task is None or not is_number(task.get("accuracy")):
        return None
    estimate = _mapping(_mapping(task.get("estimates")).get("pass@1"))
    low, high = estimate.get("low"), estimate.get("high")
    if not (is_number(low) and is_number(high)):
        low = high = None
    return float(task["accuracy"]), low, high


# ---- facts as they are


def facts(value: Any, depth: int = 0) -> Any:
    """Return a JSON value as lists of (name, value) and harmless texts of bounded length."""
    if depth >= _DEEPEST and isinstance(value, dict | list):
        return "..."
    if isinstance(value, dict):
        return [(shown(k, 80), facts(v, depth + 1)) for k, v in _first(list(value.items()))]
    if isinstance(value, list):
        if all(not isinstance(v, dict | list) for v in value):
            return ", ".join(shown(v) for v in _first(value)) or "none"
        return [(f"{at}", facts(v, depth + 1)) for at, v in enumerate(_first(value), start=1)]
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if type(value) is int and abs(value) < 10**18 else shown(value, 500)


def environment_facts(environment: Mapping[str, Any]) -> Any:
    """Return the environment with the times of its starts as dates."""
    return facts({**environment, "starts": list(_starts(environment))})


def _starts(environment: Mapping[str, Any]) -> Iterator[Any]:
    starts = environment.get("starts")
    for start in starts if isinstance(starts, list) else []:
        at = _mapping(start).get("unix_s")
        if is_number(at) and 0 <= at < 2**33:
            yield {**start, "unix_s": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))}
        else:
            yield start


def _first(values: list[Any]) -> list[Any]:
    return values[:_MOST_ITEMS]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> TypeGuard[float]:
    """Tell if a value is a finite number that a float holds; JSON's integers have no end."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max
