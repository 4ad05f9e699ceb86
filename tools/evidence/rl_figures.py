"""Tables and plots of the RL ablation, from the results of its runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.evidence.ablations import interval, markdown_table, mean_and_interval, values_of
from tools.evidence.rl_arms import LOOSE

Results = Sequence[Mapping[str, Any]]

TITLES = {
    "sft": "more SFT",
    "group": "group-relative policy gradient",
    "ppo": "PPO with a critic",
    "kl": "group-relative with KL in the loss",  # with the exploitable reward only
    "dpo": "DPO on the start's pairs",
    "dpo-slow": "the same at a quarter of the rate",
    "upo-online": "UPO, online pairs",
    "upo-offline": "UPO, offline pairs",
    "random": "random rewards",
}
BASE = "group"  # what the others are compared with, seed by seed
COLORS = dict(zip(TITLES, ("C7", "C0", "C1", "C8", "C2", "C6", "C3", "C4", "C5"), strict=True))
# Column -> (key of a result, factor, digits).
DISTANCE = {
    "KL a completion": ("kl_completion", 1, 2),
    "KL a token": ("kl_token", 1, 3),
    "entropy": ("entropy", 1, 3),
    "tokens": ("length", 1, 1),
    "elsewhere": ("elsewhere", 100, 1),
}
LOOSE_COLUMNS = {
    "paid for": ("loose", 100, 1),
    "solved": ("accuracy", 100, 1),
    "tokens, greedy": ("greedy_length", 1, 1),
    "cut off": ("greedy_truncated", 100, 1),
    "KL a completion": ("kl_completion", 1, 2),
    "entropy": ("entropy", 1, 3),
}
SMOOTHED = 5  # iterations in the running mean of the curves
MARKERS = ("<!-- tables of tools/evidence/ablate_rl.py -->", "<!-- end of the tables -->")


def title(arm: str) -> str:
    return TITLES[arm.removeprefix(LOOSE)]


def arms_of(results: Results, *, loose: bool) -> list[str]:
    """The arms of one of the two comparisons, in the order of the titles."""
    prefix = LOOSE if loose else ""
    found = {str(result["arm"]) for result in results}
    return [prefix + name for name in TITLES if prefix + name in found]


def comparison_table(results: Results, start: Mapping[str, Any]) -> str:
    """Held-out accuracy in %, its gain over the start and over the base arm, and the distances."""
    cells = [f"{scale * start[key]:.{n}f}" for key, scale, n in DISTANCE.values()]
    rows = [["the start", f"{100 * start['accuracy']:.1f}", "", "", *cells]]
    arms = arms_of(results, loose=False)
    for arm in arms:
        solved = [100 * value for value in values_of(results, arm, "accuracy")]
        gains = [value - 100 * start["accuracy"] for value in solved]
        against = ""
        if BASE in arms and arm != BASE:
            base = values_of(results, BASE, "accuracy")
            gaps = [a - 100 * b for a, b in zip(solved, base, strict=True)]
            against = mean_and_interval(gaps, 1)
        cells = _cells(results, arm, DISTANCE)
        rows.append(
            [title(arm), mean_and_interval(solved, 1), mean_and_interval(gains, 1), against, *cells]
        )
    return markdown_table(["arm", "solved", "gain", f"against {title(BASE)}", *DISTANCE], rows)


def task_table(results: Results, start: Mapping[str, Any]) -> str:
    """Accuracy in % of every task."""
    keys = [key for key in start if key.startswith("accuracy/")]
    rows = [["the start", *(f"{100 * start[key]:.1f}" for key in keys)]]
    columns = {key: (key, 100, 1) for key in keys}
    for arm in arms_of(results, loose=False):
        rows.append([title(arm), *_cells(results, arm, columns)])
    return markdown_table(["arm", *(key.partition("/")[2] for key in keys)], rows)


def hacking_table(results: Results, start: Mapping[str, Any]) -> str:
    """What the exploitable reward pays for and what is solved, of the greedy completions."""
    cells = [f"{scale * start[key]:.{n}f}" for key, scale, n in LOOSE_COLUMNS.values()]
    rows = [["the start", *cells]]
    for arm in arms_of(results, loose=True):
        rows.append([title(arm), *_cells(results, arm, LOOSE_COLUMNS)])
    return markdown_table(["arm", *LOOSE_COLUMNS], rows)


def _cells(results: Results, arm: str, columns: Mapping[str, tuple[str, int, int]]) -> list[str]:
    return [
        mean_and_interval([scale * value for value in values_of(results, arm, key)], digits)
        for key, scale, digits in columns.values()
    ]


def tables(results: Results, starts: Mapping[str, Mapping[str, Any]]) -> str:
    """All tables with the line that belongs to each; `starts` are `verifier` and `loose`."""
    seeds = len({result["seed"] for result in results})
    longest = max(float(result["cpu_s"]) for result in results)
    total = sum(float(result["cpu_s"]) for result in results) / 60
    return "\n".join(
        [
            comparison_table(results, starts["verifier"]),
            task_table(results, starts["verifier"]),
            "With the exploitable reward, on its three tasks:\n",
            hacking_table(results, starts["loose"]),
            f"Mean and 95 % confidence interval over {seeds} seeds. Training took {longest:.0f} "
            f"seconds of one core at most for a run, {total:.0f} minutes for all {len(results)}.\n",
        ]
    )


def insert(page: Path, text: str) -> None:
    """Puts the tables between the page's markers; `ValueError` where it lacks them."""
    old = page.read_text("utf-8")
    first, last = MARKERS
    if old.count(first) != 1 or old.count(last) != 1:
        raise ValueError(f"{page}: expected one line {first} and one line {last}")
    before, _, rest = old.partition(first)
    after = rest.partition(last)[2]
    page.write_text(f"{before}{first}\n\n{text}\n{last}{after}", encoding="utf-8")


