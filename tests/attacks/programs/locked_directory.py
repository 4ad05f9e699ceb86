# Leaves files and folders that nobody may remove, and a locked directory.
import os

os.makedirs("a/b/c")
open("a/b/c/file", "w").close()
os.chmod("a/b/c/file", 0)
os.chmod("a/b/c", 0)
os.chmod("a", 0)
os.chmod(".", 0)


def f(x):
    return "done"
