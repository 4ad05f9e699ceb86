"""The client against a server that fails in each way that a server can."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ernie_train.core.errors import EngineError, Interrupted
from ernie_train.generate import SamplingConfig
from ernie_train.generate.engines import EngineConfig
from ernie_train.generate.engines import endpoint as endpoint_module
from ernie_train.generate.engines.answer import Request
from ernie_train.generate.engines.endpoint import Endpoint
from tests.generate.engine_stand_in import BAD, StandIn, serving

PATH = "/v1/completions"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(endpoint_module, "_FIRST_PAUSE_S", 0.01)
    with serving(StandIn()) as state:
        yield state


def requests(count: int = 1) -> list[Request]:
    settings = SamplingConfig(4, 1.0)
    return [Request("policy", [5, 6], settings, 4, seed, (2,), 200) for seed in range(count)]


def complete(server: StandIn, count: int = 1, **options: Any) -> list[list[int]]:
    values: dict[str, Any] = {"timeout_s": 20.0, "stop_requested": lambda: False, **options}
    parallel = values.pop("parallel", 4)
    found = Endpoint(server.url, parallel).complete(requests(count), **values)
    return [completion.ids for completion in found]


def test_completions_come_in_the_order_of_the_prompts(server: StandIn) -> None:
    """Answers of early prompts are made to come last; no more run at once than are allowed."""
    running, most, lock = 0, 0, threading.Lock()

    def slow_first(state: StandIn, body: dict[str, Any]) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.06 if body["seed"] < 2 else 0.01)
        with lock:
            running -= 1
        return state.completion(body)

    server.faults[PATH] = slow_first
    assert [ids[0] for ids in complete(server, 9, parallel=3)] == list(range(10, 19))
    assert 1 < most <= 3


def test_a_connection_that_breaks_is_tried_again(server: StandIn) -> None:
    def twice(state: StandIn, body: dict[str, Any]) -> Any:
        return BAD if state.counts[PATH] <= 2 else state.completion(body)

    server.faults[PATH] = twice
    assert complete(server) == [[10, 17, 24, 31]] and server.counts[PATH] == 3


def raises(server: StandIn, answer: Any, **options: Any) -> str:
    server.faults[PATH] = lambda state, body: answer
    with pytest.raises(EngineError) as refused:
        complete(server, **options)
    assert server.url in str(refused.value)
    return str(refused.value)


def test_a_server_that_keeps_hanging_up_is_given_up(server: StandIn) -> None:
    assert "cannot be reached" in raises(server, BAD)
    assert server.counts[PATH] == 5


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, {"error": "out of\nmemory"}), 'HTTP status 500: {"error": "out of\\nmemory"}'),
        ((404, {"error": "no such model"}), "HTTP status 404"),
        ((307, b""), "HTTP status 307"),
        (b"<html>hello</html>", "with no JSON object"),
        (b"[1, 2]", "with no JSON object"),
        (b"[" * 100_000, "with no JSON object"),
        (b'{"model"', "with no JSON object"),
        ({"model": "policy", "choices": []}, "answered wrongly to prompt 0"),
        (b"", "answered wrongly to prompt 0"),
        ((200, b"no gzip", {"Content-Encoding": "gzip"}), "cannot be read: "),
    ],
)
def test_a_refusal_or_nonsense_is_not_tried_again(
    server: StandIn, answer: Any, message: str
) -> None:
    assert message in raises(server, answer)
    assert server.counts[PATH] == 1


def test_an_answer_without_end_is_cut(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "_MAX_BYTES", 1000)
    assert "over 1000 bytes" in raises(server, b"x" * 5000)


def test_a_server_that_is_too_slow_is_not_waited_for(server: StandIn) -> None:
    started = time.monotonic()
    server.faults[PATH] = lambda state, body: time.sleep(1.5)
    with pytest.raises(EngineError, match=r"did not finish /v1/completions within 0\.3 s"):
        complete(server, timeout_s=0.3)
    assert time.monotonic() - started < 1.4


def test_one_wrong_answer_among_many_ends_all(server: StandIn) -> None:
    def third(state: StandIn, body: dict[str, Any]) -> Any:
        if body["seed"] == 3:
            return {**state.completion(body), "model": "other"}
        time.sleep(0.2)
        return state.completion(body)

    server.faults[PATH] = third
    with pytest.raises(EngineError, match="answered wrongly to prompt 3: it is of the model"):
        complete(server, 12, parallel=4)
    assert server.counts[PATH] < 12


def test_a_stop_is_obeyed_while_the_server_works(server: StandIn) -> None:
    server.faults[PATH] = lambda state, body: time.sleep(1.5)
    started = time.monotonic()
    with pytest.raises(Interrupted):
        complete(server, stop_requested=lambda: time.monotonic() - started > 0.15)
    assert time.monotonic() - started < 1.4


def test_a_process_that_ended_says_so_instead_of_retries(server: StandIn) -> None:
    def ended() -> None:
        if server.counts[PATH]:
            raise EngineError("the process ended")

    server.faults[PATH] = lambda state, body: BAD
    with pytest.raises(EngineError, match="the process ended"):
        Endpoint(server.url, 4, ended).complete(
            requests(), timeout_s=5.0, stop_requested=lambda: False
        )
    assert server.counts[PATH] == 1


def test_nothing_is_sent_to_the_port_of_a_process_that_ended(server: StandIn) -> None:
    def ended() -> None:
        raise EngineError("the process ended")

    with pytest.raises(EngineError, match="the process ended"):
        Endpoint(server.url, 1, ended).call("/pause", {}, timeout_s=5.0)
    assert not server.requests


@pytest.mark.parametrize("path", ["/health", "/pause"])
def test_a_stop_is_heard_in_every_call(server: StandIn, path: str) -> None:
    server.faults[path] = lambda state, body: time.sleep(3.0)
    started = time.monotonic()
    endpoint = Endpoint(server.url, 1)

    def stop_requested() -> bool:
        return time.monotonic() - started > 0.15

    with pytest.raises(Interrupted):
        if path == "/health":
            endpoint.wait_until_up(20.0, stop_requested)
        else:
            endpoint.call(path, {}, timeout_s=20.0, stop_requested=stop_requested)
    assert time.monotonic() - started < 1.4


def test_a_server_that_does_not_come_up(unused_url: Callable[[], str]) -> None:
    with pytest.raises(EngineError, match=r"did not come up within 0\.2 s"):
        Endpoint(unused_url(), 1).wait_until_up(0.2)
    with pytest.raises(Interrupted):
        Endpoint(unused_url(), 1).wait_until_up(5.0, lambda: True)


@pytest.fixture
def unused_url() -> Callable[[], str]:
    def url() -> str:
        with serving(StandIn()) as state:
            return state.url

    return url


def test_an_iteration_of_512_completions_is_open_at_once(server: StandIn) -> None:
    """None is answered before all have come; connections follow, one each."""
    together = threading.Barrier(512)

    def waits(state: StandIn, body: dict[str, Any]) -> Any:
        together.wait(30.0)
        return state.completion(body)

    server.faults[PATH] = waits
    parallel = EngineConfig(kind="vllm", url=server.url).parallel
    assert len(complete(server, 512, parallel=parallel, timeout_s=60.0)) == 512
