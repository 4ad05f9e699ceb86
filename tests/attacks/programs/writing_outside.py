# Writes wherever it might be allowed to.
import os

written = []
for place in ("/", "/usr", "/usr/lib", "/lib", "/bin", "/dev", "/dev/shm", "/var/tmp", "/home",
              "/root", "/etc", "/run", "..", "/tmp/.."):
    try:
        with open(os.path.join(place, "ernie-attack-was-here"), "w") as file:
            file.write("here")
        written.append(place)
    except OSError:
        pass


def f(x):
    return x + 1 if written else "nothing written"
