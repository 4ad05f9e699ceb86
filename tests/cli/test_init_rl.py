"""The verb init: recipes of reinforcement learning, for rows with answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ernie_train.cli import recipes
from ernie_train.core.yaml import load_yaml
from ernie_train.data import encode_chat, load_tokenizer, prompt_ids
from tests.workspace import write_rows

Row = dict[str, Any]
PAIRS = [(a, b) for a in range(6) for b in range(6)]


def asked(a: int, b: int) -> str:
    return f"What is {a} + {b}?"


def made(**columns: Any) -> list[Row]:
    """Return a row for each sum; a column is a value, or a function of question and answer."""
    return [
        {k: v(asked(a, b), str(a + b)) if callable(v) else v for k, v in columns.items()}
        for a, b in PAIRS
    ]


def question(text: str, answer: str) -> str:
    return text


def answer(text: str, answer: str) -> str:
    return answer


def worked(text: str, answer: str) -> str:
    return f"{text} It is {answer}.\n#### {answer}"


def called(text: str, answer: str) -> list[Row]:
    calls = [{"name": "add", "arguments": {"to": answer}}]
    return [{"role": "user", "content": text}, {"role": "assistant", "tool_calls": calls}]


VERL = {
    "data_source": "sums",
    "prompt": lambda text, answer: [{"role": "user", "content": text}],
    "ability": "math",
    "reward_model": lambda text, answer: {"style": "rule", "ground_truth": answer},
}
# Rows, options of init and the reward that fits.
ROWS: dict[str, tuple[list[Row], tuple[str, ...], str]] = {
    "gsm8k": (made(question=question, answer=worked), ("--kind", "grpo"), "math"),
    "open-r1": (made(problem=question, solution=worked, answer=answer), ("--kind", "rl"), "math"),
    "solutions": (made(problem=question, solution=worked), ("--kind", "upo"), "math"),
    "prompts": (made(prompt=question, answer=answer), (), "math"),
    "numbers": (made(prompt=question, ground_truth=lambda t, a: int(a)), (), "math"),
    "verl": (made(**VERL), (), "math"),
    "own columns": (
        made(q=question, a=worked),
        ("--columns", "{prompt: q, answer: {column: a, after: '####'}}"),
        "math",
    ),
    "choices": (
        made(question=question, choices=[str(n) for n in range(11)], answer=answer),
        ("--kind", "grpo"),
        "logic",
    ),
    "labels": (made(prompt=question, answer="True"), (), "logic"),
    "mixed answers": (
        [*made(prompt=question, answer=answer), *made(prompt=worked, answer="False")],
        (),
        "math",
    ),
    "named": (made(prompt=question, answer=answer, reward="exact"), (), "row"),
    "calls": (made(messages=called, tools=[{"name": "add"}]), ("--kind", "rl"), "row"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_with_answers_make_a_recipe_that_passes_check(
    place: Path, cli: Any, tmp_path: Path, name: str
) -> None:
    rows, options, reward = ROWS[name]
    write_rows(tmp_path / "rows.jsonl", rows)
    given = ("--model", place / "model", "--data", "rows.jsonl", "--out", "a.yaml")
    status, told = cli("init", *given, *options)
    assert status == 0 and f"reward: {reward}; at most " in told, told
    recipe = load_yaml(tmp_path / "a.yaml")
    (stage,) = recipe["stages"]
    assert (stage["name"], stage["kind"], stage["reward"]) == ("rl", "upo", reward)
    assert "preference" not in stage and "critic" not in stage and "canaries" not in stage
    assert stage["optim"]["lr"] == 1e-6
    held = [json.loads(line) for line in (tmp_path / "a.held_out.jsonl").read_text().splitlines()]
    assert len(held) == 4 and all(row in rows for row in held)
    assert stage["data"][0]["without"] == "a.held_out.jsonl"
    for evaluation in (stage["evaluation"], recipe["evaluation"]):
        assert evaluation["path"] == "a.held_out.jsonl"
        named = evaluation.get("columns", {}).get("reward")
        assert named == (None if reward == "row" else {"value": reward})
    rollout = stage["rollout"]
    assert rollout["prompts_per_iteration"] * stage["iterations"] == len(rows) - len(held)
    status, told = cli("check", "a.yaml")
    assert status == 0 and "evaluation: 4 problems" in told, told
    assert f"the first of {len(rows) - len(held)} prompts" in told


def test_lengths_are_those_of_the_rows_and_of_the_model(
    place: Path, cli: Any, tmp_path: Path
) -> None:
    rows = ROWS["gsm8k"][0]
    rows = [{**rows[0], "question": "What is this? " * 9}, *rows[1:]]
    write_rows(tmp_path / "rows.jsonl", rows)
    tokenizer = load_tokenizer(place / "tokenizer")
    longest = max(
        len(prompt_ids(tokenizer, [{"role": "user", "content": row["question"]}], None))
        for row in rows
    )
    given = ("init", "--model", place / "model", "--data", "rows.jsonl", "--kind", "grpo")
    assert cli(*given)[0] == 0
    rollout = load_yaml(tmp_path / "recipe.yaml")["stages"][0]["rollout"]
    assert longest <= rollout["max_prompt_tokens"] < longest + 64
    assert rollout["max_prompt_tokens"] + rollout["max_new_tokens"] == 256, "the model's context"
    status, told = cli(*given, "--out", "short.yaml", "--seq-len", longest, "--held-out", 0)
    assert status == 0 and f"1 prompts longer than {longest // 2} tokens are left out" in told
    recipe = load_yaml(tmp_path / "short.yaml")
    rollout = recipe["stages"][0]["rollout"]
    assert rollout["max_prompt_tokens"] + rollout["max_new_tokens"] == longest
    assert "evaluation" not in recipe and "evaluation" not in recipe["stages"][0]
    assert cli("check", "short.yaml")[0] == 0


def test_completions_get_room_for_the_longest_solution(
    place: Path, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernie_train.cli.init import problems

    monkeypatch.setattr(problems, "LEAST_NEW", 16)
    monkeypatch.setattr(problems, "answer_parts", lambda tokenizer: {"thinking": False})
    given = ("init", "--model", place / "model", "--kind", "rl", "--template", "ernie_plain")
    tokenizer = load_tokenizer(place / "tokenizer", template="ernie_plain")
    found = {}
    for words in (0, 40, 80):
        text = " is" * words
        rows = made(question=question, answer=lambda t, a, text=text: f"{a}{text}\n#### {a}")
        write_rows(tmp_path / f"{words}.jsonl", rows)
        assert cli(*given, "--data", f"{words}.jsonl", "--out", f"{words}.yaml")[0] == 0
        found[words] = load_yaml(tmp_path / f"{words}.yaml")["stages"][0]["rollout"]
        asks = {"role": "user", "content": rows[-1]["question"]}
        turns = [asks, {"role": "assistant", "content": rows[-1]["answer"]}]
        asked_tokens = len(prompt_ids(tokenizer, [asks], None))
        solution = len(encode_chat(tokenizer, turns)[0]) - asked_tokens
        if words:
            assert solution <= found[words]["max_new_tokens"] < solution + 64
    assert found[80]["max_new_tokens"] > found[40]["max_new_tokens"]
    assert found[0]["max_new_tokens"] == 256 - found[0]["max_prompt_tokens"], "no worked solution"
    cut = ("--data", "40.jsonl", "--out", "cut.yaml", "--seq-len", 200)
    assert cli(*given, *cut)[0] == 0
    rollout = load_yaml(tmp_path / "cut.yaml")["stages"][0]["rollout"]
    assert rollout["max_prompt_tokens"] + rollout["max_new_tokens"] == 200


def test_it_goes_on_from_sft_and_solves_what_was_held_out(
    place: Path, cli: Any, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", made(question=question, answer=answer))
    given = ("init", "--data", "rows.jsonl", "--template", "ernie_plain", "--model")
    assert cli(*given, place / "model", "--out", "sft.yaml", "--held-out", 0)[0] == 0
    changes = ("epochs=null", "steps=60", "optim.lr=1e-2", "optim.warmup_steps=0")
    settings = [f"stages.sft.{change}" for change in changes]
    assert cli("run", "sft.yaml", "--run-dir", "sft", "export=null", *settings)[0] == 0
    assert cli(*given, "sft", "--kind", "grpo", "--method", "lora")[0] == 0
    stage = load_yaml(tmp_path / "recipe.yaml")["stages"][0]
    assert stage["lora"] == {"rank": 16} and stage["optim"]["lr"] == 1e-4
    changes = ("iterations=3", "rollout.max_new_tokens=4", "evaluation.every_iterations=1")
    settings = [f"stages.rl.{change}" for change in changes]
    settings += ["evaluation.max_new_tokens=4", "export=null"]
    status, told = cli("run", "recipe.yaml", "--run-dir", "run", *settings)
    assert status == 0, told
    lines = (tmp_path / "run/01-rl/metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert len(metrics) == 3 and all("eval/mean" in one for one in metrics)
    assert any(0 < one["accuracy"] < 1 and one["grad_norm"] > 0 for one in metrics), metrics


def test_programs_have_tests_and_the_reward_is_tried_where_they_have_a_solution(
    place: Path, cli: Any, tmp_path: Path
) -> None:
    tests = ["assert f(1) == 2"]
    rows = [{"prompt": f"Write f. {n}", "tests": tests, "entry_point": "f"} for n in range(9)]
    solved = [{**row, "solution": "def f(x):\n    return x + 1"} for row in rows]
    for name, found in (("unsolved", rows), ("solved", solved)):
        write_rows(tmp_path / f"{name}.jsonl", found)
        given = ("--data", f"{name}.jsonl", "--out", f"{name}.yaml")
        status, told = cli("init", "--model", place / "model", *given)
        assert status == 0 and "reward: code" in told, told
        stage = load_yaml(tmp_path / f"{name}.yaml")["stages"][0]
        assert stage.get("canaries") == (0 if name == "unsolved" else None)
        untried = "9 rows have no answer to try the reward on, hence canaries: 0"
        assert (untried in told) == (name == "unsolved")
        assert cli("check", f"{name}.yaml")[0] == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (made(prompt=question), "36 of 36 rows have no `answer` to grade completions by; the"),
        (made(prompt=question, gold=answer), "is rows.jsonl:1, with gold beside its prompt"),
        (made(instruction=question, output=answer), "--columns '{answer: NAME}'"),
        (made(question=question, answer="It is what you get by adding the one to the other one."),
         "36 of 36 rows have an `answer` that is prose"),
        ([*made(prompt=question, answer=answer), *made(prompt=question, tests=["assert f()"])],
         "rows need several verifiers, math (36), code (36): name each row's in a column"),
        (made(prompt=question, answer=answer, reward="maths"), "unknown reward 'maths'"),
        (made(text=question), "rows of text are none that --kind upo trains on"),
    ],
)  # fmt: skip
def test_rows_without_an_answer_are_one_message(
    place: Path, cli: Any, tmp_path: Path, rows: list[Row], message: str
) -> None:
    write_rows(tmp_path / "rows.jsonl", rows)
    given = ("--model", place / "model", "--data", "rows.jsonl", "--kind", "grpo")
    status, told = cli("init", *given)
    assert status == 2 and message in told and "Traceback" not in told, told
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_few_rows_without_an_answer_are_told_and_not_asked(
    place: Path, cli: Any, tmp_path: Path
) -> None:
    rows = ROWS["prompts"][0]
    lacking = [{"prompt": f"What is it, {n}?"} for n in range(4)]
    write_rows(tmp_path / "rows.jsonl", [*rows, *lacking])
    given = ("init", "--model", place / "model", "--data", "rows.jsonl")
    assert cli(*given)[0] == 2
    status, told = cli(*given, "--max-bad-fraction", 0.3, "--held-out", 18)
    assert status == 0 and "4 rows have nothing to be graded by, and teach nothing" in told, told
    stage = load_yaml(tmp_path / "recipe.yaml")["stages"][0]
    assert stage["canaries"] == 0 and stage["max_bad_fraction"] == 0.3
    held = (tmp_path / "recipe.held_out.jsonl").read_text()
    assert len(held.splitlines()) == 18 and "What is it" not in held


def test_rows_with_demonstrations_are_for_sft_unless_it_is_said_otherwise(
    place: Path, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS["open-r1"][0])
    given = ("init", "--model", place / "model", "--data", "rows.jsonl", "--method", "full")
    assert cli(*given, "--out", "a.yaml")[0] == 0
    assert load_yaml(tmp_path / "a.yaml")["stages"][0]["kind"] == "sft"
    questions: list[str] = []
    answers = iter(("ppo", "grpo", "", ""))

    def ask(what: str, default: str) -> str:
        questions.append(what.split()[0])
        return next(answers) or default

    monkeypatch.setattr(recipes, "_ask", ask)
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    status, told = cli(*given)
    assert status == 0 and "--kind ppo: sft, pretrain, dpo, upo" in told, told
    assert questions == ["train", "train", "recipe", "rows"]
    assert load_yaml(tmp_path / "recipe.yaml")["stages"][0]["kind"] == "upo"
    questions.clear()
    answers = iter(("",))
    assert cli(*given, "--out", "b.yaml", "--kind", "sft")[0] == 0
    assert questions == ["rows"]
