"""What `tests/waiting.py` reports of its scripts: a failure must never look like success."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Listener
from pathlib import Path

import pytest

from tests import waiting

Ran = tuple[dict[int, int | str], str, str]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[[str], Ran]]:
    """Run a script in a fork of a waiting process; return its status, output and errors."""
    address = str(tmp_path / "socket")
    serve = "import sys; from tests.waiting import serve; serve(sys.argv[1])"
    with Listener(address) as listener:
        process = subprocess.Popen([sys.executable, "-c", serve, address])
        connections = waiting.connected(listener, 1)

    def ran(code: str) -> Ran:
        script, *streams = (tmp_path / name for name in ("script.py", "in", "out", "err"))
        script.write_text(code)
        streams[0].write_text("told")
        for stream in streams[1:]:
            stream.write_text("")
        waiting.send(connections[0], script, ["x"], {"TOLD": "y"}, *streams)
        found = waiting.ended(connections, timeout_s=60)
        return found, streams[1].read_text(), streams[2].read_text()

    yield ran
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("raise ValueError('broken')", 1, "ValueError: broken"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('in words')", 1, "in words"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("syntax error", 1, "SyntaxError"),
        ("import sys; sys.exit()", 0, ""),
    ],
)
def test_a_script_ends_with_its_own_status(
    run: Callable[[str], Ran], code: str, status: int, error: str
) -> None:
    found, _, errors = run(code)
    assert found == {0: status}
    assert error in errors
    assert run("print('next')")[:2] == ({0: 0}, "next\n"), "the process waits for another"


def test_a_script_has_its_arguments_environment_and_input(run: Callable[[str], Ran]) -> None:
    code = "import os, sys; print(sys.argv[1], os.environ['TOLD'], sys.stdin.read())"
    assert run(code) == ({0: 0}, "x y told\n", "")
