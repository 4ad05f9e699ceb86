"""Evaluate and export a trained model: at the end of a run, and for the verbs eval and export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from ernie_train.core import consensus, devices
from ernie_train.core.signals import StopFlag
from ernie_train.core.terminal import progress_bar
from ernie_train.data import Record, Tokenizer
from ernie_train.environments import open_toolbox
from ernie_train.eval.evaluation import EvalConfig, Evaluation, evaluate
from ernie_train.eval.gates import check_gate
from ernie_train.eval.problems import load_problems
from ernie_train.io.files import fingerprint, write_json, write_jsonl, write_text
from ernie_train.io.run_dir import is_whole_export, read_result
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.run.export import Extras, WeightFormat, export
from ernie_train.run.lineage import Lineage, hash_files
from ernie_train.run.proof import Receipt
from ernie_train.run.quantize import Quantizer
from ernie_train.run.recipe import EvaluationConfig, Recipe
from ernie_train.run.render import evaluation_table, model_card, receipt_line, stage_table

EVALUATION = "evaluation.json"
SAMPLES = "evaluation_samples.jsonl"
EXPORT = "export"
EXPORT_RECORD = "export.json"
_LATER_KEYS = ("samples", "temperature", "k", "few_shot", "shots")  # of an evaluation


@dataclass(frozen=True)
class Finalizer:
    """Evaluates and exports the model of a run. Results are kept, and reused for equal inputs."""

    recipe: Recipe
    run_dir: Path
    console: Console
    stop: StopFlag
    model: Ernie4_5_MoeForCausalLM
    tokenizer: Tokenizer
    load_weights: Callable[[], None] = lambda: None  # into `model`, before it is used

    def after_stage(self, index: int, lineage: Lineage) -> None:
        """Solve the problems after stage `index`, if the recipe says so; `GateError` at its gate.

        The result is kept in the stage's directory as `evaluation.json`.
        """
        settings = self.recipe.evaluation
        if settings is None or not settings.after_each_stage:
            return
        stage = self.recipe.stages[index]
        title = f"held-out problems after {stage.name}"
        result = self._kept_or_solved(settings, self._stage_file(index), lineage, title)
        results = [*self._results_before(index), (stage.name, result)]
        self.console.print(stage_table(results))
        if stage.gate is not None:
            before = results[-2][1]["trained"] if index else None
            check_gate(stage.gate, stage.name, result["trained"], before)

    def evaluate(self, lineage: Lineage) -> dict[str, Any] | None:
        """Solve the recipe's problems, print the table and write `evaluation.json`."""
        settings = self.recipe.evaluation
        if settings is None:
            return None
        path = self.run_dir / EVALUATION
        result = self._kept_or_solved(settings, path, lineage, "held-out problems")
        if settings.untrained_examples and "untrained" not in result:
            devices.seed_everything(self.recipe.seed)
            fresh = Ernie4_5_MoeForCausalLM(self.model.config, self.model.model.placement)
            few = settings.untrained_examples
            result["untrained"] = self._solve(settings, fresh, few, "untrained model").to_dict()
        _write_on_main(path, result)
        self.console.print(evaluation_table(result))
        return result

    def export(
        self,
        lineage: Lineage,
        evaluation: dict[str, Any] | None,
        referee: str | None,
        score: Path | None = None,
    ) -> None:
        """Write `export/` with its receipt, and print what the comparison found.

        `score` is the head's directory of a reward model.
        """
        settings = self.recipe.export
        if settings is None:
            return
        directory, record = self.run_dir / EXPORT, self.run_dir / EXPORT_RECORD
        card = model_card(self.recipe, evaluation)
        identity = _identity(settings, lineage, card, referee)
        kept = consensus.run_on_main(
            lambda: _read_if_same(record, identity) if is_whole_export(directory) else None
        )
        if kept is not None:
            receipt = Receipt(**kept["receipt"])
        else:
            self.load_weights()
            receipt = export(
                self.model,
                self.tokenizer,
                directory,
                extras=Extras(card, score),
                weight_format=WeightFormat(
                    settings.dtype, settings.max_shard_size, self._quantizer()
                ),
                referee=referee,
                seed=self.recipe.seed,
                interruptible=self.stop.at_once,
            )
            _write_on_main(record, {"identity": identity, "receipt": asdict(receipt)})
        self.console.print(receipt_line(directory, receipt), highlight=False)

    def _quantizer(self) -> Quantizer | None:
        settings = self.recipe.export and self.recipe.export.quantize
        if not settings:
            return None
        recipe = self.recipe
        return Quantizer.on_rows_of(recipe.stages, settings, Path.cwd(), recipe.seed)

    def _stage_file(self, index: int) -> Path:
        return self.run_dir / self.recipe.stage_directory(index) / EVALUATION

    def _results_before(self, index: int) -> list[tuple[str, dict[str, Any]]]:
        def read() -> list[tuple[str, dict[str, Any]]]:
            found = [(i, read_result(self._stage_file(i))) for i in range(index)]
            return [(self.recipe.stages[i].name, result) for i, result in found if result]

        return consensus.run_on_main(read)

    def _kept_or_solved(
        self, settings: EvaluationConfig, path: Path, lineage: Lineage, title: str
    ) -> dict[str, Any]:
        """Return the result in `path` or after the last stage, if it is of this model, or solve."""
        identity = evaluation_identity(settings, lineage)
        last_stage = self._stage_file(len(self.recipe.stages) - 1)
        if kept := consensus.run_on_main(lambda: _read_kept((path, last_stage), identity)):
            return kept
        self.load_weights()
        solved = self._solve(settings, self.model, settings.max_examples, title)
        result = {"identity": identity, "trained": solved.to_dict()}
        consensus.run_on_main(lambda: write_jsonl(path.with_name(SAMPLES), solved.samples))
        _write_on_main(path, result)
        return result

    def _solve(
        self,
        settings: EvaluationConfig,
        model: Ernie4_5_MoeForCausalLM,
        max_examples: int | None,
        label: str,
    ) -> Evaluation:
        config = EvalConfig(
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            samples=settings.samples,
            temperature=settings.temperature,
            seed=self.recipe.seed,
            k=tuple(settings.k),
        )
        with open_toolbox(settings.environment, self.tokenizer, Path.cwd()) as toolbox:
            return evaluate(
                model,
                self.tokenizer,
                load_problems(settings.path, max_examples=max_examples, columns=settings.columns),
                config,
                progress=partial(progress_bar, self.console, label),
                few_shot=settings.examples(Path.cwd(), self.recipe.seed),
                toolbox=toolbox,
                stop_requested=lambda: self.stop.requested,
            )


