"""Start and end programs in sandboxes that are kept warm, from the trusted side.

    Sandbox      one sandbox with its warmed interpreter, one program at a time
    SandboxPair  a Sandbox for programs and, once one is needed, a second one for judges
    SandboxPool  idle pairs of this process; a thread borrows one for each program

A sandbox takes some 30 ms to start, a program in it about 1 ms.
"""

import atexit
import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ernie_train.rewards.sandbox import seccomp
from ernie_train.rewards.sandbox.backends import Layer

_START_S = 20.0
_STOP_S = 10.0
_MAKE_TRIES = 20
_KEPT_PAIRS = 2 * (os.cpu_count() or 1)

# The modules of `guest/` in the order of their imports, by the names that the imports use.
_MODULES = ("values", "candidate", "test_judge", "server")
_BOOT = """
import json, sys, types
sys.path.remove("")
# Below a private home its library may be out of reach, and another's is found in its place.
if not sys.executable.startswith(sys.base_prefix.rstrip("/") + "/"):
    sys.exit(f"its own library cannot be read; it found that of {sys.base_prefix}")
sources, settings = map(json.loads, sys.argv[1:])
for name, source in sources.items():
    sys.modules[name] = module = types.ModuleType(name)
    module.__path__ = []
    exec(compile(source, name, "exec"), module.__dict__)
sys.argv[1:] = []
module.serve(settings)
"""


class SandboxLost(Exception):
    """Signal that a sandbox did not start or ended by itself; the message gives the cause."""


@dataclass(frozen=True)
class ProcessExit:
    """Hold how a program's process ended.

    `status` is that of wait(2), None for a process that was killed from here; `cpu_s` is the
    processor time that it used, in seconds.
    """

    status: int | None
    cpu_s: float

    @property
    def killed_by(self) -> int:
        """Return the signal that ended the process, 0 for none and for a kill from here."""
        if self.status is None or not os.WIFSIGNALED(self.status):
            return 0
        return os.WTERMSIG(self.status)


class Sandbox:
    """Start one sandbox and control it. Raises SandboxLost if it does not start."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._closed = False
        self._scratch = None if layer.has_namespaces else _Scratch(layer.user)
        settings = {
            "filter": seccomp.build_filter(landlock=layer.readable is not None).hex(),
            "directory": self._scratch.path if self._scratch else "/tmp",
            "readable": layer.readable,
            "numpy": layer.numpy,
        }
        command = [*layer.command, layer.interpreter, "-s", "-S", "-B", "-c", _BOOT]
        command += [json.dumps(_sources()), json.dumps(settings)]
        self._control, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with inner:
                self._process = subprocess.Popen(
                    command,
                    stdin=inner.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env={"PYTHONHASHSEED": "0"},
                    start_new_session=True,
                )
        except OSError as error:
            self._closed = True
            self._control.close()
            self._remove_scratch()
            raise SandboxLost(f"the sandbox cannot be started: {error}") from error
        self._control.settimeout(_START_S)
        try:
            self._receive()
        except SandboxLost as lost:
            reason = self._errors() or str(lost)
            self.close()
            raise SandboxLost(f"the sandbox did not start: {reason}") from lost

    @property
    def usable(self) -> bool:
        """Return True while the sandbox takes programs: an idle one sends nothing until it ends."""
        if self._closed:
            return False
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        return not poll.poll(0)

    def start(
        self, descriptors: list[int], limits: dict[str, tuple[int, int]], *, judge: bool = False
    ) -> None:
        """Fork a process with these descriptors; it reads its request from the first one."""
        message = json.dumps({"limits": limits, "judge": judge}).encode()
        try:
            socket.send_fds(self._control, [message], descriptors)
        except OSError as error:
            self.close()
            raise SandboxLost(f"the sandbox has ended: {error}") from error

    def stop(self, *, ending: bool = False) -> ProcessExit:
        """End the process; a sandbox in which it left something behind is not used again.

        With `ending` the process gets a moment to end by itself.
        """
        try:
            self._control.settimeout(_STOP_S)
            self._control.send(b"wait" if ending else b"stop")
            report = json.loads(self._receive())
        except (OSError, SandboxLost) as error:
            reason = self._errors() or str(error)
            self.close()
            raise SandboxLost(f"the sandbox ended under the program: {reason}") from error
        if not report["clean"]:
            self.close()
        return ProcessExit(report["status"], report["cpu_s"])

    def close(self) -> None:
        """End the sandbox and everything in it."""
        if self._closed:
            return
        self._closed = True
        self._control.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()
        self._remove_scratch()

    def _remove_scratch(self) -> None:
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    def _receive(self) -> bytes:
        try:
            message = self._control.recv(4096)
        except TimeoutError as error:
            raise SandboxLost("it does not answer") from error
        except OSError as error:
            raise SandboxLost(str(error)) from error
        if not message:
            raise SandboxLost("it has ended")
        return message

    def _errors(self) -> str:
        """Return what the start wrote to the error stream; programs have no access to it."""
        stream = self._process.stderr
        if stream is None or stream.closed:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        os.set_blocking(stream.fileno(), False)
        try:
            return os.read(stream.fileno(), 1 << 16).decode(errors="replace").strip()[-300:]
        except BlockingIOError:
            return ""


class SandboxPair:
    """Hold the sandboxes for one program at a time: its own, and one for the judge of its tests."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._programs: Sandbox | None = None
        self._judges: Sandbox | None = None

    @property
    def programs(self) -> Sandbox:
        self._programs = _usable(self._programs, self.layer)
        return self._programs

    @property
    def judges(self) -> Sandbox:
        self._judges = _usable(self._judges, self.layer)
        return self._judges

    def close(self) -> None:
        for sandbox in (self._programs, self._judges):
            if sandbox is not None:
                sandbox.close()


