"""What follows the last stage: held-out problems are solved, the model is exported and proven."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ernie_train.core import consensus, devices
from ernie_train.core.errors import CheckpointError, storage_errors
from ernie_train.core.progress import progress_bar
from ernie_train.core.signals import StopFlag
from ernie_train.data import Record, Tokenizer
from ernie_train.eval.evaluation import EvalConfig, Evaluation, evaluate, load_problems
from ernie_train.eval.gates import check_gate
from ernie_train.io.files import fingerprint, write_json
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.run.export import Receipt, comparison_prompts, export
from ernie_train.run.recipe import EvaluationConfig, Recipe
from ernie_train.run.render import evaluation_table, model_card, receipt_line, stage_table

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Finalizer:
    """Evaluation and export of a run; both are kept and not done twice for the same inputs.

    `inputs` say what a model came from, by hash.
    """

    recipe: Recipe
    run_dir: Path
    console: Console
    stop: StopFlag

    def after_stage(
        self,
        index: int,
        model: Ernie4_5_MoeForCausalLM,
        tokenizer: Tokenizer,
        inputs: dict[str, str],
    ) -> None:
        """Solves the problems after stage `index`, if the recipe says so; `GateError` at its gate.

        What was found lies in the stage's directory as `evaluation.json`.
        """
        settings = self.recipe.evaluation
        if settings is None or not settings.after_each_stage:
            return
        stage = self.recipe.stages[index]
        title = f"held-out problems after {stage.name}"
        result = self._solved(self._stage_file(index), model, tokenizer, inputs, title)
        results = [*self._results_before(index), (stage.name, result)]
        self.console.print(stage_table(results))
        if stage.gate is not None:
            before = results[-2][1]["trained"] if index else None
            check_gate(stage.gate, stage.name, result["trained"], before)

    def evaluate(
        self, model: Ernie4_5_MoeForCausalLM, tokenizer: Tokenizer, inputs: dict[str, str]
    ) -> dict[str, Any] | None:
        """Solves the recipe's problems, prints the table and writes `evaluation.json`."""
        settings = self.recipe.evaluation
        if settings is None:
            return None
        path = self.run_dir / "evaluation.json"
        result = self._solved(path, model, tokenizer, inputs, "held-out problems")
        if settings.untrained_examples and "untrained" not in result:
            result["untrained"] = self._untrained(model, tokenizer, settings).to_dict()
        _write(path, result)
        self.console.print(evaluation_table(result))
        return result

    def _stage_file(self, index: int) -> Path:
        directory = f"{index + 1:02d}-{self.recipe.stages[index].name}"
        return self.run_dir / directory / EVALUATION

    def _results_before(self, index: int) -> list[tuple[str, dict[str, Any]]]:
        def read() -> list[tuple[str, dict[str, Any]]]:
            found = [(i, _read(self._stage_file(i))) for i in range(index)]
            return [(self.recipe.stages[i].name, result) for i, result in found if result]

        return consensus.run_on_main(read)

    def _solved(
        self,
        path: Path,
        model: Ernie4_5_MoeForCausalLM,
        tokenizer: Tokenizer,
        inputs: dict[str, str],
        title: str,
    ) -> dict[str, Any]:
        """What solving the problems gave, from `path`, or from the last stage's, if it is there."""
        settings = self.recipe.evaluation
        if settings is None:
            raise ValueError("the recipe has no evaluation")
        identity = _identity(settings, inputs)
        places = (path, self._stage_file(len(self.recipe.stages) - 1))
        kept = consensus.run_on_main(
            lambda: [found for p in places if (found := _kept(p, identity))]
        )
        if kept:
            return kept[0]
        problems = load_problems(settings.path, max_examples=settings.max_examples)
        solved = self._solve(model, tokenizer, problems, settings, title)
        result = {"identity": identity, "trained": solved.to_dict()}
        _write(path, result, solved.samples)
        return result

    def export(
        self,
        model: Ernie4_5_MoeForCausalLM,
        tokenizer: Tokenizer,
        evaluation: dict[str, Any] | None,
        referee: str | None,
        inputs: dict[str, str],
    ) -> None:
        """Writes `export/` with its receipt, and says what the comparison found."""
        settings = self.recipe.export
        if settings is None:
            return
        directory = self.run_dir / "export"
        card = model_card(self.recipe, evaluation)
        identity = _identity(settings, inputs, card, referee)
        facts = self.run_dir / "export.json"
        kept = consensus.run_on_main(lambda: _kept(facts, identity) if directory.exists() else None)
        if kept is not None:
            receipt = Receipt(**kept["receipt"])
        else:
            receipt = export(
                model,
                tokenizer,
                directory,
                prompts=comparison_prompts(tokenizer, self.recipe.seed),
                dtype=settings.dtype,
                card=card,
                max_shard_size=settings.max_shard_size,
                referee=referee,
                thinking=self.recipe.thinking,
            )
            _write(facts, {"identity": identity, "receipt": asdict(receipt)})
        self.console.print(receipt_line(directory, receipt), highlight=False)

    def _untrained(
        self, model: Ernie4_5_MoeForCausalLM, tokenizer: Tokenizer, settings: EvaluationConfig
    ) -> Evaluation:
        """The same for a model of this configuration before its first step."""
        problems = load_problems(settings.path, max_examples=settings.untrained_examples)
        devices.seed_everything(self.recipe.seed)
        fresh = Ernie4_5_MoeForCausalLM(model.config, model.model.placement)
        return self._solve(fresh, tokenizer, problems, settings, "untrained model")

    def _solve(
        self,
        model: Ernie4_5_MoeForCausalLM,
        tokenizer: Tokenizer,
        problems: list[Record],
        settings: EvaluationConfig,
        title: str,
    ) -> Evaluation:
        config = EvalConfig(
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            thinking=self.recipe.thinking,
        )
        with progress_bar(self.console, title, len(problems)) as advance_to:
            return evaluate(
                model,
                tokenizer,
                problems,
                config,
                on_progress=advance_to,
                stop_requested=lambda: self.stop.requested,
            )


def _write(path: Path, result: dict[str, Any], samples: list[dict[str, Any]] | None = None) -> None:
    """Writes a result, on rank 0, and the samples beside it; other ranks wait until it is there."""

    def write() -> None:
        if samples is not None:
            beside = path.with_name("evaluation_samples.jsonl")
            lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
            with storage_errors("cannot write the samples", beside):
                beside.write_text("".join(lines), encoding="utf-8")
        write_json(path, result)

    consensus.run_on_main(write)


def _identity(settings: Any, inputs: dict[str, str], *more: str | None) -> str:
    return fingerprint([settings.model_dump(mode="json"), inputs, *more])


def _kept(path: Path, identity: str) -> dict[str, Any] | None:
    """What an earlier run wrote to `path`, if it was for the same."""
    before = _read(path)
    return before if before is not None and before.get("identity") == identity else None


def _read(path: Path) -> dict[str, Any] | None:
    """What is in a file of `_write`, None if there is none; `CheckpointError` if it is damaged."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); delete it to have it made anew"
        ) from None
    return found
