"""Sandboxes that are kept, shared and lost, and accidents of the machine."""

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from ernie_train.rewards.sandbox import api, pool, process
from ernie_train.rewards.sandbox.api import Limits, run_calls
from ernie_train.rewards.sandbox.pool import POOL
from tests.rewards.sandboxes import LAYERS, RIGHT, descendants, probe


def test_a_sandbox_is_kept_until_a_program_changes_its_directory(layer):
    with POOL.borrow(LAYERS[layer]) as pair:
        first = pair.programs
    assert run_calls(RIGHT, "f", [[1]]).kind == "returned"
    with POOL.borrow(LAYERS[layer]) as pair:
        assert pair.programs is first
    changes = [
        "open('a', 'w').close()",
        "os.mkdir('d')",
        "open('b', 'w').close() or os.remove('b')",
    ]
    if layer == "bubblewrap":  # the filter for Landlock refuses it
        changes.append("os.chmod('.', 0o777)")
    for change in changes:
        with POOL.borrow(LAYERS[layer]) as pair:
            before = pair.programs
        assert probe(change)[0] == "value"
        with POOL.borrow(LAYERS[layer]) as pair:
            assert pair.programs is not before, change
        assert probe("os.listdir('.')") == ["value", []]


def test_threads_share_the_pool_and_equal_serial_runs():
    sources = [f"def f(x):\n    return x + {n}" for n in range(24)]
    serial = [run_calls(source, "f", [[1]], pooled=False) for source in sources]
    results = [None] * len(sources)

    def work(start):
        for n in range(start, len(sources), 3):
            results[n] = run_calls(sources[n], "f", [[1]])

    threads = [threading.Thread(target=work, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == serial
    assert [outcome.values[0][1] for outcome in serial] == [n + 1 for n in range(24)]


def kill_all(pid):
    for below in descendants(pid):
        with suppress(ProcessLookupError):  # some end with the one before
            os.kill(below, 9)


def test_a_server_that_is_killed_costs_nothing_but_another_try():
    assert run_calls(RIGHT, "f", [[1]]).kind == "returned"
    with POOL.borrow(api.current_layer()) as pair:
        victim = pair.programs._process.pid
    killer = threading.Timer(0.2, kill_all, [victim])
    killer.start()
    outcome = run_calls(f"import time\ntime.sleep(0.5)\n{RIGHT}", "f", [[1]])
    killer.join()
    assert outcome.values == [["value", 2]], outcome


def test_a_program_that_costs_its_sandbox_twice_has_failed(monkeypatch):
    """No program is known that can: what it would look like is played here."""
    real = process.exchange

    def lose(pair, request, limits):
        if "time.sleep" not in request["source"]:
            return real(pair, request, limits)
        real(pair, request | {"source": RIGHT}, limits)  # all its processes are there then
        # While the program runs: one that ended before it would be replaced, and cost nothing.
        killer = threading.Timer(0.2, kill_all, [pair.programs._process.pid])
        killer.start()
        try:
            return real(pair, request, limits)
        finally:
            killer.join()

    monkeypatch.setattr(api, "exchange", lose)
    outcome = run_calls("import time\ntime.sleep(1)", "f", [[1]])
    assert outcome.kind in ("failed", "infrastructure")
    assert run_calls(RIGHT, "f", [[1]]).values == [["value", 2]]


def test_a_process_that_could_not_be_made_ready_is_made_again(monkeypatch):
    limits = process.Limits.resources
    asked = []

    def failing_once(self, layer):
        asked.append(1)
        return {"NO_SUCH_LIMIT": (0, 0)} if len(asked) == 1 else limits(self, layer)

    monkeypatch.setattr(process.Limits, "resources", failing_once)
    assert run_calls(RIGHT, "f", [[1]]).values == [["value", 2]]


def test_directories_are_made_while_others_remove_what_was_left(own_temporary):
    """Removing a new directory before its owner has locked it costs a try, not the sandbox."""
    stop, failures = threading.Event(), []

    def remove():
        while not stop.is_set():
            for path in own_temporary.glob("ernie-sandbox-*"):
                with suppress(OSError):
                    lock = pool._locked(path)
                    path.rmdir()
                    os.close(lock)

    def make():
        for _ in range(40):
            try:
                pool._Scratch(None).remove()
            except Exception as error:
                failures.append(error)

    remover = threading.Thread(target=remove)
    makers = [threading.Thread(target=make) for _ in range(2)]
    for thread in [remover, *makers]:
        thread.start()
    for thread in makers:
        thread.join()
    stop.set()
    remover.join()
    assert failures == []


def test_an_idle_server_that_has_ended_is_replaced():
    assert run_calls(RIGHT, "f", [[1]]).kind == "returned"
    with POOL.borrow(api.current_layer()) as pair:
        pair.programs._process.kill()
        pair.programs._process.wait()
        pair.programs._control.shutdown(2)
    assert run_calls(RIGHT, "f", [[1]]).values == [["value", 2]]


SERVING = """
import os, sys, time
from ernie_train.rewards.sandbox import api as sandbox
from ernie_train.rewards.sandbox import pool as sandbox_pool
sandbox_pool._BOOT = sys.argv[1] + sandbox_pool._BOOT
if sys.argv[2] != "bubblewrap":
    layers = sandbox.possible_layers()[0]
    sandbox.current_layer = lambda: [l for l in layers if l.name == sys.argv[2]][-1]
assert sandbox.run_calls("f = abs", "f", [[-1]]).values == [["value", 1]]
print("ready", flush=True)
sandbox.run_calls("import time\\ntime.sleep(60)", "f", [[1]])
"""


def marked(mark):
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if mark in line and "sandbox_pool" not in line]


def test_everything_ends_with_a_process_that_is_killed(layer, own_temporary):
    mark = f"# killed {layer} {os.getpid()}\n"
    command = [sys.executable, "-c", SERVING, mark, layer]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        assert marked(mark.strip())
        process.kill()
    deadline = time.monotonic() + 10
    while marked(mark.strip()):
        assert time.monotonic() < deadline, marked(mark.strip())
        time.sleep(0.05)
    if layer != "bubblewrap":  # its directory goes when the next one is made
        assert list(own_temporary.glob("ernie-sandbox-*"))
        run_calls(RIGHT, "f", [[1]], pooled=False)
        POOL.close()
    assert not list(own_temporary.glob("ernie-sandbox-*"))


def test_a_machine_that_is_too_busy_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(api, "_KNOWN_PROGRAM", "import time\ntime.sleep(60)")
    outcome = run_calls("import time\ntime.sleep(60)", "f", [[1]], Limits(wall_s=0.3))
    assert outcome.kind == "timeout"
    monkeypatch.setattr(api, "_KNOWN_PROGRAM", "no python")
    outcome = run_calls("import time\ntime.sleep(60)", "f", [[1]], Limits(wall_s=0.3))
    assert outcome.kind == "infrastructure"


@pytest.mark.parametrize(("cpu_s", "walls"), [(0.0, [0.5, 0.5]), (0.3, [0.5, 1.0])])
def test_a_program_that_worked_until_the_end_of_its_time_gets_more(monkeypatch, cpu_s, walls):
    """One that slept gets the same again: a stall of the machine looks like that."""
    real, given = process.exchange, []

    def slow(pair, request, limits):
        if request["source"] != RIGHT:
            return real(pair, request, limits)
        given.append(limits.wall_s)
        late = process.NoAnswerInTime()
        late.cpu_s = cpu_s
        raise late

    monkeypatch.setattr(api, "exchange", slow)
    assert run_calls(RIGHT, "f", [[1]], Limits(cpu_s=1, wall_s=0.5)).kind in ("failed", "timeout")
    assert given == walls


def test_the_time_that_a_program_worked_is_known_when_it_is_stopped():
    spinning = {"kind": "calls", "source": "while True: pass", "entry_point": "f", "calls": [[1]]}
    with POOL.borrow(api.current_layer()) as pair, pytest.raises(process.NoAnswerInTime) as late:
        process.exchange(pair, spinning, Limits(wall_s=0.5))
    assert 0 < late.value.cpu_s < 5


def test_a_program_that_something_outside_kills_is_no_wrong_answer():
    with POOL.borrow(api.current_layer()) as pair:
        server = pair.programs._process.pid
    timer = threading.Timer(0.7, lambda: os.kill(max(descendants(server)), 9))
    timer.start()
    outcome = run_calls("import time\ntime.sleep(60)", "f", [[1]], Limits(wall_s=10))
    timer.join()
    assert (outcome.kind, outcome.detail) == (
        "infrastructure", "something outside killed the program",
    )  # fmt: skip
