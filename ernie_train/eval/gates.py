"""Gates between stages: requirements that a model must meet before the next stage starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ernie_train.core.errors import GateError


class Gate(Protocol):
    """Bar of a stage, as `train.stage.Gate` has it; `status` reads it without Paddle."""

    @property
    def metric(self) -> str: ...

    @property
    def at_least(self) -> float: ...

    @property
    def max_regression(self) -> float | None: ...


def known_metrics(problems: Iterable[Any]) -> set[str]:
    """Return the names of the metrics that evaluating these problems produces."""
    names = {str(p.fields[key]) for p in problems for key in ("task", "domain")}
    return {"eval/mean", *(f"eval/{name}" for name in names)}


def evaluation_metrics(evaluation: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of an evaluation under the names that gates use."""
    found = {f"eval/{task['task']}": task["accuracy"] for task in evaluation["tasks"]}
    found |= {f"eval/{d}": v["accuracy"] for d, v in evaluation["domains"].items()}
    return {**found, "eval/mean": evaluation["mean_accuracy"]}


def check_gate(
    gate: Gate, stage: str, evaluation: dict[str, Any], before: dict[str, Any] | None
) -> None:
    """Raise `GateError` if a stage misses its gate; `before` is the evaluation before the stage."""
    _refuse(stage, gate_problems(gate, evaluation, before))


def gate_problems(
    gate: Gate, evaluation: dict[str, Any], before: dict[str, Any] | None
) -> list[str]:
    """Return what an evaluation lacks for a gate, none where the gate is passed.

    The problems may have changed since `before`: a domain that is new has not fallen, but one that
    is gone cannot be judged.
    """
    problems = _too_low(gate, evaluation_metrics(evaluation))
    if gate.max_regression is None or before is None:
        return problems
    for domain, earlier in before["domains"].items():
        was, now = earlier["accuracy"], evaluation["domains"].get(domain)
        if now is None:
            problems.append(
                f"eval/{domain} was measured before the stage alone, so that max_regression cannot "
                "judge it: the problems have changed"
            )
        elif was - now["accuracy"] > gate.max_regression:
            problems.append(
                f"eval/{domain} fell from {was:.3f} to {now['accuracy']:.3f}, more than "
                f"max_regression={gate.max_regression:g}"
            )
    return problems


def check_metric(gate: Gate, stage: str, metrics: Mapping[str, float]) -> None:
    """Raise `GateError` if a stage misses its gate by a metric that it measures itself."""
    _refuse(stage, _too_low(gate, metrics))


def _too_low(gate: Gate, metrics: Mapping[str, float]) -> list[str]:
    value = metrics[gate.metric]
    if value >= gate.at_least:
        return []
    return [f"{gate.metric} is {value:.3f}, the gate asks for {gate.at_least:g}"]


def _refuse(stage: str, problems: list[str]) -> None:
    if problems:
        raise GateError(
            f"stage {stage} does not pass its gate: {'; '.join(problems)}. Train it longer (--from "
            f"{stage} with other settings) or change the gate; what was trained is kept"
        )
