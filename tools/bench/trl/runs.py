"""Whole runs of both sides in turns: ours by `ernie-train run`, TRL's by `peer.py`.

Each run is a process of its own on `--threads` cores, to which it is bound, and writes a line an
iteration (or step). The first ones warm up and do not count. Besides the seconds that a side states
itself, its processes are watched: processor time, in which other programs on the machine show
least, and memory, as the sum of what its processes hold (shared pages divided among them).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import psutil

from tools.bench.protocol import ROOT
from tools.bench.versus import referee_python

OPTIM = {
    "lr": 1e-5, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8,
    "clip_grad_norm": 1.0,
}  # fmt: skip
SEED = 1
POLL_S = 0.1
POLLS_OF_MEMORY = 5  # from one to the next: it holds up a process of several GB
WARM_UP = 1  # iterations or steps
Line = dict[str, Any]


@dataclass
class Run:
    """One run of a side: its lines after the warm-up, and what was watched while they came."""

    lines: list[Line]
    cpu_seconds: float  # of all its processes, per line
    peak_gb: float
    first: list[Line] = field(default_factory=list)  # those of the warm-up

    def mean(self, read: Any) -> float:
        return statistics.fmean(read(line) for line in self.lines)


class Watch:
    """Processor time and memory of a process and all that it starts."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self.peak_bytes, self._looks = 0, 0

    def look(self) -> float:
        """Take note of the memory at times; return the processor seconds so far."""
        measure = self._looks % POLLS_OF_MEMORY == 0
        self._looks += 1
        seconds, held = 0.0, 0
        for process in [self._root, *self._root.children(recursive=True)]:
            try:
                used = process.cpu_times()
                seconds += used.user + used.system + used.children_user + used.children_system
                held += process.memory_full_info().pss if measure else 0
            except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                continue
        self.peak_bytes = max(self.peak_bytes, held)
        return seconds


def watch_run(command: Sequence[str], environment: dict[str, str], cores: int, lines: Path) -> Run:
    """Run a command on so many cores until it ends; return the lines that it wrote to `lines`.

    Raises `RuntimeError` with its last words if it fails.
    """
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            ["taskset", "--cpu-list", ",".join(map(str, chosen)), *command],
            stdout=said, stderr=said, cwd=ROOT, env={**os.environ, **environment},
        )  # fmt: skip
        watch, used, told = Watch(process.pid), 0.0, 0
        at_warm = at_last = 0.0
        while process.poll() is None:
            used = max(used, watch.look())
            count = lines.read_bytes().count(b"\n") if lines.exists() else 0
            if count > told:
                # What follows the last line does not count: we save a model then, TRL does not.
                at_warm, at_last = used if told < WARM_UP else at_warm, used
                told = count
            time.sleep(POLL_S)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(
                f"{' '.join(command)} ended with {process.returncode}:\n{said.read()[-3000:]}"
            )
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    counted = found[WARM_UP:]
    return Run(counted, (at_last - at_warm) / len(counted), watch.peak_bytes / 1e9, found[:WARM_UP])


