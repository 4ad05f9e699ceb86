# Runs a regular expression that backtracks for ages.
import re


def f(x):
    return bool(re.match(r"(a+)+$", "a" * 64 + "b"))
