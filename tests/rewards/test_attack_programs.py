"""Every program of tests/attacks/programs, in every form of test: none is correct, none is felt."""

import glob
import os
import time
from pathlib import Path

import pytest

from ernie_train.data.completion_format import format_completion
from ernie_train.rewards.sandbox import api, backends, pool
from ernie_train.rewards.sandbox.api import Limits
from ernie_train.rewards.sandbox.pool import POOL
from ernie_train.rewards.verifiers import code

PROGRAMS = sorted((Path(__file__).parents[1] / "attacks" / "programs").glob("*.py"))
CALLS = {"entry_point": "f", "tests": [[[1], 2], [[40], 41]]}
ROWS = {
    "calls": CALLS,
    "asserts": {"tests": ["assert f(1) == 2"], "hidden_tests": ["assert f(40) == 41"]},
    "script": {"tests": [{"input": "1\n", "output": "2\n"}]},
}
# They take their limits to the end, whatever the form of the tests.
PATIENT = {
    "blocks_signals", "catches_the_time_limit", "closes_its_channel", "compile_bomb",
    "daemon", "deep_recursion", "endless_loop", "endless_output", "fork_bomb", "hash_flood",
    "huge_integers", "own_limits", "redos", "sleeps", "thread_bomb", "threads_that_outlive",
}  # fmt: skip
ATTACKS = [
    pytest.param(path, form, id=f"{path.stem}-{form}")
    for path in PROGRAMS
    for form in (["asserts"] if path.stem in PATIENT else ROWS)
]
INNOCENT = {
    "script": "print(int(input()) + 1)",
    "other": "import os\ndef f(x):\n    return x + 1 if os.listdir('.') == [] else 'not empty'",
}


def graded(source, form):
    return code.score(ROWS[form], format_completion("because", f"```python\n{source}\n```"))


MARK = f"# the sandboxes of process {os.getpid()}\n"


def processes_inside():
    """Processes of the sandboxes that this process started: all carry the mark as an argument."""
    found = set()
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            found |= {path} if MARK.encode() in Path(path).read_bytes() else set()
        except OSError:
            continue
    return found


def settles(condition):
    """What was killed takes a moment to be gone."""
    deadline = time.monotonic() + 5
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(autouse=True, scope="module")
def marked():
    POOL.close()
    boot, pool._BOOT = pool._BOOT, MARK + pool._BOOT
    yield
    pool._BOOT = boot
    POOL.close()
    assert settles(lambda: not processes_inside())


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(api, "DEFAULT_LIMITS", Limits(cpu_s=1, wall_s=2))


def layers():
    found, _ = backends.possible_layers()
    working = {}
    for layer in found:
        if layer.name not in working and not api.trial(layer):
            working[layer.name] = layer
    return working


LAYERS = layers()


def test_there_are_enough_of_them_and_each_says_what_it_tries():
    assert len(PROGRAMS) >= 40
    firsts = [path.read_text().partition("\n")[0] for path in PROGRAMS]
    assert all(line.startswith("# ") and line.endswith(".") for line in firsts)
    assert len(set(firsts)) == len(firsts)


@pytest.mark.parametrize(("path", "form"), ATTACKS)
def test_an_attack_is_wrong_and_leaves_nothing_behind(path, form):
    innocent = INNOCENT.get(form, INNOCENT["other"])
    assert graded(innocent, form).status == "correct"
    before = len(processes_inside())
    assert before
    score = graded(path.read_text(), form)
    assert (score.status, score.value) == ("wrong", 0.0), score
    assert graded(innocent, form).status == "correct"
    assert settles(lambda: len(processes_inside()) == before)
    for place in ("/", "/tmp", "/dev/shm", "/var/tmp", os.getcwd()):
        assert not (Path(place) / "ernie-attack-was-here").exists()


def test_the_attacks_come_out_the_same_without_the_pool():
    quick = [p for p in PROGRAMS if p.stem in ("forged_verdict", "equals_everything", "ptrace")]
    for path in quick:
        call = path.read_text(), "f", [[1], [40]]
        assert api.run_calls(*call, pooled=False) == api.run_calls(*call)


@pytest.mark.skipif("Landlock" not in LAYERS, reason="Landlock does not work here")
def test_the_attacks_behind_landlock(monkeypatch, own_temporary):
    """What it does not stop is in the sandbox's docstring, and left out here."""
    left_out = {"filling_the_directory"} | (
        PATIENT - {"fork_bomb", "daemon", "threads_that_outlive"}
    )
    monkeypatch.setattr(api, "current_layer", lambda: LAYERS["Landlock"])
    try:
        for path in PROGRAMS:
            if path.stem in left_out:
                continue
            score = graded(path.read_text(), "calls")
            assert score.status == "wrong", (path.stem, score)
            assert graded(INNOCENT["other"], "calls").status == "correct", path.stem
    finally:
        POOL.close()
    assert not list(own_temporary.glob("ernie-sandbox-*"))
