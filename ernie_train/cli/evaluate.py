"""The verb `eval`: solve problems of the user's, print a table, write results and samples."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ernie_train import __version__
from ernie_train.cli.model import best_checkpoint, engine_at, open_model
from ernie_train.core.config import parse_config
from ernie_train.core.errors import UserError
from ernie_train.core.signals import StopFlag
from ernie_train.core.terminal import progress_bar
from ernie_train.data import Column, Columns
from ernie_train.environments import EnvironmentConfig, open_toolbox
from ernie_train.eval.evaluation import EvalConfig, Evaluation, evaluate
from ernie_train.eval.measured import measured, require_scores
from ernie_train.eval.problems import load_problems
from ernie_train.eval.prompts import load_few_shot, require_episodes
from ernie_train.io.files import FileDigest, write_directory, write_json, write_jsonl
from ernie_train.io.outputs import check_output_directory
from ernie_train.run.render import evaluation_table

FORMAT = "ernie_train.evaluation/1"  # of results.json; docs/evaluation.md describes it
RESULTS, SAMPLES = "results.json", "samples.jsonl"


@dataclass(frozen=True)
class EvalCommand:
    """Arguments of the verb `eval`."""

    model: Path
    best: bool
    data: Path
    columns: Columns | None
    max_bad_fraction: float
    tasks: list[str]
    max_examples: int | None
    few_shot: Path | None
    shots: int | None
    config: EvalConfig
    environment: EnvironmentConfig | None
    engine: str | None  # URL of a server that samples
    out: Path | None
    force: bool

    def run(self, console: Console, progress: Console, *, as_json: bool = False) -> None:
        """Print the table, or the results as JSON; write results and samples to `out`, if given.

        Raises `DataError`, or `ErnieTrainError`, behind all that if nothing could be scored.
        """
        self._check()
        problems = load_problems(
            self.data,
            tasks=self.tasks,
            max_examples=self.max_examples,
            max_bad_fraction=self.max_bad_fraction,
            columns=self.columns,
        )
        examples = None
        if self.few_shot is not None and self.shots is not None:
            examples = load_few_shot(
                self.few_shot, self.shots, self.config.seed, self.columns, self.max_bad_fraction
            )
        path = best_checkpoint(self.model) if self.best else self.model
        model, tokenizer = open_model(path)
        with (
            open_toolbox(self.environment, tokenizer, Path.cwd()) as toolbox,
            StopFlag("stopping; nothing is written") as stop,
            engine_at(self.engine, model, tokenizer, lambda: stop.requested) as engine,
        ):
            require_episodes(toolbox, problems)
            found = evaluate(
                model,
                tokenizer,
                problems,
                self.config,
                progress=partial(progress_bar, progress, "problems"),
                few_shot=examples,
                toolbox=toolbox,
                engine=engine,
                stop_requested=lambda: stop.requested,
            )
        results = self._results(path, found)
        console.print(evaluation_table(results))
        if self.out is not None:
            write_directory(self.out, lambda directory: _write(directory, results, found.samples))
        if as_json:
            print(as_text(results))
        require_scores(found.samples)

    def _check(self) -> None:
        config, n = self.config, self.config.samples
        if n > 1 and config.temperature == 0:
            raise UserError(
                f"--n {n} with --temperature 0 would draw the same completion {n} times"
            )
        if wrong := [k for k in config.ks if not 1 <= k <= n]:
            raise UserError(f"--k {wrong[0]}: pass@k needs 1 to --n completions, here {n}")
        if self.out is None and self.force:
            raise UserError("--force replaces what lies at --out: give that, or leave it out")
        if self.out is not None:
            inputs = [path for path in (self.data, self.model, self.few_shot) if path is not None]
            check_output_directory(self.out, RESULTS, inputs=inputs, force=self.force)

    def _results(self, model: Path, found: Evaluation) -> dict[str, Any]:
        columns = {
            key: column.model_dump() if isinstance(column, Column) else column
            for key, column in (self.columns or {}).items()
        }
        settings = asdict(self.config) | {
            "max_new_tokens": self.config.most_new_tokens,
            "k": self.config.ks,
            "tasks": self.tasks,
            "max_examples": self.max_examples,
            "max_bad_fraction": self.max_bad_fraction,
            "few_shot": None if self.few_shot is None else str(self.few_shot),
            "shots": self.shots,
            "environment": self.environment.model_dump() if self.environment else None,
            "engine": self.engine,
        }
        return {
            "format": FORMAT,
            "version": __version__,
            "model": str(model),
            "data": str(self.data),
            "columns": columns,
            "settings": settings,
            "trained": measured(found.to_dict()),
        }


def _write(
    directory: Path, results: dict[str, Any], samples: list[dict[str, Any]]
) -> dict[str, FileDigest]:
    write_json(directory / RESULTS, results)
    write_jsonl(directory / SAMPLES, samples)
    return {}


def parse_tools(text: str, max_turns: int, max_new_tokens: int) -> EnvironmentConfig:
    """Return the environment of a text such as `calculator,lookup,my_tools.py`.

    A result of a tool may take half of the tokens of an episode, and 256 at most. Raises
    `UserError` for a tool that there is none of.
    """
    names = [name.strip() for name in text.split(",")]
    values = {
        "tools": [{"python": name} if name.endswith(".py") else name for name in names],
        "max_turns": max_turns,
        "max_tool_tokens": max(1, min(256, max_new_tokens // 2)),
    }
    return parse_config(EnvironmentConfig, values, "--tools")


def parse_ks(text: str) -> tuple[int, ...]:
    """Return the sizes in a text such as `1,8`; raises `UserError` if it holds anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--k {text!r}: it must be sizes such as 1,8") from None


def as_text(results: dict[str, Any]) -> str:
    """Return results as JSON text for the standard output, without control characters."""
    return json.dumps(results, indent=2).replace("\x7f", "\\u007f")  # DEL is ASCII, and stays
