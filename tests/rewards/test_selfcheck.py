"""Canaries: a sound reward passes on its rows, and every planted fault is found."""

import json
from pathlib import Path

import pytest

from ernie_train.core.errors import UserError
from ernie_train.rewards.scoring.composition import RewardConfig, build_reward
from ernie_train.rewards.scoring.selfcheck import check_reward_on_reference_answers

DATA = Path(__file__).resolve().parents[2] / "data" / "test"


@pytest.fixture
def build():
    made = []

    def build(value, directory=Path()):
        made.append(build_reward(RewardConfig.model_validate(value), directory))
        return made[-1]

    yield build
    for reward in made:
        reward.close()


def rows_of(domain, count=20):
    with (DATA / f"{domain}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


@pytest.mark.parametrize("domain", ["logic", "math", "science", "tools"])
def test_the_generated_rows_pass(build, domain):
    assert check_reward_on_reference_answers(rows_of(domain), build("row"), sample=6) == 6 * 6


def test_rows_where_no_call_is_right_pass(build):
    rows = [{"question": "Sing.", "expected_calls": [], "reward": "tool_call"}]
    assert check_reward_on_reference_answers(rows, build("row")) == 3


def test_programs_pass(build):
    assert check_reward_on_reference_answers(rows_of("code"), build("code"), sample=2) == 2 * 6


def test_truth_labels_and_assignments_pass(build):
    rows = [
        {"answer": "True", "choices": ["True", "False", "Unknown"]},
        {"answer": "true"},
        {"assignment": {"Zoey": True, "Ethan": False}},
        {"answer": "B", "choices": ["A) 1", "B) 2"]},
    ]
    assert (
        check_reward_on_reference_answers(rows, build([{"name": "logic"}, {"name": "format"}]))
        == 4 * 6
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"answer": "$$"}], "gold answer scores bad_gold"),
        ([{"answer": "zq vexing jumbo 8675309.25 quiz"}], "junk scores correct"),
        ([{"question": "What is it?", "answer": 12}], r"\(What is it\?\): no answer"),
    ],
)
def test_rows_that_cannot_be_graded_are_shown(build, rows, message):
    with pytest.raises(UserError, match=message):
        check_reward_on_reference_answers(rows, build("math"))


def user_reward(tmp_path, body):
    (tmp_path / "mine.py").write_text(f"def score(row, completion):\n    {body}\n")
    return {"python": "mine.py:score"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1.0", "nothing at all scores correct 1"),
        ("return 'sys.exit(0)' in completion", r"sys.exit\(0\) scores correct"),
        ("return 'Always' in completion", "always true scores correct"),
        ("return 1 / 0", "scores infrastructure 0: mine.py:score: ZeroDivisionError"),
    ],
)
def test_a_reward_that_can_be_fooled_is_refused(build, tmp_path, body, message):
    reward = build(user_reward(tmp_path, body), tmp_path)
    with pytest.raises(UserError, match=message):
        check_reward_on_reference_answers([{"answer": "12", "question": "How many?"}], reward)


def test_a_function_of_ones_own_need_not_know_the_answer(build, tmp_path):
    reward = build(user_reward(tmp_path, "return 0.3"), tmp_path)
    assert check_reward_on_reference_answers([{"answer": "12"}], reward) == 5


def test_the_sample_follows_the_seed(build):
    rows = [{"answer": str(i)} for i in range(50)]
    rows[7] = {"answer": 7, "question": "row seven"}
    outcomes, reward = set(), build("math")
    for seed in range(40):
        try:
            check_reward_on_reference_answers(rows, reward, sample=10, seed=seed)
            outcomes.add("passed")
        except UserError as error:
            assert "row 7 (row seven)" in str(error)
            outcomes.add("refused")
        if len(outcomes) == 2:
            break
    assert outcomes == {"passed", "refused"}


def test_a_row_is_shown_by_its_question_and_not_by_its_system_prompt(build):
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "How many?"},
    ]
    with pytest.raises(UserError, match=r"row 0 \(How many\?\)"):
        check_reward_on_reference_answers([{"answer": 7, "messages": messages}], build("math"))


def test_format_alone_has_no_canaries(build):
    assert check_reward_on_reference_answers([{}], build("format")) == 0
