"""The scoring service: order, parallel and serial alike, deadlines, losses, signals."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ernie_train.core.errors import UserError
from ernie_train.core.processes import process_state
from ernie_train.data.completion_format import format_completion
from ernie_train.rewards import REWARDS, SandboxUnavailable, Score, ScoringService, score_batch
from ernie_train.rewards.scoring import service as service_module
from ernie_train.rewards.verifiers.user import UserReward
from tests.launch.launched import REPOSITORY, wait_for

USER_REWARD = """
import os, signal, time

def score(row, completion):
    print("a print must not get between the replies")
    if "hang" in completion:
        time.sleep(1000)
    if "die" in completion:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(len(completion) % 2)
"""

PLANS = {
    "exact": ({"answer": "12"}, ["12", "13", ""]),
    "math": ({"answer": "1/2"}, ["0.5", r"\frac{1}{2}", "2", r"\sqrt{2}"]),
    "logic": ({"answer": "Unknown", "choices": ["True", "False", "Unknown"]}, ["uncertain", "x"]),
    "tool_call": ({"answer": '{"name": "f", "arguments": {}}'}, ["f()", "12"]),
    "format": ({}, ["fine", "<think>"]),
}


def completion(text):
    return format_completion("because", text)


ITEMS = [
    (reward, row, completion(text)) for reward, (row, texts) in PLANS.items() for text in texts
]


OWNER = """
import sys
from ernie_train.rewards import ScoringService
from ernie_train.rewards.verifiers.user import UserReward
ScoringService(2).score([(UserReward(sys.argv[1], "score"), {}, "x")] * 2)
"""
ENDLESS = """
import os, pathlib

def score(row, completion):
    pathlib.Path(__file__).with_name(f"{os.getpid()}.worker").touch()
    while True:
        pass
