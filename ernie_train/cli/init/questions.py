"""Complete what `init` was given by questions: each answer is checked when it is given."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from ernie_train.cli.init.command import InitCommand, checked_output
from ernie_train.cli.init.rows import BAD_ROWS, TRAINS, OwnModel, Rows, RowsRead
from ernie_train.cli.init.split import FEW_ROWS, HeldOutWish
from ernie_train.core.errors import UserError, wrong_path
from ernie_train.data import Columns
from ernie_train.launch import print_error

METHODS = ("auto", "lora", "full")
KINDS = {**dict.fromkeys(("rl", "grpo"), "upo"), **{kind: kind for kind in TRAINS}}
Ask = Callable[[str, str], str]  # question, default -> answer
T = TypeVar("T")


@dataclass(frozen=True)
class Given:
    """Arguments of the verb `init`; None for what was not given."""

    model: Path | None = None
    data: str | None = None
    out: Path | None = None
    columns: Columns | None = None
    template: str | None = None
    kind: str | None = None
    method: str | None = None
    held_out: str | None = None
    seq_len: int | None = None
    epochs: int = 1
    memory_gb: float | None = None
    max_bad_fraction: float = BAD_ROWS


def completed(given: Given, ask: Ask | None, console: Console) -> InitCommand:
    """Return the command of what was given and asked for.

    What was given is checked first. A wrong answer is told on `console` and asked again.

    Raises:
        UserError: what was given is wrong, or something must be asked for without a terminal.
    """
    wish, kind = HeldOutWish(given.held_out), given.kind and _kind(given.kind)
    apart = wish.text != "0"
    if given.method is not None:
        _method(given.method)
    if given.out is not None:
        checked_output(given.out, held_out=apart)
    if ask is None and (given.model is None or given.data is None):
        missing = " and ".join(f"--{n}" for n in ("model", "data") if getattr(given, n) is None)
        raise UserError(f"{missing} must be given: there is no terminal to ask in")
    read = RowsRead(given.columns, given.seq_len, given.max_bad_fraction, kind)
    value = _Asking(ask, console).value

    def model_at(path: str) -> OwnModel:
        return OwnModel(Path(path), given.template).checked()

    def rows_of(data: str) -> tuple[str, Rows]:
        return data, read.of(data, model)

    def read_for(kind: str) -> tuple[RowsRead, Rows]:
        chosen = replace(read, kind=_kind(kind))
        return chosen, chosen.of(data, model)

    def output(path: str) -> Path:
        return checked_output(Path(path), held_out=apart)

    def held_out(text: str) -> HeldOutWish:
        return HeldOutWish(text).checked(rows, data)

    model = value(given.model, "model directory", "", model_at)
    data, rows = value(given.data, "data: a file of rows, a directory or a pattern", "", rows_of)
    if rows.graded and kind is None and ask is not None:
        question = "train on the rows' answers (sft), or on own ones, by which are right (upo)"
        read, rows = value(None, question, "sft", read_for)
    out = value(given.out, "recipe to write", "recipe.yaml", output)
    if rows.count >= FEW_ROWS:
        question = "rows to measure on instead of training them: a number, a share such as 5%, or 0"
        default = str(HeldOutWish().of(rows, data))
        wish = value(given.held_out, question, default, held_out)
    question = "train the whole model (full), adapters (lora), or what fits the memory (auto)"
    method = value(given.method, question, "auto", _method)
    return InitCommand(model, data, rows, out, read, wish, method, given.epochs, given.memory_gb)


@dataclass(frozen=True)
class _Asking:
    """Ask for values, where there is a terminal; without one defaults are taken."""

    ask: Ask | None
    console: Console

    def value(
        self, given: str | Path | None, question: str, default: str, check: Callable[[str], T]
    ) -> T:
        """Return what `check` makes of a value; an answer that it refuses is asked for again."""
        if given is not None or self.ask is None:
            return check(default if given is None else str(given))
        while True:
            try:
                return check(os.path.expanduser(self.ask(question, default)))
            except UserError as mistake:
                print_error(self.console, str(mistake), mistake.exit_status)
            except OSError as error:
                if (path := wrong_path(error)) is None:
                    raise
                print_error(self.console, str(path), path.exit_status)


def _kind(text: str) -> str:
    if text not in KINDS:
        raise UserError(f"--kind {text}: {', '.join(TRAINS)}")
    return KINDS[text]


def _method(text: str) -> str:
    if text not in METHODS:
        raise UserError(f"--method {text}: {', '.join(METHODS)}")
    return text
