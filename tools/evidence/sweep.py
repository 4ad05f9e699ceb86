"""Trains every arm of a sweep with every seed, measures it, and writes tables and plots.

    python -m tools.evidence.sweep balance --out runs/balance [--images docs/images] [--jobs 2]

The first argument is a file, or the name of one in `tools/evidence/sweeps`: a recipe, arms (named
overrides of it), seeds, a measurement (`measure.py`), tables and plots. Its own keys are overridden
like a recipe's: `seeds=[1]`. Writes table.md, results.json and the plots into --out.

A sweep may name learning rates to choose between: each arm is then tried with each of its rates
first, and goes on with the one that its `best` figure is highest for. What `fresh` makes, such as
test problems, is made after that choice.

A finished run leaves `result.json` in its directory and is not repeated, an interrupted one
continues, so a sweep may be stopped and started again at any time. Results of other settings are
refused, never mixed. `--with` takes the results.json of other seeds, as other machines made them,
into the tables; `--keep` adds seeds to those that a directory holds of earlier days, which are not
repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from pydantic import model_validator

from ernie_train.core.config import StrictConfig, apply_overrides, load_yaml, parse_config
from ernie_train.core.errors import ErnieTrainError
from tools.evidence import kept, prepare
from tools.evidence.kept import SETTINGS, Result, Task
from tools.evidence.plots import Comparison, Curves
from tools.evidence.runs import (
    ROOT,
    run_program,
    stop_on_sigterm,
    stop_programs,
    train,
    write_json,
)
from tools.evidence.tables import Table, costs, insert

SWEEPS = Path(__file__).resolve().parent / "sweeps"
RESULT = "result.json"


class Step(StrictConfig):
    """A function by its name, and its keyword arguments."""

    name: str
    options: dict[str, Any] = {}


class Derived(StrictConfig):
    """An arm whose overrides a function of `prepare.py` takes from the same seed of another arm."""

    arm: str
    by: str


class Rates(StrictConfig):
    """Learning rates of each arm, and the short trials that choose one of them.

    An arm may name another arm instead, whose rate it takes. Trials have a seed of their own and
    the overrides of `trial` after those of the arm. `chosen` has what they found once; `null` tries
    all of it anew.
    """

    key: str = "stages.rl.optim.lr"
    arms: dict[str, list[float] | str]
    chosen: dict[str, float] | None = None
    trial_seed: int
    trial: dict[str, Any] = {}
    measure: Step
    best: str

    @model_validator(mode="after")
    def _chosen_are_candidates(self) -> Rates:
        if self.chosen is not None:
            tried = self.candidates()
            if self.chosen.keys() != tried.keys():
                raise ValueError("chosen must have a rate for each arm that has a list of them")
            if wrong := [arm for arm, rate in self.chosen.items() if rate not in tried[arm]]:
                raise ValueError(f"chosen: not among the rates of the arm: {', '.join(wrong)}")
        return self

    def candidates(self) -> dict[str, list[float]]:
        """Return the rates of the arms that are tried."""
        return {arm: rates for arm, rates in self.arms.items() if isinstance(rates, list)}

    def of_all(self, chosen: Mapping[str, float]) -> dict[str, float]:
        """Return the rates of the arms that were tried, and of those that take another's."""
        named = {arm: other for arm, other in self.arms.items() if isinstance(other, str)}
        return {**chosen, **{arm: chosen[other] for arm, other in named.items()}}


class Sweep(StrictConfig):
    """A sweep file. In values of `shared`, `arms` and options `{out}` is the output directory."""

    recipe: str
    seeds: list[int]
    prepare: Step | None = None  # makes data or a start before the first run
    measure: Step
    shared: dict[str, Any] = {}  # overrides of all arms but the derived, before their own
    arms: dict[str, dict[str, Any]]
    derived: dict[str, Derived] = {}
    some_seeds: dict[str, list[int]] = {}  # of arms that do not take all
    rates: Rates | None = None  # chosen before the runs
    fresh: Step | None = None  # makes what no choice may have seen; measures the starts on it
    overrides: list[str] = []  # the same after their own, for trials
    tables: list[Table]
    plots: dict[str, Curves | Comparison] = {}

    def overrides_of(self, arm: str, out: Path) -> list[str]:
        """Return the overrides of an arm that is not derived; JSON is YAML."""
        settings = {**self.shared, **self.arms[arm]}
        values = {key: json.dumps(value) for key, value in settings.items()}
        own = [f"{key}={value}".replace("{out}", str(out)) for key, value in values.items()]
        return [*own, *self.overrides]


