"""The `run` verb: in this process, or as ranks that this process starts and supervises."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from ernie_train.core import consensus
from ernie_train.core.config import apply_overrides, load_yaml
from ernie_train.io.run_dir import refuse_if_in_use
from ernie_train.launch import LaunchSettings, supervise


@dataclass(frozen=True)
class RunCall:
    """What the user asked `run` to do; `first` and `last` are --from and --until."""

    recipe: Path
    overrides: Sequence[str]
    run_dir: Path | None
    first: str | None
    last: str | None
    referee: str | None  # an interpreter

    def run_here(self, console: Console) -> None:
        """Runs the recipe in this process, which may be one of several ranks."""
        from ernie_train.run.pipeline import Pipeline, Selection
        from ernie_train.run.recipe import load_recipe

        with consensus.fail_together():
            loaded = load_recipe(self.recipe, list(self.overrides))
        directory = self._directory(loaded.name)
        console.print(f"recipe {self.recipe} -> {directory}", highlight=False)
        pipeline = Pipeline(loaded, directory, console, self.referee)
        pipeline.run(Selection(self.first, self.last))

    def launch(self, settings: LaunchSettings, console: Console, *, debug: bool) -> int:
        """Runs the recipe as ranks; returns the exit status. Loads no Paddle."""
        # Whether the recipe makes sense is for the ranks to say; here name and device are enough.
        values = apply_overrides(load_yaml(self.recipe), list(self.overrides))
        name, hide_gpus = values.get("name"), values.get("device") == "cpu"
        directory = self._directory(name) if isinstance(name, str) else self.run_dir
        if directory is not None and settings.nnodes == 1:  # on others its ranks may run already
            refuse_if_in_use(directory)

        def command(anew_begun: bool) -> list[str]:
            python = [sys.executable, "-u", "-m", "ernie_train", *(["--debug"] if debug else [])]
            return [*python, "run", *self.arguments(anew_begun)]

        return supervise(command, replace(settings, hide_gpus=hide_gpus), directory, console)

    def arguments(self, anew_begun: bool) -> list[str]:
        """The same call for a rank; a restart goes on with stages that were begun anew before."""
        options = {
            "--run-dir": self.run_dir,
            "--from": None if anew_begun else self.first,
            "--until": self.last,
            "--referee": self.referee,
        }
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        return [*given, "--", str(self.recipe), *self.overrides]

    def _directory(self, name: str) -> Path:
        return self.run_dir or Path("runs") / name
