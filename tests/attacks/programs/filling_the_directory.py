# Fills its directory with bytes, files and folders.
import os

for i in range(100_000):
    try:
        os.makedirs(f"d{i}/" + "deeper/" * 20)
        with open(f"{i}", "wb") as file:
            file.write(b"a" * (1 << 20))
    except OSError:
        break


def f(x):
    return len(os.listdir("."))
