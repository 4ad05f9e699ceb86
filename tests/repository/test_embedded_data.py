"""The committed data: complete, disjoint, graded right by its own verifiers, and reproducible."""

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from ernie_train.data import read_records
from ernie_train.data.completion_format import format_completion
from ernie_train.rewards import score_batch
from ernie_train.rewards.scoring.reference_completion import build_reference_completion
from tools.data import make_data
from tools.data.make_data import PROBLEMS, SIZES, SPLITS, file_of
from tools.data.tasks import DOMAINS, TASKS, Item, Task

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
SOLVED = ("validation", "test", "hard")


def expected_counts(split):
    return {
        (task.domain, task.name if level == 1 else f"{task.name}_{level}"): sizes[split]
        for task in TASKS
        for level, sizes in SIZES.items()
        if split in sizes
    }


@cache
def rows_in(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream.read().rstrip("\n").split("\n")]


def rows_of(split, domain=None, data=DATA):
    names = [domain] if domain else DOMAINS
    return [row for name in names for row in rows_in(file_of(data, split, name))]


def completion_of(message):
    calls = [c["function"] for c in message.get("tool_calls", [])]
    return format_completion(
        message["reasoning_content"],
        message.get("content"),
        [(call["name"], call["arguments"]) for call in calls],
    )


@pytest.mark.parametrize("split", SPLITS)
def test_every_task_has_its_rows(split):
    counts = Counter((row["domain"], row["task"]) for row in rows_of(split))
    assert counts == expected_counts(split)
    tasks_of = Counter(task.domain for task in TASKS)
    assert set(tasks_of) == set(DOMAINS) and min(tasks_of.values()) >= 2


def test_no_two_rows_share_a_prompt_whatever_their_split():
    seen = Counter(make_data.prompt_identity(r) for split in SPLITS for r in rows_of(split))
    assert [prompt for prompt, count in seen.items() if count > 1] == []


@pytest.mark.parametrize("split", SOLVED)
def test_the_worked_solution_of_every_row_is_correct(split):
    rows = rows_of(split)
    scores = score_batch([(r["reward"], r, completion_of(r["messages"][-1])) for r in rows])
    bad = [(r["task"], s) for r, s in zip(rows, scores, strict=True) if s.status != "correct"]
    assert bad == []


def test_problems_have_a_right_verifier_and_no_solution():
    rows = rows_of(PROBLEMS)
    assert all([m["role"] for m in row["messages"]] == ["user"] for row in rows)
    rows = rows[::7]
    items = [(row["reward"], row, build_reference_completion(row["reward"], row)) for row in rows]
    bad = [(i[1], s) for i, s in zip(items, score_batch(items), strict=True) if s.value != 1.0]
    assert bad == [] and {row["reward"] for row in rows} >= {"code", "tool_call", "math", "exact"}


def test_the_solution_of_another_row_is_wrong():
    items = []
    for domain in DOMAINS:
        by_task = {}
        for row in rows_of("test", domain):
            by_task.setdefault(row["task"], []).append(row)
        for rows in by_task.values():
            rows = rows[:40] if rows[0]["reward"] == "code" else rows
            for row, other in itertools.pairwise(rows):
                if row["answer"] != other["answer"]:
                    items.append((row["reward"], row, completion_of(other["messages"][-1])))
    scores = score_batch(items)
    good = [(i[1]["messages"][0], s) for i, s in zip(items, scores, strict=True) if s.value > 0]
    assert len(items) > 2000
    assert good == []


@pytest.mark.parametrize("split", SPLITS)
def test_the_reader_keeps_every_row_and_bounds_its_length(split):
    for domain in DOMAINS:
        records, _ = read_records(file_of(DATA, split, domain), max_bad_fraction=0.0)
        expected = expected_counts(split)
        assert len(records) == sum(n for (d, _), n in expected.items() if d == domain)
        assert all(record.fields["domain"] == domain for record in records)


def test_the_data_stay_small():
    total = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file())
    assert total < 6_000_000


def regenerate(out_dir, domains, hash_seed):
    command = [sys.executable, "-m", "tools.data.make_data", "--out", out_dir]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command += ["--domains", *domains]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)


def assert_same_files(out_dir, domains):
    for split, domain in itertools.product(SPLITS, domains):
        made = file_of(out_dir, split, domain).read_bytes()
        assert made == file_of(DATA, split, domain).read_bytes(), (split, domain)


def test_the_generator_gives_the_same_bytes_again(tmp_path):
    regenerate(tmp_path, ["logic", "science"], hash_seed="1")
    assert_same_files(tmp_path, ["logic", "science"])


@pytest.mark.slow
def test_the_generator_gives_the_same_bytes_for_every_domain(tmp_path):
    regenerate(tmp_path, DOMAINS, hash_seed="12345")
    assert_same_files(tmp_path, DOMAINS)


def test_tests_of_another_seed_share_no_prompt_with_what_is_trained_on(tmp_path):
    options = ["--domains", "logic", "--splits", "test", "hard", "--seed", "11"]
    make_data.main(["--out", str(tmp_path), *options])
    assert not file_of(tmp_path, PROBLEMS, "logic").exists()

    def prompts(data, *splits):
        rows = [row for split in splits for row in rows_of(split, "logic", data)]
        return {make_data.prompt_identity(row) for row in rows}

    fresh = prompts(tmp_path, "test")
    assert len(fresh) == len(prompts(DATA, "test")) and fresh != prompts(DATA, "test")
    assert fresh.isdisjoint(prompts(DATA, "train", PROBLEMS, "validation"))
    assert prompts(tmp_path, "hard").isdisjoint(fresh)


