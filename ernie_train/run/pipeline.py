"""Runs a recipe in a run directory: stage after stage, then evaluation and export.

    run_dir/recipe.yaml, environment.json, tokenizer/
    run_dir/01-sft/...        one directory a stage, with DONE when it is finished
    run_dir/evaluation.json, evaluation_samples.jsonl, export/

Everything that is finished stays; a run on the same directory goes on where the last one stopped.

With several ranks each runs this. Rank 0 alone writes and prints, but for the tensors of models;
what can fail on one rank alone is done in `consensus.fail_together`.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ernie_train import parallel
from ernie_train.core import consensus, devices, environment, process_group
from ernie_train.core.config import dump_yaml
from ernie_train.core.errors import CheckpointError, ConfigError, DataError, storage_errors
from ernie_train.core.process_group import Grid
from ernie_train.core.signals import StopFlag
from ernie_train.data import Tokenizer, load_tokenizer
from ernie_train.eval.evaluation import load_problems, require_verifiers
from ernie_train.io.files import digest_file, fingerprint, write_json
from ernie_train.io.run_dir import (
    RunLock,
    StageDone,
    differences,
    read_done,
    write_done,
)
from ernie_train.launch import rank_files
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rewards.sandbox import set_policy
from ernie_train.run.check import check_fit, check_gates
from ernie_train.run.finalize import Finalizer
from ernie_train.run.recipe import Recipe
from ernie_train.run.stages import STAGES, StageData, StageRun
from ernie_train.weights.checkpoint import CheckpointStore
from ernie_train.weights.hf import load_pretrained
from ernie_train.weights.model_directory import find_model


@dataclass(frozen=True)
class Selection:
    """Which stages to run: those from `first` on are done anew, those after `last` are left out."""

    first: str | None = None
    last: str | None = None


class Pipeline:
    """One recipe in one run directory."""

    def __init__(self, recipe: Recipe, run_dir: Path, console: Console, referee: str | None = None):
        self.recipe = recipe
        self.run_dir = run_dir
        self.console = console if process_group.is_main() else Console(quiet=True)
        self.referee = referee
        self.base_dir = Path.cwd()

    def run(self, selection: Selection = Selection()) -> None:
        """Runs what is not done yet. Raises `Interrupted` after saving, on SIGTERM or SIGINT."""
        with consensus.fail_together():
            layout = self.recipe.parallel
            grid = Grid(layout.expert, layout.data, layout.sharding)
            process_group.set_grid(grid)
            self._check_selection(selection)
            tokenizer = self._read_what_is_given()
        self._require_same_everywhere(selection)
        with ExitStack() as held, StopFlag() as stop:
            with consensus.fail_together():
                if process_group.is_main():
                    held.enter_context(RunLock(self.run_dir))
                inputs = self._initial_inputs(tokenizer)
                if process_group.is_main():
                    self._refuse_other_recipe(selection.first, inputs)
                model = self._initial_model(tokenizer)
            consensus.require_same({f"the {name}": found for name, found in inputs.items()})
            with consensus.fail_together():
                if process_group.is_main():
                    self._write_facts(tokenizer)
                    self._set_aside(selection.first)
                    rank_files.note("anew")
            outcome = Finalizer(self.recipe, self.run_dir, self.console, stop)
            for index, stage in enumerate(self.recipe.stages):
                directory = self._stage_dir(index)
                inputs = self._run_stage(index, stage, directory, model, tokenizer, inputs, stop)
                outcome.after_stage(index, model, tokenizer, inputs)
                if stage.name == selection.last:
                    self.console.print(f"stopped after stage {stage.name}, as asked")
                    return
            evaluation = outcome.evaluate(model, tokenizer, inputs)
            outcome.export(model, tokenizer, evaluation, self.referee, inputs)

    # ---- before the stages -----------------------------------------------------------------------

    def _read_what_is_given(self) -> Tokenizer:
        set_policy(self.recipe.sandbox)
        tokenizer = load_tokenizer(self.base_dir / self.recipe.tokenizer.path)
        if self.recipe.evaluation is not None:
            problems = load_problems(self.base_dir / self.recipe.evaluation.path)
            require_verifiers(problems)
            check_gates(self.recipe, problems)
        return tokenizer

    def _require_same_everywhere(self, selection: Selection) -> None:
        settings = self.recipe.model_dump(mode="json")
        consensus.require_same(
            {
                "the seed": str(settings.pop("seed")),
                "the recipe": fingerprint(settings),
                "the run directory": str(self.run_dir),
                "the choice of stages": fingerprint([selection.first, selection.last]),
            }
        )

    def _stage_dir(self, index: int) -> Path:
        return self.run_dir / f"{index + 1:02d}-{self.recipe.stages[index].name}"

    def _check_selection(self, selection: Selection) -> None:
        names = [stage.name for stage in self.recipe.stages]
        for option, name in (("--from", selection.first), ("--until", selection.last)):
            if name is not None and name not in names:
                raise ConfigError(f"{option}: no stage {name!r}; the recipe has {', '.join(names)}")

    def _refuse_other_recipe(self, first: str | None, inputs: dict[str, str]) -> None:
        """Compares what was begun here with what is asked for, before anything is written."""
        expected = {self._stage_dir(i).name for i in range(len(self.recipe.stages))}
        found = {path.parent.name for path in self.run_dir.glob("[0-9][0-9]-*/stage.json")}
        found = {name for name in found if ".before-" not in name}
        if strange := sorted(found - expected):
            raise CheckpointError(
                f"{self.run_dir} belongs to another recipe: it holds stage {', '.join(strange)}, "
                f"this recipe has {', '.join(sorted(expected))}; give another --run-dir"
            )
        for index, stage in enumerate(self.recipe.stages):
            note = self._stage_dir(index) / "stage.json"
            if stage.name == first or not note.exists():
                return
            inputs = self._stage_inputs(stage, inputs)
            before = json.loads(note.read_text(encoding="utf-8"))
            now = {"settings": stage.identity(), "input": inputs}
            if changes := differences(before, now):
                raise CheckpointError(
                    f"stage {stage.name} in {self.run_dir} was run with something else: "
                    + "; ".join(changes)
                    + f". Give another --run-dir, or --from {stage.name} to do it anew"
                )
            done = read_done(note.parent)
            if done is None:
                return
            inputs = _after(stage.name, inputs, done)

    def _initial_model(self, tokenizer: Tokenizer) -> Ernie4_5_MoeForCausalLM:
        device = devices.select_device(self.recipe.device)
        process_group.require_backend(device)
        devices.seed_everything(self.recipe.seed)
        source = self.recipe.model
        dtype = "bfloat16" if device == "gpu" else "float32"
        if source.path is not None:
            weights = find_model(source.path).weights
            source.build()  # other sizes than its preset's are told before a large model is made
            model = load_pretrained(weights, dtype=dtype)
        else:
            model = parallel.new_model(source.build(), dtype)
        check_fit(self.recipe, model.config, tokenizer)
        parallel.enable_recompute(model, self.recipe.parallel.recompute)
        return model

    def _write_facts(self, tokenizer: Tokenizer) -> None:
        with storage_errors("cannot write to the run directory", self.run_dir):
            dump_yaml(self.recipe.model_dump(mode="json"), self.run_dir / "recipe.yaml")
            if not (self.run_dir / "tokenizer").exists():
                tokenizer.save_pretrained(self.run_dir / "tokenizer", thinking=self.recipe.thinking)
        write_json(self.run_dir / "environment.json", environment.describe_environment())

    def _set_aside(self, first: str | None) -> None:
        """Renames the directories of the stages to be done anew; nothing is deleted."""
        if first is None:
            return
        start = [stage.name for stage in self.recipe.stages].index(first)
        for index in range(len(self.recipe.stages)):
            directory = self._stage_dir(index)
            if index < start and read_done(directory) is None:
                raise CheckpointError(f"--from {first}: stage {directory.name} is not finished yet")
            if index >= start and directory.exists():
                number = 1
                while (aside := directory.with_name(f"{directory.name}.before-{number}")).exists():
                    number += 1
                directory.rename(aside)
                self.console.print(f"{directory.name}: set aside as {aside.name}")

    def _initial_inputs(self, tokenizer: Tokenizer) -> dict[str, str]:
        source = self.recipe.model
        inputs = {
            "seed": str(self.recipe.seed),
            "model": fingerprint(source.model_dump(mode="json")),
            "tokenizer": tokenizer.fingerprint(),
        }
        if source.path is not None:
            inputs["weights"] = _hash_files([find_model(source.path).weights])
        return inputs

    # ---- stages ----------------------------------------------------------------------------------

    def _run_stage(
        self,
        index: int,
        stage: Any,
        directory: Path,
        model: Ernie4_5_MoeForCausalLM,
        tokenizer: Tokenizer,
        inputs: dict[str, str],
        stop: StopFlag,
    ) -> dict[str, str]:
        """Runs a stage, or takes its result from disk; returns the next stage's inputs."""
        settings = stage.identity()
        with consensus.fail_together():
            inputs = self._stage_inputs(stage, inputs)
        consensus.require_same({f"the data of stage {stage.name}": inputs["data"]})
        done = consensus.run_on_main(lambda: read_done(directory))
        if done is not None:
            self.console.print(f"stage {stage.name}: done before, {done.result['steps']} steps")
            checkpoint = directory / "checkpoints" / done.result["checkpoint"]
            store = CheckpointStore(checkpoint.parent)
            with consensus.fail_together():
                store.load(checkpoint, verify=process_group.is_main()).load_model(model)
            return _after(stage.name, inputs, done)
        data = StageData(self.base_dir, tokenizer, self.recipe.stage_seed(index))
        kind = STAGES[stage.kind]
        with consensus.fail_together():
            if process_group.is_main():
                _begin_stage(directory, settings, inputs)
            prepared = kind.prepare(stage, data)
            self.console.print(prepared.report.as_table())
            if process_group.is_main():
                write_json(directory / "data_report.json", prepared.report.to_dict())
        run = StageRun(data, directory, model, stop, self.console.is_terminal)
        done = StageDone(settings, inputs, kind.run(stage, run, prepared))
        with consensus.fail_together():
            if process_group.is_main():
                write_done(directory, done)
        return _after(stage.name, inputs, done)

    def _stage_inputs(self, stage: Any, inputs: dict[str, str]) -> dict[str, str]:
        return {**inputs, "data": _hash_files([self.base_dir / path for path in stage.paths()])}


def _begin_stage(directory: Path, settings: dict[str, Any], inputs: dict[str, str]) -> None:
    with storage_errors("cannot write to the run directory", directory):
        directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "stage.json", {"settings": settings, "input": inputs})


def _after(name: str, inputs: dict[str, str], done: StageDone) -> dict[str, str]:
    """The inputs of what follows a finished stage."""
    return {**inputs, f"after {name}": fingerprint(done.result)}


def _hash_files(paths: list[Path]) -> str:
    """One hash over the contents of files, and of the files in directories, in a fixed order."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(found for found in path.rglob("*") if found.is_file())
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or directory")
    digests = [digest_file(path).sha256 for path in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