"""


def alive(pid):
    found = process_state(pid)
    return found is not None and found.state not in "ZX"


def test_verifiers_that_loop_end_with_a_killed_owner(tmp_path):
    reward = tmp_path / "endless.py"
    reward.write_text(ENDLESS)
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(reward)], cwd=REPOSITORY)
    try:
        wait_for(lambda: len(list(tmp_path.glob("*.worker"))) == 2, "they did not begin", 120)
    finally:
        owner.kill()
        owner.wait()
    workers = [int(path.stem) for path in tmp_path.glob("*.worker")]
    try:
        wait_for(lambda: not any(map(alive, workers)), "they outlived their owner", 20)
    finally:
        for worker in filter(alive, workers):
            os.kill(worker, signal.SIGKILL)


@pytest.fixture(scope="module")
def pool():
    service = ScoringService(2)
    yield service
    service.close()


@pytest.fixture
def user(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USER_REWARD)
    return UserReward(str(path), "score")


def serial(items):
    return [REWARDS[reward](row, text) for reward, row, text in items]


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.permutations(ITEMS * 2))
def test_parallel_scores_are_the_serial_ones_in_any_order(pool, items):
    scores, report = pool.score(items)
    assert scores == serial(items)
    assert report.items == len(items)
    assert report.statuses == Counter(score.status for score in scores)
    assert pool.score(items)[0] == scores  # and the same again


def test_the_shared_service_keeps_its_processes_between_batches():
    score_batch(ITEMS, workers=1)
    first = service_module.shared_service()._pool[0]
    assert score_batch(ITEMS) == serial(ITEMS)
    assert service_module.shared_service()._pool[0] is first


def test_an_empty_batch_starts_nothing():
    service = ScoringService(1)
    assert service.score([])[0] == []
    assert service._pool == []


def test_an_unknown_name_is_found_before_anything_is_graded(pool):
    with pytest.raises(UserError, match="did you mean 'math'"):
        pool.score([*ITEMS, ("mat", {}, "")])


def test_a_function_that_hangs_costs_its_own_time_and_nothing_else(user):
    service = ScoringService(2, item_s=1.0)
    items = [(user, {}, text) for text in ("a", "hang", "ab", "hang", "abc")]
    start = time.monotonic()
    scores, report = service.score(items)
    assert [score.status for score in scores] == [
        "correct", "timeout", "wrong", "timeout", "correct"]  # fmt: skip
    assert report.workers_lost == 2
    assert report.statuses == {"correct": 2, "wrong": 1, "timeout": 2}
    assert time.monotonic() - start < 60
    service.close()


def test_a_regular_expression_that_never_ends_is_excluded(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "_MOST_LATE", 2)
    path = tmp_path / "endless.py"
    path.write_text(
        "import re\ndef score(row, completion):\n"
        "    return float(re.fullmatch(r'(a+)+', completion) is not None)\n"
    )
    reward = UserReward(str(path), "score", deadline_s=0.3)
    hostile = "a" * 60 + "!"
    service = ScoringService(1)
    scores, _ = service.score([(reward, {}, text) for text in ("a", hostile, "b", hostile)])
    assert [score.status for score in scores] == ["correct", "timeout", "wrong", "timeout"]
    scores, report = service.score([(reward, {}, hostile)] * 40)
    assert {score.status for score in scores} == {"timeout"} and report.workers_lost == 2
    assert "2 times in a row" in scores[-1].detail
    service.close()


def test_a_process_that_dies_costs_its_item_and_nothing_else(user):
    service = ScoringService(1)
    scores, report = service.score([(user, {}, text) for text in ("a", "die", "ab")])
    assert [score.status for score in scores] == ["correct", "infrastructure", "wrong"]
    assert report.workers_lost == 2  # it was tried twice
    service.close()


def test_programs_are_graded_by_the_processes_too():
    row = {"tests": [[[3], 9]], "entry_point": "f"}
    items = [
        ("code", row, completion(f"def f(x):\n    return x {sign} x")) for sign in ("*", "+", "*")
    ]
    service = ScoringService(2)
    scores, _ = service.score(items)
    assert [score.status for score in scores] == ["correct", "wrong", "correct"]
    service.close()


def test_without_a_sandbox_the_batch_is_refused(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import ernie_train.rewards.registry as named\n"
        "from ernie_train.rewards import SandboxUnavailable\n"
        "def score(row, completion):\n"
        "    raise SandboxUnavailable('no sandbox works here')\n"
        "named.REWARDS['code'] = score\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    service = ScoringService(1)
    with pytest.raises(SandboxUnavailable, match="no sandbox works here"):
        service.score([("code", {}, completion("x"))])
    service.close()


def test_a_process_that_the_machine_kills_blames_no_completion(tmp_path):
    """Killed once while it is idle, and once in the middle of an item."""
    path = tmp_path / "once.py"
    path.write_text(
        "import os, pathlib, signal\n"
        "def score(row, completion):\n"
        "    mark = pathlib.Path(row['mark'])\n"
        "    if not mark.exists():\n"
        "        mark.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return 1.0\n"
    )
    service, reward = ScoringService(1), UserReward(str(path), "score")
    scores, report = service.score([(reward, {"mark": str(tmp_path / "mark")}, "")])
    assert scores == [Score(1.0, "correct")]
    assert report.workers_lost == 1
    idle = service._pool[0]._process
    idle.kill()
    idle.wait()
    scores, report = service.score([("exact", {"answer": "12"}, completion("12"))])
    assert scores == [Score(1.0, "correct")]
    assert report.workers_lost == 0
    service.close()


@pytest.fixture
def slow_verifier(monkeypatch, tmp_path):
    """`exact` hangs on some texts, in the scoring processes of this test."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\n"
        "import ernie_train.rewards.verifiers.exact as exact\n"
        "graded = exact.score\n"
        "def score(row, completion):\n"
        "    if row.get('always') or 'hang' in completion:\n"
        "        time.sleep(1000)\n"
        "    if 'raise' in completion:\n"
        "        raise KeyError('a defect')\n"
        "    return graded(row, completion)\n"
        "exact.score = score\n"
        "import ernie_train.rewards.registry as named\n"
        "named.REWARDS['exact'] = score\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}")


def test_the_gold_answer_in_the_same_place_tells_whose_fault_it_was(slow_verifier):
    service = ScoringService(1, item_s=1.5)
    items = [
        ("exact", {"answer": "12"}, completion("hang")),
        ("exact", {"answer": "12", "always": True}, completion("12")),
        ("exact", {"answer": "12"}, completion("raise")),
        ("exact", {"answer": "raise"}, completion("raise it")),
        ("exact", {"answer": "12"}, completion("12")),
    ]
    scores, report = service.score(items)
    statuses = [score.status for score in scores]
    assert statuses == ["wrong", "timeout", "wrong", "infrastructure", "correct"]
    assert "within 1.5 s" in scores[0].detail
    assert "a defect" in scores[3].detail
    # Two for the first, before and after its gold answer, two for the second and its gold answer.
    assert report.workers_lost == 4
    service.close()


