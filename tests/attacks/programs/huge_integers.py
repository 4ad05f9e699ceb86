# Computes an integer that is never done.
def f(x):
    return 9 ** (9 ** 9) * 0 + x
