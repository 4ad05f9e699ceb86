"""Choose the layer that isolates a sandbox: bubblewrap, else Landlock.

Both run the same code inside (`guest/`), with the system-call filter of `seccomp.py`, resource
limits and a fresh process per program. `api.py` lists what each layer stops and what it does not.
"""

import glob
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ernie_train.core.errors import ErnieTrainError
from ernie_train.rewards.sandbox import seccomp

LayerName = Literal["bubblewrap", "Landlock"]

_NOBODY = 65534
# Where bubblewrap shows numpy: at its own place it would show the names of the folders above it.
_LIBRARIES = "/libraries"
# Size of the temporary /tmp of bubblewrap, which is in memory.
_DIRECTORY_BYTES = 16 << 20


class SandboxUnavailable(ErnieTrainError):
    """Signal that this machine cannot run programs safely; the text says why and what to do."""


@dataclass(frozen=True)
class Layer:
    """Describe the start of an interpreter in one layer.

    `command` precedes the interpreter. `readable` are the paths that Landlock leaves readable,
    None without Landlock. `user` owns the directory of a sandbox that has none of its own. `numpy`
    is the directory, as programs see it, of the one library that they have beside Python's own;
    None without it.
    """

    name: LayerName
    command: tuple[str, ...]
    interpreter: str
    readable: tuple[str, ...] | None
    user: int | None
    numpy: str | None = None

    @property
    def has_namespaces(self) -> bool:
        """Return True for a sandbox with a writable /tmp of its own, and its threads counted alone.

        Only then a limit on threads can be set.
        """
        return self.name == "bubblewrap"


def possible_layers() -> tuple[list[Layer], list[str]]:
    """Return the layers to try, best first, and the reasons why others are missing."""
    if not seccomp.supported():
        raise SandboxUnavailable(
            f"the sandbox supports x86_64 only, and this processor is {os.uname().machine}: "
            "grade problems of code on an x86_64 machine with Linux"
        )
    layers, reasons = [], []
    names: list[LayerName] = ["bubblewrap", "Landlock"]
    for name in names:
        try:
            drop, user = _dropped_privileges()
            command = [*drop, *_bubblewrap()] if name == "bubblewrap" else drop
        except SandboxUnavailable as unavailable:
            reasons.append(str(unavailable))
            continue
        for interpreter in _interpreters():
            for numpy in dict.fromkeys([_numpy(interpreter), None]):
                layers.append(_layer(name, command, interpreter, user, numpy))
    return layers, list(dict.fromkeys(reasons))


def _layer(
    name: LayerName, command: list[str], interpreter: str, user: int | None, numpy: str | None
) -> Layer:
    folders = [numpy, *glob.glob(f"{numpy}.libs")] if numpy else []
    inner = name == "bubblewrap"
    if inner and numpy:
        for path in folders:
            command = [*command, "--ro-bind", path, f"{_LIBRARIES}/{Path(path).name}"]
        numpy = f"{_LIBRARIES}/{Path(numpy).name}"
    if inner:
        if not interpreter.startswith("/usr/"):
            command = [*command, "--ro-bind", sys.base_prefix, sys.base_prefix]
        # After every mount, so that it applies to all of them.
        command = [*command, "--remount-ro", "/", "--chdir", "/tmp", "--"]
    readable = ("/usr", "/lib", "/lib64", "/lib32", "/bin", sys.base_prefix, *folders)
    return Layer(
        name=name,
        command=tuple(command),
        interpreter=interpreter,
        readable=None if inner else readable,
        user=user,
        numpy=numpy,
    )


def _numpy(interpreter: str) -> str | None:
    """Return this environment's numpy, if it fits the interpreter."""
    found = importlib.util.find_spec("numpy")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if found is None or found.origin is None or Path(interpreter).name != version:
        return None
    return str(Path(found.origin).parent)


def _interpreters() -> list[str]:
    """Return this interpreter and the system's: other users cannot read a private home."""
    found = [Path(sys.executable).resolve(), Path("/usr/bin/python3").resolve()]
    return [str(path) for path in dict.fromkeys(found) if path.exists()]


def _dropped_privileges() -> tuple[list[str], int | None]:
    """Return, for root, the command that becomes another user, and the id of that user."""
    if os.geteuid() != 0:
        return [], None
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise SandboxUnavailable(
            "setpriv is not installed, and root must not run programs of a model under its own "
            "name; install the package util-linux, or run as a plain user"
        )
    user = str(_NOBODY)
    drop = [setpriv, "--reuid", user, "--regid", user, "--clear-groups", "--no-new-privs"]
    return drop, _NOBODY


def _bubblewrap() -> list[str]:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxUnavailable(
            "bubblewrap (bwrap) is not installed; install the package: apt-get install bubblewrap"
        )
    # Not --die-with-parent: the sandbox would end with the thread that started it. Its first
    # process ends when the control socket closes, and all others with it.
    command = [bwrap, "--unshare-all", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    command += ["--setenv", "PYTHONHASHSEED", "0", "--hostname", "sandbox"]
    command += ["--ro-bind", "/usr", "/usr"]
    for name in ("/lib", "/lib64", "/lib32", "/bin"):
        if os.path.islink(name):
            command += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            command += ["--ro-bind", name, name]
    for device in ("/dev/null", "/dev/urandom"):
        command += ["--dev-bind", device, device]
    return [*command, "--size", str(_DIRECTORY_BYTES), "--tmpfs", "/tmp"]
