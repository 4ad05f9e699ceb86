"""Build the seccomp filter that every sandbox installs last: the system calls of a program.

It lists the calls that are allowed, so that any other call is refused. A program is one
process: it may start threads but no process, and it can reach no other process by any call that
names one (kill, ptrace, prlimit, the owner of a file's signals, the address of a datagram). Its
only sockets are connected pairs within itself. The layers decide which files it may open; for
Landlock, which does not see every call that names a file, the filter refuses those that it misses.

The filter is classic BPF (linux/filter.h, linux/seccomp.h), for x86-64 alone.
"""

import errno
import platform
import struct

# Name -> number on x86-64, from the kernel's unistd table.
FREE_CALLS: dict[str, int] = {
    # Memory and data.
    "read": 0, "write": 1, "futex": 202, "mmap": 9, "munmap": 11, "mprotect": 10, "mremap": 25,
    "brk": 12, "madvise": 28, "close": 3, "lseek": 8, "pread64": 17, "pwrite64": 18, "readv": 19,
    "writev": 20, "dup": 32, "dup2": 33, "dup3": 292, "pipe": 22, "pipe2": 293, "sendfile": 40,
    "poll": 7, "ppoll": 271, "select": 23, "pselect6": 270, "epoll_create1": 291, "epoll_ctl": 233,
    "epoll_wait": 232, "epoll_pwait": 281, "eventfd2": 290,
    # Files: the layer restricts which ones.
    "stat": 4, "fstat": 5, "lstat": 6, "newfstatat": 262, "statx": 332,
    "access": 21, "faccessat": 269, "faccessat2": 439, "readlink": 89, "readlinkat": 267,
    "getcwd": 79, "chdir": 80, "fchdir": 81, "getdents64": 217, "mkdir": 83, "mkdirat": 258,
    "rmdir": 84, "unlink": 87, "unlinkat": 263, "rename": 82, "renameat": 264, "renameat2": 316,
    "link": 86, "linkat": 265, "symlink": 88, "symlinkat": 266, "chmod": 90, "fchmod": 91,
    "fchmodat": 268, "utimensat": 280, "truncate": 76, "ftruncate": 77, "fsync": 74,
    "fdatasync": 75, "flock": 73, "umask": 95, "fadvise64": 221, "statfs": 137, "fstatfs": 138,
    # Pairs of sockets within the process (event loops); no other sockets.
    "socketpair": 53, "recvfrom": 45, "shutdown": 48, "getsockopt": 55,
    "setsockopt": 54, "getsockname": 51, "getpeername": 52,
    # Time, and signals to itself.
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "nanosleep": 35,
    "gettimeofday": 96, "time": 201, "times": 100, "getrusage": 98, "alarm": 37, "setitimer": 38,
    "getitimer": 36, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "rt_sigpending": 127, "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131,
    "restart_syscall": 219,
    # Information about the process itself.
    "getpid": 39, "gettid": 186, "getppid": 110, "getuid": 102, "geteuid": 107, "getgid": 104,
    "getegid": 108, "getpgrp": 111, "getpgid": 121, "getsid": 124, "getgroups": 115, "uname": 63,
    "sysinfo": 99, "getrandom": 318, "getrlimit": 97, "setrlimit": 160, "sched_getaffinity": 204,
    "sched_yield": 24,
    # Threads and the end.
    "exit": 60, "exit_group": 231, "wait4": 61, "waitid": 247, "set_robust_list": 273,
    "set_tid_address": 218, "rseq": 334, "arch_prctl": 158, "membarrier": 324,
}  # fmt: skip
# Landlock does not stop these on files that the program may not open: modes and times of any file
# of its user, and, before its third version, lengths.
MISSED_BY_LANDLOCK = ("chmod", "fchmod", "fchmodat", "utimensat", "truncate")
# These are allowed for some arguments only; see `_RULES`.
CHECKED_CALLS = {
    "clone": 56, "clone3": 435, "fcntl": 72, "ioctl": 16, "prlimit64": 302, "sendto": 44,
    "open": 2, "openat": 257,
}  # fmt: skip

_AUDIT_ARCH_X86_64 = 0xC000003E
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_OFFSET, _ARCH_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16

_CLONE_THREAD, _CLONE_NAMESPACES = 0x00010000, 0x7E020080
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, the three of record locks, F_DUPFD_CLOEXEC. Not
# F_SETOWN and F_SETSIG: with them the kernel sends any signal to any process of the same user.
_FILE_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Not FIOSETOWN.
_DEVICE_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# O_TRUNC goes with O_WRONLY or O_RDWR alone: old Landlock lets a mere reader cut a file.
_OPEN_MASK, _OPEN_FLAGS = 0x203, (0, 1, 2, 0x201, 0x202)
_ALL_BITS = 0xFFFFFFFF

# Name -> index of an argument, and the values that it may have under a mask.
_RULES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "clone": (0, _CLONE_THREAD | _CLONE_NAMESPACES, (_CLONE_THREAD,)),
    "prlimit64": (0, _ALL_BITS, (0,)),  # its own limits, which it can only lower
    "fcntl": (1, _ALL_BITS, _FILE_COMMANDS),
    "ioctl": (1, _ALL_BITS, _DEVICE_COMMANDS),
    # The length of an address: a datagram with one could go to any socket of the machine.
    "sendto": (5, _ALL_BITS, (0,)),
    "open": (1, _OPEN_MASK, _OPEN_FLAGS),
    "openat": (2, _OPEN_MASK, _OPEN_FLAGS),
}

_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def supported() -> bool:
    """Return True if the filter fits this machine's processor."""
    return platform.machine() == "x86_64"


def build_filter(*, landlock: bool = False) -> bytes:
    """Return the filter as an array of `struct sock_filter`, with `landlock` the one for Landlock.

    On another processor it ends every program that makes a system call.
    """
    free = [n for name, n in FREE_CALLS.items() if not (landlock and name in MISSED_BY_LANDLOCK)]
    code: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCH_OFFSET),
        (_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
    ]
    for name, number in CHECKED_CALLS.items():
        block = _checked(name)
        code += [(_EQUAL, 0, len(block), number), *block]
    # A jump skips the remaining comparisons and the refusal after them.
    code += [(_EQUAL, len(free) - i, 0, number) for i, number in enumerate(free)]
    code += [_refuse(errno.EPERM), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _checked(name: str) -> list[_Instruction]:
    """Return the instructions that decide a call by its arguments; every path returns."""
    if name == "clone3":  # its flags are in memory, which BPF cannot read; libc uses clone
        return [_refuse(errno.ENOSYS)]
    index, mask, values = _RULES[name]
    # The lower half of an argument: the kernel reads these as 32 bits.
    load = [(_LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * index), (_AND, 0, 0, mask)]
    tests = [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [*load, *tests, _refuse(errno.EPERM), (_RETURN, 0, 0, _ALLOW)]


def _refuse(number: int) -> _Instruction:
    return (_RETURN, 0, 0, _REFUSE | number)
