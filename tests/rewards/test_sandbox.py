"""The sandbox: what programs can reach, what comes back, layers, the pool, accidents."""

import dataclasses
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

import ernie_train
from ernie_train.rewards.sandbox import api, backends, seccomp
from ernie_train.rewards.sandbox.api import Limits, Tests, run_calls, run_script, run_tests
from ernie_train.rewards.sandbox.pool import POOL, Sandbox, SandboxLost

RIGHT = "def f(x):\n    return x + 1"
LAYERS = {}
for layer in backends.possible_layers()[0]:
    if layer.name not in LAYERS and not api.trial(layer):
        LAYERS[layer.name] = layer


@pytest.fixture(params=list(LAYERS))
def layer(request, monkeypatch):
    monkeypatch.setattr(api, "current_layer", lambda: LAYERS[request.param])
    yield request.param
    POOL.close()


@pytest.fixture
def fresh_layer():
    """The layer in force is found out again within the test and after it."""
    api._working_layer.cache_clear()
    yield
    api._working_layer.cache_clear()


def probe(expression):
    """What an expression gives inside: ["value", v], or ["error", text] where it raises."""
    outcome = run_calls(f"import os, socket\ndef f():\n    return {expression}", "f", [[]])
    assert outcome.kind == "returned", outcome
    return outcome.values[0]


# ---- what comes back ----------------------------------------------------------------------------


def test_calls_return_values_and_errors(layer):
    outcome = run_calls("def f(x):\n    return 6 / x", "f", [[4], [0]])
    assert outcome.kind == "returned"
    assert outcome.values == [["value", 1.5], ["error", "ZeroDivisionError: division by zero"]]


def test_calls_do_not_see_each_others_changes(layer):
    source = "def f(x):\n    x.append(1)\n    return x"
    assert run_calls(source, "f", [[[0]], [[0]]]).values == [["value", [0, 1]]] * 2


def test_a_script_reads_and_writes_the_standard_streams(layer):
    source = "import os, sys\nn = int(input())\nprint(n + 1, flush=True)\nos.write(1, b'raw')\n"
    assert run_script(source + "sys.stdout.write(open(0).read())", "4\nrest").values == ["5\nraw"]
    echo = "import sys\nfor line in sys.stdin:\n    print(line.strip()[::-1])\nexit()"
    assert run_script(echo, "ab\nü€\n").values == ["ba\n€ü\n"]


@pytest.mark.parametrize(
    "end", ["exit(3)", "1 / 0", "raise SystemExit('no')", "import os\nos._exit(1)"]
)
def test_a_script_that_does_not_end_well_has_failed(end):
    assert run_script(f"print(5)\n{end}", "").kind == "failed"
    assert run_script("print(5)\nraise SystemExit", "").values == ["5\n"]


def test_tests_see_exact_values_of_plain_types(layer):
    values = (
        "(1, [2.5, None], 'ü')", "{1, 2}", "frozenset({3})", "{1: 'a', (2, 3): True}", "b'\\x00x'",
        "1 << 70", "-(3 ** 50)", "1e300", "complex(0.1, -0.0)", "range(3)", "''",
        "__import__('fractions').Fraction(1, 3)", "__import__('decimal').Decimal('0.10')",
        "__import__('datetime').date(2024, 2, 29)", "__import__('collections').deque([1])",
    )  # fmt: skip
    tests = [f"v = f({n}); assert v == {v} and type(v) is type({v})" for n, v in enumerate(values)]
    outcome = run_tests(f"def f(n):\n    return [{', '.join(values)}][n]", Tests(tests, ["f"]))
    assert outcome.values == [[True, ""]] * len(values)
    nan = Tests(["import math", "assert math.isnan(f()) and f() != f()"], ["f"])
    assert run_tests("def f():\n    return float('nan')", nan).values == [[True, ""]] * 2


