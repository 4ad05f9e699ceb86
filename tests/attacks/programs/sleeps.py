# Sleeps until the machine is given up.
import time

time.sleep(987)


def f(x):
    return "awake"
