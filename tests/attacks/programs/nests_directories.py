# Nests directories deeper than a path or a stack can be, the last one unreadable.
import os

for i in range(3000):
    os.mkdir("d", 0o700 if i < 2999 else 0)
    if i < 2999:
        os.chdir("d")


def f(x):
    return "nested"