def test_tests_use_the_objects_of_the_program(layer):
    source = (
        "class Node:\n    def __init__(self, value):\n        self.value, self.next = value, None\n"
        "    def __len__(self):\n        return 1 + (len(self.next) if self.next else 0)\n"
        "    def __getitem__(self, i):\n        return self.value + i\n"
        "def total(node):\n    return node.value + (total(node.next) if node.next else 0)\n"
        "def count(n):\n    yield from range(n)\n"
    )
    tests = Tests(
        setup="head = Node(1)\nhead.next = Node(value=2)\n",
        tests=[
            "assert total(head) == 3", "assert head.next.value == 2", "assert len(head) == 2",
            "assert head[4] == 5", "assert list(count(3)) == [0, 1, 2]",
            "assert [total(n) for n in [head, head.next]] == [3, 2]",
            "assert Node(1) != Node(1) and head.next is not None",
        ],
        names=["Node", "total", "count"],
    )  # fmt: skip
    assert run_tests(source, tests).values == [[True, ""]] * 7


def test_the_exceptions_of_the_program_reach_the_tests():
    expecting = "try:\n    f(0)\nexcept {}:\n    caught = True\nelse:\n    raise ValueError\n"
    source = "def f(x):\n    if x:\n        raise AssertionError\n    raise KeyError('k')"
    tests = ["KeyError", "LookupError", "ValueError"]
    outcome = run_tests(source, Tests([expecting.format(t) for t in tests], ["f"]))
    assert [passed for passed, _ in outcome.values] == [True, True, False]
    forged = expecting.format("AssertionError").replace("f(0)", "f(1)")
    assert run_tests(source, Tests([forged], ["f"])).values[0][0] is False


def test_a_test_that_catches_everything_does_not_hide_the_end_of_the_program():
    catching = "try:\n    f(1)\nexcept BaseException:\n    pass"
    outcome = run_tests("import os\ndef f(x):\n    os._exit(0)", Tests([catching] * 2, ["f"]))
    assert [passed for passed, _ in outcome.values] == [False, False]


def test_unittest_cases_count_by_method():
    case = (
        "import unittest\nclass T(unittest.TestCase):\n"
        "    def test_a(self):\n        self.assertEqual(f(1), 2)\n"
        "    def test_b(self):\n        self.assertEqual(f(1), 3)\n"
        "    def test_c(self):\n        with self.assertRaises(TypeError):\n            f('a')\n"
        "    def test_d(self):\n        self.skipTest('later')\n"
    )
    outcome = run_tests(RIGHT, Tests([case, "assert f(0) == 1"], ["f"]))
    assert [passed for passed, _ in outcome.values] == [True, False, True, False, True]


def test_a_setup_that_fails_is_the_rows_fault_unless_the_program_had_a_hand_in_it():
    tests = Tests(["assert f(1) == 2"], ["f"], setup="import no_such_module")
    outcome = run_tests(RIGHT, tests)
    assert outcome.kind == "bad_tests" and "no_such_module" in outcome.detail
    tests = Tests(["assert f(1) == 2"], ["f"], setup="first = f('x')")
    assert run_tests(RIGHT, tests).values[0][0] is False


# ---- what programs can reach --------------------------------------------------------------------


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
    outcome = run_calls("def f(x):\n    return 'a' * (1 << 22)", "f", [[1]])
    assert (outcome.kind, outcome.detail) == ("failed", "more than 1048576 bytes of output")
    assert run_calls("def f(x):\n    return len(bytearray(1 << 30))", "f", [[1]]).values == [
        ["error", "MemoryError: "]
    ]
    assert run_calls(RIGHT, "f", [[1]]).values == [["value", 2]]


# ---- the pool -----------------------------------------------------------------------------------


def test_a_sandbox_is_kept_until_a_program_changes_its_directory(layer):
    with POOL.borrow(LAYERS[layer]) as pair:
        first = pair.programs
    assert run_calls(RIGHT, "f", [[1]]).kind == "returned"
    with POOL.borrow(LAYERS[layer]) as pair:
        assert pair.programs is first
    for change in ("open('a', 'w').close()", "os.mkdir('d')", "os.chmod('.', 0o777)",
                   "open('b', 'w').close() or os.remove('b')"):  # fmt: skip
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


def test_a_server_that_is_killed_costs_its_program_alone(monkeypatch):
    assert run_calls(RIGHT, "f", [[1]]).kind == "returned"
    with POOL.borrow(api.current_layer()) as pair:
        victim = pair.programs

    def kill_all():
        for pid in descendants(victim._process.pid):
            with suppress(ProcessLookupError):  # some end with the one before
                os.kill(pid, 9)

    killer = threading.Timer(0.5, kill_all)
    killer.start()
    outcome = run_calls("import time\ntime.sleep(60)", "f", [[1]], Limits(wall_s=20))
    killer.join()
    assert outcome.kind == "failed", outcome
    assert run_calls(RIGHT, "f", [[1]]).values == [["value", 2]]


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


