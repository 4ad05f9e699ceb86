"""The verbs that prepare a run: their options.

What they run is imported when one of them is called: other verbs start without it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ernie_train.cli.arguments import (
    ColumnsText,
    MaxBadFraction,
    Overrides,
    RecipePath,
    Template,
    number,
    refuse_idle,
    whole_number,
)
from ernie_train.core.errors import UserError
from ernie_train.core.terminal import Terminal


def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="also print the recipe with every default")
    ] = False,
) -> None:
    """Validate recipe, model, tokenizer and data without training, and show the label mask."""
    from ernie_train.run.check import check_recipe, print_resolved
    from ernie_train.run.recipe import load_recipe

    loaded, console = load_recipe(recipe, overrides), Terminal()
    if resolved:
        print_resolved(loaded, console)
    check_recipe(loaded, console)


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int | None, whole_number(min=1, help="ranks; default 8")] = None,
    gpu_memory_gb: Annotated[
        float | None, number(min=0.001, help="memory of a rank; default 80")
    ] = None,
    expert: Annotated[
        int | None, whole_number(min=1, help="only layouts of this expert degree")
    ] = None,
    document_tokens: Annotated[
        int | None, whole_number(min=1, help="mean length of packed documents; default a row")
    ] = None,
    tflops: Annotated[
        float | None, number(min=1e-6, help="what a rank achieves in training")
    ] = None,
    interconnect_gbps: Annotated[
        float | None, number(min=1e-6, help="Gbit/s that a rank sends to others")
    ] = None,
    between_gbps: Annotated[
        float | None, number(min=1e-6, help="the same, to ranks of other machines")
    ] = None,
    memory_gb_per_s: Annotated[
        float | None, number(min=1e-6, help="GB/s that a rank reads from its memory")
    ] = None,
    layer_us: Annotated[
        float | None, number(min=1e-6, help="microseconds to start a layer's kernels in sampling")
    ] = None,
) -> None:
    """Show how a recipe fits a cluster: memory, traffic and time of every layout."""
    from ernie_train.plan import PlanSettings, print_plan
    from ernie_train.run.recipe import load_recipe

    settings = PlanSettings(
        ranks=gpus,
        memory_gb=gpu_memory_gb,
        expert=expert,
        document_tokens=document_tokens,
        tflops=tflops,
        interconnect_gbps=interconnect_gbps,
        between_gbps=between_gbps,
        memory_gb_per_s=memory_gb_per_s,
        layer_us=layer_us,
    )
    print_plan(load_recipe(recipe, overrides), settings, Terminal())


def preview(
    context: typer.Context,
    data: Annotated[str, typer.Argument(help="a file of rows, a directory or a pattern")],
    model: Annotated[
        Path | None, typer.Option(help="a model directory: shows text and label mask in its format")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="a tokenizer directory, the same")] = None,
    template: Template = None,
    columns: ColumnsText = None,
    row: Annotated[
        str | None, typer.Option(help="only this row, by its line or as file:line")
    ] = None,
    rows: Annotated[int, whole_number(min=0, help="rows to show")] = 3,
    max_rows: Annotated[int, whole_number(min=0, help="rows to read; 0 for all")] = 1000,
    seq_len: Annotated[int, whole_number(min=2, help="longest row that is kept")] = 4096,
    max_tokens: Annotated[int, whole_number(min=2, help="tokens of a row to show")] = 400,
) -> None:
    """Show rows of data files: messages, text, label mask, lengths, what is left out and why."""
    from ernie_train.cli.preview import PreviewSettings, preview_data, preview_tokenizer
    from ernie_train.data import parse_columns

    if row is not None:
        refuse_idle(context, ["rows", "max_rows"], "and --row exclude each other")
    if model is None and tokenizer is None:
        unread = ["template", "seq_len", "max_tokens"]
        refuse_idle(context, unread, "needs --model or --tokenizer")
    mapped = None if columns is None else parse_columns(columns, "--columns")
    settings = PreviewSettings(mapped, row, rows, max_rows, seq_len, max_tokens)
    preview_data(data, preview_tokenizer(model, tokenizer, template), settings, Terminal())


def schema() -> None:
    """Print the JSON Schema of a recipe, by which editors complete and check it."""
    from ernie_train.run.recipe import schema_text

    print(schema_text(), end="")


def init(
    model: Annotated[Path | None, typer.Option(help="a model directory, or a run")] = None,
    data: Annotated[
        str | None, typer.Option(help="a file of rows, a directory or a pattern")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="recipe to write; default recipe.yaml")] = None,
    columns: ColumnsText = None,
    template: Template = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="sft, pretrain, dpo, or upo (also grpo, rl): reinforcement learning on rows with "
            "answers; default what the rows are"
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="full, lora, or auto (default): what fits the memory")
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="rows that are measured instead of trained: 50, 5%, or 0; default 5%, 4 to 500"
        ),
    ] = None,
    seq_len: Annotated[
        int | None, whole_number(min=2, help="tokens of a row; default by the rows' lengths")
    ] = None,
    epochs: Annotated[int, whole_number(min=1, help="passes over the data")] = 1,
    memory_gb: Annotated[
        float | None, number(min=0.001, help="memory to fit; default this machine's")
    ] = None,
    max_bad_fraction: MaxBadFraction = 0.01,
) -> None:
    """Write a recipe for a model and a file of rows; ask for what is not given."""
    from ernie_train.cli.init import Given, completed
    from ernie_train.data import parse_columns

    asks = sys.stdin.isatty() and sys.stdout.isatty()
    given = Given(
        model=model,
        data=data,
        out=out,
        columns=None if columns is None else parse_columns(columns, "--columns"),
        template=template,
        kind=kind,
        method=method,
        held_out=held_out,
        seq_len=seq_len,
        epochs=epochs,
        memory_gb=memory_gb,
        max_bad_fraction=max_bad_fraction,
    )
    completed(given, _ask if asks else None, Terminal(stderr=True)).run(Terminal())


def doctor(
    selftest: Annotated[
        bool, typer.Option("--selftest", help="compute, compare and measure on this device")
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="of the self-test: attention,ranks or other checks alone")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="report of the self-test to write, .md or .json")
    ] = None,
) -> None:
    """Show versions, device, kernels and CPU set-up, and what is slow; or test the device."""
    if selftest:
        from ernie_train.selftest.command import selftest as run_selftest

        names = [name.strip() for name in only.split(",")] if only else []
        raise typer.Exit(0 if run_selftest(names, out, Terminal()) else 1)
    if only is not None or out is not None:
        raise UserError("--only and --out belong to doctor --selftest")
    from ernie_train.cli.doctor import doctor_report, print_doctor_report

    print_doctor_report(doctor_report())


def _ask(what: str, default: str) -> str:
    answer: str = typer.prompt(what, default=default or None)
    return answer
