# Gives a generator without end where a value is expected.
def f(x):
    while True:
        yield x + 1
