"""No hostile text scores correct, and none harms what is graded after it."""

import time
from pathlib import Path

import pytest

from ernie_train.data.completion_format import format_completion
from ernie_train.rewards import REWARDS, ScoringService
from ernie_train.rewards.scoring.reference_completion import build_reference_completion
from tests.attacks.texts import ATTACKS, LABEL, LETTER, PEOPLE, ROOT, TWELVE

# Far above what any attack takes; a comparison may use 3 s of processor time of its own.
ITEM_S = 120.0


@pytest.fixture(scope="module")
def service():
    service = ScoringService(1, item_s=ITEM_S)
    yield service
    service.close()


def test_there_are_many_attacks_and_each_says_what_it_tries():
    tries = [attack.tries for attack in ATTACKS]
    assert len(set(tries)) == len(tries) >= 40
    assert all(tries)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.tries.replace(" ", "-"))
def test_no_text_is_correct_and_the_next_answer_is_graded(service, attack):
    honest = ("math", {"answer": r"\sqrt{2}"}, format_completion("b", r"\frac{2}{\sqrt{2}}"))
    scores, report = service.score([(attack.reward, attack.row, attack.completion), honest])
    assert (scores[0].status, scores[0].value) == ("wrong", 0.0), scores[0]
    assert scores[1].status == "correct"
    assert report.workers_lost == 0


def test_nothing_is_left_behind():
    service = ScoringService(1, item_s=ITEM_S)
    bomb = ("math", {"answer": r"\sqrt{2}"}, format_completion("b", "9^{9^{9^9}}"))
    assert service.score([bomb])[0][0].status == "wrong"
    worker = service._pool[0]._process.pid  # its session has the same number
    assert worker in processes_of(worker)
    service.close()
    deadline = time.monotonic() + 10
    while processes_of(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(worker) == set()


def processes_of(session):
    """The processes of a session, zombies aside."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(") ")[2].split()[:4]
        except OSError:
            continue
        if int(sid) == session and state != "Z":
            found.add(int(stat.parent.name))
    return found


SLOW_TO_READ = [
    "</answer>" + "<answer>" * 12_000,
    "\\(" * 49_000,
    "\n" * 99_000,
    "1" + ",111" * 24_000 + "1",
    "\\boxed{" + "1" + ",111" * 24_000 + "1}",
    "\\boxed{" * 14_000,
    "\\boxed{x}" * 11_000,
    "\\text{" * 16_000,
    "answer: 1. " * 9_000,
    "answer" + " " * 90_000,
    "." + " " * 99_000,
    "Zoey, " * 16_000,
    "Zoey is " * 12_000,
    "(A" * 49_000,
    "#### " * 19_000,
    "{" * 99_000,
    "$" * 99_999,
    "- " * 49_000,
]


@pytest.mark.parametrize("text", SLOW_TO_READ, ids=lambda text: repr(text[:12]))
@pytest.mark.parametrize("row", [TWELVE, LABEL, LETTER, PEOPLE, ROOT], ids=str)
def test_reading_takes_time_linear_in_the_length(text, row):
    completion = format_completion("because", text)
    start = time.process_time()
    scores = [REWARDS[reward](row, completion) for reward in ("math", "logic", "format")]
    assert time.process_time() - start < 1.5  # quadratic readings take 10 s and more
    assert "correct" not in [score.status for score in scores[:2]]


@pytest.mark.parametrize("reward", sorted(set(REWARDS) - {"code", "format"}))
def test_the_rows_of_the_attacks_can_be_answered(service, reward):
    rows = [attack.row for attack in ATTACKS if attack.reward == reward]
    scores, _ = service.score(
        [(reward, row, build_reference_completion(reward, row)) for row in rows]
    )
    assert {score.status for score in scores} == {"correct"}