def evaluation_identity(settings: EvaluationConfig, lineage: Lineage) -> str:
    """Return a hash of the model, the settings, the files of tools, the problems and the examples.

    Problems and examples may lie anywhere. Settings that recipes did not have before count where
    they are set, so that results kept from then are found.
    """
    problems = _content(load_problems(settings.path, columns=settings.columns))
    files = settings.environment.files if settings.environment else []
    more = [hash_files([Path.cwd() / Path(file).expanduser() for file in files])] if files else []
    if examples := settings.examples(Path.cwd(), seed=0):
        more.append(_content(examples.examples))
    fields = type(settings).model_fields
    unset = {key for key in _LATER_KEYS if getattr(settings, key) == fields[key].default}
    without = {"path", "columns", "few_shot", *unset}
    return _identity(settings, lineage, problems, *more, without=without)


def _content(records: Sequence[Record]) -> str:
    facts = [[record.messages, record.tools, record.fields] for record in records]
    return hashlib.sha256(json.dumps(facts, default=repr, sort_keys=True).encode()).hexdigest()


def _read_if_same(path: Path, identity: str) -> dict[str, Any] | None:
    before = read_result(path)
    return before if before is not None and before.get("identity") == identity else None


def _read_kept(places: tuple[Path, ...], identity: str) -> dict[str, Any] | None:
    """Return the first result of this identity; its samples go beside the first of `places`."""
    for place in places:
        if (found := _read_if_same(place, identity)) is not None:
            samples, wanted = place.with_name(SAMPLES), places[0].with_name(SAMPLES)
            if samples != wanted and samples.exists():
                write_text(wanted, samples.read_text(encoding="utf-8"))
            return found
    return None


def _write_on_main(path: Path, result: dict[str, Any]) -> None:
    """Write on rank 0; the other ranks wait until the file is there."""
    consensus.run_on_main(lambda: write_json(path, result))


def _identity(
    settings: BaseModel, lineage: Lineage, *more: str | None, without: Set[str] = frozenset()
) -> str:
    """Return a hash of all that a result depends on. It is on disk: keep it stable."""
    values = settings.model_dump(mode="json", exclude=set(without))
    return fingerprint([values, lineage.to_dict(), *more])
