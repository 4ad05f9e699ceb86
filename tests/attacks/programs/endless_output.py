# Writes without end into every descriptor.
import os

while True:
    for d in range(64):
        try:
            os.write(d, b"a" * 65536)
        except OSError:
            pass
