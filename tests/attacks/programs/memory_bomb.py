# Takes all memory in one piece.
def f(x):
    return len("a" * 10**11) * 0 + x + 1 - 1