def load_sweep(name: str, overrides: Sequence[str] = ()) -> Sweep:
    """Return a sweep by its file, or by its name in `sweeps/`.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    path = Path(name) if name.endswith(".yaml") else SWEEPS / f"{name}.yaml"
    return parse_config(Sweep, apply_overrides(load_yaml(path), overrides), str(path))


def claim(sweep: Sweep, out: Path) -> None:
    """Note in `out` what all runs share, or end the program if it holds results of other settings.

    Arms and seeds may differ: what they are is noted in each result.
    """
    recipes = [sweep.recipe]
    if sweep.prepare:
        recipes += prepare.RECIPES.get(sweep.prepare.name, [])
    shared = {"recipe", "prepare", "measure", "overrides"}
    shared |= {key for key in ("rates", "fresh") if getattr(sweep, key) is not None}
    settings = json.loads(sweep.model_dump_json(include=shared))
    settings["sha256"] = {
        name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in recipes
    }
    file = out / SETTINGS
    if not file.exists():
        write_json(file, settings)
    elif (known := json.loads(file.read_text("utf-8"))) != settings:
        other = [key for key in settings if known.get(key) != settings[key]]
        sys.exit(f"{out} holds results with other {', '.join(other)}; choose another --out")


class Runner:
    """Runs of a sweep in the directory `out`, `jobs` at a time.

    root: what `{out}` stands for, `out` unless given; rates: values of `rates.key` by arm.
    """

    def __init__(
        self,
        sweep: Sweep,
        out: Path,
        jobs: int = 1,
        *,
        root: Path | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.sweep = sweep
        self.out = out
        self.jobs = jobs
        self.root = root or out
        self.rates = rates or {}

    def run_dir(self, arm: str, seed: int) -> Path:
        return self.out / f"{arm}-seed{seed}"

    def results(
        self, arms: Sequence[str], seeds: Sequence[int], done: Collection[Task] = ()
    ) -> list[Result]:
        """Run every arm with every seed, a whole seed after the other, its derived arms last.

        Those that are `done` elsewhere are left out.
        """
        derived = self.sweep.derived
        ordered = sorted(arms, key=lambda arm: arm in derived)
        some = self.sweep.some_seeds
        tasks = [(a, seed) for seed in seeds for a in ordered if seed in some.get(a, seeds)]
        tasks = [task for task in tasks if task not in done]
        results = self._run_all(tasks)
        write_json(self.out / "results.json", results)
        return results

    def _run_all(self, tasks: Sequence[Task]) -> list[Result]:
        found: dict[Task, Result] = {}
        ordered = map(self.result, tasks) if self.jobs == 1 else self._side_by_side(tasks)
        for result in ordered:
            arm, seed = result["arm"], result["seed"]
            found[arm, seed] = result
            print(f"{arm}, seed {seed}: {result['cpu_s']:.0f} s of one core", flush=True)
        return [found[task] for task in tasks]

    def _side_by_side(self, tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield results as they come; the first failure, or Ctrl-C, ends all programs that run.

        Tasks begin in order, but a derived one only after its source: others go before it until
        then, so that no core stands idle.
        """
        waiting, running = list(tasks), dict[Future[Result], Task]()
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while waiting or running:
                    unfinished = {*waiting, *running.values()}
                    ready = [task for task in waiting if self._source(task) not in unfinished]
                    for task in ready[: self.jobs - len(running)]:
                        waiting.remove(task)
                        running[pool.submit(self.result, task)] = task
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        del running[future]
                        yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                while not all(future.done() for future in running):
                    stop_programs()  # again, for one that has not begun yet
                    time.sleep(0.05)
                raise

    def _source(self, task: Task) -> Task | None:
        arm, seed = task
        return (self.sweep.derived[arm].arm, seed) if arm in self.sweep.derived else None

    def result(self, task: Task) -> Result:
        """Train and measure, unless the directory holds the result of these very settings.

        Raises `ValueError` if it holds that of others: a table must not mix them.
        """
        arm, seed = task
        run_dir = self.run_dir(arm, seed)
        overrides = self._overrides(arm, seed)
        identity = {"arm": arm, "seed": seed, "overrides": overrides}
        file = run_dir / RESULT
        if file.exists():
            known: Result = json.loads(file.read_text("utf-8"))
            if {key: known.get(key) for key in identity} != identity:
                raise ValueError(f"{file} is of other settings; choose another --out or delete it")
            return known
        spent = train(self.sweep.recipe, [f"seed={seed}", *overrides], run_dir)
        measure = placed(self.sweep.measure, self.root)
        result = {**identity, **spent, **measured(run_dir, measure)}
        write_json(file, result)
        return result

    def _overrides(self, arm: str, seed: int) -> list[str]:
        derived = self.sweep.derived.get(arm)
        if derived is None:
            overrides = self.sweep.overrides_of(arm, self.root)
        else:
            overrides = prepare.DERIVED[derived.by](self.run_dir(derived.arm, seed))
        if self.sweep.rates is None or arm not in self.rates:
            return overrides
        return [*overrides, f"{self.sweep.rates.key}={self.rates[arm]}"]


def placed(step: Step, out: Path) -> Step:
    """Return a step with `{out}` in its options replaced."""
    text = json.dumps(step.options).replace("{out}", str(out))
    return Step(name=step.name, options=json.loads(text))


