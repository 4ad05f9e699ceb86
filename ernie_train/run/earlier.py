"""Compare a recipe with what its run directory holds from earlier starts, and make room for it.

A stage that was run with something else is refused. `--from` sets its directory aside; `--extend`
trains the last stage, or one that is not finished, on, longer and maybe at another rate, with its
weights, moments and place in the data.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ernie_train.core import process_group
from ernie_train.core.cpu import __version__
from ernie_train.core.errors import CheckpointError, ConfigError, storage_errors
from ernie_train.core.foreign_files import read_json
from ernie_train.io.files import write_json
from ernie_train.io.run_dir import DONE, ENVIRONMENT, read_done, read_result, recorded_version
from ernie_train.run.finalize import EVALUATION, EXPORT, EXPORT_RECORD, SAMPLES
from ernie_train.run.foreign_keys import minor_version
from ernie_train.run.lineage import HashMemory, Lineage, stage_changes, stage_record
from ernie_train.run.recipe import Recipe
from ernie_train.run.stages import AnyStageConfig
from ernie_train.weights.checkpoint import WITHOUT_OPTIMIZER, CheckpointStore

CHECKPOINTS = "checkpoints"  # in a stage's directory
STAGE = "stage.json"  # settings and inputs of a stage that was begun

# Settings that --extend may change: how long a stage trains, and at what rate.
_LENGTH = r"steps|epochs|iterations|rope_schedule\.\d+\.(?:steps|tokens)"
_RATE = r"optim\.(?:lr|min_lr|schedule|warmup_steps|decay_fraction)"
_EXTENDED = re.compile(rf"(?:{_LENGTH}|{_RATE}|checkpoint\.early_stopping_patience):")


@dataclass(frozen=True)
class Selection:
    """The stages to run: repeat those from `first` on, stop after `last`.

    extend: train on the recipe's last stage, or the one that is not finished, where it was trained
        with other settings.
    """

    first: str | None = None
    last: str | None = None
    extend: bool = False

    def check(self, recipe: Recipe) -> None:
        """Raise `ConfigError` for an unknown stage, or options that exclude each other."""
        names = [stage.name for stage in recipe.stages]
        for option, name in (("--from", self.first), ("--until", self.last)):
            if name is not None and name not in names:
                raise ConfigError(f"{option}: no stage {name!r}; the recipe has {', '.join(names)}")
        if self.extend and self.first is not None:
            raise ConfigError("--extend trains the last stage on, --from repeats stages: give one")
        if self.extend and self.last not in (None, names[-1]):
            raise ConfigError(
                f"--extend trains the last stage on, {names[-1]}; --until {self.last} ends before"
            )


@dataclass(frozen=True)
class Changed:
    """Stages that this start begins anew (from `repeated` on) or, with --extend, trains on."""

    repeated: str | None = None
    extended: str | None = None


@dataclass(frozen=True)
class EarlierStarts:
    """The state of a run directory when a recipe is started in it; for rank 0 alone."""

    recipe: Recipe
    run_dir: Path
    base_dir: Path
    hashes: HashMemory
    console: Console

    def compare(self, selection: Selection, lineage: Lineage) -> Changed:
        """Return what changed, before anything is written; `lineage` is that of the first stage.

        A stage that was begun with something else and has trained nothing yet begins anew.

        Raises:
            CheckpointError: the directory holds another run, or nothing that --extend can train on.
        """
        self._refuse_unknown_stages()
        last = self.recipe.stages[-1]
        for index, stage in enumerate(self.recipe.stages):
            directory = self._directory(index)
            if stage.name == selection.first or not (directory / STAGE).exists():
                break
            lineage = lineage.with_data(
                [self.base_dir / path for path in stage.paths()], self.hashes
            )
            recorded = read_result(directory / STAGE) or {}
            changes, done = stage_changes(stage, lineage, recorded), read_done(directory)
            if changes and done is None and not _has_trained(directory):
                return Changed(repeated=stage.name)
            if changes and (other := _other_version(self.run_dir)):
                raise CheckpointError(
                    f"{self.run_dir} was written by {other}, and its stage {stage.name} cannot go "
                    f"on with ernie_train {__version__}. Use that version; or give another "
                    f"--run-dir, with model.path={self.run_dir} tokenizer.path={self.run_dir} to "
                    f"start from what it trained; or repeat the stage here: --from {stage.name}"
                )
            if changes:
                is_latest = stage is last or done is None
                extends = is_latest and all(map(_EXTENDED.match, changes))
                hindrance = self._hindrance(index, recorded["settings"]) if extends else None
                if extends and selection.extend:
                    if hindrance is not None:
                        raise CheckpointError(f"--extend: stage {stage.name} {hindrance}")
                    return Changed(extended=stage.name)
                on = extends and hindrance is None
                raise CheckpointError(
                    f"stage {stage.name} in {self.run_dir} was run with something else: "
                    + "; ".join(changes)
                    + f". Give another --run-dir, or --from {stage.name} to repeat it"
                    + (", or --extend to train it on with these settings" if on else "")
                )
            if done is None:
                break
            lineage = lineage.after(stage.name, done.result)
        if selection.extend:
            self.console.print(
                f"--extend: stage {last.name} was not trained with other settings: the run goes on",
                highlight=False,
            )
        return Changed(repeated=selection.first)

    def _hindrance(self, index: int, before: dict[str, Any]) -> str | None:
        """Return why a stage, trained with the settings `before`, cannot be trained on.

        It needs a checkpoint with optimizer state, and must become longer; an unfinished one at
        least not shorter.
        """
        stage, directory = self.recipe.stages[index], self._directory(index)
        now, old = _lengths(stage.model_dump(mode="json")), _lengths(before)
        if not _has_trained(directory):
            return (
                f"has no checkpoint in {directory / CHECKPOINTS} any more to train on from: give "
                f"another --run-dir, or --from {stage.name} to repeat it"
            )
        if not CheckpointStore(directory / CHECKPOINTS).has_optimizer():
            return (
                f"{WITHOUT_OPTIMIZER}: give another --run-dir, or --from {stage.name} to repeat it"
            )
        if now.keys() != old.keys():
            return f"was given {', '.join(old)}, not {', '.join(now)}: lengthen it in the same unit"
        if self._is_out_of_patience(index, stage.checkpoint.early_stopping_patience):
            return "has ended as checkpoint.early_stopping_patience says: raise that as well"
        before_patience = before["checkpoint"].get("early_stopping_patience")
        ended_early = self._is_out_of_patience(index, before_patience)
        finished = read_done(directory) is not None and not ended_early
        longer = any(now[key] > old[key] for key in now)
        if any(now[key] < old[key] for key in now) or (finished and not longer):
            told = ", ".join(f"{key}={value}" for key, value in old.items())
            return f"has been trained with {told}; give it more, so that something is left to train"
        return None

    def _is_out_of_patience(self, index: int, patience: int | None) -> bool:
        settings = self.recipe.stages[index].checkpoint
        config = settings.model_copy(update={"early_stopping_patience": patience})
        store = CheckpointStore(self._directory(index) / CHECKPOINTS, config)
        return store.is_out_of_patience(store.steps()[-1])

    def _refuse_unknown_stages(self) -> None:
        expected = {self._directory(i).name for i in range(len(self.recipe.stages))}
        found = {path.parent.name for path in self.run_dir.glob(f"[0-9][0-9]-*/{STAGE}")}
        found = {name for name in found if ".before-" not in name}
        if unknown := sorted(found - expected):
            raise CheckpointError(
                f"{self.run_dir} belongs to another recipe: it holds stage {', '.join(unknown)}, "
                f"this recipe has {', '.join(sorted(expected))}; give another --run-dir"
            )

    def make_room(self, changed: Changed) -> None:
        """Set aside the stages to be repeated, or what an extension makes anew; delete nothing."""
        names = [stage.name for stage in self.recipe.stages]
        if changed.extended is not None:
            self._reopen(names.index(changed.extended))
        if changed.repeated is None:
            return
        start = names.index(changed.repeated)
        for index in range(len(self.recipe.stages)):
            directory = self._directory(index)
            if index < start and read_done(directory) is None:
                raise CheckpointError(
                    f"--from {changed.repeated}: stage {directory.name} is not finished yet"
                )
            if index >= start and directory.exists():
                self.console.print(f"{directory.name}: set aside as {_rename(directory).name}")

    def _reopen(self, index: int) -> None:
        """Make a stage unfinished under the recipe's settings; keep its checkpoints.

        Its mark goes first and its settings come last, so that a kill in between leaves a stage
        that --extend takes up again.
        """
        stage, directory = self.recipe.stages[index], self._directory(index)
        steps = CheckpointStore(directory / CHECKPOINTS).steps()
        with storage_errors("cannot extend the stage", directory):
            outdated = [directory / DONE, directory / EVALUATION, directory / SAMPLES]
            outdated += [
                self.run_dir / name for name in (EVALUATION, SAMPLES, EXPORT_RECORD, EXPORT)
            ]
            for path in outdated:
                if path.exists():
                    aside = _rename(path)
                    if path.name != DONE:
                        self.console.print(f"{path.name}: set aside as {aside.name}")
        recorded = read_result(directory / STAGE) or {}
        earlier = {"at_step": steps[-1], "settings": recorded["settings"]}
        extensions = [*recorded.get("extensions", []), earlier]
        settings = stage.model_dump(mode="json")
        write_json(directory / STAGE, {**recorded, "settings": settings, "extensions": extensions})
        self.console.print(
            f"stage {stage.name} is trained on from step {steps[-1]}, with the optimizer's moments "
            "and its place in the data. Its schedule is that of the new length: each step from "
            "there on has the learning rate that it would have in a run of this length from the "
            "start",
            highlight=False,
        )

    def _directory(self, index: int) -> Path:
        return self.run_dir / self.recipe.stage_directory(index)


def record_stage(directory: Path, stage: AnyStageConfig, lineage: Lineage) -> None:
    """Write the settings and inputs of a stage before it starts, for later starts to compare."""
    with storage_errors("cannot write to the run directory", directory):
        directory.mkdir(parents=True, exist_ok=True)
    before = read_result(directory / STAGE) or {}
    kept = {key: before[key] for key in ("extensions",) if key in before}
    write_json(directory / STAGE, {**stage_record(stage, lineage), **kept})


def remove_optimizer_states(
    recipe: Recipe, run_dir: Path, begun: AnyStageConfig, console: Console
) -> None:
    """Remove the optimizer state of the stages before `begun`, but what `keep_optimizer` keeps.

    Nothing reads it any more: a stage may be trained on only while it is the last one.
    """
    for index, stage in enumerate(recipe.stages[: recipe.stages.index(begun)]):
        if stage.checkpoint.keep_optimizer:
            continue
        store = CheckpointStore(run_dir / recipe.stage_directory(index) / CHECKPOINTS)
        if freed := store.remove_optimizer():
            console.print(
                f"stage {stage.name}: its optimizer state, {freed / 1e9:.3g} GB, is removed "
                "(checkpoint.keep_optimizer: true keeps it)",
                highlight=False,
            )


def _other_version(run_dir: Path) -> str | None:
    """Return the version that wrote a run directory last, None if it is as good as this one.

    Settings and hashes of another minor version cannot be compared with those of this one.
    """
    try:
        recorded = str(read_json(run_dir / ENVIRONMENT)["ernie_train"])
        same = minor_version(recorded) == minor_version(__version__)
    except (OSError, ValueError, KeyError, TypeError):  # unknown
        return None
    return None if same else recorded_version(run_dir)


def _has_trained(directory: Path) -> bool:
    return bool(CheckpointStore(directory / CHECKPOINTS).steps())


def _lengths(settings: dict[str, Any]) -> dict[str, int]:
    """Return what bounds a stage's length, by setting; of a `rope_schedule` each phase's."""
    found = {key: settings.get(key) for key in ("steps", "epochs", "iterations")}
    for at, phase in enumerate(settings.get("rope_schedule") or []):
        found |= {f"rope_schedule.{at}.{key}": phase.get(key) for key in ("steps", "tokens")}
    return {key: value for key, value in found.items() if value is not None}


def _rename(path: Path) -> Path:
    """Rename a file or directory to the next free name of those set aside; return that."""
    number = 1
    while (aside := path.with_name(f"{path.name}.before-{number}")).exists():
        number += 1
    return path.rename(aside)


def change_of_kernels(before: dict[str, Any] | None, computed_by: str) -> str | None:
    """Return a warning where a run goes on by other kernels than its last start's."""
    last = (before or {}).get("kernels", computed_by)
    if last.partition(":")[0] == computed_by.partition(":")[0]:
        return None
    return (
        f"warning: this start computes by {computed_by}, the last one by {last}: figures differ "
        "by rounding"
    )


def with_history(now: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """Return an environment with the code's version at each start of the run, the last one now."""
    facts = {"ernie_train": now["ernie_train"], "code": now["code"]}
    start = {"unix_s": time.time(), "ranks": process_group.world_size(), **facts}
    earlier: list[Any] = []
    if before is not None:  # version 0.2.0 recorded the last start alone
        earlier = before.get("starts") or [{name: before.get(name) for name in facts}]
    return {**now, "starts": [*earlier, start]}
