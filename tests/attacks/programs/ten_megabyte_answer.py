# Gives a value of 10 MB.
def f(x):
    return "a" * 10_000_000