def test_everything_ends_with_a_process_that_is_killed(layer):
    mark = f"# killed {layer} {os.getpid()}\n"
    before = set(Path("/tmp").glob("ernie-sandbox-*"))
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
        run_calls(RIGHT, "f", [[1]], pooled=False)
        POOL.close()
    assert not set(Path("/tmp").glob("ernie-sandbox-*")) - before


# ---- accidents ----------------------------------------------------------------------------------


def test_a_machine_that_is_too_busy_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(api, "_KNOWN_PROGRAM", "import time\ntime.sleep(60)")
    outcome = run_calls("import time\ntime.sleep(60)", "f", [[1]], Limits(wall_s=1))
    assert outcome.kind == "timeout"
    monkeypatch.setattr(api, "_KNOWN_PROGRAM", "no python")
    outcome = run_calls("import time\ntime.sleep(60)", "f", [[1]], Limits(wall_s=1))
    assert outcome.kind == "infrastructure"


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


def descendants(root):
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()[1:]]
    found, grown = {root}, True
    while grown:
        more = {pid for pid, parent in pairs if parent in found} - found
        found, grown = found | more, bool(more)
    return found


# ---- layers -------------------------------------------------------------------------------------


def test_the_best_layer_is_in_force(fresh_layer):
    assert api.layer_in_force() == next(iter(LAYERS))


def test_without_bubblewrap_landlock_is_next_and_without_both_nothing_runs(
    fresh_layer, monkeypatch
):
    monkeypatch.setattr(backends.shutil, "which", which_without("bwrap"))
    if "Landlock" in LAYERS:
        assert api.layer_in_force() == "Landlock"
    api._working_layer.cache_clear()
    working = api.trial
    monkeypatch.setattr(
        api, "trial", lambda layer: "no" if layer.name == "Landlock" else working(layer)
    )
    with pytest.raises(api.SandboxUnavailable) as refused:
        api.layer_in_force()
    for word in ("apt-get install bubblewrap", "Landlock does not work", "allow them"):
        assert word in str(refused.value)
    with pytest.raises(api.SandboxUnavailable):
        run_calls(RIGHT, "f", [[1]])


def which_without(*missing):
    real = shutil.which
    return lambda name: None if name in missing else real(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="for root")
def test_an_interpreter_that_finds_the_library_of_another_is_refused():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        copy = shutil.copy("/usr/bin/python3", Path(folder) / "python3")
        layer = dataclasses.replace(LAYERS["Landlock"], interpreter=str(copy))
        with pytest.raises(SandboxLost, match="its own library cannot be read"):
            Sandbox(layer)


def test_root_without_a_way_to_become_another_user_is_refused(fresh_layer, monkeypatch):
    monkeypatch.setattr(backends.shutil, "which", which_without("setpriv"))
    with pytest.raises(api.SandboxUnavailable, match="util-linux"):
        api.layer_in_force()


def test_another_processor_is_refused(fresh_layer, monkeypatch):
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "aarch64")
    with pytest.raises(api.SandboxUnavailable, match="supports x86_64 only"):
        api.layer_in_force()


def test_a_bubblewrap_that_does_not_work_says_why(monkeypatch):
    # Not below pytest's own directory, which another user may not enter.
    with tempfile.TemporaryDirectory() as directory:
        fake = Path(directory, "bwrap")
        fake.write_text("#!/bin/sh\necho 'No permissions to create a new namespace' >&2\nexit 1")
        fake.chmod(0o755)
        Path(directory).chmod(0o755)
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
        layers, _ = backends.possible_layers()
        assert "No permissions to create a new namespace" in api.trial(layers[0])


def test_a_sandbox_that_cannot_be_started_is_no_wrong_answer(monkeypatch):
    broken = backends.Layer(
        "bubblewrap", ("/bin/false",), "/usr/bin/python3", None, True, True, None
    )
    monkeypatch.setattr(api, "current_layer", lambda: broken)
    assert run_calls(RIGHT, "f", [[1]]).kind == "infrastructure"
    with pytest.raises(SandboxLost):
        Sandbox(backends.Layer("bubblewrap", ("/nowhere",), "x", None, True, True, None))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a plain user")
