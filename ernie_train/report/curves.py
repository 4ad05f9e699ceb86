"""Curves of metrics and the heat map of expert load, made short enough to draw.

A curve of more than `MOST_POINTS` values becomes as many means over equal numbers of them, with the
lowest and the highest of each, so that a spike stays visible.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ernie_train.core.terminal import one_line
from ernie_train.report.run_files import Curves

MOST_POINTS = 400
MOST_CURVES = 120  # of a stage
_OF_LAYER = re.compile(r"moe/layer_(\d{1,4})/(load_max|load_cv|dead_experts)")
_HEAT_COLUMNS = 150
_HIDDEN = ("time/unix_s",)
# What is drawn at once; the others are under "more metrics".
_FIRST = (
    "loss", "validation_loss", "reward", "accuracy", "entropy", "kl", "clip_ratio", "grad_norm",
    "logprob_mismatch", "completions/truncated", "completions/mean_length", "reward_std",
    "frac_reward_zero_std", "rewards/accuracies", "rewards/margins", "lr", "moe/load_max",
    "moe/dead_experts", "episodes/turns", "episodes/tool_errors", "time/tokens_per_second",
    "time/seconds", "eval/mean",
)  # fmt: skip


def chart_names(stages: Sequence[Curves]) -> tuple[list[str], list[str]]:
    """Return the metrics of stages of one name to draw at once, and the others."""
    names = sorted({name for curves in stages for name in curves.steps})
    names = [n for n in names if n not in _HIDDEN and not n.startswith("moe/layer_")]
    first = [name for name in _FIRST if name in names]
    return first, [name for name in names if name not in first]


def curve(curves: Curves, name: str) -> dict[str, Any] | None:
    """Return a metric as lists to draw, None if the stage has none.

    x, y: steps and values, None in the place of what is not finite.
    low, high: of each mean, where the curve was shortened.
    summary: last, lowest and highest value, and how many were not finite.
    """
    if name not in curves.steps:
        return None
    steps = np.asarray(curves.steps[name])
    values = np.asarray(curves.values[name])
    if np.any(np.diff(steps) < 0):
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
    finite = np.isfinite(values)
    found: dict[str, Any] = {"summary": _summary(values, finite)}
    if len(values) <= MOST_POINTS:
        return {"x": steps.astype(int).tolist(), "y": _rounded(values), **found}
    edges = np.linspace(0, len(values), MOST_POINTS + 1).astype(int)
    starts = edges[:-1]
    counts = np.add.reduceat(finite.astype(int), starts)
    with np.errstate(all="ignore"):
        means = np.add.reduceat(np.where(finite, values, 0.0), starts) / counts
    lows = np.minimum.reduceat(np.where(finite, values, math.inf), starts)
    highs = np.maximum.reduceat(np.where(finite, values, -math.inf), starts)
    return {
        "x": steps[edges[1:] - 1].astype(int).tolist(),
        "y": _rounded(means),
        "low": _rounded(lows),
        "high": _rounded(highs),
        "each": math.ceil(len(values) / MOST_POINTS),
        **found,
    }


def heat_map(curves: Curves) -> dict[str, Any] | None:
    """Return the load of experts by layer and step; None where no layer was measured.

    For each measure one row a layer; a cell that was not logged is None.
    """
    layers: dict[str, dict[int, str]] = {}
    for name in curves.steps:
        if (match := _OF_LAYER.fullmatch(name)) is not None:
            layers.setdefault(match[2], {})[int(match[1])] = name
    if not layers:
        return None
    logged = [curves.steps[name] for rows in layers.values() for name in rows.values()]
    every = sorted({step for steps in logged for step in steps})
    columns = [every[at] for at in _evenly(len(every), _HEAT_COLUMNS)]
    numbers = sorted({number for rows in layers.values() for number in rows})
    return {
        "steps": [int(step) for step in columns],
        "layers": numbers,
        "measures": {
            measure: [_heat_row(curves, rows.get(number), columns) for number in numbers]
            for measure, rows in sorted(layers.items(), reverse=True)
        },
    }


def _heat_row(curves: Curves, name: str | None, columns: list[float]) -> list[float | None]:
    if name is None:
        return [None] * len(columns)
    at = dict(zip(curves.steps[name], curves.values[name], strict=True))
    return _rounded(np.array([at.get(step, math.nan) for step in columns]))


def _evenly(count: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()


def _rounded(values: np.ndarray) -> list[float | None]:
    short = (float(f"{v:.5g}") for v in values.tolist())  # the largest floats become infinite
    return [v if math.isfinite(v) else None for v in short]


def _summary(values: np.ndarray, finite: np.ndarray) -> str:
    last = f"last {values[-1]:.4g}"
    if not finite.any():
        return f"{last}; never finite"
    kept = values[finite]
    odd = int((~finite).sum())
    told = f"{last}, lowest {kept.min():.4g}, highest {kept.max():.4g}"
    return told + (f"; {odd} values are NaN or infinite" if odd else "")


def shown_name(name: str) -> str:
    """Return a metric's name as the page shows it."""
    return one_line(name, 80)
