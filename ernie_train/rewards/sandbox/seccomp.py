"""What a program may ask of the kernel: a seccomp filter that every sandbox puts on last.

It is a list of what is allowed, so that a call nobody thought of is refused. A program is one
process: it may start threads but no process, and it can reach no other process by any call that
names one (kill, ptrace, prlimit, the owner of a file's signals). It has no sockets but connected
pairs within itself. Which files it may open is not decided here.

Built as classic BPF (linux/filter.h, linux/seccomp.h); the result depends on the processor alone.
"""

import errno
import platform
import struct

# Name -> number on x86-64 and on aarch64 (None: not there). From the kernel's unistd tables.
FREE_CALLS: dict[str, tuple[int, int | None]] = {
    # Memory and data.
    "read": (0, 63), "write": (1, 64), "futex": (202, 98), "mmap": (9, 222), "munmap": (11, 215),
    "mprotect": (10, 226), "mremap": (25, 216), "brk": (12, 214), "madvise": (28, 233),
    "close": (3, 57), "lseek": (8, 62), "pread64": (17, 67), "pwrite64": (18, 68),
    "readv": (19, 65), "writev": (20, 66), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "pipe": (22, None), "pipe2": (293, 59), "sendfile": (40, 71), "poll": (7, None),
    "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    # Files, which the file system's own guards bound.
    "open": (2, None), "openat": (257, 56), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17),
    "chdir": (80, 49), "fchdir": (81, 50), "getdents64": (217, 61), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None),
    "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "chmod": (90, None),
    "fchmod": (91, 52), "fchmodat": (268, 53), "utimensat": (280, 88), "truncate": (76, 45),
    "ftruncate": (77, 46), "fsync": (74, 82), "fdatasync": (75, 83), "flock": (73, 32),
    "umask": (95, 166), "fadvise64": (221, 223), "statfs": (137, 43), "fstatfs": (138, 44),
    # Pairs of sockets within the process (event loops); none that reaches out.
    "socketpair": (53, 199), "sendto": (44, 206), "recvfrom": (45, 207), "shutdown": (48, 210),
    "getsockopt": (55, 209), "setsockopt": (54, 208), "getsockname": (51, 204),
    "getpeername": (52, 205),
    # Time, and signals to itself.
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "getrusage": (98, 165), "alarm": (37, None), "setitimer": (38, 103), "getitimer": (36, 102),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    # Facts about itself.
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getpgrp": (111, None),
    "getpgid": (121, 155), "getsid": (124, 156), "getgroups": (115, 158), "uname": (63, 160),
    "sysinfo": (99, 179), "getrandom": (318, 278), "getrlimit": (97, 163), "setrlimit": (160, 164),
    "sched_getaffinity": (204, 123), "sched_yield": (24, 124),
    # Threads and the end.
    "exit": (60, 93), "exit_group": (231, 94), "wait4": (61, 260), "waitid": (247, 95),
    "set_robust_list": (273, 99), "set_tid_address": (218, 96), "rseq": (334, 293),
    "arch_prctl": (158, None), "membarrier": (324, 283),
}  # fmt: skip
# These are allowed for some arguments only; see `_checked`.
CHECKED_CALLS = {
    "clone": (56, 220), "clone3": (435, 435), "fcntl": (72, 25), "ioctl": (16, 29),
    "prlimit64": (302, 261),
}  # fmt: skip

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_OFFSET, _ARCH_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16

_CLONE_THREAD, _CLONE_NAMESPACES = 0x00010000, 0x7E020080
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, the three of record locks, F_DUPFD_CLOEXEC. Not
# F_SETOWN and F_SETSIG: with them the kernel sends any signal to any process of the same user.
_FILE_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Not FIOSETOWN.
_DEVICE_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)

_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def supported(machine: str | None = None) -> bool:
    """Whether the filter can be built for this processor (or the one named)."""
    return (machine or platform.machine()) in _AUDIT_ARCH


def build_filter(machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter`; KeyError where `supported` is False."""
    machine = machine or platform.machine()
    column = list(_AUDIT_ARCH).index(machine)
    code: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCH_OFFSET),
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
    ]
    for name, numbers in CHECKED_CALLS.items():
        block = _checked(name)
        code += [(_EQUAL, 0, len(block), numbers[column]), *block]
    free = [n for numbers in FREE_CALLS.values() if (n := numbers[column]) is not None]
    # A jump skips the comparisons that are left and the refusal after them.
    code += [(_EQUAL, len(free) - i, 0, number) for i, number in enumerate(free)]
    code += [_refuse(errno.EPERM), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _checked(name: str) -> list[_Instruction]:
    """What decides a call by its arguments; every path returns."""
    allow: _Instruction = (_RETURN, 0, 0, _ALLOW)
    if name == "clone3":  # its flags lie in memory, out of sight; libc falls back to clone
        return [_refuse(errno.ENOSYS)]
    if name == "clone":
        mask = _CLONE_THREAD | _CLONE_NAMESPACES
        return [_argument(0), (_AND, 0, 0, mask), (_EQUAL, 0, 1, _CLONE_THREAD), allow,
                _refuse(errno.EPERM)]  # fmt: skip
    index, values = {
        "prlimit64": (0, (0,)),  # its own limits, which it can only lower
        "fcntl": (1, _FILE_COMMANDS),
        "ioctl": (1, _DEVICE_COMMANDS),
    }[name]
    tests = [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [_argument(index), *tests, _refuse(errno.EPERM), allow]


def _argument(index: int) -> _Instruction:
    """Loads the lower half; the kernel reads these arguments as 32 bits."""
    return (_LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * index)


def _refuse(number: int) -> _Instruction:
    return (_RETURN, 0, 0, _REFUSE | number)
