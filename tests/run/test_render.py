"""Tables of evaluation results, as they are printed."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from ernie_train.run.recipe import Recipe
from ernie_train.run.render import evaluation_table, model_card, stage_table

RECIPE = {
    "name": "card", "model": {"preset": "tiny"}, "tokenizer": {"path": "data/tokenizer"},
    "stages": [{"name": "sft", "kind": "sft", "data": [{"path": "a.jsonl"}], "seq_len": 64,
                "micro_batch_size": 1, "steps": 1, "optim": {"lr": 0.1}}],
}  # fmt: skip


def lines_of(table: RenderableType) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return [line.split() for line in console.file.getvalue().splitlines()]


def printed(result: dict[str, Any]) -> list[list[str]]:
    return lines_of(evaluation_table(result))


def result(**changes: Any) -> dict[str, Any]:
    task = {
        "domain": "math", "task": "sum", "problems": 8, "accuracy": 0.25, "pass_at_k": 0.5,
        "baseline": 0.125, "truncated": 1.0, "excluded": {"timeout": 3},
    }  # fmt: skip
    domains = {"math": {"accuracy": 0.25, "baseline": 0.125}}
    return {"mean_accuracy": 0.25, "domains": domains, "tasks": [{**task, **changes}]}


def test_several_estimates_have_a_table_of_their_own() -> None:
    names = ("pass@1", "pass@8", "pass@64", "maj@64")
    estimates = {name: {"value": 0.5, "low": 0.25, "high": 1.0} for name in names}
    rows = printed({"trained": result(estimates=estimates)})
    assert ["domain", "task", "n", "accuracy", "baseline", "cut", "off"] in rows
    assert ["math", "sum", "8", "25.0", "12.5", "100.0"] in rows
    assert ["task", *names] in rows
    assert ["sum", "50.0", "50.0", "50.0", "50.0"] in rows
    assert ["25.0-100.0"] * 4 in rows
    assert ["math", "25.0", "12.5", "+12.5"] in rows
    assert ["sum:", "3", "completions", "could", "not", "be", "scored", "(timeout)"] in rows


def test_one_sample_shows_the_untrained_model_beside_it() -> None:
    rows = printed({"trained": result(), "untrained": result(accuracy=0.0)})
    assert ["math", "sum", "8", "25.0", "12.5", "-", "0.0", "100.0"] in rows
    one = {"pass@1": {"value": 0.25, "low": 0.1, "high": 0.4}}
    rows = printed({"trained": result(estimates=one)})
    assert ["math", "sum", "8", "25.0", "12.5", "10.0-40.0", "100.0"] in rows


@pytest.mark.parametrize("names", [("pass@4",), ("pass@4", "maj@8"), ("maj@8",)])
def test_an_estimate_other_than_pass_at_1_is_shown_alone_too(names: tuple[str, ...]) -> None:
    estimates = {name: {"value": 0.5, "low": 0.25, "high": 1.0} for name in names}
    shown = printed({"trained": result(estimates=estimates)})
    assert ["task", *names] in shown
    assert ["sum", *["50.0"] * len(names)] in shown


def test_a_task_without_a_baseline_shows_none() -> None:
    found = result(baseline=None)
    found["domains"]["math"]["baseline"] = None
    shown = printed({"trained": found})
    assert ["math", "sum", "8", "25.0", "-", "-", "100.0"] in shown
    assert ["math", "25.0", "-", "-"] in shown
    card = model_card(Recipe.model_validate(RECIPE), {"trained": found})
    assert "| math | sum | 8 | 25.0 % | - |" in card


def test_a_task_that_no_completion_of_could_be_scored_has_no_accuracy_anywhere() -> None:
    found = result(accuracy=0.0, completions=8, excluded={"timeout": 8})
    assert ["math", "sum", "8", "-", "12.5", "-", "25.0", "100.0"] in printed(
        {"trained": found, "untrained": result()}
    )
    shown = printed({"trained": result(), "untrained": found})
    assert ["math", "sum", "8", "25.0", "12.5", "-", "-", "100.0"] in shown
    assert ["math", "sum", "-"] in lines_of(stage_table([("sft", {"trained": found})]))
    card = model_card(Recipe.model_validate(RECIPE), {"trained": found})
    assert "| math | sum | 8 | - | 12.5 % |" in card


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "; greedy decoding."),
        ({"samples": 4, "temperature": 0.7}, "; of each 4 completions at temperature 0.7."),
    ],
)
def test_a_card_says_how_the_problems_were_solved(settings: dict[str, Any], told: str) -> None:
    recipe = Recipe.model_validate({**RECIPE, "evaluation": {"path": "x.jsonl", **settings}})
    assert f"\nOn held-out problems{told}\n" in model_card(recipe, {"trained": result()})


def test_stages_that_solved_other_problems_stand_side_by_side() -> None:
    second = result(task="product", accuracy=0.5)
    both = {
        "mean_accuracy": 0.5,
        "domains": second["domains"] | {"logic": {"accuracy": 1.0, "baseline": None}},
        "tasks": [*second["tasks"], *result(task="aiw", domain="logic", accuracy=1.0)["tasks"]],
    }
    rows = lines_of(stage_table([("sft", {"trained": result()}), ("rl", {"trained": both})]))
    told = ("math product - 50.0 -", "logic aiw - 100.0 -", "math all 25.0 25.0 +0.0",
            "logic all - 100.0 -", "all mean 25.0 50.0 +25.0")  # fmt: skip
    for row in told:
        assert row.split() in rows


def test_episodes_are_counted() -> None:
    shown = [" ".join(row) for row in printed({"trained": result(episodes=3, completions=8)})]
    assert "3 of 8 completions could call tools" in shown
    assert not any("tools" in " ".join(row) for row in printed({"trained": result(completions=8)}))


def test_many_completions_that_are_cut_off_are_warned_of() -> None:
    """By their share of all problems: the second task has 24, the first 8."""

    def warned(first: float, second: float) -> list[str]:
        both = [*result(truncated=first)["tasks"], *result(task="product", problems=24)["tasks"]]
        both[1]["truncated"] = second
        found = printed({"trained": {**result(), "tasks": both}})
        return [" ".join(line) for line in found if "hardly" in line]

    assert warned(0.8, 0.0) == [] and warned(0.0, 0.26) == []
    (line,) = warned(0.4, 0.2)
    assert line.startswith("25.0 % of the completions were cut off")


def test_completions_that_never_close_the_thinking_part_are_told() -> None:
    def lines(**changes: int) -> list[str]:
        return [" ".join(row) for row in printed({"trained": result(**changes)})]

    assert not any("thinking" in line for line in lines(unclosed=0, completions=8))
    few = lines(unclosed=3, completions=8)
    assert "3 of 8 completions never closed the thinking part" in few
    all_of_them = " ".join(lines(unclosed=8, completions=8))
    assert "8 of 8 completions never closed the thinking part, so that no verifier" in all_of_them
    other = {**result()["tasks"][0], "task": "product", "unclosed": 0, "completions": 8}
    both = result(unclosed=8, completions=8)
    rows = printed({"trained": {**both, "tasks": [*both["tasks"], other]}})
    assert any("part (sum: 8)" in " ".join(row) for row in rows)
    console = Console(file=io.StringIO(), width=100)
    console.print(stage_table([("sft", {"trained": result(unclosed=8, completions=8)})]))
    assert isinstance(console.file, io.StringIO)
    assert "8 of 8 completions never closed" in console.file.getvalue()
