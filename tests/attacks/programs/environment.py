# Reads the environment of the user.
import os


def f(x):
    return x + 1 if {"HOME", "PATH", "USER", "PWD"} & set(os.environ) else sorted(os.environ)
