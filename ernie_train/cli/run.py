"""The verb `run`, in this process or as ranks that it starts and supervises.

Importing this module loads no Paddle: the process that supervises ranks does without it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ernie_train.core import consensus
from ernie_train.core.errors import UserError
from ernie_train.io.run_dir import refuse_if_in_use
from ernie_train.launch import LaunchSettings, supervise
from ernie_train.launch.rank_files import is_supervised


@dataclass(frozen=True)
class RunCommand:
    """Arguments of the verb `run`; `first`, `last` and `extend` are --from, --until, --extend."""

    recipe: Path
    overrides: Sequence[str]
    run_dir: Path | None
    first: str | None
    last: str | None
    extend: bool
    referee: str | None  # an interpreter

    def run_on_cores(self, console: Console, launch_console: Console, *, debug: bool) -> int:
        """Run the recipe here, or as ranks where those use the cores better; return the status."""
        from ernie_train.core import process_group
        from ernie_train.core.cpu import use_threads
        from ernie_train.launch.cores import plan_cores

        plan = None
        if process_group.world_size() == 1 and not is_supervised():
            with suppress(UserError):  # reported by the run, with all that is wrong beside it
                values = self._settings()
                directory = self._directory(str(values.get("name")))
                plan = plan_cores(values, directory, Path.cwd())
        if plan is not None and plan.threads is not None:
            use_threads(plan.threads)
        if plan is None or plan.ranks == 1:
            if plan is not None:
                console.print(plan.line, highlight=False)
            self.run_here(console)
            return 0
        launch_console.print(plan.line, highlight=False)
        shared = replace(self, overrides=[*self.overrides, f"parallel.data={plan.ranks}"])
        return shared.launch(LaunchSettings(plan.ranks), launch_console, debug=debug)

    def run_here(self, console: Console) -> None:
        """Run the recipe in this process, which may be one of several ranks."""
        from ernie_train.run.earlier import Selection
        from ernie_train.run.pipeline import Pipeline
        from ernie_train.run.recipe import load_recipe

        with consensus.fail_together():
            loaded = load_recipe(self.recipe, list(self.overrides))
        directory = self._directory(loaded.name)
        console.print(f"recipe {self.recipe} -> {directory}", highlight=False)
        pipeline = Pipeline(loaded, directory, console, self.referee)
        pipeline.run(Selection(self.first, self.last, self.extend))

    def launch(self, settings: LaunchSettings, console: Console, *, debug: bool) -> int:
        """Run the recipe as ranks; return the exit status. Loads no Paddle."""
        # The ranks validate the recipe, which takes Paddle; only name and device are needed here.
        values = self._settings()
        name, hide_gpus = values.get("name"), values.get("device") == "cpu"
        directory = self._directory(name) if isinstance(name, str) else self.run_dir
        if directory is not None and settings.nnodes == 1:  # ranks of other nodes may hold it
            refuse_if_in_use(directory)

        def command(stages_set_aside: bool) -> list[str]:
            python = [sys.executable, "-u", "-m", "ernie_train", *(["--debug"] if debug else [])]
            return [*python, "run", *self.rank_arguments(stages_set_aside)]

        return supervise(command, replace(settings, hide_gpus=hide_gpus), directory, console)

    def rank_arguments(self, stages_set_aside: bool) -> list[str]:
        """Return the arguments of `run` for a rank.

        Without --from once its stages are set aside: a restart continues them.
        """
        options = {
            "--run-dir": self.run_dir,
            "--from": None if stages_set_aside else self.first,
            "--until": self.last,
            "--referee": self.referee,
        }
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        given += ["--extend"] if self.extend else []  # a second time it finds nothing to do
        return [*given, "--", str(self.recipe), *self.overrides]

    def _settings(self) -> dict[str, Any]:
        """Return the recipe with its overrides, as it is written."""
        from ernie_train.core.config import apply_overrides
        from ernie_train.io.shipped import read_recipe

        return apply_overrides(read_recipe(self.recipe), list(self.overrides))

    def _directory(self, name: str) -> Path:
        return self.run_dir or Path("runs") / name
