"""Accuracies of an evaluation, but for tasks without a single scored completion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_train.core.errors import DataError, ErnieTrainError


def is_measured(task: Mapping[str, Any]) -> bool:
    """Return whether a task's result rests on a completion that could be scored."""
    completions = task.get("completions", 0)  # earlier versions have none
    return not completions or sum(task["excluded"].values()) < completions


def measured(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation without the accuracies and estimates of tasks that none could score.

    Means stay, but for those over such tasks alone.
    """
    tasks = [
        {**task} if is_measured(task) else {**task, "accuracy": None, "estimates": {}}
        for task in evaluation["tasks"]
    ]
    known = {task["domain"] for task in tasks if task["accuracy"] is not None}
    lost = {task["domain"] for task in tasks} - known
    domains = {
        name: {**values, "accuracy": None} if name in lost else values
        for name, values in evaluation["domains"].items()
    }
    mean = evaluation["mean_accuracy"] if known or not tasks else None
    return {**evaluation, "mean_accuracy": mean, "domains": domains, "tasks": tasks}


def require_scores(samples: Sequence[Mapping[str, Any]]) -> None:
    """Raise an error with the first reason if none of the samples could be scored.

    It is `DataError` where the rows are at fault, else `ErnieTrainError`.
    """
    statuses = Counter(str(sample["status"]) for sample in samples)
    if not samples or statuses.keys() & {"correct", "wrong"}:
        return
    first = samples[0]
    counts = ", ".join(f"{count} {status}" for status, count in statuses.items())
    kind = DataError if statuses.keys() == {"bad_gold"} else ErnieTrainError
    raise kind(
        f"none of the {len(samples)} completions could be scored ({counts}); the first, of "
        f"{first['source']}: {first['detail'] or first['status']}"
    )
