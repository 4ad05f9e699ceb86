"""Worked examples before a problem: which ones, in which order, never the problem itself."""

from __future__ import annotations

import pytest

from ernie_train.core.errors import DataError
from ernie_train.data import Record, load_tokenizer, parse_columns
from ernie_train.eval import prompts
from ernie_train.eval.problems import load_problems
from ernie_train.eval.prompts import answer_parts, encode_prompt, load_few_shot, problem_row
from tests.workspace import make_workspace, write_rows

MATH = parse_columns("{reward: {value: math}}", "columns")


@pytest.fixture
def file(tmp_path):
    """Rows as GSM8K has them: the answer stands behind the worked steps."""
    made = [
        {"question": f"What is {a} + 1?", "answer": f"{a} and 1 make {a + 1}.\n#### {a + 1}"}
        for a in range(6)
    ]
    write_rows(tmp_path / "rows.jsonl", made)
    return tmp_path / "rows.jsonl"


def questions(messages):
    return [message["content"] for message in messages if message["role"] == "user"]


def test_the_seed_fixes_the_order_and_the_row_itself_is_passed_over(file):
    examples = load_few_shot(file, 5, seed=3, columns=MATH)
    problems = load_problems(file, columns=MATH)
    order = questions(turn for row in examples.examples for turn in row.messages)
    assert sorted(order) == sorted(question for p in problems for question in questions(p.messages))
    for problem in problems:
        (own,) = questions(problem.messages)
        shown = examples.before(problem)
        assert questions(shown) == [question for question in order if question != own]
        assert [m["role"] for m in shown] == ["user", "assistant"] * 5
        assert shown[1]["content"].endswith(f"#### {int(shown[0]['content'].split()[2]) + 1}")
    assert load_few_shot(file, 5, seed=3, columns=MATH).examples == examples.examples
    assert load_few_shot(file, 5, seed=4, columns=MATH).examples != examples.examples


def test_the_same_question_of_another_file_is_passed_over_too(file):
    examples = load_few_shot(file, 2, seed=0)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f" {questions(examples.examples[0].messages)[0]}\n"},
    ]
    own = Record("prompt", messages=turns)
    first = questions(examples.before(own))[0]
    assert first == questions(examples.examples[1].messages)[0]


def test_prompts_show_the_examples_in_the_models_own_format(file, tmp_path):
    make_workspace(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer", template="ernie_plain")
    examples = load_few_shot(file, 2, seed=0)
    system = {"role": "system", "content": "Be brief."}
    problem = Record("prompt", messages=[system, {"role": "user", "content": "What is 9 + 1?"}])
    text = tokenizer.decode(encode_prompt(tokenizer, problem, examples))
    first, second = (row.messages[1]["content"] for row in examples.examples[:2])
    assert text.index("Be brief.") < text.index(first) < text.index(second) < text.index("9 + 1")
    assert text.count("User: ") == 3
    assert text.rstrip().endswith("Assistant:")


def test_an_answer_alone_serves_and_rows_without_one_are_refused(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "1 + 1?", "answer": "2"}] * 2)
    examples = load_few_shot(tmp_path / "rows.jsonl", 1, seed=0)
    other = Record("prompt", messages=[{"role": "user", "content": "2 + 2?"}])
    assert [turn["content"] for turn in examples.before(other)] == ["1 + 1?", "2"]
    with pytest.raises(DataError, match="1 shots need as many other rows; there are 0"):
        examples.before(examples.examples[0])
    with pytest.raises(DataError, match="3 shots need as many rows; it has 2"):
        load_few_shot(tmp_path / "rows.jsonl", 3, seed=0)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "1 + 1?"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: an example needs an answer"):
        load_few_shot(tmp_path / "rows.jsonl", 1, seed=0)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a text to read"},
        {"messages": [{"role": "user", "content": "1 + 1?"}]},
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"},
    ],
)
def test_rows_that_show_no_answer_are_named_by_their_line(tmp_path, row):
    good = {"prompt": "2 + 2?", "answer": "4"}
    write_rows(tmp_path / "good.jsonl", [good])
    write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: "):
        load_few_shot(tmp_path, 1, seed=0)


def test_each_question_is_normalized_once(file, monkeypatch):
    examples, problems = load_few_shot(file, 5, seed=3), load_problems(file, columns=MATH)
    counted, asked = [], prompts._asked
    monkeypatch.setattr(prompts, "_asked", lambda record: counted.append(record) or asked(record))
    for problem in problems:
        examples.before(problem)
    assert len(counted) == len(examples.examples) + len(problems)


@pytest.mark.parametrize(("template", "parts"), [("ernie_plain", False), ("ernie_thinking", True)])
def test_verifiers_expect_what_the_format_lets_a_model_write(tmp_path, template, parts):
    make_workspace(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer", template=template)
    form = {"thinking": parts, "response_tags": parts}
    assert answer_parts(tokenizer) == form
    column = Record("prompt", fields={"answer": "2", "thinking": "1 + 1", "response_tags": "x"})
    row = problem_row(column, tokenizer)
    assert (row["completion_format"], row["thinking"]) == (form, "1 + 1")
