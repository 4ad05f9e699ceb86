"""A place where ranks wait for one another for as long as it takes.

Paddle's collectives over gloo give up after 30 seconds, and that cannot be set. One rank may be
busy for longer than that, with an export or a long completion, or stopped for a moment. So before
ranks begin a collective they meet here, over plain sockets: each tells rank 0 that it has come, and
rank 0 tells all when all have.

There is no limit to the wait for a rank that works: it may grade completions for hours. One that
has ended closes its connection; of a machine that is gone the kernel finds out, by asking for
signs of life while nothing is sent. A rank that hangs is its supervisor's to end.
"""

from __future__ import annotations

import secrets
import select
import socket
from collections.abc import Callable, Mapping

from ernie_train.core.errors import ErnieTrainError

JOIN_LIMIT_S = 1800.0  # from the first rank that is here to the last
# The kernel asks a silent peer after so many seconds, then as often, and at last gives it up.
_IDLE_S, _ASK_EVERY_S, _ASKED = 60, 10, 6
_TOKEN_BYTES, _RANK_BYTES = 16, 4


class HostBarrier:
    """The meeting place of `ranks` ranks, of which this process is number `rank`.

    Args:
        host: the address of this machine that the other ranks reach; only rank 0 uses it.
        publish: hands a text to the other ranks; called by rank 0.
        look_up: returns that text, once it is there; called by the others.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        host: str,
        publish: Callable[[str], None],
        look_up: Callable[[], str],
    ) -> None:
        self._peers: dict[int, socket.socket] = {}
        if rank == 0:
            self._receive(host, ranks, publish)
        else:
            address, port, token = look_up().split()
            peer = socket.create_connection((address, int(port)), JOIN_LIMIT_S)
            peer.sendall(bytes.fromhex(token) + rank.to_bytes(_RANK_BYTES, "big"))
            self._peers[0] = peer
        for peer in self._peers.values():
            _set_up(peer)
        self._is_host = rank == 0

    def _receive(self, host: str, ranks: int, publish: Callable[[str], None]) -> None:
        token = secrets.token_bytes(_TOKEN_BYTES)
        with socket.create_server((host, 0), backlog=ranks) as server:
            server.settimeout(JOIN_LIMIT_S)
            publish(f"{host} {server.getsockname()[1]} {token.hex()}")
            while len(self._peers) < ranks - 1:
                peer, _ = server.accept()
                peer.settimeout(10)
                try:
                    hello = _read(peer, _TOKEN_BYTES + _RANK_BYTES)
                except OSError:
                    hello = b""
                if secrets.compare_digest(hello[:_TOKEN_BYTES], token):
                    self._peers[int.from_bytes(hello[_TOKEN_BYTES:], "big")] = peer
                else:
                    peer.close()  # a stranger

    def wait(self) -> None:
        """Returns when all ranks have called it as often as this one.

        Raises `ErnieTrainError` that names a rank that has ended.
        """
        if not self._is_host:
            self._for_each(_tell)
        self._await_all()
        if self._is_host:
            self._for_each(_tell)

    def _await_all(self) -> None:
        awaited = dict(self._peers)
        while awaited:
            come, _, _ = select.select(list(awaited.values()), [], [])
            here = {rank: peer for rank, peer in awaited.items() if peer in come}
            self._for_each(_listen, here)
            awaited = {rank: peer for rank, peer in awaited.items() if rank not in here}

    def _for_each(
        self,
        step: Callable[[socket.socket], None],
        peers: Mapping[int, socket.socket] | None = None,
    ) -> None:
        for rank, peer in (self._peers if peers is None else peers).items():
            try:
                step(peer)
            except OSError:
                raise ErnieTrainError(f"the connection to rank {rank} is lost") from None

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()


def _set_up(peer: socket.socket) -> None:
    """Lets a connection wait for ever, unless its other end is gone."""
    peer.settimeout(None)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _ASK_EVERY_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _ASKED)
    # What was sent and is not acknowledged is given up after as long, and not after a quarter hour.
    limit_ms = 1000 * (_IDLE_S + _ASK_EVERY_S * _ASKED)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)


def _tell(peer: socket.socket) -> None:
    peer.sendall(b".")


def _listen(peer: socket.socket) -> None:
    _read(peer, 1)


def _read(peer: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = peer.recv(size - len(found))
        if not part:
            raise ConnectionError("closed")
        found += part
    return found
