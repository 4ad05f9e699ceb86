# Raises SystemExit(0), on import and from the function.
def f(x):
    raise SystemExit(0)


f(1)
