# Ends with status 0 in the middle of a call.
import os


def f(x):
    os._exit(0)