# ---- plots ---------------------------------------------------------------------------------------


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and those before it, `width` of them at most."""
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def plot_comparison(results: Results, start: Mapping[str, Any], file: Path) -> None:
    """Left, accuracy of every arm with its interval; right, each run's accuracy over its KL."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), dpi=90, layout="constrained")
    arms = arms_of(results, loose=False)
    for place, arm in enumerate(arms):
        solved = [100 * value for value in values_of(results, arm, "accuracy")]
        mean = statistics.fmean(solved)
        half = interval(solved) if len(solved) > 1 else 0.0
        left.errorbar([mean], [place], xerr=[half], fmt="o", color=COLORS[arm], capsize=3)
        left.plot(solved, [place + 0.22] * len(solved), "|", color=COLORS[arm], alpha=0.6)
        distances = values_of(results, arm, "kl_completion")
        right.plot(distances, solved, "o", color=COLORS[arm], markersize=4, label=title(arm))
    for line in (left.axvline, right.axhline):
        line(100 * start["accuracy"], color="gray", linewidth=0.8, linestyle=":")
    left.set_yticks(range(len(arms)), [title(arm) for arm in arms], fontsize=8)
    left.invert_yaxis()
    left.set(xlabel="held-out problems solved, %")
    right.set(xlabel="KL to the start, nats a completion", ylabel="solved, %")
    figure.savefig(file)
    pyplot.close(figure)


def plot_hacking(results: Results, file: Path) -> None:
    """What training saw with the exploitable reward: what was paid for and what was solved."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        1, 3, figsize=(9, 3.2), dpi=90, layout="constrained", sharex=True
    )
    names = {"reward": "paid for, %", "solved": "solved, %", "length": "tokens a completion"}
    for arm in arms_of(results, loose=True):
        runs = [result["curves"] for result in results if result["arm"] == arm]
        for axis, name in zip(axes, names, strict=True):
            scale = 1 if name == "length" else 100
            curve = [
                scale * statistics.fmean(values)
                for values in zip(*(run[name] for run in runs), strict=True)
            ]
            color = COLORS[arm.removeprefix(LOOSE)]
            smooth = running_mean(curve, SMOOTHED)
            axis.plot(range(1, len(curve) + 1), smooth, color=color, label=title(arm))
    for axis, label in zip(axes, names.values(), strict=True):
        axis.set(xlabel="iteration", title=label, ylim=(0, None))
    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=4
    )
    figure.savefig(file)
    pyplot.close(figure)
