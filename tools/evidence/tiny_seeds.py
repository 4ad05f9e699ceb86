"""Runs recipes/tiny.yaml with several seeds, and SFT alone for the same time: README's table.

    python -m tools.evidence.tiny_seeds --out runs/tiny-seeds [--jobs 2]

The control goes on from the same SFT checkpoint, on the same rows, for as many seconds as the RL
stages took. Prints the tables and writes table.md and results.json. It may be stopped at any time;
started again it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_train.core.config import load_yaml
from ernie_train.io.metrics_log import read_metrics
from ernie_train.io.run_dir import read_done
from tools.evidence.ablations import (
    ROOT,
    Arm,
    markdown_table,
    mean_and_interval,
    mean_and_spread,
    result_of,
    results_of,
    stop_on_sigterm,
)

RECIPE = "recipes/tiny.yaml"
SFT, CONTROL = "sft", "SFT continued"
# What each RL stage trains on.
DOMAINS = {
    "rl-logic": ("logic",),
    "rl-math-code": ("math", "code"),
    "rl-general": ("science", "tools"),
}
# Without its gates, so that the table does not leave out the seeds that miss one.
PIPELINE = Arm("pipeline", tuple(f"stages.{stage}.gate=null" for stage in DOMAINS))
Results = Sequence[Mapping[str, Any]]


def stage_directories(run_dir: Path) -> dict[str, Path]:
    """The directory of each stage, in order: runs/tiny/01-sft is that of `sft`."""
    return {path.name[3:]: path for path in sorted(run_dir.glob("[0-9][0-9]-*"))}


def accuracies(evaluation: Path) -> dict[str, float]:
    """Percent solved of each task and domain, and their mean over tasks, as a run wrote them."""
    found = json.loads(evaluation.read_text("utf-8"))["trained"]
    told = {task["task"]: task["accuracy"] for task in found["tasks"]}
    told |= {domain: values["accuracy"] for domain, values in found["domains"].items()}
    return {name: 100 * value for name, value in {**told, "mean": found["mean_accuracy"]}.items()}


def stage_seconds(directory: Path) -> float:
    return sum(row["time"]["seconds"] for row in read_metrics(directory / "metrics.jsonl"))


def measure(run_dir: Path) -> dict[str, Any]:
    """What a finished pipeline shows after each stage, and the seconds that each stage trained."""
    stages = stage_directories(run_dir)
    return {
        "solved": {name: accuracies(path / "evaluation.json") for name, path in stages.items()},
        "seconds": {name: stage_seconds(path) for name, path in stages.items()},
    }


def control_arm(run_dir: Path, result: Mapping[str, Any]) -> Arm:
    """SFT that goes on from a pipeline's SFT, for the seconds of its RL stages."""
    sft = load_yaml(ROOT / RECIPE)["stages"][0]
    seconds = result["seconds"]
    rest = sum(seconds[stage] for stage in DOMAINS)
    steps = max(1, round(sft["steps"] * rest / seconds[SFT]))
    directory = stage_directories(run_dir)[SFT]
    done = read_done(directory)
    if done is None:
        raise ValueError(f"{directory} is not finished")
    start = directory / "checkpoints" / done.result["checkpoint"]
    # A warm restart from half the rate: the checkpoint stands at the end of a cosine.
    optim = {**sft["optim"], "lr": sft["optim"]["lr"] / 2}
    again = {**sft, "steps": steps, "optim": optim}
    return Arm(
        "control",
        (f"model={json.dumps({'path': str(start)})}", f"stages=[{json.dumps(again)}]",
         "evaluation.untrained_examples=0"),
    )  # fmt: skip


def measure_control(run_dir: Path) -> dict[str, Any]:
    return {"solved": {CONTROL: accuracies(run_dir / "evaluation.json")}}


def solved(results: Results, stage: str, name: str) -> list[float]:
    """Percent solved after a stage, one for each seed."""
    return [result["solved"][stage][name] for result in results]


def lifts(results: Results, stage: str, name: str) -> list[float]:
    """Points that a stage added to what the one before it left, one for each seed."""
    stages = [SFT, *DOMAINS]
    before = stages[stages.index(stage) - 1]
    after = zip(solved(results, stage, name), solved(results, before, name), strict=True)
    return [now - was for now, was in after]


def table(results: Results, controls: Results) -> str:
    """Percent solved after each stage, task by task: mean and standard deviation over the seeds."""
    own = [domain for domains in DOMAINS.values() for domain in domains]
    names = [name for name in results[0]["solved"][SFT] if name not in own]
    rows = []
    for name in names:
        cells = [mean_and_spread(solved(results, stage, name), 1) for stage in [SFT, *DOMAINS]]
        rows.append([f"`{name}`", *cells, mean_and_spread(solved(controls, CONTROL, name), 1)])
    return markdown_table(["task", "SFT", *DOMAINS, CONTROL], rows)


def changes(before: Sequence[float], after: Sequence[float]) -> str:
    """The points between two stages: mean and 95 % interval over the seeds."""
    return mean_and_interval([b - a for a, b in zip(before, after, strict=True)], 1)


def lift_table(results: Results, controls: Results) -> str:
    """What each RL stage added to its own domains, what was kept of it, and what SFT adds."""
    last, rows = list(DOMAINS)[-1], []
    for stage, domains in DOMAINS.items():
        for domain in domains:
            start, end = solved(results, SFT, domain), solved(results, last, domain)
            rows.append([
                domain, stage, mean_and_interval(lifts(results, stage, domain), 1),
                "" if stage == last else changes(solved(results, stage, domain), end),
                changes(start, end), changes(start, solved(controls, CONTROL, domain)),
            ])  # fmt: skip
    by = ["added by it", "added by later stages", "in all, over SFT", "added by more SFT"]
    return markdown_table(["domain", "trained in", *by], rows)


def run(options: argparse.Namespace) -> None:
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = results_of(RECIPE, [PIPELINE], options.seeds, out, measure, jobs=options.jobs)
    controls = []
    for result in results:
        seed = result["seed"]
        arm = control_arm(out / f"pipeline-seed{seed}", result)
        directory = out / f"control-seed{seed}"
        controls.append(result_of(RECIPE, arm, seed, directory, measure_control))
    seconds = [result["wall_s"] for result in results]
    peak = max(result["peak_gb"] for result in results)
    text = (
        f"{table(results, controls)}\n{lift_table(results, controls)}\n"
        f"A run on one thread, {options.jobs} at a time: {min(seconds) / 60:.1f} to "
        f"{max(seconds) / 60:.1f} minutes, at most {peak:.1f} GB.\n"
    )
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    stop_on_sigterm()
    try:
        run(parser.parse_args(arguments))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")


if __name__ == "__main__":
    main()
