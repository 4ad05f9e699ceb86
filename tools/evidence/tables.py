"""Tables of a sweep: figures over seeds, as cells that rows and columns describe."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ernie_train.core.config import StrictConfig

Results = Sequence[Mapping[str, Any]]
SPREADS = {
    "deviation": "standard deviation",
    "interval": "95 % confidence interval",
    "bootstrap": "95 % bootstrap interval",
}
RESAMPLES = 4000
MARKERS = ("<!-- tables of tools.evidence.sweep -->", "<!-- end of the tables -->")


class Minus(StrictConfig):
    """Other fields of a cell whose figure is taken off, seed by seed."""

    arm: str | None = None
    key: str | None = None


class Cell(StrictConfig):
    """Fields of a cell; a row and a column each give some, and the row's win.

    `key` names a figure of a result; it and `text` may have the names in `names` in braces.
    """

    arm: str | None = None
    key: str | None = None
    scale: float = 1.0
    digits: int = 1
    minus: Minus | None = None
    text: str | None = None  # instead of a figure
    names: dict[str, str] = {}

    def over(self, column: Cell) -> Cell:
        """Return the cell where this row meets a column."""
        ours = {name: getattr(self, name) for name in self.model_fields_set}
        theirs = {name: getattr(column, name) for name in column.model_fields_set}
        return Cell(**{**theirs, **ours, "names": {**column.names, **self.names}})

    def values(self, results: Results) -> dict[int | None, float]:
        """Return the figure for each seed; the start of all runs has the seed None."""
        key = (self.key or "").format(**self.names)
        return {
            r["seed"]: self.scale * r[key] for r in results if r["arm"] == self.arm and key in r
        }

    def differences(self, results: Results) -> dict[int | None, float]:
        """Return the figure less that of `minus`; nothing for a cell less itself."""
        values = self.values(results)
        if self.minus is None:
            return values
        changed = {name: getattr(self.minus, name) for name in self.minus.model_fields_set}
        other = self.model_copy(update=changed)
        theirs = other.values(results)
        key, other_key = ((c.key or "").format(**c.names) for c in (self, other))
        if (self.arm, key) == (other.arm, other_key):
            return {}
        if set(theirs) == {None}:
            return {seed: value - theirs[None] for seed, value in values.items()}
        return {seed: value - theirs[seed] for seed, value in values.items() if seed in theirs}

    def by_problem(self, results: Results) -> np.ndarray | None:
        """Return the figure less that of `minus` for each seed and test problem, [S,P].

        Results have it under `by_problem`; None where they do not, or for a cell less itself.
        """
        mine = self._rows(results)
        if mine is None or self.minus is None:
            return mine
        changed = {name: getattr(self.minus, name) for name in self.minus.model_fields_set}
        other = self.model_copy(update={**changed, "minus": None})
        if (self.arm, self.key) == (other.arm, other.key):
            return None
        theirs = other._rows(results)
        if theirs is None or (len(theirs) > 1 and len(theirs) != len(mine)):
            return None
        return mine - theirs

    def _rows(self, results: Results) -> np.ndarray | None:
        key = (self.key or "").format(**self.names)
        mine = [r.get("by_problem", {}) for r in results if r["arm"] == self.arm]
        rows = [figures[key] for figures in mine if key in figures]
        return self.scale * np.array(rows, np.float64) if rows else None

    def render(self, results: Results, spread: str) -> str:
        """Return the cell's text: the mean over seeds, and their spread."""
        if self.text is not None:
            return self.text.format(**self.names)
        if spread == "bootstrap":
            table = self.by_problem(results)
            return "" if table is None else mean_with_bootstrap(table, self.digits)
        values = list(self.differences(results).values())
        return mean_with(spread, values, self.digits) if values else ""


class Table(StrictConfig):
    """A table of a page. Without `rows`, every arm is one under its own name."""

    head: str = "arm"
    before: str = ""
    spread: Literal["deviation", "interval", "bootstrap"] = "deviation"
    rows: dict[str, Cell] | None = None
    columns: dict[str, Cell]

    def render(self, results: Results) -> str:
        """Return the table in Markdown; rows of arms without results are left out."""
        arms = list(dict.fromkeys(str(result["arm"]) for result in results))
        rows = self.rows or {arm: Cell(arm=arm) for arm in arms}
        lines = [
            [
                title,
                *(
                    row.over(column).render(results, self.spread)
                    for column in self.columns.values()
                ),
            ]
            for title, row in rows.items()
            if row.arm is None or row.arm in arms
        ]
        before = f"{self.before}\n\n" if self.before else ""
        return before + markdown_table([self.head, *self.columns], lines)


def mean_with(spread: str, values: Sequence[float], digits: int) -> str:
    """Return the mean of a sample and its spread, as "0.97 ± 0.02".

    The spread is the `deviation` of the values, or the 95 % confidence `interval` of the mean.
    """
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    width = interval(values) if spread == "interval" else statistics.stdev(values)
    return f"{mean} ± {width:.{digits}f}"


def mean_with_bootstrap(table: np.ndarray, digits: int) -> str:
    """Return the mean of [S,P] and its 95 % percentile interval over seeds and problems.

    Seeds and problems are drawn with replacement, each for itself: an arm's runs share their test
    problems. A single row, such as that of a start, is resampled over problems alone.
    """
    seeds, problems = table.shape
    rng = np.random.Generator(np.random.Philox(key=0))
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    columns = rng.multinomial(problems, np.full(problems, 1 / problems), RESAMPLES) / problems
    means = np.einsum("rs,sp,rp->r", rows, table, columns, optimize=True)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{table.mean():.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def interval(values: Sequence[float]) -> float:
    """Return half the width of the 95 % confidence interval of a sample's mean (Student's t).

    Raises `ValueError` for fewer than two values, which show no spread.
    """
    from scipy import stats

    if len(values) < 2:
        raise ValueError("an interval needs at least two values")
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with its first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def costs(results: Results, spreads: Sequence[str]) -> str:
    """Return a line about the seeds, and the time and memory that the runs took."""
    seeds = len({result["seed"] for result in results})
    spread = " or ".join(SPREADS[name] for name in dict.fromkeys(spreads))
    cpu, wall, peak = ([float(r[name]) for r in results] for name in ("cpu_s", "wall_s", "peak_gb"))
    return (
        f"Mean and {spread} over {seeds} seeds. Training took {max(cpu):.0f} seconds of one core "
        f"at most for a run, {sum(cpu) / 60:.0f} minutes for all {len(results)}. A run took "
        f"{min(wall) / 60:.1f} to {max(wall) / 60:.1f} minutes and at most {max(peak):.1f} GB.\n"
    )


def insert(page: Path, text: str, markers: tuple[str, str] = MARKERS) -> None:
    """Put the tables between the page's markers; `ValueError` if it lacks them."""
    old = page.read_text("utf-8")
    first, last = markers
    if old.count(first) != 1 or old.count(last) != 1:
        raise ValueError(f"{page}: expected one line {first} and one line {last}")
    before, _, rest = old.partition(first)
    after = rest.partition(last)[2]
    page.write_text(f"{before}{first}\n\n{text}\n{last}{after}", encoding="utf-8")
