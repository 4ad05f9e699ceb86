"""The state of processes, and that none outlives its owner."""

import gzip
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ernie_train.core import processes

REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_signal_has_a_name():
    names = [processes.signal_name(number) for number in (9, 34, 35, 64)]
    assert names == ["SIGKILL", "SIGRTMIN", "signal 35", "SIGRTMAX"]


def test_a_process_is_known_by_number_and_start(tmp_path):
    # A name with brackets and spaces, which stands in the middle of what the kernel tells.
    program = tmp_path / "x) R (1 2"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "60"])
    try:
        while (found := processes.process_state(process.pid)) is None or found.state != "S":
            time.sleep(0.01)
        assert found.parent == os.getpid()
        assert process.pid in processes.descendants([os.getpid()])
        assert processes.is_running(process.pid, found.started)
        assert not processes.is_running(process.pid, found.started + 1), "another of its number"
    finally:
        process.kill()
    while processes.process_state(process.pid).state != "Z":
        time.sleep(0.01)
    assert not processes.is_running(process.pid, found.started)
    process.wait()
    assert processes.process_state(process.pid) is None


def test_descendants_are_killed_down_to_orphans_but_not_those_spared():
    code = """
import os, subprocess, sys
from ernie_train.core import processes
processes.adopt_orphans()
spared = subprocess.Popen(["sleep", "60"])
shell = subprocess.Popen(["sh", "-c", "setsid sleep 60 & sleep 60"])
orphaned = subprocess.Popen(["sh", "-c", "setsid sleep 60 & exit"])
orphaned.wait()
assert len(processes.descendants([os.getpid()])) >= 4
left = processes.kill_descendants([spared.pid])
assert not left, left
assert processes.descendants([os.getpid()]) == {spared.pid}
spared.kill()
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=30)


def test_a_process_dies_with_its_parent_also_one_that_ended_before_it_could_ask():
    """Both are forked: one asks in time, one when its parent has already gone."""
    code = """
import os, sys, time
from ernie_train.core.processes import die_with_parent
kind, out = sys.argv[1], os.dup(1)
heard, tell = os.pipe()
if os.fork() == 0:
    parent = os.getpid()
    if os.fork() == 0:
        os.close(1)
        if kind == "late":
            while os.getppid() == parent:
                time.sleep(0.01)
        die_with_parent(parent)
        os.write(out, b"asked")
        os.write(tell, b"asked")
        time.sleep(60)
    if kind == "in time":
        os.read(heard, 5)
    os._exit(0)
os.close(out)
"""
    for kind, asked in (("in time", True), ("late", False)):
        command = [sys.executable, "-c", code, kind]
        # The output ends when the last process that holds it has.
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=50)
        assert ("asked" in done.stdout) == asked, kind


LEFT = """
import atexit, ctypes, gzip, multiprocessing, os, sys, tempfile, threading, time
import paddle
from concurrent.futures import ThreadPoolExecutor
from ernie_train.core import processes

class Keeper:  # a cycle, which holds files that are never closed
    def __init__(self):
        self.me = self
        self.text, self.bytes = open("text", "w"), open("bytes", "wb")
        self.packed = gzip.open("packed.gz", "wt")
        self.scratch = tempfile.TemporaryDirectory(dir=".", prefix="scratch-")

def later():
    time.sleep(0.3)
    print("a thread")

keeper = Keeper()
keeper.text.write("text")
keeper.bytes.write(b"bytes")
keeper.packed.write("packed")
atexit.register(print, "an exit handler")
threading.Thread(target=later).start()
ThreadPoolExecutor().submit(later)
queue = multiprocessing.Queue()
queue.put("x")
ctypes.CDLL(None).printf(b"from C\\n")
print("unflushed")
processes.leave(7)
"""
# Stands for Paddle, which takes seconds to import.
LOADED = "import sys\nsys.modules['paddle'] = sys\nfrom ernie_train.core.processes import leave\n"


def test_a_process_that_leaves_has_done_all_that_python_does_at_its_end(tmp_path):
    done = _python(LEFT, tmp_path)
    assert (done.returncode, done.stderr) == (7, "")
    said = ["a thread", "a thread", "an exit handler", "from C", "unflushed"]
    assert sorted(done.stdout.splitlines()) == said
    assert (tmp_path / "text").read_text() == "text"
    assert (tmp_path / "bytes").read_bytes() == b"bytes"
    assert gzip.decompress((tmp_path / "packed.gz").read_bytes()) == b"packed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "packed.gz", "text"]


def test_a_process_leaves_without_clearing_up_unless_something_watches_it(tmp_path):
    code = "class Last:\n    def __del__(self): print('cleared up', flush=True)\nlast = Last()\n"
    code = LOADED + code
    assert _python(code + "leave(3)", tmp_path).stdout == ""
    for watch in ("settrace", "setprofile"):
        watched = f"sys.{watch}(lambda *_: None)\ntry: leave(3)\nfinally: sys.{watch}(None)"
        done = _python(code + watched, tmp_path)
        assert (done.returncode, done.stdout) == (3, "cleared up\n")


def test_output_that_cannot_be_written_is_told_as_python_tells_it(tmp_path):
    with open("/dev/full", "w") as full:
        done = _python(f"{LOADED}print('x')\nleave(7)", tmp_path, stdout=full)
    assert done.returncode == 120 and "No space left" in done.stderr


def _python(code: str, directory: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("PYTHONUNBUFFERED", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    code = f"import ernie_train\n{code}"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=directory, env=environment, text=True, timeout=120, check=False, **pipes
    )
