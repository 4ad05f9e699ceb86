# Gives a value nested so deep that reading it may break the reader.
def f(x):
    value = []
    for _ in range(100_000):
        value = [value]
    return value
