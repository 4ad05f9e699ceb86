"""Tables of evaluation results, the line of an export's receipt, and the model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ernie_train.eval.measured import measured
from ernie_train.io.run_dir import RECEIPT
from ernie_train.run.proof import Receipt
from ernie_train.run.recipe import Recipe

MOST_CUT = 0.2  # share of completions without an end


def evaluation_table(result: dict[str, Any]) -> Group:
    """Return accuracy by task and domain, beside baseline and untrained model, for printing.

    pass@k and maj@n stand with their intervals, where the result has them.
    """
    trained = measured(result["trained"])
    untrained: dict[str, Any] = {}
    if "untrained" in result:
        untrained = {task["task"]: task for task in measured(result["untrained"])["tasks"]}
    tasks = _table("held-out problems", "domain", "task", "n", "accuracy", "baseline")
    several = any(name != "pass@1" for task in trained["tasks"] for name in _estimates(task))
    if not several:
        tasks.add_column("95 %", justify="right")
    if untrained:
        tasks.add_column("untrained", justify="right")
    tasks.add_column("cut off", justify="right")
    for task in trained["tasks"]:
        cells = [task["domain"], task["task"], str(task["problems"])]
        cells += [_percent(task["accuracy"]), _percent(task["baseline"])]
        if not several:
            cells.append(_interval(_estimates(task).get("pass@1")))
        if untrained:
            cells.append(_percent(untrained[task["task"]]["accuracy"]))
        tasks.add_row(*cells, _percent(task["truncated"]))
    domains = _table("", "domain", "accuracy", "baseline", "above it")
    for domain, values in trained["domains"].items():
        accuracy, baseline = values["accuracy"], values["baseline"]
        known = baseline is not None and accuracy is not None
        gain = f"{100 * (accuracy - baseline):+.1f}" if known else "-"
        domains.add_row(domain, _percent(accuracy), _percent(baseline), gain)
    lines = [f"mean over tasks: {_with_sign(trained['mean_accuracy'])}"]
    lines.append("in %; baseline: always the task's most frequent answer, - where rows have none")
    lines.append("95 %: interval over problems, where a completion that cannot be scored is wrong")
    if untrained:
        count = next(iter(untrained.values()))["problems"]
        lines.append(f"untrained: the model before its first step, on {count} problems of a task")
    lines += [
        f"{task['task']}: {n} completions could not be scored ({status})"
        for task in trained["tasks"]
        for status, n in task["excluded"].items()
    ]
    if called := sum(task.get("episodes", 0) for task in trained["tasks"]):
        of_all = sum(task["completions"] for task in trained["tasks"])
        lines.append(f"{called} of {of_all} completions could call tools")
    more = [_estimate_table(trained["tasks"])] if several else []
    return Group(tasks, *more, domains, *lines, *_cut_lines(trained), *_unclosed_lines(trained))


def _estimates(task: dict[str, Any]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = task.get("estimates", {})  # earlier versions have none
    return found


def _estimate_table(tasks: Sequence[dict[str, Any]]) -> Table:
    """Return pass@k and majority votes of each task, their intervals below them."""
    names = list(dict.fromkeys(name for task in tasks for name in _estimates(task)))
    table = _table("pass@k, majority vote and 95 % intervals", "task", *names)
    for task in tasks:
        found = [_estimates(task).get(name) for name in names]
        cells = [f"{_percent(one['value'])}\n{_interval(one)}" if one else "-" for one in found]
        table.add_row(task["task"], *cells)
    return table


def _cut_lines(evaluation: dict[str, Any]) -> list[Text]:
    """Return a warning if more completions were cut off than a result can be trusted with."""
    tasks = evaluation["tasks"]
    problems = sum(task["problems"] for task in tasks)
    share = sum(task["truncated"] * task["problems"] for task in tasks) / problems
    if share <= MOST_CUT:
        return []
    line = f"{_percent(share)} % of the completions were cut off, which are hardly ever right"
    return [Text(f"{line}: give more new tokens, if the model's context has room", "yellow")]


def _unclosed_lines(evaluation: dict[str, Any]) -> list[Text]:
    """Return a line on completions that never closed the thinking part, if there are any."""
    tasks = [task for task in evaluation["tasks"] if task.get("unclosed")]
    if not tasks:
        return []
    unclosed = sum(task["unclosed"] for task in tasks)
    of_all = sum(task["completions"] for task in evaluation["tasks"])
    line = f"{unclosed} of {of_all} completions never closed the thinking part"
    if len(tasks) < len(evaluation["tasks"]):
        line += " (" + ", ".join(f"{t['task']}: {t['unclosed']}" for t in tasks) + ")"
    if 2 * unclosed < of_all:
        return [Text(line)]
    remedy = "give more new tokens, or train the Thinking format first"
    return [Text(f"{line}, so that no verifier saw an answer: {remedy}", "yellow")]


def stage_table(results: Sequence[tuple[str, dict[str, Any]]]) -> Group:
    """Return a table of accuracy after each stage, with the gain of the last stage.

    The problems may have changed between stages: what one did not solve is "-".
    """
    table = _table("solved, in %", "domain", "task", *(name for name, _ in results))
    if len(results) > 1:
        table.add_column("last stage", justify="right")

    def add(domain: str, task: str, values: list[float | None], section: bool = False) -> None:
        cells = [_percent(value) for value in values]
        if len(values) > 1:
            before, after = values[-2:]
            gain = None if before is None or after is None else after - before
            cells.append("-" if gain is None else f"{100 * gain:+.1f}")
        table.add_row(domain, task, *cells, end_section=section)

    evaluations = [measured(result["trained"]) for _, result in results]
    solved = [{(t["domain"], t["task"]): t["accuracy"] for t in e["tasks"]} for e in evaluations]
    for at, (domain, task) in enumerate(solved[-1], start=1):
        add(domain, task, [found.get((domain, task)) for found in solved], at == len(solved[-1]))
    for domain in evaluations[-1]["domains"]:
        found = (e["domains"].get(domain, {}) for e in evaluations)
        add(domain, "all", [one.get("accuracy") for one in found])
    add("all", "mean", [evaluation["mean_accuracy"] for evaluation in evaluations])
    return Group(table, *_unclosed_lines(evaluations[-1]))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, box=SIMPLE, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("domain", "task") else "right")
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _with_sign(share: float | None) -> str:
    return "-" if share is None else f"{_percent(share)} %"


def _interval(estimate: dict[str, float] | None) -> str:
    if estimate is None:
        return "-"
    return f"{_percent(estimate['low'])}-{_percent(estimate['high'])}"


def receipt_line(
    directory: Path, receipt: Receipt, file: str = RECEIPT, verb: str = "exported"
) -> str:
    """Return one line with the outcome of the comparison after an export or import."""
    mtp = len(receipt.carried_tensors)
    carried = f", {mtp} tensors of multi-token prediction carried through unchanged" if mtp else ""
    versions = f" ({receipt.reader})" if " " in receipt.reader else ""
    return (
        f"{verb} to {directory} ({receipt.dtype}{_quantized(receipt)}): "
        f"{'passed' if receipt.passed else 'FAILED'}, {receipt.stored_tensors} stored tensors "
        f"equal bit for bit, largest logit difference {receipt.max_logit_difference:.1e} on "
        f"logits up to {receipt.max_logit:.1f}{carried}; {receipt.note}{versions}; see {file}"
    )


def _quantized(receipt: Receipt) -> str:
    """Return ", int4 in groups of 32 by gptq" and how many weights got too few tokens for it."""
    if (found := receipt.quantization) is None:
        return ""
    few = len(found["rounded_for_few_tokens"])
    rest = f", but {few} of {found['weights']} weights, of experts that few tokens reached, by rtn"
    return f", {found['scheme']} by {found['method']}{rest if few else ''}"


def model_card(recipe: Recipe, evaluation: dict[str, Any] | None) -> str:
    """Return the README.md of an exported model: its origin and its measurements."""
    stages = " -> ".join(f"{stage.name} ({stage.kind})" for stage in recipe.stages)
    # The directory's name alone: its path says nothing to others, and may say too much.
    path = recipe.model.path
    source = Path(path).resolve().name if path else f"preset {recipe.model.preset}"
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags:",
        "- ernie4_5", "- ernie_train", "---", "",
        f"# {recipe.name}", "",
        f"Trained with ernie_train from {source}, seed {recipe.seed}, stages: {stages}.", "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained(".")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "```", "",
    ]  # fmt: skip
    if evaluation is not None:
        lines += ["| domain | task | problems | accuracy | most frequent answer |"]
        lines += ["|---|---|---|---|---|"]
        lines += [
            f"| {t['domain']} | {t['task']} | {t['problems']} | {_with_sign(t['accuracy'])} | "
            f"{_with_sign(t['baseline'])} |"
            for t in measured(evaluation["trained"])["tasks"]
        ]
        asked, how = recipe.evaluation, "greedy decoding"
        if asked is not None and asked.temperature:
            how = f"of each {asked.samples} completions at temperature {asked.temperature:g}"
        lines += ["", f"On held-out problems; {how}.", ""]
    lines += [f"How the export was checked: `{RECEIPT}`.", ""]
    return "\n".join(lines)
