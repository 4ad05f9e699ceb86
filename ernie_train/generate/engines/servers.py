"""vLLM and FastDeploy as servers: how each is started and given new weights.

A version of the weights is a directory, an export without a receipt. vLLM reads the next one in
place; it names the version that it holds, and its checksums show that the weights in its memory
changed. FastDeploy is started again, under a model name that no other version has.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ernie_train.core.errors import EngineError, UserError
from ernie_train.generate.engines.config import EngineConfig
from ernie_train.generate.engines.endpoint import Endpoint
from ernie_train.generate.engines.process import ServerProcess, free_ports

ENVIRONMENT = "ERNIE_TRAIN_VLLM"
_EMPTY = hashlib.sha256(b"").hexdigest()  # the checksum of a matrix that was packed away
_IN_PLACE = (
    "it must take weights in place: start it with VLLM_SERVER_DEV_MODE=1 in its environment, "
    "vLLM 0.32 or later"
)


@dataclass(frozen=True)
class Weights:
    """A version of the weights on the disk: its name, its directory and a hash of its tensors."""

    name: str
    directory: Path
    digest: str
    dtype: str


class Server(Protocol):
    """A server that samples with a version of the weights."""

    @property
    def endpoint(self) -> Endpoint: ...

    @property
    def model(self) -> str:
        """Return the name that it answers under."""
        ...

    def load(self, weights: Weights) -> None:
        """Make it sample with `weights`; raise `EngineError` where it says that it does not."""
        ...

    def restart(self, weights: Weights) -> bool:
        """Start it anew with `weights`, now and for later versions; False where it is not ours."""
        ...

    def require(self, weights: Weights) -> None:
        """Raise `EngineError` unless it still samples with `weights`."""
        ...

    def close(self) -> None: ...


@dataclass
class _Started:
    """A process that this program starts, and the endpoint that it opens."""

    config: EngineConfig
    directory: Path  # of its log
    stop_requested: Callable[[], bool]
    process: ServerProcess | None = field(default=None, init=False)
    endpoint: Endpoint = field(init=False)

    def start(self, command: Sequence[str], port: int, environ: dict[str, str]) -> None:
        """Run `command` in place of what ran before; return once it is healthy."""
        self.close()
        log = self.directory / "engine.log"
        self.process = ServerProcess(command, {**os.environ, **environ}, log)
        self.endpoint = Endpoint(
            f"http://127.0.0.1:{port}", self.config.parallel, self.process.require_alive
        )
        self.endpoint.wait_until_up(self.config.start_timeout_s, self.stop_requested)

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None


@dataclass
class VllmServer:
    """vLLM, started here or at a URL, in its mode for development, which takes new weights.

    A process of ours is started anew where weights do not arrive in place: builds for CPUs pack
    most matrices away, and what they then read is wrong (seen with vLLM 0.32).
    """

    config: EngineConfig
    directory: Path
    stop_requested: Callable[[], bool]
    logprobs_mode: str
    model: str = field(default="policy", init=False)
    endpoint: Endpoint = field(init=False)
    _started: _Started = field(init=False)
    _runs: bool = field(default=False, init=False)
    _in_place: bool = field(default=True, init=False)
    _loaded: tuple[str, dict[str, Any]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._started = _Started(self.config, self.directory, self.stop_requested)

    def load(self, weights: Weights) -> None:
        """Start it with `weights`, or have it read them in place; name the version to it."""
        if self.config.url is None and not (self._runs and self._in_place):
            self._start(weights)
        else:
            if not self._runs:
                self._connect()
            self._reload(weights)
        self._runs = True
        self._check_memory(weights)
        self._call("/update_weight_version", {"new_version": weights.name})
        self.require(weights)

    def restart(self, weights: Weights) -> bool:
        if self.config.url is not None or not self._in_place:
            return False
        self._in_place = False
        self.load(weights)
        return True

    def require(self, weights: Weights) -> None:
        found = self._call("/weight_info").get("weight_version")
        if found != weights.name:
            raise EngineError(
                f"the engine at {self.endpoint.url} holds the weights {found!r}, not "
                f"{weights.name!r}: it was started again, or another run uses it"
            )

    def close(self) -> None:
        self._started.close()

    def _start(self, weights: Weights) -> None:
        (port,) = free_ports(1)
        command = [
            _vllm_python(self.config.python), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(weights.directory), "--host", "127.0.0.1", "--port", str(port),
            "--served-model-name", self.model, "--dtype", weights.dtype,
            "--generation-config", "vllm", "--logprobs-mode", self.logprobs_mode,
            *self.config.args,
        ]  # fmt: skip
        environ = {
            "VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        }  # fmt: skip
        self._loaded = None
        self._started.start(command, port, environ)
        self.endpoint = self._started.endpoint

    def _connect(self) -> None:
        self.endpoint = Endpoint(str(self.config.url), self.config.parallel)
        self.endpoint.wait_until_up(self.config.start_timeout_s, self.stop_requested)
        served = self._call("/v1/models").get("data")
        try:
            self.model = str(served[0]["id"])  # type: ignore[index]
        except (LookupError, TypeError):
            raise EngineError(f"the engine at {self.endpoint.url} serves no model") from None

    def _reload(self, weights: Weights) -> None:
        # Nothing of ours runs; requests of a run that was killed may.
        self._call("/pause?mode=abort", {})
        arguments = {"weights_path": str(weights.directory)}
        self._call("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})
        self._call("/reset_prefix_cache", {})
        self._call("/resume", {})

    def _check_memory(self, weights: Weights) -> None:
        """Compare how the weights in its memory changed with how those on the disk did.

        Else an engine that read an old directory, or nothing, would go unnoticed: one update moves
        log-probabilities less than another dtype does.
        """
        checksums = self._call("/weight_checker", {"action": "checksum"}).get("checksums")
        if not isinstance(checksums, dict) or not checksums:
            raise EngineError(f"the engine at {self.endpoint.url} tells no checksums: {_IN_PLACE}")
        if _EMPTY in checksums.values():
            self._in_place = False
        elif self._loaded is not None:
            digest, before = self._loaded
            if (digest == weights.digest) != (before == checksums):
                changed = "did not change" if before == checksums else "changed"
                raise EngineError(
                    f"the engine at {self.endpoint.url} was given {weights.directory}, but the "
                    f"weights in its memory {changed}"
                )
        self._loaded = (weights.digest, checksums)

    def _call(self, path: str, body: Any = None) -> dict[str, Any]:
        timeout_s = self.config.start_timeout_s
        answer = self.endpoint.call(path, body, timeout_s=timeout_s, optional=True)
        if answer is None:
            raise EngineError(f"the engine at {self.endpoint.url} has no {path}: {_IN_PLACE}")
        return answer


@dataclass
class FastDeployServer:
    """FastDeploy, started anew for each version: it takes weights in place from its own kit alone.

    Written against its source and a stand-in; it has no build for CPUs that could be tried.
    """

    config: EngineConfig
    directory: Path
    stop_requested: Callable[[], bool]
    model: str = field(default="", init=False)
    _started: _Started = field(init=False)

    def __post_init__(self) -> None:
        self._started = _Started(self.config, self.directory, self.stop_requested)

    @property
    def endpoint(self) -> Endpoint:
        return self._started.endpoint

    def restart(self, weights: Weights) -> bool:  # every version has a process of its own
        return False

    def load(self, weights: Weights) -> None:
        port, metrics, queue, cache = free_ports(4)
        command = [
            str(self.config.python), "-m", "fastdeploy.entrypoints.openai.api_server",
            "--model", str(weights.directory), "--host", "127.0.0.1", "--port", str(port),
            "--metrics-port", str(metrics), "--engine-worker-queue-port", str(queue),
            "--cache-queue-port", str(cache), "--served-model-name", weights.name,
            "--enable-logprob", "--load-choices", "default_v1", *self.config.args,
        ]  # fmt: skip
        self._started.start(command, port, {})
        self.model = weights.name
        self.require(weights)

    def require(self, weights: Weights) -> None:
        """Compare the name of the served model; every completion's is compared too."""
        answer = self.endpoint.call("/v1/models", timeout_s=self.config.start_timeout_s)
        served = [m.get("id") for m in (answer or {}).get("data", []) if isinstance(m, dict)]
        if served != [weights.name]:
            raise EngineError(
                f"the engine at {self.endpoint.url} serves {served}, not {weights.name!r}"
            )

    def close(self) -> None:
        self._started.close()


def _vllm_python(given: str | None) -> str:
    """Return the interpreter that is named, or that of the environment in `ERNIE_TRAIN_VLLM`."""
    if given is not None:
        return given
    if directory := os.environ.get(ENVIRONMENT):
        return str(Path(directory) / "bin" / "python")
    raise UserError(
        "rollout.engine: vllm needs a url, or the python of an environment that has it: make one "
        f"with tools/vllm.sh and name it in {ENVIRONMENT}"
    )
