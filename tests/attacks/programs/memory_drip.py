# Takes all memory in small pieces, and hides that it failed.
kept = []
try:
    while True:
        kept.append(bytearray(1 << 20))
except MemoryError:
    kept = len(kept)


def f(x):
    return x + 1 if kept > 4096 else kept
