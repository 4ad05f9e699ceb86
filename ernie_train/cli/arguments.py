"""Arguments and options that several verbs share, and how a mistake in them is told."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ernie_train.core.errors import UserError
from ernie_train.core.terminal import one_line

MOST = 2**31 - 1  # of a count or a seed
LEAST_TEMPERATURE = 1e-3  # logits divided by less overflow
_PROBE = (
    "from importlib.util import find_spec as f; print('missing:', *(n for n in "
    "('torch', 'transformers') if f(n) is None))"
)
_PROBE_TIMEOUT_S = 60


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number that can be used")
    return value


def _temperature(value: float | None) -> float | None:
    if value is not None and 0 < value < LEAST_TEMPERATURE:
        raise typer.BadParameter(f"{value} is too near to 0, which is greedy")
    return _finite(value)


def _top_p(value: float) -> float:
    if not 0 < value <= 1:
        raise typer.BadParameter(f"it must lie in (0, 1], got {value}; --temperature 0 is greedy")
    return value


# Options with a whole number from `min` to what 31 bits hold, with a finite number, and so on.
whole_number: Callable[..., Any] = partial(typer.Option, max=MOST)
number: Callable[..., Any] = partial(typer.Option, callback=_finite)
temperature_option: Callable[..., Any] = partial(
    typer.Option, min=0, max=100, callback=_temperature
)
bad_fraction_option: Callable[..., Any] = partial(number, min=0, max=1)
BAD_ROWS_HELP = "share of unreadable rows that may be left out"

RecipePath = Annotated[
    Path, typer.Argument(help="a YAML recipe, or the name of a shipped one: tiny")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="settings to change: stages.sft.optim.lr=1e-4 ...")
]
Model = Annotated[
    Path, typer.Argument(help="a Hugging Face directory, a checkpoint, a run or a stage of one")
]
Best = Annotated[
    bool, typer.Option("--best", help="of a run: the checkpoint with the best `best_metric`")
]
ColumnsText = Annotated[
    str | None,
    typer.Option(
        "--columns",
        help="names of your columns: '{prompt: question, reward: {value: math}}'; docs/data.md",
    ),
]
Template = Annotated[
    str | None, typer.Option(help="another chat template: ernie_plain, ..., or a file")
]
MaxBadFraction = Annotated[float, bad_fraction_option(help=BAD_ROWS_HELP)]
TopP = Annotated[
    float,
    typer.Option(
        callback=_top_p, help="below 1: only the likeliest tokens, of this total probability"
    ),
]
TopK = Annotated[int, whole_number(min=0, help="above 0: only this many likeliest tokens")]
Seed = Annotated[int, whole_number(min=0, help="seed of the random numbers")]
ShardSize = Annotated[str, typer.Option(help="largest weights file: bytes, or 5GB")]
Force = Annotated[
    bool, typer.Option("--force", help="replace an output of another kind, or what is read")
]
Referee = Annotated[
    str | None,
    typer.Option(
        envvar="ERNIE_TRAIN_REFEREE",
        help="a Python interpreter with torch and transformers, or its environment's directory: "
        "the export is then proven by transformers",
    ),
]


def refuse_idle(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Refuse options of the command line that have no effect beside the others.

    Defaults, and what the environment sets, pass.

    Raises:
        UserError: one of `names` is given; the message ends in `reason`.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(f"--{name.replace('_', '-')} {reason}")


def referee_interpreter(referee: str | None) -> str | None:
    """Return the interpreter that `--referee` names, itself or by its environment's directory.

    It is tried before the work that it is to prove. Raises `UserError` if it is no Python with
    torch and transformers.
    """
    if referee is None:
        return None
    path, shown = Path(referee), one_line(referee)
    try:
        python = path / "bin" / "python" if path.is_dir() else path
        done = subprocess.run(
            [str(python), "-c", _PROBE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise UserError(f"--referee {shown}: there is no interpreter at {python}") from None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--referee {shown}: it cannot be started: {reason}") from None
    said, _, missing = done.stdout.decode(errors="replace").partition("missing:")
    if done.returncode != 0 or said or not done.stdout:
        raise UserError(f"--referee {shown}: it is no Python interpreter")
    if missing.strip():
        raise UserError(f"--referee {shown}: it lacks {missing.strip().replace(' ', ' and ')}")
    return str(python)


# Verbs of LLaMA-Factory, axolotl, ms-swift, TRL and torchtune -> what does it here.
_VERBS_ELSEWHERE = {
    **dict.fromkeys(("train", "sft", "pt", "dpo", "grpo", "finetune", "fine-tune"), "run RECIPE"),
    **dict.fromkeys(("merge", "merge-lora", "save"), "export MODEL OUT"),
    **dict.fromkeys(("infer", "inference", "predict"), "generate MODEL"),
    **dict.fromkeys(("serve", "deploy", "api"), "export MODEL OUT, for a server: docs/serving.md"),
    **dict.fromkeys(("evaluate", "validate"), "eval MODEL"),
    **dict.fromkeys(("preprocess", "tokenize"), "preview DATA"),
    **dict.fromkeys(("convert", "quantize"), "import SOURCE OUT, or export MODEL OUT --quantize"),
}


def usage_message(error: Any) -> str:
    """Return the message of typer's error about an argument, with the command that helps."""
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    message = error.format_message()
    if verb := re.match("No such command '([^']*)'", message):
        known = _VERBS_ELSEWHERE.get(verb[1])
        message = f"{verb[0]}; here it is ernie-train {known}" if known else message
    elif (option := getattr(error, "option_name", None)) and "overrides" in _parameters(context):
        message += _as_override(option)
    return f"{message}{hint}" if message else ""  # without any argument the help was shown


def _parameters(context: Any) -> set[str]:
    return {parameter.name for parameter in context.command.params} if context else set()


def _as_override(option: str) -> str:
    """Return how a setting of the recipe is given that stands as an option."""
    from ernie_train.run.foreign_keys import FOREIGN_KEYS

    known = FOREIGN_KEYS.get(option.lstrip("-").replace("-", "_"), "stages[].optim.lr")
    if " " in known:
        return f"; {known}"
    return f"; a setting of the recipe stands without dashes: {known.replace('[]', '.0')}=..."
