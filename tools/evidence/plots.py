"""Plots of a sweep: curves over steps or sizes, and a comparison of arms with their distances."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ernie_train.core.config import StrictConfig
from tools.evidence.tables import Results, interval


class Arm(StrictConfig):
    """How an arm is drawn: by its title, in a matplotlib color and line style."""

    arm: str
    color: str | None = None
    style: str = "-"


class Panel(StrictConfig):
    """One pair of axes. `key` is a list or a mapping from x to y; or `keys` maps x to figures."""

    key: str = ""
    keys: dict[str, str] = {}
    scale: float = 1.0
    smoothed: int = 1  # values in the running mean
    dots: bool = False  # one for each seed
    marker: str = ""
    chance: float | None = None  # a dotted line
    ticks: list[int] = []  # of a logarithmic x axis
    title: str = ""
    xlabel: str = ""
    ylabel: str = ""
    top: float | None = None

    def curves(self, results: Results, arm: str) -> tuple[list[float], list[list[float]]]:
        """Return x, and y for each seed."""
        own = [result for result in results if result["arm"] == arm]
        if self.keys:
            points = [{x: result[key] for x, key in self.keys.items()} for result in own]
        else:
            points = [_by_x(result[self.key]) for result in own]
        scaled = [[self.scale * y for y in curve.values()] for curve in points]
        return [float(x) for x in points[0]] if points else [], scaled

    def draw(self, axes: Any, results: Results, arms: dict[str, Arm]) -> None:
        """Draw the mean over the seeds of every arm that has results."""
        for title, arm in arms.items():
            x, curves = self.curves(results, arm.arm)
            if not curves:
                continue
            mean = [statistics.fmean(ys) for ys in zip(*curves, strict=True)]
            style = {"color": arm.color, "linestyle": arm.style, "marker": self.marker}
            line = axes.plot(
                x,
                running_mean(mean, self.smoothed),
                label=title,
                linewidth=1.2,
                markersize=3,
                **style,
            )[0]
            if self.dots:
                for curve in curves:
                    axes.plot(x, curve, ".", color=line.get_color(), markersize=5)
        if self.chance is not None:
            axes.axhline(self.chance, color="gray", linewidth=0.8, linestyle=":")
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel, title=self.title, ylim=(0, self.top))
        if self.ticks:
            axes.set_xscale("log", base=2)
            axes.set_xticks(self.ticks, [str(n) for n in self.ticks])
            axes.minorticks_off()


class Curves(StrictConfig):
    """Panels beside each other, with one legend."""

    kind: Literal["curves"]
    size: tuple[float, float] = (9.0, 3.4)  # inches
    share_y: bool = False
    legend: str = "outside upper center"
    legend_columns: int = 4
    arms: dict[str, Arm] = {}  # by title; all under their own names unless given
    panels: list[Panel]

    def draw(self, results: Results, file: Path) -> None:
        names = dict.fromkeys(str(result["arm"]) for result in results)
        arms = self.arms or {name: Arm(arm=name) for name in names}
        figure, axes = _subplots(len(self.panels), self.size, sharey=self.share_y)
        for axis, panel in zip(axes, self.panels, strict=True):
            panel.draw(axis, results, arms)
        figure.legend(
            *axes[0].get_legend_handles_labels(),
            fontsize=8, loc=self.legend, ncols=self.legend_columns,
        )  # fmt: skip
        figure.savefig(file)


class Comparison(StrictConfig):
    """Left, a figure of every arm with its 95 % interval; right, of each run, over its distance.

    Dotted lines show the arm `start`.
    """

    kind: Literal["comparison"]
    size: tuple[float, float] = (9.0, 3.4)
    arms: dict[str, Arm]
    key: str
    scale: float = 1.0
    distance: str
    start: str
    xlabel: str
    distance_label: str

    def draw(self, results: Results, file: Path) -> None:
        figure, (left, right) = _subplots(2, self.size)
        present = {str(result["arm"]) for result in results}
        arms = {title: arm for title, arm in self.arms.items() if arm.arm in present}
        for place, (title, arm) in enumerate(arms.items()):
            own = [result for result in results if result["arm"] == arm.arm]
            values = [self.scale * result[self.key] for result in own]
            mean, color = statistics.fmean(values), arm.color
            half = interval(values) if len(values) > 1 else 0.0
            left.errorbar([mean], [place], xerr=[half], fmt="o", color=color, capsize=3)
            left.plot(values, [place + 0.22] * len(values), "|", color=color, alpha=0.6)
            distances = [result[self.distance] for result in own]
            right.plot(distances, values, "o", color=color, markersize=4, label=title)
        for start in (result for result in results if result["arm"] == self.start):
            for line in (left.axvline, right.axhline):
                line(self.scale * start[self.key], color="gray", linewidth=0.8, linestyle=":")
        left.set_yticks(range(len(arms)), list(arms), fontsize=8)
        left.invert_yaxis()
        left.set(xlabel=self.xlabel)
        right.set(xlabel=self.distance_label, ylabel=self.xlabel)
        figure.savefig(file)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of each value and those before it, `width` of them at most."""
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def _by_x(values: Any) -> dict[Any, float]:
    return dict(values) if isinstance(values, dict) else dict(enumerate(values, start=1))


def _subplots(columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    # A Figure of its own, without pyplot: no backend to choose and nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=90, layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]
