"""The verbs that sample completions of rows or grade them, `generate`, `eval`, `score`: options.

What they run is imported when one of them is called: other verbs start without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ernie_train.cli.arguments import (
    BAD_ROWS_HELP,
    Best,
    ColumnsText,
    Force,
    MaxBadFraction,
    Model,
    Seed,
    TopK,
    TopP,
    bad_fraction_option,
    temperature_option,
    whole_number,
)
from ernie_train.core.errors import UserError
from ernie_train.core.terminal import Terminal
from ernie_train.io.outputs import check_output_file

Problems = Annotated[Path, typer.Option(help="problems: a file of rows, a directory or a pattern")]
HeldOut = Annotated[
    Path | None,
    typer.Option(
        help="problems: a file of rows, a directory or a pattern; default data/test of this "
        "directory, or of the package"
    ),
]
Tasks = Annotated[str | None, typer.Option(help="only these tasks or domains: math,aiw")]
Samples = Annotated[int, whole_number(min=1, help="completions a problem")]
Sizes = Annotated[str | None, typer.Option(help="sizes of pass@k: 1,8; default 1 and n")]
FewShotFile = Annotated[
    Path | None, typer.Option(help="worked examples for --shots: a file of rows like --data")
]
Shots = Annotated[int | None, whole_number(min=1, help="examples before each problem; default 4")]
MaxExamples = Annotated[int | None, whole_number(min=1, help="problems of each task")]
Tools = Annotated[
    str | None,
    typer.Option(help="tools that may be called: calculator,python,lookup,my_tools.py"),
]
MaxTurns = Annotated[
    int | None, whole_number(min=2, help="turns of an episode with --tools; default 8")
]
NewTokens = Annotated[
    int | None,
    whole_number(
        min=1,
        help="longest completion, in tokens; default 1024, or what the model's context leaves",
    ),
]
BatchSize = Annotated[
    int | None, whole_number(min=1, help="completions sampled at once; default 256")
]
Temperature = Annotated[float | None, temperature_option(help="default 0 for n=1, else 1")]
ResultsDirectory = Annotated[
    Path | None, typer.Option(help="directory for results.json and samples.jsonl")
]
EngineUrl = Annotated[
    str | None,
    typer.Option(
        "--engine", metavar="URL", help="a vLLM server that has the same model, and samples"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print results as JSON")]


def evaluate(
    model: Model,
    data: HeldOut = None,
    columns: ColumnsText = None,
    max_bad_fraction: MaxBadFraction = 0.01,
    tasks: Tasks = None,
    n: Samples = 1,
    k: Sizes = None,
    few_shot: FewShotFile = None,
    shots: Shots = None,
    max_examples: MaxExamples = None,
    tools: Tools = None,
    max_turns: MaxTurns = None,
    max_new_tokens: NewTokens = None,
    batch_size: BatchSize = None,
    temperature: Temperature = None,
    seed: Seed = 0,
    engine: EngineUrl = None,
    out: ResultsDirectory = None,
    as_json: AsJson = False,
    force: Force = False,
    best: Best = False,
) -> None:
    """Solve held-out problems; print accuracy, pass@k and majority vote by task."""
    from ernie_train.cli.evaluate import EvalCommand, parse_ks, parse_tools
    from ernie_train.data import parse_columns
    from ernie_train.eval.evaluation import EvalConfig
    from ernie_train.io.shipped import shared_path

    if shots is not None and few_shot is None:
        raise UserError("--shots needs --few-shot, the file of the examples")
    if max_turns is not None and tools is None:
        raise UserError("--max-turns needs --tools: without them a problem has one turn")
    if engine is not None and batch_size is not None:
        raise UserError("--batch-size is that of our own sampler: leave it out beside --engine")
    chosen = (0.0 if n == 1 else 1.0) if temperature is None else temperature
    config = EvalConfig(
        max_new_tokens, batch_size or 256, n, chosen, seed, () if k is None else parse_ks(k)
    )
    turns = max_turns or 8
    command = EvalCommand(
        model=model,
        best=best,
        data=shared_path("data/test") if data is None else data,
        columns=None if columns is None else parse_columns(columns, "--columns"),
        max_bad_fraction=max_bad_fraction,
        tasks=[name.strip() for name in tasks.split(",")] if tasks else [],
        max_examples=max_examples,
        few_shot=few_shot,
        shots=(shots or 4) if few_shot is not None else None,
        config=config,
        environment=None if tools is None else parse_tools(tools, turns, config.most_new_tokens),
        engine=engine,
        out=out,
        force=force,
    )
    command.run(Terminal(quiet=as_json), Terminal(stderr=as_json), as_json=as_json)


def score(
    reward: Annotated[
        str,
        typer.Option(
            help="a verifier (math, logic, code, ...), row for the one that each row names, "
            "FILE.py:FUNCTION, or a .yaml file with a recipe's reward"
        ),
    ],
    data: Problems,
    completions: Annotated[
        Path, typer.Option(help='lines {"completion": text}, in the order of the data or with id')
    ],
    model: Annotated[
        Path | None, typer.Option(help="whose chat format they have; default: as they look")
    ] = None,
    columns: ColumnsText = None,
    out: Annotated[Path | None, typer.Option(help="write each score here, as JSONL")] = None,
    force: Force = False,
) -> None:
    """Grade completions with a verifier and print how many are right."""
    from ernie_train.cli.score import SCORE_KEYS, score_file
    from ernie_train.data import parse_columns

    if out is None and force:
        raise UserError("--force replaces what lies at --out: give that, or leave it out")
    if out is not None:
        check_output_file(out, SCORE_KEYS, inputs=[data, completions], force=force)
    mapped = None if columns is None else parse_columns(columns, "--columns")
    score_file(reward, data, completions, out, Terminal(), mapped, model)


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="what to ask; shown as it is written")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="many: a file of rows, a directory or a pattern")
    ] = None,
    columns: ColumnsText = None,
    max_bad_fraction: Annotated[
        float | None, bad_fraction_option(help=f"{BAD_ROWS_HELP}; default 0.01")
    ] = None,
    system: Annotated[str | None, typer.Option(help="a system prompt")] = None,
    raw: Annotated[
        bool, typer.Option(help="continue the text itself, without chat format")
    ] = False,
    max_new_tokens: Annotated[int, whole_number(min=1, help="longest completion, in tokens")] = 256,
    temperature: Annotated[float, temperature_option(help="0 is greedy")] = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    batch_size: Annotated[
        int | None,
        whole_number(
            min=1, help="prompts of --prompts sampled at once; default 64, with --engine 512"
        ),
    ] = None,
    engine: EngineUrl = None,
    out: Annotated[
        Path | None, typer.Option(help="write JSONL here; default: print it, row by row")
    ] = None,
    force: Force = False,
    best: Best = False,
) -> None:
    """Complete a prompt while you watch, or a file of prompts as JSONL."""
    from ernie_train.cli.generate import GenerateCommand
    from ernie_train.data import parse_columns
    from ernie_train.generate.sampler import SamplingConfig

    GenerateCommand(
        model=model,
        best=best,
        prompt=prompt,
        prompts=prompts,
        columns=None if columns is None else parse_columns(columns, "--columns"),
        max_bad_fraction=max_bad_fraction,
        system=system,
        raw=raw,
        sampling=SamplingConfig(max_new_tokens, temperature, top_p, top_k, seed),
        batch_size=batch_size,
        engine=engine,
        out=out,
        force=force,
    ).run(Terminal(stderr=True))