@pytest.mark.parametrize("name", list(LAYERS))
def test_a_plain_user_needs_no_more(name):
    # A copy: a plain user may not read the checkout of root.
    place = Path("/var/tmp") / f"ernie-copy-{os.getpid()}-{name}"
    try:
        package = place / "ernie_train"
        source = Path(ernie_train.__file__).parent
        for inner in ("", "core", "rewards"):
            (package / inner).mkdir(parents=True)
            (package / inner / "__init__.py").touch()
        shutil.copy(source / "core" / "errors.py", package / "core")
        shutil.copytree(source / "rewards" / "sandbox", package / "rewards" / "sandbox")
        script = (
            "import os\nfrom ernie_train.rewards.sandbox import api as sandbox\n"
            "layers = sandbox.possible_layers()[0]\n"
            f"sandbox.current_layer = lambda: [l for l in layers if l.name == {name!r}][-1]\n"
            "assert os.getuid() == 12345\n"
            "hard = 'import os\\ndef f(x):\\n    os.kill(-1, 9)\\n'\n"
            "print(sandbox.run_calls(hard, 'f', [[-5]]).values[0][0])\n"
            "print(sandbox.run_calls('f = abs', 'f', [[-5]]).values)\n"
        )
        done = subprocess.run(
            ["/usr/bin/python3", "-c", script], capture_output=True, text=True, timeout=60,
            user=12345, group=12345, extra_groups=[], cwd="/", env={"PYTHONPATH": str(place)},
        )  # fmt: skip
        assert done.stdout.split("\n")[:2] == ["error", "[['value', 5]]"], done.stderr
    finally:
        shutil.rmtree(place)


# ---- the filter of system calls -----------------------------------------------------------------


def run_filter(program, number, arguments=(), *, arch=0xC000003E):
    """What a filter decides: an interpreter of the instructions that it uses (linux/filter.h)."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("=IIQ6Q", number, arch, 0, *padded)
    code = list(struct.iter_unpack("=HBBI", program))
    position = accumulator = 0
    while True:
        operation, yes, no, constant = code[position]
        position += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, constant)
        elif operation == 0x54:
            accumulator &= constant
        elif operation == 0x15:
            position += yes if accumulator == constant else no
        else:
            assert operation == 0x06
            return constant


ALLOW, REFUSE, NO_SUCH_CALL = 0x7FFF0000, 0x50001, 0x50026


def test_the_filter_allows_its_list_and_nothing_else():
    program = seccomp.build_filter()
    free = set(seccomp.FREE_CALLS.values())
    checked = {number: name for name, number in seccomp.CHECKED_CALLS.items()}
    for number in [*range(600), 0x40000000, 0x40000001]:
        if number not in checked:
            expected = ALLOW if number in free else REFUSE
            assert run_filter(program, number) == expected, number
    for other in (0xC00000B7, 0x40000003):  # aarch64, and 32-bit calls, whose numbers differ
        assert run_filter(program, min(free), arch=other) == 0x80000000
    call = {name: number for number, name in checked.items()}

    def decided(name, *arguments):
        return run_filter(program, call[name], arguments)

    assert decided("clone", 0x3D0F00) == ALLOW  # the flags of pthread_create
    assert decided("clone", 0x01200011) == REFUSE  # those of fork
    assert decided("clone", 0x10000000 | 0x10000) == REFUSE  # a thread in a new user namespace
    assert decided("clone3") == NO_SUCH_CALL
    assert decided("prlimit64", 0) == ALLOW and decided("prlimit64", 1) == REFUSE
    assert decided("fcntl", 3, 4) == ALLOW and decided("fcntl", 3, 1030) == ALLOW
    assert decided("fcntl", 3, 8) == REFUSE and decided("fcntl", 3, 10) == REFUSE
    assert decided("ioctl", 3, 0x5401) == ALLOW and decided("ioctl", 3, 0x8901) == REFUSE


HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


@pytest.mark.skipif(not HEADER.exists(), reason="the kernel's headers are not installed")
def test_the_numbers_are_those_of_the_kernels_table():
    found = re.findall(r"#define __NR_(\w+)\s+(\d+)", HEADER.read_text())
    numbers = {name: int(number) for name, number in found}
    ours = seccomp.FREE_CALLS | seccomp.CHECKED_CALLS
    assert ours == {name: numbers.get(name) for name in ours}
