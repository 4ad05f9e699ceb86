"""Rewards of a recipe: short forms, weights, parts apart, bounds, one's own functions."""

from pathlib import Path

import pytest

from ernie_train.core.config import StrictConfig, parse_config
from ernie_train.core.errors import ConfigError, UserError
from ernie_train.data.completion_format import format_completion
from ernie_train.rewards.scoring.composition import RewardConfig, build_reward
from ernie_train.rewards.verifiers import format


class Section(StrictConfig):
    reward: RewardConfig


def config_of(value):
    return parse_config(Section, {"reward": value}, "recipe.yaml").reward


def completion(text):
    return format_completion("because", text)


@pytest.fixture
def build():
    made = []

    def build(value, directory=Path()):
        made.append(build_reward(config_of(value), directory))
        return made[-1]

    yield build
    for reward in made:
        reward.close()


ROWS = [{"answer": "12", "reward": "math"}, {"answer": "Yes", "reward": "logic"}]


def test_a_name_one_part_a_list_and_the_long_form_mean_the_same():
    long = config_of({"parts": [{"name": "logic"}]})
    assert config_of("logic") == config_of({"name": "logic"}) == config_of([{"name": "logic"}])
    assert config_of("logic") == long


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("logik", "did you mean 'logic'"),
        ({"name": "logic", "python": "a.py:f"}, "exactly one of name, python, judge and model"),
        ({"weight": 1.0}, "exactly one of name, python, judge and model"),
        ({"name": "logic", "max_tokens": 3}, "max_tokens is for the part named format"),
        ([{"name": "logic"}, {"name": "logic"}], "two parts have the name 'logic'"),
        ([], "at least 1"),
        ({"nam": "logic"}, "did you mean 'name'"),
        ({"judge": {"url": "http://x/v1"}}, "model"),
        ({"name": "logic", "weight": "1"}, "weight"),
        ({"parts": [{"name": "logic"}], "max_excluded_fraction": 1.5}, "max_excluded_fraction"),
    ],
)
def test_mistakes_in_the_recipe_are_told(value, message):
    with pytest.raises(ConfigError, match=message):
        config_of(value)


def test_the_value_is_the_weighted_sum_and_the_parts_are_told_apart(build):
    reward = build([{"name": "row"}, {"name": "format", "weight": 0.25}])
    texts = [completion("12"), completion("yes") + "stray", completion("13"), "12"]
    batch = reward.score_batch([*ROWS, ROWS[0], ROWS[0]], texts)
    assert [score.value for score in batch.scores] == [1.25, 1.125, 0.25, 0.0]
    assert [score.parts for score in batch.scores] == [
        {"row": 1.0, "format": 1.0},
        {"row": 1.0, "format": 0.5},
        {"row": 0.0, "format": 1.0},
        {"row": 0.0, "format": 0.0},
    ]
    assert [s.score.status for s in batch.scores] == ["correct", "correct", "wrong", "wrong"]
    assert batch.report.items == 4


def test_the_length_counts_for_the_format(build):
    reward = build([{"name": "format", "max_tokens": 10}])
    batch = reward.score_batch([{}, {}], [completion("a")] * 2, [10, 11])
    assert [score.value for score in batch.scores] == [1.0, 0.5]
    with pytest.raises(UserError, match="max_tokens needs the number of tokens"):
        reward.score_batch([{}], [completion("a")])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (completion("a"), 1.0),
        (format_completion("a", None, [("f", {}), ("g", {"x": 1})]), 1.0),
        ("never finished", 0.0),
        ("<response>\na\n</response>", 0.0),
        (completion(""), 0.0),
        (format_completion("a", "b", [("f", {})]), 0.0),
        (format_completion("a", None, [("f", "no json")]), 0.0),
        (completion("a") + "more", 0.5),
        (completion("a") + completion("a"), 0.5),
        (completion("<think>a"), 0.5),
        (format_completion("<response>a</response>", "b"), 0.5),
        ("a</think>b<response>\nc\n</response>", 0.5),
    ],
)
def test_what_the_format_reward_asks_for(text, value):
    score = format.score({}, text)
    assert (score.value, score.status) == (value, "correct" if value == 1 else "wrong")


def write(directory, body, name="mine.py"):
    (directory / name).write_text(body)
    return f"{name}:score"


