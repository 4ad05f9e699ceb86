"""Evaluation plays problems as episodes with tools, and grades the last turn."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from ernie_train.cli.evaluate import parse_tools
from ernie_train.core.errors import ConfigError, DataError
from ernie_train.data import Record, load_tokenizer
from ernie_train.data.completion_format import response_block, tool_call_block
from ernie_train.environments import EnvironmentConfig, ToolEnvironment, build_toolbox
from ernie_train.eval import evaluation
from ernie_train.eval.evaluation import EvalConfig, evaluate
from ernie_train.eval.problems import load_problems
from ernie_train.eval.prompts import check_problems, require_episodes
from ernie_train.generate import Completion
from tests.small_models import make_model
from tools.data.make_episodes import SIZES, make_split

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "data/tokenizer")


@pytest.fixture
def box(tokenizer, tmp_path):
    toolbox = build_toolbox(EnvironmentConfig(tools=["calculator", "lookup"]), tokenizer, tmp_path)
    yield toolbox
    toolbox.close()


def test_problems_are_played_and_their_last_turn_graded(tokenizer, box, monkeypatch):
    """The first problem is solved with a call, the second is answered at once and wrong."""
    asked = []

    def generate(model, prompts, *, sequence_ids, seed, limits, **settings):
        asked.append((list(sequence_ids), seed))
        found = []
        for prompt, number in zip(prompts, sequence_ids, strict=True):
            text = "x\n</think>\n\n"
            if "<tool_response>" in tokenizer.decode(prompt):
                text += response_block("7006652")
            elif number == 0:
                text += tool_call_block("calculator", {"expression": "1234 * 5678"})
            else:
                text += response_block("7")
            ids = [*tokenizer.encode(text), tokenizer.stop_token_ids[0]]
            found.append(Completion(ids, [0.0] * len(ids), True))
        return found

    monkeypatch.setattr(evaluation, "generate_sharded", generate)
    fields = {"reward": "exact", "domain": "d", "answer": "7006652"}
    problems = [
        Record("prompt", [{"role": "user", "content": "?"}], fields={**fields, "task": task})
        for task in ("called", "guessed")
    ]
    model = make_model(max_position_embeddings=2000)
    found = evaluate(model, tokenizer, problems, EvalConfig(max_new_tokens=200), toolbox=box)
    assert {task.task: task.accuracy for task in found.tasks} == {"called": 1.0, "guessed": 0.0}
    assert [numbers for numbers, _ in asked] == [[0, 1], [0]]
    assert asked[0][1] != asked[1][1], "another turn, other random numbers"
    turns = found.samples[0]["turns"]
    assert [turn["content"] for turn in turns if turn["role"] == "tool"] == ["7006652"]
    assert "turns" not in found.samples[1]
    assert [task.episodes for task in found.tasks] == [1, 1]
    problems[0].fields["reward"] = "tool_call"
    found = evaluate(model, tokenizer, problems, EvalConfig(max_new_tokens=200), toolbox=box)
    assert {task.task: task.episodes for task in found.tasks} == {"called": 0, "guessed": 1}
    plain = evaluate(model, tokenizer, problems, EvalConfig(max_new_tokens=200))
    assert [task.episodes for task in plain.tasks] == [0, 0]


def test_tools_that_no_problem_is_offered_are_refused(tokenizer, box, tmp_path):
    fields = {"reward": "exact", "answer": "1", "task": "t", "domain": "d"}
    asked = [{"role": "user", "content": "?"}]
    own = [{"type": "function", "function": {"name": "shell", "parameters": {"type": "object"}}}]
    calls = Record("prompt", asked, fields={**fields, "reward": "tool_call"})
    others = Record("prompt", asked, tools=own, fields=fields)
    served = Record("prompt", asked, fields=fields)
    with pytest.raises(DataError, match="none of the 2 problems is offered a tool") as told:
        require_episodes(box, [calls, others])
    for part in ("calculator, lookup", "tool_call", "table"):
        assert part in str(told.value)
    require_episodes(box, [calls, served])
    environment = EnvironmentConfig(tools=["lookup"])
    with pytest.raises(DataError, match="is offered a tool"):  # rows have no table to look in
        check_problems(tokenizer, [served], 1000, environment, tmp_path)


def test_tools_of_the_command_line():
    found = parse_tools("calculator, my_tools.py", 3, 100)
    assert found.files == ["my_tools.py"] and found.max_turns == 3
    assert found.max_tool_tokens == 50
    with pytest.raises(ConfigError, match="--tools"):
        parse_tools("shell", 3, 100)


# ---- the generated problems ----------------------------------------------------------------------


def test_demonstrations_call_what_gives_their_results(box):
    """Referee: the environment itself, played along each demonstration."""
    for row in make_split("demonstrations", (20, 20)):
        environment = ToolEnvironment(box)
        environment.reset(
            Record("chat", row["messages"][:1], tools=row["tools"], fields={**row, "messages": []})
        )
        for turn, result in zip(row["messages"][1::2], row["messages"][2::2], strict=False):
            (called,) = (call["function"] for call in turn["tool_calls"])
            text = f"x\n</think>\n\n{tool_call_block(called['name'], called['arguments'])}"
            (message,) = environment.step(text).messages
            assert message["content"] == result["content"]
        assert row["messages"][-1]["content"] == row["answer"] == row["messages"][-2]["content"]


def test_the_files_are_those_of_the_generator_and_share_no_problem():
    seen: set[str] = set()
    for split, sizes in SIZES.items():
        rows = make_split(split, sizes, seen=seen)
        records = load_problems(ROOT / f"data/episodes/{split}.jsonl.gz")
        assert [r.messages[0]["content"] for r in records] == [
            row["messages"][0]["content"] for row in rows
        ]
        assert [r.fields["answer"] for r in records] == [row["answer"] for row in rows]
        assert split == "demonstrations" or all(len(r.messages) == 1 for r in records)
        assert Counter(r.fields["task"] for r in records) == {
            f"{task}{suffix}": size
            for task in ("product", "price", "order")
            for suffix, size in zip(("", "_2"), sizes, strict=True)
            if size
        }
    assert len(seen) == 3 * sum(map(sum, SIZES.values()))


@pytest.mark.parametrize("task", ["product", "price", "order"])
def test_the_second_level_has_neighbouring_digits_that_the_first_lacks(task):
    def pairs(row):
        """Of the numbers in a question and of the price of what it asks for."""
        words = row["messages"][0]["content"].rstrip("?.").split()
        numbers = [word for word in words if word.isdigit()]
        numbers += [row["table"][word] for word in words if word in row.get("table", {})]
        return {a + b for number in numbers for a, b in pairwise(number)}

    levels = [
        [pairs(row) for row in make_split("problems", own) if row["task"].startswith(task)]
        for own in ((400, 0), (0, 200))
    ]
    shown = set().union(*levels[0])
    assert 40 < len(shown) < 80, "of a hundred pairs some are left for the second level"
    assert all(found - shown for found in levels[1])
