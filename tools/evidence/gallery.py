"""Make docs/gallery.md: each shipped recipe with the curve, time and memory of a real run.

    python -m tools.evidence.gallery --run balance ...   runs small recipes, then takes them in
    python -m tools.evidence.gallery RUN_DIR...          takes finished or stopped runs in
    python -m tools.evidence.gallery                     plans anew, and writes the page

What a run gave is kept in docs/gallery.json (its name is that of its recipe), its curves in
docs/images/gallery/. For recipes of GPUs the page has what `ernie-train plan` says.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from ernie_train.core.config import load_yaml
from ernie_train.core.cpu import __version__
from ernie_train.core.foreign_files import read_json
from ernie_train.io.files import write_json
from tools.evidence.plots import running_mean
from tools.evidence.runs import ROOT, SPENT, train

PAGE, KEPT = ROOT / "docs/gallery.md", ROOT / "docs/gallery.json"
IMAGES = ROOT / "docs/images/gallery"
RUNS = ROOT / "runs/gallery"
RECIPES = ROOT / "recipes"
NEEDLES = "python -m tools.data.make_needles --out runs/needles"
# Commands that make what a recipe reads, and those in place of a plain run.
BEFORE = {"long_context": NEEDLES}
INSTEAD = {
    "ernie-21b-a3b-sft": "ernie-train run ernie-21b-a3b-sft --nproc 8",
    "ernie-21b-a3b-prl": "ernie-train run ernie-21b-a3b-prl --nproc 8",
}
ELSEWHERE = {
    "tiny": ("tiny.md", "held-out problems after each stage"),
    "sft": ("worked_steps.md", "held-out problems with and without worked steps"),
    "tools": ("tools.md", "what demonstrations and RL reach"),
    "balance": ("balance.md", "each term beside the others"),
    "long_context": ("long_context.md", "three seeds, found facts by length"),
    "own_model": ("own_model.md", "a real model of 135 M parameters, losses beside `peft`"),
}
COLOURS = 64
SMOOTHED = 15  # steps in the running mean of a loss


# ---- what a run gave -----------------------------------------------------------------------------


def metrics_files(run_dir: Path) -> list[Path]:
    """Return the metrics of the stages in their order, without those of stages set aside."""
    found = sorted(run_dir.glob("[0-9][0-9]-*/metrics.jsonl"))
    return [file for file in found if ".before-" not in file.parent.name]


def stage_curves(run_dir: Path) -> Iterator[tuple[str, str, list[float]]]:
    """Yield stage, name and values of the curve to look at: rewards of RL, else the loss."""
    for file in metrics_files(run_dir):
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        name = next((one for one in ("reward", "loss") if any(one in row for row in rows)), None)
        if name is not None:
            yield file.parent.name[3:], name, [row[name] for row in rows if name in row]


def figures_of(run_dir: Path) -> dict[str, Any]:
    """Return what the page says of a run; raises `SystemExit` for a directory that is none."""
    if not (run_dir / "recipe.yaml").exists():
        raise SystemExit(f"{run_dir}: no run directory")
    environment = read_json(run_dir / "environment.json")
    stages = {}
    for stage, name, values in stage_curves(run_dir):
        ends = sorted((run_dir).glob(f"[0-9][0-9]-{stage}/DONE"))
        smooth = running_mean(values, SMOOTHED)
        stages[stage] = {
            "curve": name, "first": values[0], "last": smooth[-1],
            "points": len(values), "done": bool(ends),
        }  # fmt: skip
    spent = read_json(run_dir / SPENT) if (run_dir / SPENT).exists() else {}
    evaluation = {}
    if (run_dir / "evaluation.json").exists():
        solved = read_json(run_dir / "evaluation.json")["trained"]
        evaluation = {"mean_accuracy": solved["mean_accuracy"], "tasks": len(solved["tasks"])}
    return {
        "stages": stages,
        "cpu_s": spent.get("cpu_s") or _seconds(run_dir),
        "measured": "cpu" if spent else "wall",
        "peak_gb": spent.get("peak_gb"),
        "evaluation": evaluation,
        "version": environment.get("ernie_train", __version__),
        "commit": environment.get("code", {}).get("commit"),
    }


def _seconds(run_dir: Path) -> float:
    """Return the seconds between the first and the last step of all stages."""
    times = [
        json.loads(line)["time"]["unix_s"]
        for file in metrics_files(run_dir)
        for line in file.read_text("utf-8").splitlines()
    ]
    return max(times) - min(times) if times else 0.0


def draw(run_dir: Path, file: Path) -> None:
    """Draw the curve of each stage beside each other."""
    curves = list(stage_curves(run_dir))
    figure = Figure(figsize=(2.6 * max(len(curves), 2), 2.2), dpi=90, layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (stage, name, values) in zip(panels, curves, strict=True):
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color="#9db8d8", linewidth=0.7)
        axes.plot(steps, running_mean(values, SMOOTHED), color="#1f4e8c", linewidth=1.4)
        axes.set_title(stage, fontsize=9)
        axes.set_xlabel("iteration" if name == "reward" else "step", fontsize=8)
        axes.set_ylabel(name, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_ylim(0, None)
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    figure.savefig(stream)
    image = Image.open(stream).convert("RGB").quantize(COLOURS)
    image.save(file, optimize=True)


# ---- the page ------------------------------------------------------------------------------------

HEAD = """\
# Gallery of recipes

