"""The command line: `ernie-train VERB`, also `python -m ernie_train VERB`.

Exit status: 0 done; 2 a mistake in recipe, data or arguments; 3 stopped on a signal after saving;
4 training became non-finite; 5 a stage's gate was not met; 1 anything else.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Annotated, Any, cast

import typer
from rich.logging import RichHandler

from ernie_train.cli.arguments import (
    Best,
    Force,
    Model,
    Overrides,
    RecipePath,
    Referee,
    Seed,
    ShardSize,
    TopK,
    TopP,
    number,
    referee_interpreter,
    refuse_idle,
    temperature_option,
    usage_message,
    whole_number,
)
from ernie_train.cli.grading import evaluate, generate, score
from ernie_train.cli.recipes import check, doctor, init, plan, preview, schema
from ernie_train.cli.run import RunCommand
from ernie_train.core import process_group
from ernie_train.core.errors import (
    ErnieTrainError,
    FailedElsewhere,
    UserError,
    full_gpu,
    wrong_path,
)
from ernie_train.core.terminal import CurrentStderr, Terminal, show_every_character
from ernie_train.io.outputs import check_output_directory
from ernie_train.launch import LaunchSettings, print_error
from ernie_train.launch.rank_files import RankReporter, is_supervised

app = typer.Typer(
    help="Trains ERNIE 4.5 mixture-of-experts models with PaddlePaddle.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@dataclass
class CommonOptions:
    """Options before the verb; the context's object of every verb."""

    debug: bool = False


@app.callback()
def _common_options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option(help="show tracebacks and debug messages")] = False,
) -> None:
    context.ensure_object(CommonOptions).debug = debug
    level = logging.DEBUG if debug else logging.WARNING
    console = Terminal(file=cast(IO[str], CurrentStderr()))
    handler = RichHandler(console=console, show_time=False, show_path=debug)
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)


@app.command()
def run(
    context: typer.Context,
    recipe: RecipePath,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="where to write; default runs/<recipe's name>")
    ] = None,
    first: Annotated[
        str | None, typer.Option("--from", help="repeat this stage and all after it")
    ] = None,
    last: Annotated[str | None, typer.Option("--until", help="stop after this stage")] = None,
    extend: Annotated[
        bool,
        typer.Option(
            help="continue the last stage, or an unfinished one, at another rate or longer"
        ),
    ] = False,
    referee: Referee = None,
    nproc: Annotated[
        int | None, whole_number(min=1, help="start this many ranks on this machine")
    ] = None,
    max_restarts: Annotated[
        int, whole_number(min=0, help="restarts when a rank dies or hangs")
    ] = LaunchSettings.max_restarts,
    hang_timeout_s: Annotated[
        float, number(min=3, help="a rank without a sign of life for this long has hung")
    ] = LaunchSettings.hang_timeout_s,
    nnodes: Annotated[int, whole_number(min=1, help="machines")] = LaunchSettings.nnodes,
    master: Annotated[
        str | None, typer.Option(help="name or address of one of the machines, and a port there")
    ] = LaunchSettings.master,
    node_rank: Annotated[
        int, whole_number(min=-1, help="number of this machine; -1: in order of arrival")
    ] = LaunchSettings.node_rank,
) -> None:
    """Run a recipe's stages; the same command on the same directory resumes."""
    python = referee_interpreter(referee)
    command = RunCommand(recipe, overrides or [], run_dir, first, last, extend, python)
    settings = LaunchSettings(
        nproc=nproc or 1,
        nnodes=nnodes,
        master=master,
        node_rank=node_rank,
        max_restarts=max_restarts,
        hang_timeout_s=hang_timeout_s,
    )
    debug = context.ensure_object(CommonOptions).debug
    if nproc is not None:
        raise typer.Exit(command.launch(settings, Terminal(stderr=True), debug=debug))
    if settings != LaunchSettings(nproc=1):
        raise UserError("the options of a launch need --nproc, the ranks of this machine")
    console = Terminal(quiet=not process_group.is_main())
    if status := command.run_on_cores(console, Terminal(stderr=True), debug=debug):
        raise typer.Exit(status)


