"""A barrier of ranks without a time limit, over TCP sockets.

Paddle's collectives over gloo time out after 30 seconds (3.3.1; not configurable), but one rank may
be busy for longer, for instance with an export, or grade completions for hours. So before each
collective ranks wait here: each sends a byte to rank 0, and rank 0 answers when all have.

A rank that has ended closes its connection, which the others notice at once. Of a machine that is
gone the kernel finds out within two minutes, by TCP keepalive. A rank that hangs is ended by its
supervisor.

Own sockets instead of a counter on Paddle's TCPStore (3.3.1): between two ranks of one machine a
barrier takes 0.02 ms instead of 88 ms (its server polls), and the end of a rank is noticed in 2 ms,
where `TCPStore.wait` went on waiting for 90 s and more, far past the store's own time-out of 8 s.
"""

from __future__ import annotations

import secrets
import select
import socket
from collections.abc import Callable, Mapping

from ernie_train.core.errors import ErnieTrainError

CONNECT_TIMEOUT_S = 1800.0  # from the first rank to the last
# TCP keepalive: the first probe, the time between probes, and unanswered ones until it gives up.
_IDLE_S, _PROBE_EVERY_S, _PROBES = 60, 10, 6
_TOKEN_BYTES, _RANK_BYTES = 16, 4


class HostBarrier:
    """Barrier of `ranks` ranks, of which this process is number `rank`.

    Args:
        host: an address of this machine that the other ranks can reach; only rank 0 uses it.
        publish: makes a text known to the other ranks; called by rank 0.
        look_up: waits for that text and returns it; called by the others.
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
            self._accept(host, ranks, publish)
        else:
            address, port, token = look_up().split()
            peer = socket.create_connection((address, int(port)), CONNECT_TIMEOUT_S)
            peer.sendall(bytes.fromhex(token) + rank.to_bytes(_RANK_BYTES, "big"))
            self._peers[0] = peer
        for peer in self._peers.values():
            _configure(peer)
        self._is_host = rank == 0

    def _accept(self, host: str, ranks: int, publish: Callable[[str], None]) -> None:
        token = secrets.token_bytes(_TOKEN_BYTES)
        with socket.create_server((host, 0), backlog=ranks) as server:
            server.settimeout(CONNECT_TIMEOUT_S)
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
                    peer.close()  # not a rank of this job

    def wait(self) -> None:
        """Return when all ranks have called it as often as this one.

        Raises `ErnieTrainError` that names a rank whose connection is lost.
        """
        if not self._is_host:
            self._for_each(_send_byte)
        self._receive_from_all()
        if self._is_host:
            self._for_each(_send_byte)

    def _receive_from_all(self) -> None:
        pending = dict(self._peers)
        while pending:
            readable, _, _ = select.select(list(pending.values()), [], [])
            ready = {rank: peer for rank, peer in pending.items() if peer in readable}
            self._for_each(_receive_byte, ready)
            pending = {rank: peer for rank, peer in pending.items() if rank not in ready}

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


def _configure(peer: socket.socket) -> None:
    """Let a connection wait without limit, unless its other end is gone."""
    peer.settimeout(None)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_EVERY_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    # Unacknowledged data is given up after as long; Linux's default is a quarter of an hour.
    limit_ms = 1000 * (_IDLE_S + _PROBE_EVERY_S * _PROBES)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)


def _send_byte(peer: socket.socket) -> None:
    peer.sendall(b".")


def _receive_byte(peer: socket.socket) -> None:
    _read(peer, 1)


def _read(peer: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = peer.recv(size - len(found))
        if not part:
            raise ConnectionError("closed")
        found += part
    return found
