"""Trains a mixture of 32 experts with and without each balance term: docs/balance.md's figures.

    python -m tools.evidence.ablate_balance --out runs/balance [--images docs/images]

Prints the table and writes table.md, results.json and balance.png. It may be stopped at any time;
started again it goes on where it was.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_train.io.metrics_log import read_metrics
from tools.evidence.ablations import Arm, markdown_table, mean_and_spread, results_of, values_of

RECIPE = "recipes/balance.yaml"
LAST_STEPS = 20  # over which the router's figures are averaged


def _arm(name: str, **balance: float | str) -> Arm:
    return Arm(name, tuple(f"stages.sft.balance.{key}={value}" for key, value in balance.items()))


ARMS = (
    _arm("nothing"),
    _arm("load-balance-1e-2", load_balance_coef=0.01),
    _arm("z-loss-1e-3", z_loss_coef=0.001),
    _arm("bias-1e-3", bias_update_rate=0.001),
    _arm("orthogonal-1e-3", orthogonal_coef=0.001),
    _arm("orthogonal-1", orthogonal_coef=1.0),
    _arm("decoupled-1e-3", orthogonal_coef=0.001, orthogonal_mode="decoupled"),
    _arm("decoupled-1", orthogonal_coef=1.0, orthogonal_mode="decoupled"),
    _arm(
        "bias-1e-3-and-decoupled-1",
        bias_update_rate=0.001,
        orthogonal_coef=1.0,
        orthogonal_mode="decoupled",
    ),
)
# Column -> (key of a result, digits).
COLUMNS = {
    "load CV": ("moe/load_cv", 2),
    "load max/mean": ("moe/load_max", 1),
    "dead experts": ("moe/dead_experts", 1),
    "router entropy": ("moe/router_entropy", 2),
    "router cosine": ("moe/router_cosine", 3),
    "validation loss": ("validation_loss", 3),
}


def measure(run_dir: Path) -> dict[str, Any]:
    """The router's figures, each the mean over the last steps, and the last validation loss.

    Also the load's coefficient of variation after every step, for the plot.
    """
    rows = list(read_metrics(run_dir / "01-sft" / "metrics.jsonl"))
    last = rows[-LAST_STEPS:]
    keys = [key for key, _ in COLUMNS.values() if key.startswith("moe/")]
    return {
        **{key: statistics.fmean(row[key] for row in last) for key in keys},
        "validation_loss": rows[-1]["validation_loss"],
        "load_cv_by_step": [round(row["moe/load_cv"], 4) for row in rows],
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line an arm: mean and standard deviation over the seeds of every column.

    The last column compares seed by seed with the arm without any term: a seed has the same first
    weights and the same batches in every arm.
    """
    rows = []
    without = values_of(results, ARMS[0].name, "validation_loss")
    for arm in ARMS:
        figures = [(values_of(results, arm.name, key), digits) for key, digits in COLUMNS.values()]
        losses = values_of(results, arm.name, "validation_loss")
        figures.append(([a - b for a, b in zip(losses, without, strict=True)], 3))
        rows.append([arm.name, *(mean_and_spread(*figure) for figure in figures)])
    return markdown_table(["arm", *COLUMNS, "against nothing"], rows)


def plot(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Load CV over the steps: the mean over the seeds of each arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), dpi=90, layout="constrained")
    for arm in ARMS:
        curves = [r["load_cv_by_step"] for r in results if r["arm"] == arm.name]
        mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        axes.plot(range(1, len(mean) + 1), mean, label=arm.name, linewidth=1.2)
    axes.set(xlabel="step", ylabel="load CV, mean of the layers", ylim=(0, None))
    figure.legend(fontsize=8, loc="outside right center")
    figure.savefig(file)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/balance"))
    parser.add_argument("--images", type=Path, help="where the plot goes; --out unless given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    results = results_of(RECIPE, ARMS, options.seeds, options.out, measure)
    text = table(results)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    plot(results, (options.images or options.out) / "balance.png")
    print(text)


if __name__ == "__main__":
    main()
