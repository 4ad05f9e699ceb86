"""Trains one start further in several ways, several seeds each: docs/rl_ablation.md's figures.

    python -m tools.evidence.ablate_rl --out runs/rl --images docs/images --page docs/rl_ablation.md

Makes rows with verifiers and the start (a short SFT, unless --start names a model directory),
trains every arm of `rl_arms.py` with every seed, and measures what it gave on held-out problems.
Prints the tables, writes them into table.md and between the page's markers; also results.json,
rl_ablation.png, rl_hacking.png. --jobs 2 uses two cores. It may be stopped at any time; the same
command goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_train.io.metrics_log import read_metrics
from tools.evidence import rl_figures
from tools.evidence.ablations import ROOT, results_of, run_program, stop_on_sigterm
from tools.evidence.rl_arms import DOMAIN, LOOSE, LOOSE_DOMAIN, RECIPE, Budget, Place, arms
from tools.evidence.rl_start import START_RECIPE, make_rows, make_start

# Curve of a run -> metric of its RL stage, by iteration.
CURVES = {"reward": "reward", "solved": "reward_part/row", "length": "completions/mean_length"}


@dataclass(frozen=True)
class Yardstick:
    """How policies are measured: against which start, and on how many problems of each task."""

    start: Path
    problems: int

    def read(self, model: Path, file: Path, *, loose: bool) -> dict[str, Any]:
        """The figures of `rl_measure.py`, which are written to `file` once."""
        if not file.exists():
            domains = (LOOSE_DOMAIN,) if loose else (DOMAIN, "--others", LOOSE_DOMAIN)
            options = ("--start", str(self.start), "--problems", str(self.problems))
            told = ("--tasks", *domains, *options, "--out", str(file))
            run_program("-m", "tools.evidence.rl_measure", str(model), *told)
        figures: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return figures

    def result(self, run_dir: Path) -> dict[str, Any]:
        """What a finished run shows: its figures, and its curves where it sampled completions."""
        loose = run_dir.name.startswith(LOOSE)
        figures = self.read(run_dir, run_dir / "figures.json", loose=loose)
        rows = list(read_metrics(run_dir / "01-rl" / "metrics.jsonl"))
        curves = {
            name: [round(row[key], 4) for row in rows if key in row] for name, key in CURVES.items()
        }
        return {**figures, "curves": curves}


def claim(out: Path, options: argparse.Namespace) -> None:
    """Notes in `out` what rows, start and figures are made with; ends the program where it differs.

    They are made once, so that other settings would be mixed with them.
    """
    recipes = {
        name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
        for name in (RECIPE, START_RECIPE)
    }
    settings = {
        "iterations": options.iterations,
        "problems": options.problems,
        "start": options.start and str(options.start.resolve()),
        "start_set": options.start_set,
        "recipes": recipes,
    }
    file = out / "settings.json"
    if not file.exists():
        file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    elif (known := json.loads(file.read_text("utf-8"))) != settings:
        other = [key for key in settings if known.get(key) != settings[key]]
        sys.exit(f"{out} holds results with other {', '.join(other)}; choose another --out")


def run(options: argparse.Namespace) -> None:
    """Everything from rows to plots; what is there already is not made again."""
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    claim(out, options)
    budget = Budget.of_recipe(options.iterations)
    rows = make_rows(out / "rows", budget)
    start = options.start or make_start(out, options.start_set)
    yardstick = Yardstick(start.resolve(), options.problems)
    begun = {
        "verifier": yardstick.read(start, out / "start.json", loose=False),
        "loose": yardstick.read(start, out / "start-loose.json", loose=True),
    }
    known = arms(budget, Place(yardstick.start, rows))
    chosen = [arm for arm in known if not options.arms or arm.name in options.arms]
    results = results_of(RECIPE, chosen, options.seeds, out, yardstick.result, jobs=options.jobs)
    text = rl_figures.tables(results, begun)
    (out / "table.md").write_text(text, encoding="utf-8")
    images: Path = options.images or out
    images.mkdir(parents=True, exist_ok=True)
    rl_figures.plot_comparison(results, begun["verifier"], images / "rl_ablation.png")
    rl_figures.plot_hacking(results, images / "rl_hacking.png")
    if options.page:
        rl_figures.insert(options.page, text)
    print(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/rl"))
    parser.add_argument("--images", type=Path, help="where the plots go; --out unless given")
    parser.add_argument("--page", type=Path, help="a page whose tables are replaced")
    parser.add_argument("--start", type=Path, help="a model directory; else a short SFT makes it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--iterations", type=int, help="other than the recipe's")
    parser.add_argument("--problems", type=int, default=150, help="held-out ones of each task")
    parser.add_argument(
        "--start-set", nargs="+", default=[], help="overrides of the start's recipe"
    )
    stop_on_sigterm()
    try:
        run(parser.parse_args(arguments))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")


if __name__ == "__main__":
    main()
