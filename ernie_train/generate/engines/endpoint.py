"""Client of an OpenAI-compatible endpoint: token ids in, checked token ids out.

One request is one sequence, since a seed belongs to a request. Connections that break are tried
again; a server's refusal, a wrong answer and a time-out are not.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from ernie_train.core.errors import EngineError, Interrupted
from ernie_train.generate.engine import Completion
from ernie_train.generate.engines.answer import Request, WrongAnswer

_RETRIES, _FIRST_PAUSE_S = 4, 0.25
_POLL_S, _CONNECT_S = 0.1, 10.0
_MOST_BYTES = 64 << 20  # of an answer; the experts of 32k tokens of 28 layers are 10 MB


class Endpoint:
    """Sends requests to the server at `url`; every failure is an `EngineError` that names it.

    alive: raises `EngineError` once the server cannot come back, such as a process that ended.
    """

    def __init__(self, url: str, parallel: int, alive: Callable[[], None] = lambda: None) -> None:
        self.url, self.parallel, self.alive = url.rstrip("/"), parallel, alive

    # ---- single calls ----------------------------------------------------------------------------

    def call(
        self, path: str, body: Any = None, *, timeout_s: float, optional: bool = False
    ) -> dict[str, Any] | None:
        """GET `path`, or POST a JSON body, and return the JSON object that comes back.

        optional: return None where the server has no such path.
        """

        async def call() -> dict[str, Any] | None:
            async with self._client(timeout_s) as client:
                return await self._send(client, path, body, optional=optional)

        return asyncio.run(self._within(timeout_s, path, call()))

    def wait_until_up(
        self, timeout_s: float, stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        """Wait until the server says that it is healthy."""
        end = time.monotonic() + timeout_s
        while True:
            self.alive()
            try:
                if self._is_healthy():
                    return
            except httpx.HTTPError:
                pass  # not there yet
            if stop_requested():
                raise Interrupted("stopped on a signal while the engine was starting")
            if time.monotonic() > end:
                raise EngineError(
                    f"the engine at {self.url} did not come up within {timeout_s:g} s: see its "
                    "log, or raise rollout.engine.start_timeout_s"
                )
            time.sleep(_POLL_S)

    def _is_healthy(self) -> bool:
        answer = httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False)
        return answer.status_code == httpx.codes.OK

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
        return asyncio.run(
            self._within(
                timeout_s, "/v1/completions", self._complete(requests, timeout_s, stop_requested)
            )
        )

    async def _complete(
        self, requests: Sequence[Request], timeout_s: float, stop_requested: Callable[[], bool]
    ) -> list[Completion]:
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
                left = set(tasks)
                while left:
                    done, left = await asyncio.wait(
                        left, timeout=_POLL_S, return_when=asyncio.FIRST_EXCEPTION
                    )
                    for task in done:
                        task.result()
                    if stop_requested():
                        raise Interrupted("stopped on a signal while generating")
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            return [task.result() for task in tasks]

    # ---- transport -------------------------------------------------------------------------------

    def _client(self, timeout_s: float) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=self.parallel)
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S))
        # Proxies of the environment are for the world outside, not for an engine.
        return httpx.AsyncClient(base_url=self.url, timeout=timeout, limits=limits, trust_env=False)

    async def _within(self, timeout_s: float, path: str, work: Any) -> Any:
        """Await `work` for at most `timeout_s`, however slowly bytes arrive meanwhile."""
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except (TimeoutError, httpx.TimeoutException):
            self.alive()
            raise EngineError(
                f"the engine at {self.url} did not finish {path} within {timeout_s:g} s: raise "
                "rollout.engine.timeout_s or start_timeout_s, or ask it for less at a time"
            ) from None

    async def _send(
        self, client: httpx.AsyncClient, path: str, body: Any = None, *, optional: bool = False
    ) -> dict[str, Any] | None:
        """Send a request, again where the connection broke; return the JSON object of the answer.

        The pauses grow from 0.25 to 2 seconds.
        """
        pause_s = _FIRST_PAUSE_S
        for attempt in range(_RETRIES + 1):
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
                if len(content) > _MOST_BYTES:
                    raise EngineError(
                        f"the engine at {self.url} answered {path} with over {_MOST_BYTES} bytes"
                    )
            return answer.status_code, bytes(content)
