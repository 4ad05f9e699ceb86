# Gives an integer whose decimal digits take hours to convert.
import sys

sys.set_int_max_str_digits(0)


def f(x):
    return 1 << 3_000_000
