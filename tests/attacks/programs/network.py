# Reaches out by TCP, UDP, raw, netlink and Unix sockets.
import socket

reached = []
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, 40):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            socket.socket(family, kind)
            reached.append((family, kind))
        except OSError:
            pass


def f(x):
    return x + 1 if reached else "nothing reached"