@app.command()
def status(
    run_dir: Annotated[Path, typer.Argument(help="a run directory")],
    follow: Annotated[
        bool, typer.Option("--follow", help="go on showing it until the run ends")
    ] = False,
) -> None:
    """Show a run's stages, steps and latest metrics."""
    from ernie_train.cli.status import print_status

    if follow:
        from ernie_train.cli.watch import follow_status

        follow_status(run_dir, Terminal())
    print_status(run_dir, Terminal())


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="run directories; several are compared")],
    out: Annotated[
        Path | None, typer.Option(help="the page; default report.html in the first directory")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="keep it up to date until the runs are complete")
    ] = False,
) -> None:
    """Write a page that shows runs: curves, health, completions, evaluation, recipe."""
    from ernie_train.cli.watch import report_runs

    report_runs(run_dirs, out, Terminal(), watch=watch)


for _verb in (check, doctor, init, plan, preview, schema, score):
    app.command()(_verb)
app.command(name="eval")(evaluate)
app.command()(generate)


@app.command()
def chat(
    model: Model,
    system: Annotated[str, typer.Option(help="a system prompt")] = "",
    tools: Annotated[
        str | None,
        typer.Option(
            help="tools that it may call: calculator,python,my_tools.py; default those of the "
            "run's recipe; none for none"
        ),
    ] = None,
    max_turns: Annotated[
        int | None, whole_number(min=2, help="turns of an answer with --tools; default 8")
    ] = None,
    max_new_tokens: Annotated[int, whole_number(min=1, help="longest turn, in tokens")] = 1024,
    temperature: Annotated[float, temperature_option(help="0 is greedy")] = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    seed: Seed = 0,
    fold: Annotated[bool, typer.Option("--fold", help="show reasoning as one line")] = False,
    transcript: Annotated[
        Path | None, typer.Option(help="write conversations here, as rows of data")
    ] = None,
    force: Force = False,
    best: Best = False,
) -> None:
    """Talk to a model in the terminal: reasoning is shown, tool calls are executed."""
    from ernie_train.cli.chat import ChatCommand, line_reader
    from ernie_train.cli.evaluate import parse_tools
    from ernie_train.generate.sampler import SamplingConfig

    given = tools not in (None, "none")
    if max_turns is not None and not given:
        raise UserError("--max-turns needs --tools: those of a recipe have its max_turns")
    if transcript is None and force:
        raise UserError("--force replaces what lies at --transcript: give that, or leave it out")
    ChatCommand(
        model=model,
        best=best,
        system=system,
        environment=parse_tools(str(tools), max_turns or 8, max_new_tokens) if given else None,
        use_tools=tools != "none",
        sampling=SamplingConfig(max_new_tokens, temperature, top_p, top_k, seed),
        folded=fold,
        transcript=transcript,
        force=force,
    ).run(Terminal(), line_reader())


@app.command()
def export(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Argument(help="directory to write")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "bfloat16",
    max_shard_size: ShardSize = "5GB",
    referee: Referee = None,
    force: Force = False,
    best: Best = False,
    adapter: Annotated[
        bool, typer.Option(help="write the LoRA adapter alone, as PEFT reads it, not merged")
    ] = False,
    quantize: Annotated[
        str | None, typer.Option(help="int8 or int4 weights, in compressed-tensors' format")
    ] = None,
    quantize_method: Annotated[
        str | None, typer.Option(help="gptq, on rows of the run or --calibration (default), or rtn")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="inputs that share a scale of int4, by default 128 or 32")
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="file of rows for gptq")] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="by default 16384")] = None,
) -> None:
    """Write a Hugging Face directory and prove it by reading it back."""
    from ernie_train.cli.model import (
        best_checkpoint,
        export_adapter_of,
        export_model,
        quantize_config,
    )
    from ernie_train.io.run_dir import RECEIPT

    settings = quantize_config(
        quantize, calibration, method=quantize_method, group_size=group_size,
        calibration_tokens=calibration_tokens,
    )  # fmt: skip
    if adapter:
        unread = ["quantize", "dtype", "max_shard_size", "referee"]
        refuse_idle(context, unread, "and --adapter exclude each other")
    mark = "adapter_config.json" if adapter else RECEIPT
    check_output_directory(out, mark, inputs=[model], force=force)
    model = best_checkpoint(model) if best else model
    if adapter:
        export_adapter_of(model, out, Terminal())
        return
    export_model(
        model, out, dtype, max_shard_size, referee_interpreter(referee), Terminal(),
        quantize=settings, calibration=calibration,
    )  # fmt: skip


