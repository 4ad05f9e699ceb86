# Makes the compiler itself run out of stack or memory.
def f(x):
    source = "(" * 5000 + "1" + ")" * 5000
    try:
        eval("-" * 1_000_000 + "1")
    except (MemoryError, RecursionError, SyntaxError):
        pass
    return eval(source)