def test_a_function_of_ones_own_is_found_beside_the_recipe(build, tmp_path):
    (tmp_path / "helper.py").write_text("MARK = 0.5\n")
    body = "from helper import MARK\ndef score(row, completion):\n    return MARK * row['x']\n"
    reward = build({"python": write(tmp_path, body)}, tmp_path)
    batch = reward.score_batch([{"x": 1}, {"x": 2}, {"x": 0}], ["", "", ""])
    assert [score.value for score in batch.scores] == [0.5, 1.0, 0.0]
    assert [score.score.status for score in batch.scores] == ["wrong", "correct", "wrong"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return float('nan')", "a number from 0 to 1, not nan"),
        ("return 2", "a number from 0 to 1, not 2"),
        ("return 'good'", "it gave str"),
        ("return None", "it gave NoneType"),
        ("raise KeyError('boom')", "KeyError: 'boom'"),
        ("import no_such_module", "No module named 'no_such_module'"),
    ],
)
def test_a_function_that_fails_is_told_and_never_a_silent_zero(build, tmp_path, body, message):
    reward = build({"python": write(tmp_path, f"def score(row, completion):\n    {body}\n")},
                   tmp_path)  # fmt: skip
    with pytest.raises(UserError, match="1 of 1 completions could not be scored") as failure:
        reward.score_batch([{}], [""])
    assert message in str(failure.value)
    assert [s.status for s in reward.grade_verifier([{}], [""])] == ["infrastructure"]


def test_the_time_of_a_function_is_the_recipes(build, tmp_path):
    (tmp_path / "mine.py").write_text("import time\ndef score(row, text):\n    time.sleep(60)\n")
    part = {"python": "mine.py:score", "timeout_s": 0.5}
    reward = build({"parts": [part], "max_excluded_fraction": 1.0}, tmp_path)
    scored = reward.score_batch([{}], ["a"]).scores[0].score
    assert (scored.status, scored.detail) == ("timeout", "not graded within 0.5 s")
    with pytest.raises(ValueError, match="timeout_s is for a python function"):
        RewardConfig.model_validate([{"name": "math", "timeout_s": 5}])


def test_the_bound_decides_how_many_may_fail(build, tmp_path):
    body = "def score(row, completion):\n    return 1 / row['x']\n"
    parts = {"parts": [{"python": write(tmp_path, body)}], "max_excluded_fraction": 0.5}
    reward = build(parts, tmp_path)
    batch = reward.score_batch([{"x": 1}, {"x": 0}], ["", ""])
    assert [score.score.trains for score in batch.scores] == [True, False]
    assert batch.report.statuses == {"correct": 1, "infrastructure": 1}
    with pytest.raises(UserError, match="2 of 3 completions"):
        reward.score_batch([{"x": 1}, {"x": 0}, {"x": 0}], [""] * 3)
    stopped = reward.score_batch([{"x": 1}], [""], stop_requested=lambda: True)
    assert not stopped.scores[0].score.trains


def test_a_part_without_a_score_excludes_the_whole(build, tmp_path):
    body = "def score(row, completion):\n    raise ValueError\n"
    parts = [{"name": "math"}, {"python": write(tmp_path, body)}]
    reward = build({"parts": parts, "max_excluded_fraction": 1.0}, tmp_path)
    (score,) = reward.score_batch([ROWS[0]], [completion("12")]).scores
    assert score.score.status == "infrastructure"
    assert score.parts["math"] == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine.py", "expected file.py:function"),
        ("nowhere.py:score", "cannot read"),
        ("mine.py:other", "defines no other; it defines score"),
        ("broken.py:score", "broken.py:1"),
    ],
)
def test_a_function_that_is_not_there_is_found_without_running_the_file(tmp_path, text, message):
    write(tmp_path, "def score(row, completion):\n    return 1\nraise SystemExit\n")
    (tmp_path / "broken.py").write_text("def score(:\n")
    with pytest.raises(UserError, match=message):
        build_reward(config_of({"python": text}), tmp_path)


def test_a_row_that_names_no_verifier_is_told(build):
    reward = build("row")
    with pytest.raises(UserError, match="a row names no verifier"):
        reward.score_batch([{"answer": "12"}], [""])
    with pytest.raises(UserError, match="unknown reward 'maths'"):
        reward.score_batch([{"answer": "12", "reward": "maths"}], [""])
