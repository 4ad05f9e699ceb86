"""Run the first process inside a sandbox: a warmed interpreter that forks one per program.

It reads nothing that a program or a judge gets, and a program cannot reach it: the descriptors are
closed, and the system-call filter allows no call that names another process. When a program has
changed anything in the writable directory, this process ends, and the next program gets a new
sandbox.

Control messages are datagrams on standard input: a start with descriptors, then a stop.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib.util
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from typing import Any

from ernie_train.rewards.sandbox.guest import candidate, test_judge
from ernie_train.rewards.sandbox.guest.values import decode, encode

_CHANNEL, _PROGRAM = 3, 4
_MAX_DESCRIPTORS = 4
# The exit status of a process that could not be made ready, or that broke what runs its program.
SETUP_FAILED = 70
# A process that closed its channel should be about to end, but may not be.
_ENDING_S = 0.3
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_SECCOMP_MODE_FILTER = 2
# linux/landlock.h; these system calls have the same number on every processor.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_VERSION, _LANDLOCK_PATH = 1, 1
_READ_FILE, _WRITE_FILE, _READ_DIRECTORY = 1 << 2, 1 << 1, 1 << 3
_EXECUTE = 1 << 0
# File-system rights that later versions of the interface added: refer, truncate, ioctl.
_FILE_RIGHTS = ((1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1, (1 << 15) - 1, (1 << 16) - 1)
_ON_FILES_ALONE = _EXECUTE | _READ_FILE | _WRITE_FILE | 1 << 14 | 1 << 15

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def serve(settings: dict[str, Any]) -> None:
    """Fork programs until the other end closes or a program leaves something behind.

    `settings`: `filter` (hex), `directory` that programs may write to, `readable`: the paths below
    which Landlock lets them read files, null without Landlock, and `numpy`: its directory or null.
    """
    control = socket.socket(fileno=0)
    os.environ.clear()
    _warm()
    if settings["numpy"] is not None:
        sys.meta_path.append(_NumpyFinder(settings["numpy"]))
    os.chdir(settings["directory"])
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    # Else a program of the same user could open this process's memory, if it sees /proc.
    _checked(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
    if settings["readable"] is not None:
        restrict_files(settings["readable"], settings["directory"])
    system_calls = _SystemCalls(bytes.fromhex(settings["filter"]))
    directory = os.open(".", os.O_PATH)  # a program may remove its permissions
    pristine = os.fstat(directory).st_ctime_ns
    gc.collect()
    gc.freeze()  # a collection in a child does not touch, and so not copy, these pages
    control.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 16, _MAX_DESCRIPTORS)
        if not message:
            return
        request = json.loads(message)  # before the fork: in the child it would copy pages
        child = os.fork()
        if child == 0:
            try:
                _become(request, descriptors, system_calls)
            finally:
                os._exit(SETUP_FAILED)
        for descriptor in descriptors:
            os.close(descriptor)
        command = control.recv(16)  # "stop", "wait", or nothing if the other side has closed
        status, cpu_s = _end(child, _ENDING_S if command == b"wait" else 0.0)
        clean = os.fstat(directory).st_ctime_ns == pristine
        if command:
            report = {"status": status, "cpu_s": cpu_s, "clean": clean}
            control.send(json.dumps(report).encode())
        if not clean or not command:
            return


class _NumpyFinder:
    """Find numpy in a directory whose parent may not be read, and let it start no threads."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "numpy":
            return None
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read by the library when it is loaded
        return importlib.util.spec_from_file_location(
            name, f"{self._directory}/__init__.py", submodule_search_locations=[self._directory]
        )


def _end(child: int, patience_s: float) -> tuple[int | None, float]:
    """Return a child's wait status, None if it is killed here, and its processor seconds."""
    limit = time.monotonic() + patience_s
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended or time.monotonic() >= limit:
            break
        time.sleep(0.001)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, _, usage = os.wait4(child, 0)
    return status if ended else None, usage.ru_utime + usage.ru_stime