def _usable(sandbox: Sandbox | None, layer: Layer) -> Sandbox:
    if sandbox is not None and not sandbox.usable:
        sandbox.close()
        sandbox = None
    return sandbox or Sandbox(layer)


class SandboxPool:
    """Keep idle pairs by layer. Threads share the pool; a forked child starts with an empty one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[tuple[Layer, SandboxPair]] = []
        self._owner = os.getpid()

    @contextlib.contextmanager
    def borrow(self, layer: Layer, *, keep: bool = True) -> Iterator[SandboxPair]:
        """Lend a pair for one program; `keep=False` starts a new one and closes it afterwards."""
        pair = self._take(layer) if keep else SandboxPair(layer)
        try:
            yield pair
        except BaseException:
            pair.close()  # a program may still be running in it
            raise
        with self._lock:
            if keep and len(self._idle) < _KEPT_PAIRS:
                self._idle.append((layer, pair))
                return
        pair.close()

    def _take(self, layer: Layer) -> SandboxPair:
        with self._lock:
            if self._owner != os.getpid():  # a forked child: the pairs are the parent's
                self._idle, self._owner = [], os.getpid()
            for index in range(len(self._idle) - 1, -1, -1):
                if self._idle[index][0] == layer:
                    return self._idle.pop(index)[1]
        return SandboxPair(layer)

    def close(self) -> None:
        """End all idle sandboxes."""
        with self._lock:
            idle, self._idle = self._idle, []
            if self._owner != os.getpid():
                return
        for _, pair in idle:
            pair.close()


POOL = SandboxPool()
atexit.register(POOL.close)


@cache
def _sources() -> dict[str, str]:
    package = "ernie_train.rewards.sandbox.guest"
    parents = {"ernie_train": "", "ernie_train.rewards": "", "ernie_train.rewards.sandbox": ""}
    parents[package] = ""
    folder = Path(__file__).parent / "guest"
    return parents | {
        f"{package}.{name}": (folder / f"{name}.py").read_text(encoding="utf-8")
        for name in _MODULES
    }


class _Scratch:
    """Make a directory for the programs of one sandbox, if the layer has none of its own.

    It is locked as long as its owner lives. Directories without a lock belonged to owners that
    were killed; they are removed when the next one is made.
    """

    _PREFIX = "ernie-sandbox-"

    def __init__(self, user: int | None) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{self._PREFIX}*"):
            with contextlib.suppress(OSError):  # another user's, in use, or already deleted
                if not os.access(left, os.R_OK):  # a program may have removed the permissions
                    os.chmod(left, 0o700)
                lock = _locked(left)
                _remove_tree(left)
                os.close(lock)
        self.path, self._lock = self._make()
        if user is not None:
            os.chown(self.path, user, user)

    def _make(self) -> tuple[str, int]:
        """Return a new directory and its lock.

        A process that removes what others left may be faster than the lock: then another directory
        is made.
        """
        for _ in range(_MAKE_TRIES):
            path = tempfile.mkdtemp(prefix=self._PREFIX)
            with contextlib.suppress(OSError):
                lock = _locked(Path(path))
                if os.path.exists(path):
                    return path, lock
                os.close(lock)
        raise SandboxLost("another process removes each new directory below the temporary one")

    def remove(self) -> None:
        _remove_tree(Path(self.path))
        os.close(self._lock)


def _remove_tree(top: Path) -> None:
    """Remove a directory of a program: locked, or nested deeper than a path or a stack can be.

    What cannot be removed stays; the next directory is another one.
    """
    for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
        subprocess.run(
            [*command, "--", str(top)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            check=False,
        )  # fmt: skip


def _locked(directory: Path) -> int:
    """Return a descriptor that holds the directory's lock; OSError if another process has it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
