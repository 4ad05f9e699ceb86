"""A place where ranks wait for one another for as long as it takes.

Paddle's collectives over gloo give up after 30 seconds, and that cannot be set. One rank may be
busy for longer than that, with an export or a long completion, or stopped for a moment. So before
ranks begin a collective they meet here, over plain sockets: each tells rank 0 that it has come, and
rank 0 tells all when all have.
"""

from __future__ import annotations

import secrets
import select
import socket
import time
from collections.abc import Callable, Mapping

from ernie_train.errors import ErnieTrainError

LIMIT_S = 1800.0  # as long as Paddle waits with NCCL
_TOKEN_BYTES, _RANK_BYTES = 16, 4


class Meeting:
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
            peer = socket.create_connection((address, int(port)), LIMIT_S)
            peer.sendall(bytes.fromhex(token) + rank.to_bytes(_RANK_BYTES, "big"))
            self._peers[0] = peer
        for peer in self._peers.values():
            peer.settimeout(LIMIT_S)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._is_host = rank == 0

    def _receive(self, host: str, ranks: int, publish: Callable[[str], None]) -> None:
        token = secrets.token_bytes(_TOKEN_BYTES)
        with socket.create_server((host, 0), backlog=ranks) as server:
            server.settimeout(LIMIT_S)
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

        Raises `ErnieTrainError` that names a rank that has ended, or did not come in half an hour.
        """
        if not self._is_host:
            self._for_each(_tell)
        self._await_all()
        if self._is_host:
            self._for_each(_tell)

    def _await_all(self) -> None:
        end = time.monotonic() + LIMIT_S
        awaited = dict(self._peers)
        while awaited:
            left_s = max(0.0, end - time.monotonic())
            come, _, _ = select.select(list(awaited.values()), [], [], left_s)
            if not come:
                raise ErnieTrainError(f"rank {min(awaited)} did not come in {LIMIT_S:.0f} s")
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
