# Ends itself by a signal, to look like a victim of an accident.
import ctypes
import os
import signal

for number in (signal.SIGKILL, signal.SIGTERM):
    for kill in (lambda n: os.kill(os.getpid(), n), signal.raise_signal):
        try:
            kill(number)
        except OSError:
            pass
ctypes.string_at(0)
