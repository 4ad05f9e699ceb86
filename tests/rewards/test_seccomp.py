"""The filter of system calls."""

import errno
import re
import struct
from pathlib import Path

import pytest

from ernie_train.rewards.sandbox import seccomp
from ernie_train.rewards.sandbox.api import run_calls


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


# Calls that reach other processes, the network, the kernel's settings or files past the layers.
FORBIDDEN = {
    "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "kill": 62, "tkill": 200,
    "tgkill": 234, "rt_sigqueueinfo": 129, "pidfd_open": 434, "pidfd_send_signal": 424,
    "pidfd_getfd": 438, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311,
    "process_madvise": 440, "kcmp": 312, "socket": 41, "connect": 42, "bind": 49, "listen": 50,
    "accept4": 288, "sendmsg": 46, "sendmmsg": 307, "recvmsg": 47, "mount": 165, "umount2": 166,
    "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "bpf": 321, "perf_event_open": 298, "io_uring_setup": 425,
    "userfaultfd": 323, "keyctl": 250, "add_key": 248, "request_key": 249, "init_module": 175,
    "finit_module": 313, "kexec_load": 246, "reboot": 169, "swapon": 167, "syslog": 103,
    "acct": 163, "chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260, "mknod": 133,
    "mknodat": 259, "setxattr": 188, "fsetxattr": 190, "utime": 132, "utimes": 235,
    "fchmodat2": 452, "openat2": 437, "open_by_handle_at": 304, "setuid": 105, "setreuid": 113,
    "setresuid": 117, "setgid": 106, "setgroups": 116, "capset": 126, "personality": 135,
    "prctl": 157, "seccomp": 317, "setpriority": 141, "sched_setaffinity": 203,
    "sched_setscheduler": 144, "ioprio_set": 251, "clock_settime": 227, "settimeofday": 164,
    "adjtimex": 159, "sethostname": 170, "shmget": 29, "shmat": 30, "msgget": 68, "semget": 64,
    "mq_open": 240, "inotify_init": 253, "fanotify_init": 300, "memfd_create": 319, "mlockall": 151,
    "vmsplice": 278, "setsid": 112, "setpgid": 109, "a call that does not exist yet": 600,
}  # fmt: skip
# With arguments that the kernel itself would refuse in another way, so that nothing happens even
# if one gets through.
TRY_THEM = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f(number):
    ctypes.set_errno(0)
    return [libc.syscall(number, *[ctypes.c_long(-1)] * 6), ctypes.get_errno()]
"""


def test_what_reaches_beyond_the_process_is_refused_by_the_kernel(layer):
    outcome = run_calls(TRY_THEM, "f", [[number] for number in FORBIDDEN.values()])
    refused = ["value", [-1, errno.EPERM]]
    got = dict(zip(FORBIDDEN, outcome.values, strict=True))
    assert {name: value for name, value in got.items() if value != refused} == {}
    allowed = run_calls(TRY_THEM, "f", [[0], [16], [5]]).values  # read, ioctl and fstat of nothing
    assert [value[1][1] for value in allowed] == [errno.EBADF, errno.EPERM, errno.EBADF]


@pytest.mark.parametrize("landlock", [False, True])
def test_arguments_decide_where_a_call_does_good_and_harm(landlock):
    program = seccomp.build_filter(landlock=landlock)
    for other in (0xC00000B7, 0x40000003):  # aarch64, and 32-bit calls, whose numbers differ
        assert run_filter(program, 0, arch=other) == 0x80000000
    for number in (0x40000000, 0x40000001, 0x40000000 + 57):  # the calls of x32
        assert run_filter(program, number) == REFUSE

    def decided(name, *arguments):
        return run_filter(program, seccomp.CHECKED_CALLS[name], arguments)

    assert decided("clone", 0x3D0F00) == ALLOW  # the flags of pthread_create
    assert decided("clone", 0x01200011) == REFUSE  # those of fork
    assert decided("clone", 0x10000000 | 0x10000) == REFUSE  # a thread in a new user namespace
    assert decided("clone3") == NO_SUCH_CALL
    assert decided("prlimit64", 0) == ALLOW and decided("prlimit64", 1) == REFUSE
    assert decided("fcntl", 3, 4) == ALLOW and decided("fcntl", 3, 1030) == ALLOW
    assert decided("fcntl", 3, 8) == REFUSE and decided("fcntl", 3, 10) == REFUSE
    assert decided("ioctl", 3, 0x5401) == ALLOW and decided("ioctl", 3, 0x8901) == REFUSE
    assert decided("sendto", 3, 1 << 40, 1, 0, 0, 0) == ALLOW  # send
    assert decided("sendto", 3, 1 << 40, 1, 0, 1 << 40, 110) == REFUSE
    for flags, expected in ((0, ALLOW), (0o1101, ALLOW), (0o1000, REFUSE), (0o1003, REFUSE)):
        assert decided("open", 1 << 40, flags) == decided("openat", 3, 1 << 40, flags) == expected


@pytest.mark.parametrize("name", ["chmod", "fchmod", "fchmodat", "utimensat", "truncate"])
def test_what_landlock_misses_is_refused_by_its_filter_alone(name):
    number = seccomp.FREE_CALLS[name]
    assert run_filter(seccomp.build_filter(landlock=True), number) == REFUSE
    assert run_filter(seccomp.build_filter(), number) == ALLOW


HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


@pytest.mark.skipif(not HEADER.exists(), reason="the kernel's headers are not installed")
def test_the_numbers_are_those_of_the_kernels_table():
    found = re.findall(r"#define __NR_(\w+)\s+(\d+)", HEADER.read_text())
    numbers = {name: int(number) for name, number in found}
    ours = seccomp.FREE_CALLS | seccomp.CHECKED_CALLS
    assert ours == {name: numbers.get(name) for name in ours}
