# Closes all descriptors, to look like a victim of an accident.
import os

os.closerange(0, 64)
while True:
    pass
