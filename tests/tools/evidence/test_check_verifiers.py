"""The checks on public rows: they see what is right, what is spoilt, and what is missed."""

import json

import pytest

from ernie_train.rewards.score import Score
from tools.evidence import check_verifiers
from tools.evidence.check_verifiers import checks

MBPP = [
    {"task_id": 1, "code": "def double(x):\r\n    return x * 2", "test_setup_code": "",
     "test_list": ["assert double(3) == 6", "assert double(0) == 0"], "challenge_test_list": []},
    {"task_id": 2, "code": "class P:\n    def __init__(self, a):\n        self.a = a\n"
     "def first(p):\n    return p.a", "test_setup_code": "p = P(4)",
     "test_list": ["assert first(p) == 4"], "challenge_test_list": ["assert first(P(5)) == 5"]},
]  # fmt: skip
HUMANEVAL = [
    {"task_id": "H/0", "entry_point": "inc", "prompt": 'def inc(x):\n    """ x + 1 """\n',
     "canonical_solution": "    return x + 1\n",
     "test": "def check(candidate):\n    assert candidate(1) == 2\n"},
    {"task_id": "H/1", "entry_point": "neg", "prompt": "def neg(x):\n    ''' -x '''\n",
     "canonical_solution": "    return -x\n",
     "test": "def check(candidate):\n    assert candidate(3) == -3\n"},
]  # fmt: skip
BFCL = [{"id": "a", "ground_truth": [{"f": {"x": [1], "unit": ["", "C"], "b": [True]}}]}]


@pytest.fixture
def data_dir(tmp_path):
    for name, rows in (
        ("mbpp/train.jsonl", MBPP),
        ("humaneval/HumanEval.jsonl", HUMANEVAL),
        ("bfcl/simple_python.answers.jsonl", BFCL),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_right_ones_are_correct_and_spoilt_ones_are_not(data_dir, tmp_path):
    found = {check.name: check[1:] for check in checks(data_dir)}
    assert found["mbpp right"] == (4, 4, [])  # the solution, and the row's own answer
    assert found["humaneval right"] == (4, 4, [])
    assert found["bfcl right"] == (1, 1, [])
    # Each solution under the other's name, and one of each changed, but `first` and `neg` have
    # nothing that breaks.
    assert found["mbpp perturbed"] == (0, 3, [])
    assert found["humaneval perturbed"] == (0, 3, [])
    # Four whole-call changes; for each of three arguments another value and a text; two left out.
    assert found["bfcl perturbed"] == (0, 4 + 3 * 2 + 2, [])
    assert list(checks(tmp_path / "nowhere")) == []


def test_every_miss_is_shown(data_dir, monkeypatch):
    def score_all(score):
        return lambda items: [score] * len(items)

    monkeypatch.setattr(check_verifiers, "score_batch", score_all(Score.correct()))
    for name, correct, total, misses in checks(data_dir):
        assert correct == total
        assert len(misses) == (total if "perturbed" in name else 0)
    monkeypatch.setattr(check_verifiers, "score_batch", score_all(Score.wrong("why")))
    first, *_ = checks(data_dir)
    assert first[1:3] == (0, 4)
    assert all(miss.endswith("wrong why") for miss in first.misses) and len(first.misses) == 4