@app.command(name="import")
def import_(
    context: typer.Context,
    source: Annotated[
        Path, typer.Argument(help="a Llama-architecture directory (safetensors) or a GGUF file")
    ],
    out: Annotated[Path, typer.Argument(help="directory to write")],
    experts: Annotated[
        int | None, whole_number(min=1, help="make a mixture of this many routed experts")
    ] = None,
    top_k: Annotated[int | None, whole_number(min=1, help="routed experts a token uses")] = None,
    shared: Annotated[int, whole_number(min=0, help="shared experts")] = 0,
    noise: Annotated[
        float, number(min=0, help="noise on routed experts, relative to their weights")
    ] = 0.0,
    seed: Annotated[int, whole_number(min=0, help="seed of --noise and of the router")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default as stored")
    ] = None,
    max_shard_size: ShardSize = "5GB",
    referee: Referee = None,
    force: Force = False,
) -> None:
    """Write a Llama-architecture model as an ERNIE 4.5 directory and prove that it is the same."""
    from ernie_train.cli.model import import_source
    from ernie_train.run.import_model import RECEIPT
    from ernie_train.weights.upcycle import Upcycling

    if (experts is None) != (top_k is None):
        raise UserError("--experts and --top-k go together")
    if experts is None:
        refuse_idle(context, ["shared", "noise", "seed"], "needs --experts and --top-k")
    check_output_directory(out, RECEIPT, inputs=[source], force=force)
    upcycling = experts and top_k and Upcycling(experts, top_k, shared, noise, seed)
    import_source(
        source, out, Terminal(), upcycling=upcycling or None, dtype=dtype,
        max_shard_size=max_shard_size, referee=referee_interpreter(referee),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its status; a mistake is one message without a traceback."""
    show_every_character()
    reporter = RankReporter.of_this_process()
    if reporter is None:
        status, message = _run(arguments)
        if message:
            print_error(Terminal(stderr=True), message, status)
        sys.exit(status)
    reporter.start()
    reporter.finish(*_run(arguments))


@cache
def _command() -> Any:
    """Return the verbs with their options, which Typer reads from the signatures above."""
    return typer.main.get_command(app)


def _run(arguments: list[str] | None) -> tuple[int, str]:
    """Return the exit status and the message that explains it, "" if there is none."""
    options = CommonOptions()
    try:
        result: Any = _command()(arguments, standalone_mode=False, obj=options)
    except ErnieTrainError as error:
        return _failure(error, error.exit_status, debug=options.debug)
    except typer.Exit as stop:
        return stop.exit_code, ""
    except KeyboardInterrupt:
        return 1, "stopped at once: only what was saved before, if anything, is kept"
    except Exception as error:  # anything else is a defect: one line, unless --debug asks for more
        if hasattr(error, "exit_code") and hasattr(error, "ctx"):  # a mistake in the arguments
            return error.exit_code, usage_message(error)
        known = full_gpu(error) or (wrong_path(error) if isinstance(error, OSError) else None)
        if known is not None:
            return _failure(known, known.exit_status, debug=options.debug)
        hint = " (a defect; --debug shows where)"
        return _failure(error, 1, hint, debug=options.debug)
    return result if isinstance(result, int) else 0, ""


def _failure(
    error: BaseException, exit_status: int, hint: str = "", *, debug: bool
) -> tuple[int, str]:
    on_main_too = (
        isinstance(error, ErnieTrainError) and error.on_all_ranks and not process_group.is_main()
    )
    if (on_main_too and not is_supervised()) or isinstance(error, FailedElsewhere):
        return exit_status, ""  # another rank prints the message
    if debug:
        Terminal(stderr=True).print_exception()
    kind = "" if isinstance(error, ErnieTrainError) else f"{type(error).__name__}: "
    return exit_status, f"{kind}{error}{hint}"
