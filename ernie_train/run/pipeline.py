"""Run a recipe in a run directory: stage after stage, then evaluation and export.

    run_dir/recipe.yaml, environment.json, tokenizer/
    run_dir/01-sft/...        one directory per stage, with DONE when it is finished
    run_dir/evaluation.json, evaluation_samples.jsonl, export/

Finished work is kept: a run on the same directory continues where the last one stopped.

With several ranks, every rank runs this. Rank 0 alone writes and prints, except for the tensors of
models. Steps that can fail on one rank only run in `consensus.fail_together`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ernie_train import kernels, parallel
from ernie_train.core import blas, consensus, devices, environment, process_group
from ernie_train.core.config import dump_yaml
from ernie_train.core.cpu import cpu_setup
from ernie_train.core.errors import (
    EngineError,
    Interrupted,
    NonFiniteError,
    ToolFailure,
    storage_errors,
)
from ernie_train.core.process_group import Grid
from ernie_train.core.signals import NOTICE, StopFlag
from ernie_train.core.terminal import Terminal
from ernie_train.data import Tokenizer
from ernie_train.io.files import fingerprint, verify_manifest, write_json, write_text
from ernie_train.io.outputs import check_run_directory
from ernie_train.io.run_dir import (
    ENVIRONMENT,
    RECIPE,
    RunLock,
    StageDone,
    read_done,
    read_result,
    require_shared,
    saved_steps,
    write_done,
)
from ernie_train.launch import rank_files
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.model.partial import begin_partial_training, end_partial_training
from ernie_train.rl.reward import find_score
from ernie_train.rl.rollout import KEPT
from ernie_train.run.check import (
    check_device,
    check_evaluation,
    check_fit,
    check_reward_models,
    describe_training,
    recipe_warnings,
)
from ernie_train.run.earlier import (
    CHECKPOINTS,
    EarlierStarts,
    Selection,
    change_of_kernels,
    record_stage,
    remove_optimizer_states,
    with_history,
)
from ernie_train.run.export import require_change
from ernie_train.run.finalize import EVALUATION, Finalizer
from ernie_train.run.lineage import HashMemory, Lineage, stage_record
from ernie_train.run.recipe import Recipe
from ernie_train.run.stages import STAGES, AnyStageConfig, Prepared, StageData, StageRun
from ernie_train.weights.adapters import describe_base
from ernie_train.weights.checkpoint import CheckpointStore
from ernie_train.weights.hf import load_pretrained
from ernie_train.weights.layout import parameter_shapes
from ernie_train.weights.model_directory import find_model
from ernie_train.weights.saving import save_pretrained

INITIAL = "initial"  # the random weights that a first stage trains a part of
# What a run writes beside its stages.
HASHES = "hashes.json"  # of what the run reads
WRITTEN = (RECIPE, EVALUATION, INITIAL, "tokenizer", "export")


class Pipeline:
    """One recipe in one run directory."""

    def __init__(self, recipe: Recipe, run_dir: Path, console: Console, referee: str | None = None):
        self.recipe = recipe
        self.run_dir = run_dir
        self.console = console if process_group.is_main() else Terminal(quiet=True)
        self.referee = referee
        self.base_dir = Path.cwd()
        self.hashes = HashMemory(run_dir / HASHES)
        self.weights: Path | None = None  # where the model's present weights are; None: nowhere
        self.has_begun = False  # what it replaces is set aside, and its recipe is written
        self.loaded: Path | None = None  # those of `weights` that are in memory

    def run(self, selection: Selection | None = None) -> None:
        """Run what is not done yet. Raises `Interrupted` after saving, on SIGTERM or SIGINT."""
        selection = selection or Selection()
        speaks = process_group.is_main() and not rank_files.is_supervised()
        with StopFlag(NOTICE if speaks else "") as stop:
            try:
                self._run(selection, stop)
            except (Interrupted, ToolFailure) as ended:
                again = " without --from" if selection.first and self.has_begun else ""
                raise type(ended)(
                    f"{ended}; {self._kept()}. The same command{again} goes on from there"
                ) from None
            except EngineError as ended:
                raise EngineError(
                    f"{ended}. Nothing of this iteration was learnt; {self._kept()}. The same "
                    "command goes on from there"
                ) from None
            except NonFiniteError as ended:
                raise NonFiniteError(f"{ended}; {self._kept()}") from None

    def _kept(self) -> str:
        """Say what of the training is on the disk."""
        for index in reversed(range(len(self.recipe.stages))):
            store = CheckpointStore(self._stage_dir(index) / CHECKPOINTS)
            if steps := store.steps():
                return f"{store.path_of(steps[-1])} is saved"
            if (kept := self._stage_dir(index) / KEPT).exists():
                return f"the rollout of its first iteration is kept in {kept}"
        return "nothing was to be saved yet"

    def _run(self, selection: Selection, stop: StopFlag) -> None:
        with consensus.fail_together(), stop.at_once():
            layout = self.recipe.parallel
            process_group.set_grid(Grid(layout.expert, layout.data, layout.sharding))
            selection.check(self.recipe)
            tokenizer = self._check_inputs()
            processor = cpu_setup().processor
            warning = blas.require_sound_products(processor)
            for line in [warning] if warning else devices.slow_products(processor):
                self.console.print(line, style="yellow", highlight=False)
        self._require_same_on_all_ranks(selection)
        with ExitStack() as held:
            with consensus.fail_together():
                if process_group.is_main():
                    check_run_directory(self.run_dir, ENVIRONMENT, WRITTEN)
                    held.enter_context(RunLock(self.run_dir))
            require_shared(self.run_dir)
            self.recipe = consensus.run_on_main(lambda: self.recipe.dated(tokenizer, self.run_dir))
            tokenizer = self.recipe.load_tokenizer(self.base_dir)
            model, lineage = self._begin(selection, stop, tokenizer)
            self._run_stages(selection, stop, tokenizer, model, lineage)

    def _begin(
        self, selection: Selection, stop: StopFlag, tokenizer: Tokenizer
    ) -> tuple[Ernie4_5_MoeForCausalLM, Lineage]:
        """Compare with earlier starts, record this one; return the model to start from."""
        done = consensus.run_on_main(lambda: self._read_finished(selection.first))
        with consensus.fail_together(), stop.at_once():
            recorded = done[0].inputs if done else None
            lineage = Lineage.of_recipe(self.recipe, tokenizer, self.hashes, recorded)
        earlier = EarlierStarts(self.recipe, self.run_dir, self.base_dir, self.hashes, self.console)
        changed = consensus.run_on_main(lambda: earlier.compare(selection, lineage))
        if changed.extended is not None:
            done = done[: len(self.recipe.stages) - 1]
        with consensus.fail_together(), stop.at_once():
            model = self._starting_model(tokenizer, done)
        hashes = lineage.to_dict()
        consensus.require_same({f"the {name}": found for name, found in hashes.items()})
        with consensus.fail_together():
            computed_by = kernels.agree_over_ranks()
            if process_group.is_main():
                self._record_run(tokenizer, computed_by)
                earlier.make_room(changed)
                rank_files.write_marker(rank_files.STAGES_SET_ASIDE)
        self.has_begun = True
        return model, lineage

    def _run_stages(
        self,
        selection: Selection,
        stop: StopFlag,
        tokenizer: Tokenizer,
        model: Ernie4_5_MoeForCausalLM,
        lineage: Lineage,
    ) -> None:
        """Run the stages, then evaluate and export what the last one leaves."""
        finalizer = Finalizer(
            self.recipe,
            self.run_dir,
            self.console,
            stop,
            model,
            tokenizer,
            load_weights=lambda: self._load_weights(model),
        )
        for index, stage in enumerate(self.recipe.stages):
            data = StageData(self.base_dir, tokenizer, self.recipe.stage_seed(index))
            directory = self._stage_dir(index)
            loggers = self.recipe.loggers(self.base_dir)
            run = StageRun(data, directory, model, stop, self.console.is_terminal, loggers)
            lineage = self._finish_stage(stage, run, lineage)
            finalizer.after_stage(index, lineage)
            if stage.name == selection.last:
                self.console.print(f"stopped after stage {stage.name}, as asked")
                return
        evaluation = finalizer.evaluate(lineage)
        if self.recipe.export is not None and self.weights is not None:
            with consensus.fail_together():
                require_change(self.weights, self.recipe.export.dtype)
        score = find_score(self.weights) if self.weights is not None else None
        finalizer.export(lineage, evaluation, self.referee, score)
        if self.recipe.export is None and self.weights is not None:
            self.console.print(
                f"the model is {self.weights}\n"
                f"try it: ernie-train generate {self.run_dir} --prompt ...\n"
                f"for transformers: ernie-train export {self.run_dir} DIRECTORY",
                highlight=False,
                soft_wrap=True,  # paths stay whole, to be copied
            )

    # ---- before the stages -----------------------------------------------------------------------

    def _check_inputs(self) -> Tokenizer:
        """Check that the recipe's problems can be scored; return its tokenizer."""
        self.recipe.loggers(self.base_dir).check()
        tokenizer = self.recipe.load_tokenizer(self.base_dir)
        check_reward_models(self.recipe, self.base_dir)
        if self.recipe.evaluation is not None:
            check_evaluation(self.recipe, self.recipe.model.build(), tokenizer, self.base_dir)
        for line in recipe_warnings(self.recipe, tokenizer):
            self.console.print(line, style="yellow", highlight=False)
        return tokenizer

    def _require_same_on_all_ranks(self, selection: Selection) -> None:
        settings = self.recipe.model_dump(mode="json")
        consensus.require_same(
            {
                "the seed": str(settings.pop("seed")),
                "the recipe": fingerprint(settings),
                "the run directory": str(self.run_dir),
                "the choice of stages": fingerprint(astuple(selection)),
            }
        )

    def _stage_dir(self, index: int) -> Path:
        return self.run_dir / self.recipe.stage_directory(index)

    def _read_finished(self, first: str | None) -> list[StageDone]:
        """Return the results of the stages that are finished and not repeated, from the first."""
        found: list[StageDone] = []
        for index, stage in enumerate(self.recipe.stages):
            done = read_done(self._stage_dir(index)) if stage.name != first else None
            if done is None:
                break
            found.append(done)
        return found

    def _starting_model(
        self, tokenizer: Tokenizer, done: Sequence[StageDone]
    ) -> Ernie4_5_MoeForCausalLM:
        """Return the model as the last finished stage left it, or that of the recipe.

        Nothing else is read: weights of earlier stages may have been deleted.
        """
        device = devices.select_device(self.recipe.device)
        process_group.require_backend(device)
        check_device(self.recipe, device)
        devices.seed_everything(self.recipe.seed)
        source = self.recipe.model
        dtype = devices.compute_dtype(device)
        if done:
            last = self._stage_dir(len(done) - 1) / CHECKPOINTS / done[-1].result["checkpoint"]
            verify_manifest(last, hashes=process_group.is_main())
            self.weights = self.loaded = last
            model = load_pretrained(last, dtype=dtype, verified=True)
        elif source.path is not None:
            self.weights = self.loaded = find_model(source.path).weights
            source.build()  # refuses sizes that differ from the preset's, before building the model
            model = load_pretrained(self.weights, dtype=dtype, verified=True)
        else:
            model = parallel.new_model(source.build(), dtype)
        vocabulary = self.recipe.vocabulary(model.config, tokenizer)
        if vocabulary > model.config.vocab_size:
            model.grow_vocabulary(vocabulary)
            self.weights = self.loaded = None  # with the new rows they are nowhere yet
        check_fit(self.recipe, model.config, tokenizer)
        parallel.enable_recompute(model, self.recipe.parallel.recompute)
        return model

    def _record_run(self, tokenizer: Tokenizer, computed_by: str) -> None:
        """Write the resolved recipe, the tokenizer and a description of the environment."""
        with storage_errors("cannot write to the run directory", self.run_dir):
            # First, since `check_run_directory` knows a run by it.
            path = self.run_dir / ENVIRONMENT
            recipe = dump_yaml(self.recipe.model_dump(mode="json"))
            # With the recipe's fingerprint `status` knows it as unchanged, without validating it.
            now = {**environment.describe_environment(), "recipe": fingerprint(recipe)}
            before = read_result(path)
            if changed := change_of_kernels(before, computed_by):
                self.console.print(changed, style="yellow", highlight=False)
            write_json(path, with_history({**now, "kernels": computed_by}, before))
            write_text(self.run_dir / RECIPE, recipe)
            tokenizer.save_pretrained(self.run_dir / "tokenizer")

    # ---- stages ----------------------------------------------------------------------------------

    def _finish_stage(self, stage: AnyStageConfig, run: StageRun, lineage: Lineage) -> Lineage:
        """Run a stage, or load its result from disk; return the lineage of what follows."""
        with consensus.fail_together(), run.stop.at_once():
            paths = [self.base_dir / path for path in stage.paths()]
            lineage = lineage.with_data(paths, self.hashes)
        consensus.require_same({f"the data of stage {stage.name}": str(lineage.data)})
        done = consensus.run_on_main(lambda: read_done(run.directory))
        if done is not None:
            self.console.print(f"stage {stage.name}: done before, {done.result['steps']} steps")
            self.weights = run.directory / CHECKPOINTS / done.result["checkpoint"]
            return lineage.after(stage.name, done.result)
        kind = STAGES[stage.kind]
        place = self._place_of(stage)
        if saved := saved_steps(run.directory / CHECKPOINTS):
            place += f"; saved at step {saved[-1]}"
        self.console.print(place, style="bold", highlight=False)
        with consensus.fail_together(), run.stop.at_once():
            if process_group.is_main():
                self.hashes.save()
            prepared = kind.prepare(stage, run.data)
            self.console.print(prepared.report.as_table())
            if process_group.is_main():
                # Only now: a recipe that fails at its data leaves nothing that holds the next one.
                record_stage(run.directory, stage, lineage)
                write_json(run.directory / "data_report.json", prepared.report.to_dict())
        self._load_weights(run.model)
        inputs = consensus.run_on_main(lambda: lineage.of_start(self.weights))
        consensus.run_on_main(
            lambda: remove_optimizer_states(self.recipe, self.run_dir, stage, self.console)
        )
        result = self._train(stage, replace(run, inputs=inputs), prepared)
        record = stage_record(stage, lineage)
        done = StageDone(record["settings"], record["input"], result)
        consensus.run_on_main(lambda: write_done(run.directory, done))
        return lineage.after(stage.name, result)

    def _place_of(self, stage: AnyStageConfig) -> str:
        """Return where a stage stands among the others, as the terminal shows it."""
        names = [other.name for other in self.recipe.stages]
        at = names.index(stage.name)
        before = f"; done: {', '.join(names[:at])}" if at else ""
        after = f"; then: {', '.join(names[at + 1 :])}" if names[at + 1 :] else ""
        return f"stage {at + 1} of {len(names)}: {stage.name} ({stage.kind}){before}{after}"

    def _train(self, stage: AnyStageConfig, run: StageRun, prepared: Prepared) -> dict[str, Any]:
        """Run a stage; one that trains a part of the model leaves it as its checkpoint reads."""
        model, kind = run.model, STAGES[stage.kind]
        selection = stage.selection(parameter_shapes(model.config))
        if selection is None:
            result = kind.run(stage, run, prepared)
        else:
            base = self._describe_base(model)
            self.console.print(describe_training(stage, model.config), highlight=False)
            begin_partial_training(model, selection, stage.lora, base, run.data.seed)
            try:
                result = kind.run(stage, run, prepared)
            finally:
                end_partial_training(model)
        self.weights = run.directory / CHECKPOINTS / result["checkpoint"]
        if selection is None:
            self.loaded = self.weights
        # Else read, not merged in memory: a run that was interrupted here computes on with these.
        self._load_weights(model)
        return result

    def _describe_base(self, model: Ernie4_5_MoeForCausalLM) -> dict[str, str]:
        """Return where the model's present weights are on disk; random ones are written first."""
        if self.weights is None:
            self.weights = self.run_dir / INITIAL
            save_pretrained(model, self.weights)  # the same bits, unless the recipe has changed
            self.loaded = self.weights
        weights = self.weights
        return consensus.run_on_main(lambda: describe_base(weights))

    def _load_weights(self, model: Ernie4_5_MoeForCausalLM) -> None:
        """Load what the last finished stage left, unless the model has it."""
        if self.weights is not None and self.weights != self.loaded:
            store, main = CheckpointStore(self.weights.parent), process_group.is_main()
            with consensus.fail_together():
                store.load(self.weights, verify=main).load_model(model)
            self.loaded = self.weights