def _warm() -> None:
    """Import the modules that programs use most, so that each fork has them already."""
    import bisect
    import builtins
    import cmath
    import contextlib
    import copy
    import dataclasses
    import enum
    import functools
    import heapq
    import itertools
    import math
    import operator
    import re
    import string
    import typing

    assert bisect and cmath and contextlib and copy and dataclasses and enum and functools
    assert heapq and itertools and math and operator and re and string and typing
    # A program draws the same random numbers in every run. By default `random` seeds itself
    # again in each fork, which also takes a tenth of the fork's time.
    register, os.register_at_fork = os.register_at_fork, lambda **hooks: None
    import random

    os.register_at_fork = register
    random.seed(0)
    # The parser, the compiler and the encoder initialize on first use.
    space: dict[str, Any] = {}
    exec(compile("def f(x):\n    return [x, {1: 'a'}]\nvalue = f(1)\n", "warm", "exec"), space)
    json.loads(json.dumps(encode(decode(encode(space["value"], int), int), int)))
    # `site` would add these; programs from contests call them.
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]


def restrict_files(readable: list[str], writable: str) -> None:
    """Let this process and its children read below `readable` and write below `writable` alone.

    Raises OSError if the kernel has no Landlock.
    """
    version = _checked(
        _libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION), "Landlock"
    )
    rights = _FILE_RIGHTS[min(version, len(_FILE_RIGHTS)) - 1]
    # struct landlock_ruleset_attr: files, network (TCP), scopes (abstract sockets, signals)
    network, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    fields = [rights] + ([network] if version >= 4 else []) + ([scopes] if version >= 6 else [])
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = _checked(
        _libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0), "Landlock"
    )
    for path in readable:
        if os.path.exists(path):
            _allow(ruleset, path, _READ_FILE | _READ_DIRECTORY)
    _allow(ruleset, "/dev/null", _READ_FILE | _WRITE_FILE)
    _allow(ruleset, "/dev/urandom", _READ_FILE)
    # No right to execute: programs cannot start others anyway.
    _allow(ruleset, writable, rights & ~_EXECUTE)
    _checked(_libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0), "Landlock")
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not os.path.isdir(path):
        rights &= _ON_FILES_ALONE
    # struct landlock_path_beneath_attr, packed
    rule = struct.pack("=Qi", rights, descriptor)
    result = _libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_PATH, rule, 0)
    _checked(result, f"Landlock, {path}")
    os.close(descriptor)


def _become(request: dict[str, Any], descriptors: list[int], system_calls: _SystemCalls) -> None:
    """Turn this fresh process into that of a program or a judge, and run it."""
    _arrange(descriptors)
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0), "pdeathsig")
    for name, limits in request["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), tuple(limits))
    system_calls.restrict()
    if request["judge"]:
        test_judge.run(_CHANNEL, _PROGRAM)
    else:
        candidate.run(_CHANNEL)
    os._exit(0)


def _arrange(descriptors: list[int]) -> None:
    """Move the channels to descriptors from 3 on, streams to 0 to 2, and close all others.

    `descriptors`: the channel; the channel and the program; or the channel, input and output.
    """
    nothing = os.open("/dev/null", os.O_RDWR)
    wanted = {0: nothing, 1: nothing, 2: nothing, _CHANNEL: descriptors[0]}
    if len(descriptors) == 2:
        wanted[_PROGRAM] = descriptors[1]
    elif len(descriptors) == 3:
        wanted[0], wanted[1] = descriptors[1:]
    # First move them off the numbers that are wanted.
    high = {n: fcntl.fcntl(d, fcntl.F_DUPFD_CLOEXEC, 16) for n, d in wanted.items()}
    for number, descriptor in high.items():
        os.dup2(descriptor, number)
    os.closerange(max(wanted) + 1, 1 << 10)


class _SystemCalls:
    """Hold the filter, built before any fork: each page that a child touches costs it 10 us."""

    def __init__(self, program: bytes) -> None:
        self._instructions = ctypes.create_string_buffer(program, len(program))
        # struct sock_fprog: the number of instructions and their address
        header = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(self._instructions))
        self._header = ctypes.create_string_buffer(header, len(header))
        self._pointer = ctypes.c_void_p(ctypes.addressof(self._header))

    def restrict(self) -> None:
        result = _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self._pointer, 0, 0)
        _checked(result, "seccomp")
