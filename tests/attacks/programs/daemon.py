# Becomes a daemon: a new session, two forks, all descriptors closed.
import os
import time

try:
    os.setsid()
    if os.fork():
        os._exit(0)
    if os.fork():
        os._exit(0)
except OSError:
    pass
os.closerange(0, 64)
time.sleep(987)
