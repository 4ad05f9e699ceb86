"""What programs can reach, and the limits that end them."""

import os
import socket
import tempfile
import time

import pytest

from ernie_train.rewards.sandbox import api
from ernie_train.rewards.sandbox.api import Limits, run_calls
from tests.rewards.sandboxes import LAYERS, RIGHT, probe


def test_nothing_of_this_process_can_be_seen(monkeypatch, tmp_path):
    monkeypatch.setenv("A_SECRET", "must-not-leak")
    secret = tmp_path / "secret.txt"
    secret.write_text("must-not-leak")
    assert probe("dict(os.environ)") == ["value", {}]
    assert probe(f"open({str(secret)!r}).read()")[0] == "error"
    for place in ("/home", "/root", "/etc", "/proc", "/sys", "/var", os.getcwd()):
        assert probe(f"os.listdir({place!r})")[0] == "error", place
    assert probe("os.listdir('/tmp')") == ["value", []]
    assert probe("sorted(os.listdir('/dev'))") == ["value", ["null", "urandom"]]
    assert probe("os.getuid() != 0 or os.open('/dev/mem', 0)")[1] is True
    assert probe("[d for d in range(64) if os.path.lexists(f'/tmp/{d}')]") == ["value", []]


@pytest.mark.skipif("Landlock" not in LAYERS, reason="this kernel has no Landlock")
def test_landlock_hides_files_that_anyone_may_read(monkeypatch):
    monkeypatch.setattr(api, "current_layer", lambda: LAYERS["Landlock"])
    assert "Permission denied" in probe("open('/etc/passwd').read()")[1]
    for place in ("/", "/etc", "/proc", "/tmp", "/dev"):
        assert probe(f"os.listdir({place!r})")[0] == "error", place
    assert probe("open('mine', 'w').write('x')") == ["value", 1]
    assert probe("os.listdir('.')") == ["value", []]
    assert "denied" in probe("open('/tmp/not-mine', 'w')")[1]


def test_no_network_no_process_and_nothing_to_write_to_outside(layer):
    assert "not permitted" in probe("socket.socket()")[1]
    assert "not permitted" in probe("os.fork()")[1]
    assert "not permitted" in probe("os.execv('/bin/sh', ['sh'])")[1]
    assert "not permitted" in probe("os.kill(os.getppid(), 0)")[1]
    assert "File too large" in probe("open('x', 'w').write('a' * (1 << 22))")[1]
    for place in ("/usr/x", "/x", "/dev/x", "/lib/x"):
        assert probe(f"open({place!r}, 'w')")[0] == "error", place


def test_a_datagram_reaches_no_socket_of_the_host(layer, tmp_path):
    """A pair of datagram sockets could send to any address, were the filter to let it."""
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o777)
        path = f"{open_to_all}/log"
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as named,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract,
        ):
            named.bind(path)
            os.chmod(path, 0o777)
            abstract.bind(f"\0ernie-{os.getpid()}")
            for address in (path, abstract.getsockname()):
                sending = f"socket.socketpair(1, 2)[0].sendto(b'x', {address!r})"
                assert "not permitted" in probe(sending)[1]
            for listener in (named, abstract):
                listener.setblocking(False)
                with pytest.raises(BlockingIOError):
                    listener.recv(1)


def user_files(name):
    """A script of a plain user: a program of its own name tries to change its key."""
    return f"""
import sys
from ernie_train.rewards.sandbox import api
layers = api.possible_layers()[0]
api.current_layer = lambda: [l for l in layers if l.name == {name!r}][-1]
key, change = sys.argv[1:]
print(api.run_calls("import os\\ndef f(key):\\n    return " + change, "f", [[key]]).values[0][0])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a plain user")
@pytest.mark.parametrize("change", [
    "os.chmod(key, 0o777)", "os.utime(key, (1, 1))", "os.truncate(key, 0)",
    "os.fchmod(os.open(key, os.O_PATH), 0o777)",
    "os.chmod(os.path.basename(key), 0o777, dir_fd=os.open(os.path.dirname(key), os.O_PATH))",
    "os.close(os.open(key, os.O_TRUNC))", "os.rename(key, 'mine')", "os.link(key, 'mine')",
    "os.unlink(key)", "open(key, 'a')",
])  # fmt: skip
def test_files_of_the_same_user_stay_as_they_are(plain_user, change):
    key = plain_user.directory / "key"
    key.write_text("secret")
    os.chown(key, plain_user.uid, plain_user.uid)
    key.chmod(0o600)
    before = os.stat(key)
    for name in LAYERS:
        said = plain_user.run(user_files(name), str(key), change)
        assert said.split() == ["error"], (name, said)
    after = os.stat(key)
    assert (after.st_mode, after.st_size, after.st_mtime_ns, after.st_nlink) == (
        before.st_mode, before.st_size, before.st_mtime_ns, before.st_nlink,
    )  # fmt: skip


def test_event_loops_threads_and_pipes_work(layer):
    source = (
        "import asyncio, concurrent.futures, os, tempfile\n"
        "async def double(x):\n    await asyncio.sleep(0.001)\n    return 2 * x\n"
        "def f(x):\n"
        "    with concurrent.futures.ThreadPoolExecutor(2) as pool:\n"
        "        ahead = list(pool.map(abs, [-x, x]))\n"
        "    with tempfile.TemporaryFile('w+') as file:\n"
        "        file.write('text')\n        file.seek(0)\n        text = file.read()\n"
        "    return [asyncio.run(double(x)), ahead, text]\n"
    )
    assert run_calls(source, "f", [[3]]).values == [["value", [6, [3, 3], "text"]]]


def test_draws_and_the_order_of_sets_are_the_same_in_every_process(layer):
    source = (
        "import random\ndef f():\n    return [random.random(), list({'a', 'b', 'c', 'd', 'e'})]"
    )
    first = run_calls(source, "f", [[]])
    assert first.kind == "returned"
    assert run_calls(source, "f", [[]], pooled=False) == first


def test_limits_end_a_program_and_are_its_own_fault(layer):
    short = Limits(cpu_s=1, wall_s=20)
    outcome = run_calls("while True:\n    pass", "f", [[1]], short)
    assert (outcome.kind, outcome.detail) == ("failed", "more than 1 s of processor time")
    start = time.monotonic()
    outcome = run_calls("import time\ntime.sleep(60)", "f", [[1]], Limits(wall_s=1))
    assert (outcome.kind, outcome.detail) == ("failed", "not finished after 1 s")
    assert time.monotonic() - start < 15
    outcome = run_calls("def f(x):\n    return 'a' * (1 << 24)", "f", [[1]])
    assert (outcome.kind, outcome.detail) == ("failed", "more than 8388608 bytes of output")
    assert run_calls("def f(x):\n    return len(bytearray(1 << 30))", "f", [[1]]).values == [
        ["error", "MemoryError: "]
    ]
    assert run_calls(RIGHT, "f", [[1]]).values == [["value", 2]]
