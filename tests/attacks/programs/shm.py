# Leaves something in /dev/shm.
try:
    open("/dev/shm/ernie-attack-was-here", "w").write("here")
    left = True
except OSError:
    left = False


def f(x):
    return x + 1 if left else "nothing left"