@pytest.fixture
def failing_verifier(monkeypatch, tmp_path):
    """`exact` raises, dies or hangs for the first `times` tries of the completion in a row."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, time\n"
        "import ernie_train.rewards.verifiers.exact as exact\n"
        "import ernie_train.rewards.registry as named\n"
        "from ernie_train.rewards.score import Score\n"
        "graded = exact.score\n"
        "def score(row, completion):\n"
        "    tries = pathlib.Path(row['tries'])\n"
        "    if 'reference' in completion:\n"
        "        return graded(row, completion)\n"
        "    tries.write_text(tries.read_text() + 'x' if tries.exists() else 'x')\n"
        "    if len(tries.read_text()) <= row['times']:\n"
        "        exec(row['failure'])\n"
        "        return Score.infrastructure('no sandbox')\n"
        "    return graded(row, completion)\n"
        "named.REWARDS['exact'] = score\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}")

    def grade(failure, times):
        row = {"answer": "12", "failure": failure, "times": times, "tries": str(tmp_path / "tries")}
        service = ScoringService(1, item_s=1.0)
        scores, report = service.score([("exact", row, completion("12"))])
        service.close()
        return scores[0], report

    return grade


@pytest.mark.parametrize("failure", [
    "raise KeyError('x')", "raise OSError('disk')", "os.abort()", "time.sleep(60)", "pass",
])  # fmt: skip
def test_a_failure_that_passes_makes_no_right_completion_wrong(failing_verifier, failure):
    score, _ = failing_verifier(failure, 1)
    assert score == Score(1.0, "correct")


def test_a_completion_is_blamed_for_what_it_does_again_after_its_rows_own_answer(failing_verifier):
    score, _ = failing_verifier("raise KeyError('x')", 3)
    assert score.status == "correct"  # fails twice before the reference, and once after it


@pytest.mark.parametrize(
    ("failure", "status"),
    [("raise KeyError('x')", "wrong"), ("raise OSError('disk')", "infrastructure"),
     ("import no_such_module", "infrastructure"), ("pass", "infrastructure")],
)  # fmt: skip
def test_an_error_of_the_machine_is_never_the_completions(failing_verifier, failure, status):
    score, _ = failing_verifier(failure, 99)
    assert score.status == status


def test_a_stop_is_obeyed_at_once_and_the_service_goes_on(user):
    service = ScoringService(1)
    service.score([(user, {}, "a")])
    asked: list[float] = []

    def stop_requested():
        asked.append(time.monotonic())
        return len(asked) > 5

    items = [(user, {}, "hang"), (user, {}, "a")]
    scores, _ = service.score(items, stop_requested=stop_requested)
    assert time.monotonic() - asked[-1] < 1.0
    assert max(b - a for a, b in pairwise(asked)) < 0.2
    assert {score.status for score in scores} == {"infrastructure"}
    assert service.score([(user, {}, "a")])[0] == [Score(1.0, "correct")]
    service.close()


def test_the_batch_has_a_deadline_too(user):
    service = ScoringService(1, batch_s=2.0)
    scores, _ = service.score([(user, {}, "hang"), (user, {}, "a")])
    assert [score.status for score in scores] == ["timeout", "timeout"]
    service.close()


def test_processes_that_do_not_start_are_no_wrong_answers(monkeypatch):
    broken = partial(service_module.WorkerProcess, "ernie_train.no_such_module")
    monkeypatch.setattr(service_module, "WorkerProcess", broken)
    scores, _ = ScoringService(1).score(ITEMS)
    assert {score.status for score in scores} == {"infrastructure"}


def test_scoring_processes_load_no_paddle(tmp_path):
    path = tmp_path / "look.py"
    path.write_text("import sys\ndef score(row, completion):\n    return 'paddle' in sys.modules\n")
    service = ScoringService(1)
    assert service.score([(UserReward(str(path), "score"), {}, "")])[0][0].value == 0.0
    service.close()


def test_a_process_ends_when_its_owner_is_gone(user):
    service = ScoringService(1)
    service.score([(user, {}, "a")])
    process = service._pool[0]._process
    service._pool[0]._pipe.close()
    assert process.wait(10) == 0
    service._pool.clear()


def test_a_signal_of_the_terminal_does_not_reach_the_processes(pool):
    pool.score(ITEMS)
    worker = pool._pool[0]._process.pid
    assert os.getsid(worker) == worker != os.getsid(0)
