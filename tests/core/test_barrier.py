"""The barrier of ranks, with threads for ranks."""

from __future__ import annotations

import itertools
import queue
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from ernie_train.core.barrier import HostBarrier
from ernie_train.core.errors import ErnieTrainError

RANKS = 3


@pytest.fixture
def barriers():
    board: queue.Queue[str] = queue.Queue()
    intruders: list[socket.socket] = []

    def publish(text: str) -> None:
        host, port, _ = text.split()
        intruders.append(socket.create_connection((host, int(port))))
        intruders[0].sendall(bytes(20))  # another token
        for _ in range(RANKS - 1):
            board.put(text)

    with ThreadPoolExecutor(RANKS) as threads:
        made = list(
            threads.map(
                lambda r: HostBarrier(r, RANKS, "127.0.0.1", publish, board.get), range(RANKS)
            )
        )
    yield made
    for place in (*made, *intruders):
        place.close()


def test_nobody_goes_on_before_all_are_there(barriers):
    went: list[tuple[int, int]] = []
    lock = threading.Lock()

    def work(rank: int) -> None:
        for turn in range(20):
            time.sleep(0.001 * ((rank + turn) % RANKS))
            with lock:
                went.append((turn, 0))
            barriers[rank].wait()
            with lock:
                went.append((turn, 1))

    with ThreadPoolExecutor(RANKS) as threads:
        list(threads.map(work, range(RANKS)))
    for turn in range(20):
        last_arrival = max(i for i, event in enumerate(went) if event == (turn, 0))
        first_departure = min(i for i, event in enumerate(went) if event == (turn, 1))
        assert last_arrival < first_departure


@pytest.mark.parametrize("lost", [0, 2])
def test_a_rank_that_has_ended_is_noticed_by_those_that_wait(barriers, lost):
    barriers[lost].close()
    waiting = 1 if lost == 0 else 0
    with pytest.raises(ErnieTrainError, match=f"rank {lost}"):
        barriers[waiting].wait()


def test_a_rank_may_take_a_day_and_a_machine_that_is_gone_is_noticed(barriers, monkeypatch):
    days = itertools.count(step=86400)
    clock = SimpleNamespace(monotonic=lambda: float(next(days)))
    monkeypatch.setattr("ernie_train.core.barrier.time", clock, raising=False)

    def late() -> None:
        time.sleep(0.5)
        barriers[2].wait()

    with ThreadPoolExecutor(RANKS) as threads:
        waiting = [threads.submit(barriers[rank].wait) for rank in (0, 1)]
        threads.submit(late)
        for future in waiting:
            future.result()
    for peer in (peer for place in barriers for peer in place._peers.values()):
        assert peer.gettimeout() is None
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        idle, every, asked, unread_ms = (
            peer.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names
        )
        assert idle + every * asked == 120 == unread_ms // 1000
