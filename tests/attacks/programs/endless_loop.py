# Loops without end.
def f(x):
    while True:
        pass
