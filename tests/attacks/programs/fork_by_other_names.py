# Starts processes by every other way that Python has.
import multiprocessing
import os
import subprocess

started = []
for start in (
    lambda: subprocess.Popen(["/usr/bin/python3", "-c", "while True: pass"]),
    lambda: os.posix_spawn("/bin/sh", ["sh", "-c", "sleep 987"], {}),
    lambda: os.spawnv(os.P_NOWAIT, "/bin/sh", ["sh", "-c", "sleep 987"]),
    lambda: multiprocessing.Process(target=print).start(),
    lambda: os.forkpty(),
    lambda: os.system("sleep 987 &") and 1 / 0,
):
    try:
        start()
        started.append(start)
    except Exception:
        pass


def f(x):
    return x + 1 if started else "nothing started"
