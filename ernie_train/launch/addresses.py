"""The addresses by which the machines of a job find each other.

Paddle's launcher (3.3.1) compares the master's address with its own as texts, to tell who serves
the others. A name would match nowhere, so that all machines wait for ever. Its own address is what
the machine's name resolves to, which on Debian is 127.0.1.1.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import time
from collections.abc import Callable

from ernie_train.core.errors import ConfigError, ErnieTrainError

RESOLVE_LIMIT_S = 600.0  # a cluster may know the name of a machine only once it is up
_MASTER = re.compile(r"[^:/\s]+:\d+")
_THIS_MACHINE_ALONE = ("localhost", "127.0.0.1")


def is_master(text: str) -> bool:
    """Return whether a text is an address or name with a port."""
    return _MASTER.fullmatch(text) is not None


def resolve_master(
    master: str, notice: Callable[[str], None], limit_s: float = RESOLVE_LIMIT_S
) -> str:
    """Return `master` (name or address, with a port) with an IPv4 address in place of a name.

    Waits for a name that is not known yet, and says so by `notice`, once.

    Raises:
        ErnieTrainError: it stays unknown for `limit_s` seconds.
        ConfigError: it leads to this machine alone.
    """
    name, _, port = master.rpartition(":")
    address = _look_up(name, notice, time.monotonic() + limit_s)
    if ipaddress.ip_address(address).is_loopback and name not in _THIS_MACHINE_ALONE:
        raise ConfigError(
            f"--master: {name} is {address} on this machine, where no other one reaches it: give "
            "the address that the others know"
        )
    return f"{address}:{port}"


def _look_up(name: str, notice: Callable[[str], None], until: float) -> str:
    told = False
    while True:
        try:
            return socket.gethostbyname(name)
        except OSError as error:
            unknown = f"--master: there is no machine {name} ({error})"
            if time.monotonic() >= until:
                raise ErnieTrainError(unknown) from None
            if not told:
                notice(f"{unknown}; waiting for it")
                told = True
        time.sleep(1.0)


def own_address(master: str) -> str:
    """Return the address of this machine from which it reaches `master` (address:port).

    On the master's machine it is the master's own. Raises `ConfigError` where no way leads there.
    """
    address, _, port = master.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, int(port)))  # of a datagram socket: nothing is sent
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--master: no way leads to {master} ({error})") from None
        return str(probe.getsockname()[0])