def test_problems_can_be_made_with_their_solutions_and_more_of_them(tmp_path):
    options = ["--domains", "logic", "--splits", PROBLEMS, "--solutions", "--rows", "1.1"]
    make_data.main(["--out", str(tmp_path), *options])
    solved, plain = rows_of(PROBLEMS, "logic", tmp_path), rows_of(PROBLEMS, "logic")
    assert len(solved) == round(1.1 * len(plain))
    prompts = {make_data.prompt_identity(row) for row in solved}
    assert prompts >= {make_data.prompt_identity(row) for row in plain}
    scores = score_batch([(r["reward"], r, completion_of(r["messages"][-1])) for r in solved])
    assert all(score.status == "correct" for score in scores)


# ---- what a level holds out ----------------------------------------------------------------------


def numbers(text):
    return [int(found) for found in re.findall(r"\d+", text)]


def steps(text, separator):
    """Successive steps of a program's description, without their numbers."""
    return list(itertools.pairwise(re.sub(r"\d", "", text).split(separator)))


COMBINATIONS = {  # what a level holds out, from prompt and answer
    "number_function": lambda asked, _: steps(asked.partition(": ")[2].rstrip("."), ", then "),
    "list_function": lambda asked, _: steps("".join(re.findall(r", (.*), return", asked)), ", "),
    "aiw": lambda asked, _: re.findall(r"(\d+) (sister|female)", asked),
    "unit_conversion": lambda asked, answer: [min(numbers(asked)[0], numbers(answer)[0])],
    "formula": lambda asked, answer: [tuple(sorted(numbers(f"{amounts(asked)} {answer}"))[:2])],
}


def amounts(text):
    return re.sub(r"cm3|m/s2|m2", "", text)  # units with a digit


@pytest.mark.parametrize("task", COMBINATIONS)
def test_every_problem_of_the_second_level_has_what_no_demonstration_shows(task):
    def combinations(split, name):
        rows = [row for row in rows_of(split) if row["task"] == name]
        for row in rows:
            answer = row.get("answer") or row["messages"][-1]["content"]
            yield COMBINATIONS[task](row["messages"][0]["content"], amounts(answer))

    shown = {one for found in combinations("train", task) for one in found}
    assert shown
    for split in (PROBLEMS, "validation", "test"):
        found = list(combinations(split, f"{task}_2"))
        assert len(found) == SIZES[2][split]
        assert [own for own in found if shown.issuperset(own)] == []


def first_argument(row):
    turn = row["messages"][-1]
    solved = "tool_calls" in turn
    call = turn["tool_calls"][0]["function"] if solved else json.loads(row["answer"])
    properties = row["tools"][0]["function"]["parameters"]["properties"]
    return call["name"], call["arguments"][next(iter(properties))]


def test_the_first_argument_of_a_tool_is_new_to_it_and_then_to_all():
    def shown(split, name):
        return {first_argument(row) for row in rows_of(split, "tools") if row["task"] == name}

    demonstrated = shown("train", "tool_arguments")
    for split in (PROBLEMS, "validation", "test"):
        second = shown(split, "tool_arguments_2")
        assert second and second.isdisjoint(demonstrated)
        assert shown(split, "tool_arguments") <= demonstrated
    third = {value for _, value in shown("hard", "tool_arguments_3")}
    demonstrations = "".join(row["messages"][0]["content"] for row in rows_of("train", "tools"))
    assert third and not [value for value in third if str(value) in demonstrations]


def terms_together(asked):
    return sum(numbers(asked)[1:3])


def factor_and_constant(asked):
    left = asked.partition(": ")[2].partition(" = ")[0]
    factor, constant = re.match(r"(\d+)?", left)[0], re.search(r" (\d+)$", left)
    return int(factor or 1) > 3 and int(constant[1] if constant else 0) > 4


SIZES_OF = {  # what grows from level to level, and where it is for the three
    "boolean": (lambda asked: asked.count("not "), {0, 1}, {2, 3, 4}, None),
    "chain_sum": (terms_together, range(11), range(11, 15), range(15, 19)),
    "leg_counting": (lambda asked: sum(numbers(asked)), {2, 3}, {4}, {5, 6}),
    "simple_equations": (factor_and_constant, {False}, {True}, {True}),
}


@pytest.mark.parametrize("task", SIZES_OF)
def test_levels_of_logic_and_mathematics_are_apart_by_size(task):
    size, *wanted = SIZES_OF[task]
    for level, allowed in enumerate(wanted, 1):
        name = task if level == 1 else f"{task}_{level}"
        for split in SIZES[level] if allowed is not None else ():
            asked = [r["messages"][0]["content"] for r in rows_of(split) if r["task"] == name]
            assert asked and {size(one) for one in asked} <= set(allowed), (split, name)


def test_the_tokenizer_is_the_one_that_its_command_makes(tmp_path):
    vocab_size = len(json.loads((DATA / "tokenizer/tokenizer.json").read_text())["model"]["vocab"])
    command = [sys.executable, "-m", "tools.data.train_tokenizer", tmp_path, DATA / "train"]
    subprocess.run(
        [*command, "--vocab-size", str(vocab_size)], check=True, cwd=ROOT, capture_output=True
    )
    for path in sorted((DATA / "tokenizer").iterdir()):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_another_seed_gives_other_rows_and_too_few_problems_are_an_error():
    task = next(task for task in TASKS if task.name == "boolean")
    small = {"train": 5, "validation": 2, "test": 2}
    one, other = (make_data.build_task(task, 1, small, seed)["train"] for seed in (1, 2))
    assert one != other
    item = Item(key="1", prompt="1 + 0?", think="1", answer="1", reward="math")
    with pytest.raises(RuntimeError, match="one, level 1: too few prompts"):
        make_data.build_task(Task("one", "logic", lambda rng, level: item), 1, small)
