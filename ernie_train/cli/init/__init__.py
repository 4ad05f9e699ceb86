"""The verb `init`: write a recipe for a model and a file of rows, sized by what `plan` says."""

from ernie_train.cli.init.command import LEAST_STEPS, SCHEMA, InitCommand
from ernie_train.cli.init.questions import Given, completed

__all__ = ["LEAST_STEPS", "SCHEMA", "Given", "InitCommand", "completed"]