def choose_rates(sweep: Sweep, out: Path, jobs: int) -> dict[str, float]:
    """Return the rate of each arm: `chosen`, or the one whose trial has the highest `best` figure.

    Trials are runs of a sweep of their own in `out/rates`, an arm and a rate each; one that derives
    from another arm derives from that arm's first rate. Equal figures give the lower rate. What was
    measured is in `out/rates.json`.
    """
    rates = sweep.rates
    if rates is None:
        return {}
    if rates.chosen is not None:
        return rates.of_all(rates.chosen)
    named = {f"{arm}-at-{r:g}": (arm, r) for arm, rs in rates.candidates().items() for r in rs}
    first = {arm: f"{arm}-at-{rs[0]:g}" for arm, rs in rates.candidates().items()}
    arms: dict[str, dict[str, Any]] = {}
    derived: dict[str, Derived] = {}
    for name, (arm, _) in named.items():
        if arm in sweep.arms:
            arms[name] = {**sweep.arms[arm], **rates.trial}
        else:
            source = sweep.derived[arm]
            derived[name] = Derived(arm=first[source.arm], by=source.by)
    changes = {"arms": arms, "derived": derived, "measure": rates.measure, "some_seeds": {}}
    trials = sweep.model_copy(update=changes)
    directory = out / "rates"
    directory.mkdir(parents=True, exist_ok=True)
    tried = {name: rate for name, (_, rate) in named.items()}
    runner = Runner(trials, directory, jobs, root=out, rates=tried)
    found = runner.results(list(named), [rates.trial_seed])
    figures = {result["arm"]: result[rates.best] for result in found}
    best = {
        arm: max(rs, key=lambda rate: (figures[f"{arm}-at-{rate:g}"], -rate))
        for arm, rs in rates.candidates().items()
    }
    chosen = rates.of_all(best)
    write_json(out / "rates.json", {"best": rates.best, "chosen": chosen, "figures": figures})
    return chosen


def measured(run_dir: Path, step: Step, name: str = "figures.json") -> Result:
    """Return the figures of a run directory, measured in a process of its own."""
    file = run_dir / name
    options = json.dumps(step.options)
    run_program("-m", "tools.evidence.measure", step.name, str(run_dir), str(file), options)
    figures: Result = json.loads(file.read_text("utf-8"))
    return figures


def report(sweep: Sweep, results: Sequence[Result], out: Path, images: Path) -> str:
    """Return the tables and write them into `table.md`, and the plots into `images`."""
    trained = [result for result in results if result["seed"] is not None]
    spent = costs(trained, [table.spread for table in sweep.tables])
    text = "\n".join([*(table.render(results) for table in sweep.tables), spent])
    (out / "table.md").write_text(text, encoding="utf-8")
    images.mkdir(parents=True, exist_ok=True)
    for name, plot in sweep.plots.items():
        plot.draw(results, images / name)
    return text


def run(options: argparse.Namespace) -> None:
    sweep = load_sweep(options.sweep, options.overrides)
    known = [*sweep.arms, *sweep.derived]
    if unknown := [arm for arm in options.arms or () if arm not in known]:
        sys.exit(f"no such arm: {', '.join(unknown)}; there are {', '.join(known)}")
    out: Path = (options.out or Path("runs") / Path(options.sweep).stem).resolve()
    out.mkdir(parents=True, exist_ok=True)
    claim(sweep, out)
    earlier = kept.begin(options.keep, out) if options.keep else []
    starts: prepare.Starts = {}
    if sweep.prepare:
        starts |= prepare.PREPARE[sweep.prepare.name](out, sweep.recipe, **sweep.prepare.options)
    rates = choose_rates(sweep, out, options.jobs)
    if sweep.fresh:
        starts |= prepare.PREPARE[sweep.fresh.name](out, sweep.recipe, **sweep.fresh.options)
    chosen = [arm for arm in known if not options.arms or arm in options.arms]
    runner = Runner(sweep, out, options.jobs, rates=rates)
    done = {(result["arm"], result["seed"]) for result in earlier}
    results = runner.results(chosen, sweep.seeds, done)
    if options.keep:
        results = kept.keep(options.keep, earlier, results, out)
        write_json(out / "results.json", results)
    results = kept.join_results(results, options.results, out)
    begun = [{"arm": name, "seed": None, **figures} for name, figures in starts.items()]
    text = report(sweep, [*begun, *results], out, options.images or out)
    if options.page:
        insert(options.page, text)
    print(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sweep", help="a YAML file, or the name of one in tools/evidence/sweeps")
    parser.add_argument("overrides", nargs="*", help="of the sweep file: key.path=value")
    parser.add_argument("--out", type=Path, help="default: runs/<name of the sweep>")
    parser.add_argument("--images", type=Path, help="where the plots go; --out unless given")
    parser.add_argument("--page", type=Path, help="a page whose tables are replaced")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    parser.add_argument(
        "--with", dest="results", type=Path, nargs="*", default=[], help="results.json of others"
    )
    parser.add_argument(
        "--keep", type=Path, help="a directory whose results of earlier seeds these are added to"
    )
    parser.add_argument("--arms", type=lambda text: text.split(","), help="only these: a,b")
    stop_on_sigterm()
    try:
        run(parser.parse_intermixed_args(arguments))  # overrides may follow options
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues from here")
    except ErnieTrainError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
