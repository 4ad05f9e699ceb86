# Raises its own limits, then takes what it wants.
import resource

for what in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
    for limits in ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), (1 << 40, 1 << 40)):
        try:
            resource.setrlimit(what, limits)
        except (OSError, ValueError):
            pass
while True:
    pass