class Comparison(ABC):
    """Driver of a comparison; `rl.py` and `sft.py` say what a run is and how sides must agree."""

    kind: str
    # Of options that are not given, by model: a 135M takes minutes where `tiny` takes seconds.
    defaults: ClassVar[dict[str, dict[str, int]]]

    def __init__(self, options: argparse.Namespace, model: str) -> None:
        given = {name: value for name, value in vars(options).items() if value is not None}
        self.options = argparse.Namespace(**{**self.defaults[model], **given})
        self.model = model
        self.directory = Path()  # of this comparison
        self.model_directory = Path(options.model_135m)

    @abstractmethod
    def title(self) -> str: ...

    @abstractmethod
    def write_rows(self) -> None:
        """Write the rows of both sides, `ours.jsonl` and `peer.jsonl`."""

    @abstractmethod
    def stage(self) -> dict[str, Any]:
        """Return the stage of our recipe."""

    @abstractmethod
    def peer_settings(self) -> Iterator[dict[str, Any]]:
        """Yield settings of TRL to choose the fastest of."""

    @abstractmethod
    def peer_request(self) -> dict[str, Any]: ...

    @abstractmethod
    def check(self, ours: Run, peer: Run) -> str:
        """Return in words that both sides did the same; `RuntimeError` if they did not."""

    @abstractmethod
    def phases(self, line: Line, side: str) -> dict[str, float]:
        """Return where the seconds of a line went."""

    def run(self) -> float:
        """Print everything; return the ratio, TRL's seconds / ours."""
        print(f"\n== {self.title()}, float32, {self.options.threads} core(s)", flush=True)
        with tempfile.TemporaryDirectory() as directory:
            self.directory = Path(directory)
            if self.model == "tiny":
                self.model_directory = self.directory / "model"
                export_tiny(self.model_directory)
            self.write_rows()
            setting = self._best_setting()
            print("TRL's best:", setting, flush=True)
            runs: dict[str, list[Run]] = {"ours": [], "TRL": []}
            for number in range(self.options.rounds):
                for side in list(runs)[:: 1 if number % 2 else -1]:
                    runs[side].append(self.run_ours() if side == "ours" else self.run_peer(setting))
            ratio = self._report(runs)
            print(self.check(runs["ours"][0], runs["TRL"][0]), flush=True)
            return ratio

    def _best_setting(self) -> dict[str, Any]:
        best: tuple[float, dict[str, Any]] | None = None
        for setting in self.peer_settings():
            try:
                run = self.run_peer(setting, steps=self.options.trial_steps)
            except RuntimeError as error:
                print(f"  {setting}: not here: {str(error).strip().splitlines()[-1]}", flush=True)
                continue
            seconds = min(line["seconds"] for line in run.lines)
            print(f"  {setting}: {seconds:.2f} s", flush=True)
            best = min(best or (seconds, setting), (seconds, setting), key=lambda found: found[0])
        if best is None:
            raise RuntimeError("no setting of TRL runs here")
        return best[1]

    def run_ours(self) -> Run:
        """Run the recipe as a user does."""
        from ernie_train.core.config import dump_yaml

        with fresh(self.directory / "ours") as directory:
            recipe = {
                "name": self.kind, "seed": SEED,
                "model": {"path": str(self.model_directory)},
                "tokenizer": {"path": str(self.model_directory)},
                "device": "cpu", "stages": [self.stage()],
            }  # fmt: skip
            (directory / "recipe.yaml").write_text(dump_yaml(recipe))
            run_dir = directory / "run"
            command = [sys.executable, "-m", "ernie_train", "run", str(directory / "recipe.yaml")]
            command += ["--run-dir", str(run_dir)]
            lines = run_dir / f"01-{self.kind}" / "metrics.jsonl"
            run = watch_run(command, {}, self.options.threads, lines)
        for line in [*run.first, *run.lines]:
            line["seconds"] = line["time"]["seconds"]
        return run

    def run_peer(self, setting: dict[str, Any], steps: int | None = None) -> Run:
        """Run TRL for so many steps after the warm-up; by default those of a round."""
        threads, counted = self.options.threads, steps or self.options.steps
        with fresh(self.directory / "peer") as directory:
            request = {
                "kind": self.kind, "model": str(self.model_directory),
                "rows": str(self.directory / "peer.jsonl"), "out": str(directory),
                "threads": threads, "optim": OPTIM, "steps": WARM_UP + counted,
                **self.peer_request(), **setting,
            }  # fmt: skip
            (directory / "request.json").write_text(json.dumps(request))
            command = [str(self.options.referee_python), "-m", "tools.bench.trl.peer"]
            command += [str(directory / "request.json")]
            environment = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
            return watch_run(command, environment, threads, directory / "progress.jsonl")

    def _report(self, runs: dict[str, list[Run]]) -> float:
        middles, processor = {}, {}
        for side, made in runs.items():
            seconds = [line["seconds"] for run in made for line in run.lines]
            middles[side] = statistics.median(seconds)
            processor[side] = statistics.median(run.cpu_seconds for run in made)
            parts: dict[str, list[float]] = {}
            for line in (line for run in made for line in run.lines):
                for name, value in self.phases(line, side).items():
                    parts.setdefault(name, []).append(value)
            where = ", ".join(f"{n} {statistics.median(v):.2f}" for n, v in parts.items())
            print(
                f"{side + ':':5} {middles[side]:6.2f} s, median of {len(seconds)} "
                f"(from {min(seconds):.2f} to {max(seconds):.2f}); "
                f"processor {processor[side]:.2f} s; peak {max(r.peak_gb for r in made):.2f} GB"
            )
            print(f"      {where}")
        ratio = middles["TRL"] / middles["ours"]
        print(
            f"ratio TRL / ours: {ratio:.2f} in seconds, "
            f"{processor['TRL'] / processor['ours']:.2f} in processor seconds",
            flush=True,
        )
        return ratio


