"""Client of an OpenAI-compatible endpoint: token ids in, checked token ids out.

One request is one sequence, since a seed belongs to a request. Connections that break are tried
again; a server's refusal, a wrong answer and a time-out are not.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import httpx

from ernie_train.core.errors import EngineError, Interrupted
from ernie_train.generate.engine import Completion
from ernie_train.generate.engines.answer import Request, WrongAnswer

_RETRIES, _FIRST_PAUSE_S = 4, 0.25
_POLL_S, _CONNECT_S, _HEALTH_S = 0.1, 10.0, 5.0
_MAX_BYTES = 64 << 20  # of an answer; the experts of 32k tokens of 28 layers are 10 MB

T = TypeVar("T")


class Endpoint:
    """Sends requests to the server at `url`; every failure is an `EngineError` that names it.

    alive: raises `EngineError` once the server cannot come back, such as a process that ended; it
        is asked before each request, as another server may have the port then.

    Every call raises `Interrupted` soon after a stop is requested.
    """

    def __init__(self, url: str, parallel: int, alive: Callable[[], None] = lambda: None) -> None:
        self.url, self.parallel, self.alive = url.rstrip("/"), parallel, alive

    # ---- single calls ----------------------------------------------------------------------------

    def call(
        self,
        path: str,
        body: Any = None,
        *,
        timeout_s: float,
        optional: bool = False,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any] | None:
        """GET `path`, or POST a JSON body, and return the JSON object that comes back.

        optional: return None where the server has no such path.
        """

        async def call() -> dict[str, Any] | None:
            async with self._client(timeout_s) as client:
                return await self._send(client, path, body, optional=optional)

        return self._run(path, call(), timeout_s, stop_requested)

    def wait_until_up(
        self, timeout_s: float, stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        """Wait until the server says that it is healthy."""

        async def healthy() -> None:
            async with self._client(min(timeout_s, _HEALTH_S)) as client:
                while True:
                    self.alive()
                    with suppress(httpx.HTTPError):  # not there yet
                        status, _ = await self._receive(client, "/health", None)
                        if status == httpx.codes.OK:
                            return
                    await asyncio.sleep(_POLL_S)

        late = (
            f"did not come up within {timeout_s:g} s: see its log, or raise "
            "rollout.engine.start_timeout_s"
        )
        self._run("/health", healthy(), timeout_s, stop_requested, late)

    # ---- completions -----------------------------------------------------------------------------

    def complete(
        self,
        requests: Sequence[Request],
        *,
        timeout_s: float,
        stop_requested: Callable[[], bool],
    ) -> list[Completion]:
        """Return the checked completions of `requests`, in order.

        Raises `Interrupted` when a stop is requested, and `EngineError` for anything else that
        keeps one of them from coming back as it was asked for within `timeout_s`.
        """
        work = self._complete(requests, timeout_s)
        return self._run("/v1/completions", work, timeout_s, stop_requested)

    async def _complete(self, requests: Sequence[Request], timeout_s: float) -> list[Completion]:
        gate = asyncio.Semaphore(self.parallel)
        async with self._client(timeout_s) as client:

            async def one(number: int, request: Request) -> Completion:
                async with gate:
                    answer = await self._send(client, "/v1/completions", request.body())
                try:
                    return request.read(answer)
                except WrongAnswer as error:
                    raise EngineError(
                        f"the engine at {self.url} answered wrongly to prompt {number}: {error}"
                    ) from None

            tasks = [asyncio.create_task(one(i, request)) for i, request in enumerate(requests)]
            try:
                return await asyncio.gather(*tasks)
            finally:
                await _end(tasks)

    # ---- transport -------------------------------------------------------------------------------

    def _client(self, timeout_s: float) -> httpx.AsyncClient:
        # A connection each: httpx 0.28 looks at all it keeps, for each of them, whenever one ends
        # (7 s of a processor for 512 requests at a time).
        limits = httpx.Limits(max_connections=self.parallel, max_keepalive_connections=0)
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S))
        # Proxies of the environment are for the world outside, not for an engine.
        return httpx.AsyncClient(base_url=self.url, timeout=timeout, limits=limits, trust_env=False)

    def _run(
        self,
        path: str,
        work: Coroutine[Any, Any, T],
        timeout_s: float,
        stop_requested: Callable[[], bool],
        late: str = "",
    ) -> T:
        """Return the result of `work` on `path`; raise `EngineError` after `timeout_s`.

        However slowly bytes arrive meanwhile. late: the end of that message.
        """

        async def run() -> T:
            task, ends = asyncio.create_task(work), time.monotonic() + timeout_s
            try:
                while not task.done():
                    if stop_requested():
                        raise Interrupted(
                            f"stopped on a signal while waiting for the engine's {path}"
                        )
                    left_s = ends - time.monotonic()
                    if left_s <= 0:
                        raise TimeoutError
                    await asyncio.wait([task], timeout=min(_POLL_S, left_s))
                return task.result()
            finally:
                await _end([task])

        try:
            return asyncio.run(run())
        except (TimeoutError, httpx.TimeoutException):
            self.alive()
            late = late or (
                f"did not finish {path} within {timeout_s:g} s: raise rollout.engine.timeout_s or "
                "start_timeout_s, or ask it for less at a time"
            )
            raise EngineError(f"the engine at {self.url} {late}") from None

    async def _send(
        self, client: httpx.AsyncClient, path: str, body: Any = None, *, optional: bool = False
    ) -> dict[str, Any] | None:
        """Send a request, again where the connection broke; return the JSON object of the answer.

        The pauses grow from 0.25 to 2 seconds.
        """
        pause_s = _FIRST_PAUSE_S
        for attempt in range(_RETRIES + 1):
            self.alive()
            try:
                status, content = await self._receive(client, path, body)
                break
            except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout):
                raise
            except httpx.TransportError as error:
                self.alive()
                if attempt == _RETRIES:
                    reason = str(error) or type(error).__name__
                    raise EngineError(
                        f"the engine at {self.url} cannot be reached: {reason}"
                    ) from None
                await asyncio.sleep(pause_s)
                pause_s *= 2
            except httpx.HTTPError as error:  # such as a compression that is none
                raise EngineError(
                    f"the engine at {self.url} answered {path} with what cannot be read: {error}"
                ) from None
        if optional and status in (httpx.codes.NOT_FOUND, httpx.codes.METHOD_NOT_ALLOWED):
            return None
        if status != httpx.codes.OK:
            said = " ".join(content.decode(errors="replace").split())
            raise EngineError(
                f"the engine at {self.url} answered {path} with HTTP status {status}: {said[:400]}"
            )
        if not content:
            return {}
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise EngineError(f"the engine at {self.url} answered {path} with no JSON object")
        return answer

    async def _receive(self, client: httpx.AsyncClient, path: str, body: Any) -> tuple[int, bytes]:
        method = "GET" if body is None else "POST"
        async with client.stream(method, path, json=body) as answer:
            content = bytearray()
            async for part in answer.aiter_bytes():
                content += part
                if len(content) > _MAX_BYTES:
                    raise EngineError(
                        f"the engine at {self.url} answered {path} with over {_MAX_BYTES} bytes"
                    )
            return answer.status_code, bytes(content)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel what still runs, and wait until it has ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
