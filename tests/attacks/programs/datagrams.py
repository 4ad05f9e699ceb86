# Sends datagrams from a connected pair to sockets of the host.
import socket

sent = []
for address in ("/dev/log", "/run/systemd/journal/socket", "/run/systemd/notify", "\0bus"):
    for one in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM):
        try:
            one.sendto(b"x", address)
            sent.append(address)
        except PermissionError:
            pass


def f(x):
    return x + 1 if sent else "nothing sent"