The recipes that come with the package, with the command that runs each. `ernie-train run NAME`
works outside a checkout too; `python -m tools...` needs one. Curves and figures are those of one
run on a CPU: `python -m tools.evidence.gallery --run NAME` makes them again, and
`python -m tools.evidence.gallery RUN_DIR` takes those of an existing run. Dark lines are running
means of 15 steps. What to watch in training: [report.md](report.md).
"""


def render(kept: dict[str, Any]) -> str:
    """Return the page."""
    paths = sorted(RECIPES.glob("*.yaml"), key=lambda path: (path.stem != "tiny", path.stem))
    return "\n".join([HEAD, *(_entry(path, kept) for path in paths)])


def first_sentence(recipe: Path) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    lines = recipe.read_text("utf-8").splitlines()[1:]  # behind the schema's line
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return re.split(r"(?<=\w)[.:](?:\s|$)", " ".join(comment), maxsplit=1)[0] + "."


def _entry(path: Path, kept: dict[str, Any]) -> str:
    name, recipe = path.stem, load_yaml(path)
    found, plans = kept["runs"].get(name), kept["plans"]
    stages = ", ".join(f"`{one['name']}` ({one['kind']})" for one in recipe["stages"])
    commands = [BEFORE[name]] if name in BEFORE else []
    commands.append(INSTEAD.get(name, f"ernie-train run {name}"))
    text = [f"## {name}", "", first_sentence(path), "", f"Stages: {stages}.", ""]
    if found is not None:
        text += [f"![curves of {name}](images/gallery/{name}.png)", "", _measured(found), ""]
    elif name in plans:
        text += [_planned_with(kept["planned_with"]), ""]
        text += [*(f"- {line}" for line in plans.get(name, [])), ""]
        commands = [f"ernie-train plan {name} --gpus 8 --gpu-memory-gb 80", *commands]
    if name in ELSEWHERE:
        page, what = ELSEWHERE[name]
        text += [f"More: [{page}]({page}) ({what}).", ""]
    mark = "<!-- checked: minutes to hours of a machine -->"
    return "\n".join([*text, mark, "```bash", *commands, "```", ""])


def _planned_with(version: str) -> str:
    other = "" if version == __version__ else f"ernie_train {version}, before {__version__}; "
    return f"**Planned, never run.** What `plan` computes ({other}[scaling.md](scaling.md)):"


def _measured(found: dict[str, Any]) -> str:
    parts = []
    for stage, one in found["stages"].items():
        unfinished = "" if one["done"] else f", stopped after {one['points']}"
        ends = f"{one['first']:.2f} to {one['last']:.2f}"
        parts.append(f"{one['curve']} of `{stage}` {ends}{unfinished}")
    clock = "of one core" if found["measured"] == "cpu" else "by the clock"
    said = f"{'; '.join(parts)}. {timedelta(seconds=round(found['cpu_s']))} (h:mm:ss) {clock}"
    if found["peak_gb"]:
        said += f", {found['peak_gb']:.1f} GB at most"
    if found["evaluation"]:
        solved = found["evaluation"]
        said += f"; {100 * solved['mean_accuracy']:.1f} % of held-out problems solved"
        said += f", mean over {solved['tasks']} tasks"
    commit = f" at {found['commit'][:7]}" if found["commit"] else ""
    commit += f", before {__version__}" if found["version"] != __version__ else ""
    said = said[0].upper() + said[1:]
    return f"{said} (ernie_train {found['version']}{commit})."


def planned(name: str) -> list[str]:
    """Return what `plan` says of a recipe of GPUs: memory, time, and what else fits."""
    command = ["-m", "ernie_train", "plan", f"recipes/{name}.yaml"]
    command += ["--gpus", "8", "--gpu-memory-gb", "80"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "400"},
        capture_output=True,
        text=True,
        check=True,
    )
    kept = ("model: 21", "the recipe's own", "it fits")
    return [line.strip() for line in done.stdout.splitlines() if line.startswith(kept)]


def main() -> None:
    """Run recipes if asked, take runs in, write pictures and page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", nargs="+", default=[], metavar="NAME")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR")
    options = parser.parse_args()
    for name in options.run:
        train(f"recipes/{name}.yaml", [], RUNS / name)
    nothing: dict[str, Any] = {"runs": {}, "plans": {}, "planned_with": __version__}
    kept = read_json(KEPT) if KEPT.exists() else nothing
    for run_dir in [*options.runs, *(RUNS / name for name in options.run)]:
        found = figures_of(run_dir)
        name = load_yaml(run_dir / "recipe.yaml")["name"]
        name = name if (RECIPES / f"{name}.yaml").exists() else run_dir.name
        if not (RECIPES / f"{name}.yaml").exists():
            raise SystemExit(f"{run_dir}: no shipped recipe is called {name}")
        draw(run_dir, IMAGES / f"{name}.png")
        kept["runs"][name] = found
    if not (options.runs or options.run):
        gpu = [one.stem for one in RECIPES.glob("*.yaml") if load_yaml(one).get("device") == "gpu"]
        kept["plans"] = {name: planned(name) for name in sorted(gpu)}
        kept["planned_with"] = __version__
    kept["runs"] = dict(sorted(kept["runs"].items()))
    write_json(KEPT, kept)
    PAGE.write_text(render(kept), "utf-8")


if __name__ == "__main__":
    main()