@contextmanager
def fresh(directory: Path) -> Iterator[Path]:
    """Make a directory that is removed again: a run of 135M leaves 2 GB."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def export_tiny(directory: Path) -> None:
    """Write a random model of the preset `tiny` with the project's tokenizer."""
    from ernie_train.core.devices import seed_everything
    from ernie_train.data import load_tokenizer
    from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
    from ernie_train.weights.saving import save_pretrained

    seed_everything(SEED)
    config = Ernie4_5_MoeConfig.preset("tiny")
    save_pretrained(Ernie4_5_MoeForCausalLM(config), directory)
    load_tokenizer(ROOT / "data" / "tokenizer").save_pretrained(directory)


def describe_machine(referee: Path) -> None:
    """Print processor, kernels of matrix products and versions of both sides."""
    from ernie_train.core import blas, environment

    name = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    instructions = (blas.read_processor().vector_set or ("unknown vectors",))[0]
    ours = environment.installed_versions()
    theirs = ", ".join(versions_in(referee, "torch", "transformers", "trl"))
    print(f"{name}, {instructions}; numpy's products: OpenBLAS {blas.core_in_use()}")
    print(
        f"paddle {ours.get('paddlepaddle')}, numpy {ours['numpy']}; {theirs} (torch's own MKL); "
        f"{len(os.sched_getaffinity(0))} cores"
    )


def versions_in(python: Path, *names: str) -> list[str]:
    """Return names and versions of packages in another interpreter's environment.

    Raises `SystemExit` with the packages that are not there.
    """
    code = (
        "import sys, importlib.metadata as m; found = {d.name: d.version for d in "
        "m.distributions()}; print(*(found.get(name, '-') for name in sys.argv[1:]))"
    )
    command = [str(python), "-c", code, *names]
    versions = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    found = dict(zip(names, versions, strict=True))
    if lacking := [name for name in names if found[name] == "-"]:
        raise SystemExit(
            f"{python} has no {', '.join(lacking)}: pip install -r requirements-referee.txt"
        )
    return [f"{name} {version}" for name, version in found.items()]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that both comparisons have.

    Sizes that are not given are the comparison's `defaults` for the model.
    """
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--model", choices=("tiny", "135m"), help="only this one (default: both)")
    made.add_argument(
        "--model-135m", default="", help="directory of an ERNIE 4.5 model, see `import`"
    )
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--rounds", type=int, help="runs of each side, in turns")
    made.add_argument("--steps", type=int, help="that count, in each run")
    made.add_argument("--trial-steps", type=int, help="that count, of each setting of TRL")
    made.add_argument("--quick", action="store_true", help="try one setting of TRL only")
    made.add_argument("--referee-python", type=Path, default=referee_python())
    return made


def compare(made: argparse.ArgumentParser, comparison: type[Comparison]) -> None:
    """Run the comparison on the models asked for."""
    options = made.parse_args()
    if not options.referee_python.exists():
        made.error(f"no {options.referee_python}: make the referee environment (README)")
    if options.model == "135m" and not options.model_135m:
        made.error("--model 135m needs --model-135m DIRECTORY")
    names = (
        [options.model] if options.model else ["tiny", *(["135m"] if options.model_135m else [])]
    )
    describe_machine(options.referee_python)
    for name in names:
        comparison(options, name).run()
