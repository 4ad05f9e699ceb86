"""The verbs that try a finished model: eval, generate, export."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from ernie_train.core.config import load_yaml, parse_config
from ernie_train.core.errors import storage_errors
from ernie_train.core.progress import progress_bar
from ernie_train.core.signals import StopFlag
from ernie_train.data import Tokenizer, load_tokenizer, prompt_ids
from ernie_train.eval.evaluation import EvalConfig, evaluate, load_problems
from ernie_train.eval.prompts import completion_text
from ernie_train.generate.engine import generate
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.run.export import comparison_prompts
from ernie_train.run.export import export as export_directory
from ernie_train.run.recipe import Recipe
from ernie_train.run.render import evaluation_table, model_card, receipt_line
from ernie_train.weights.hf import load_pretrained
from ernie_train.weights.model_directory import find_model


def open_model(path: Path) -> tuple[Ernie4_5_MoeForCausalLM, Tokenizer]:
    """Model and tokenizer of a Hugging Face directory, a checkpoint or a run directory."""
    place = find_model(path)
    tokenizer = load_tokenizer(place.tokenizer)
    return load_pretrained(place.weights), tokenizer


def evaluate_model(
    path: Path,
    data: Path,
    tasks: list[str],
    max_examples: int | None,
    config: EvalConfig,
    output: Path | None,
    console: Console,
) -> None:
    """Solves problems with the model at `path` and prints the table."""
    problems = load_problems(data, tasks=tasks, max_examples=max_examples)
    model, tokenizer = open_model(path)
    total = len(problems) * config.samples
    with StopFlag() as stop, progress_bar(console, "problems", total) as advance_to:
        result = evaluate(
            model,
            tokenizer,
            problems,
            config,
            on_progress=advance_to,
            stop_requested=lambda: stop.requested,
        )
    console.print(evaluation_table({"trained": result.to_dict()}))
    if output is not None:
        with storage_errors("cannot write the samples", output):
            lines = (json.dumps(sample, ensure_ascii=False) for sample in result.samples)
            output.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def complete(
    path: Path,
    prompt: str,
    *,
    raw: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> str:
    """The model's completion of one prompt."""
    model, tokenizer = open_model(path)
    if raw:
        ids = tokenizer.encode(prompt)
    else:
        ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}], None)
    with StopFlag() as stop:
        completions = generate(
            model,
            [ids],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            eos_token_id=tokenizer.stop_token_ids,
            stop_requested=lambda: stop.requested,
        )
    return completion_text(tokenizer, completions[0])


def export_model(
    path: Path, out: Path, dtype: str, max_shard_size: str, referee: str | None, console: Console
) -> None:
    """Exports the model at `path` to `out` and prints what the comparison found."""
    model, tokenizer = open_model(path)
    recipe_file, thinking = path / "recipe.yaml", True
    card = f"# {path.name}\n\nExported with ernie_train.\n"
    if recipe_file.exists():
        recipe = parse_config(Recipe, load_yaml(recipe_file), str(recipe_file))
        evaluation = path / "evaluation.json"
        measured = json.loads(evaluation.read_text("utf-8")) if evaluation.exists() else None
        card, thinking = model_card(recipe, measured), recipe.thinking
    receipt = export_directory(
        model,
        tokenizer,
        out,
        prompts=comparison_prompts(tokenizer, seed=0),
        dtype=dtype,
        card=card,
        max_shard_size=max_shard_size,
        referee=referee,
        thinking=thinking,
    )
    console.print(receipt_line(out, receipt), highlight=False)
