"""vLLM and FastDeploy as servers: how each is started and given new weights.

A version of the weights is a directory, an export without a receipt. vLLM reads the next one in
place; it names the version that it holds, and its checksums show that the weights in its memory
changed. FastDeploy is started again, under a model name that no other version has.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, ClassVar

from ernie_train.core.errors import EngineError, UserError
from ernie_train.core.processes import free_ports
from ernie_train.generate.engines.config import EngineConfig
from ernie_train.generate.engines.endpoint import Endpoint
from ernie_train.generate.engines.process import ServerProcess

ENVIRONMENT = "ERNIE_TRAIN_VLLM"
_EMPTY = hashlib.sha256(b"").hexdigest()  # the checksum of a matrix that was packed away
_CANNOT_SLEEP = "Sleep mode is not supported"  # what vLLM 0.32 says then
_IN_PLACE = (
    "it must take weights in place: start it with VLLM_SERVER_DEV_MODE=1 in its environment, "
    "vLLM 0.32 or later"
)


@dataclass(frozen=True)
class Weights:
    """Names a version of the weights on the disk, its directory and a hash of its tensors."""

    name: str
    directory: Path
    digest: str
    dtype: str


@dataclass
class Server(ABC):
    """Samples with a version of the weights: a process of ours, or one at a URL.

    model: the name that it answers under.
    """

    config: EngineConfig
    directory: Path  # of the log of a process
    stop_requested: Callable[[], bool]
    model: str = field(default="", init=False)
    endpoint: Endpoint = field(init=False)
    _process: ServerProcess | None = field(default=None, init=False)
    _must_have: ClassVar[str] = "it is no server of this kind"

    @abstractmethod
    def load(self, weights: Weights) -> None:
        """Make it sample with `weights`; raise `EngineError` where it says that it does not."""

    @abstractmethod
    def require_version(self, weights: Weights) -> None:
        """Raise `EngineError` unless it still samples with `weights`."""

    def restart(self, weights: Weights) -> bool:
        """Start it anew with `weights`, now and for later versions; False where that is no help."""
        return False

    def sleep(self) -> None:
        """Give the GPU memory of our process back until `load`: it ends, unless it can sleep."""
        self.close()

    def close(self) -> None:
        """End the process, if it is ours; may be called more than once."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _start_process(self, model: str, port: int, command: Sequence[str], **environ: str) -> None:
        """Run `command` in place of what ran before; return once it is healthy.

        model: a name that no other server has, to tell it from one that took the port before it.
        """
        self.close()
        command = [
            *command, "--host", "127.0.0.1", "--port", str(port),
            "--served-model-name", model, *self.config.args,
        ]  # fmt: skip
        self._process = ServerProcess(
            command, {**_environment(self.config.gpus), **environ}, self.directory / "engine.log"
        )
        self._connect(f"http://127.0.0.1:{port}", self._process.require_alive)
        self._require_model(model)
        self.model = model

    def _find(self) -> None:
        self._connect(str(self.config.url))
        served = self._served_models()
        if not served:
            raise EngineError(f"the engine at {self.endpoint.url} serves no model")
        self.model = served[0]

    def _connect(self, url: str, alive: Callable[[], None] = lambda: None) -> None:
        self.endpoint = Endpoint(url, self.config.parallel, alive)
        self.endpoint.wait_until_up(self.config.start_timeout_s, self.stop_requested)

    def _require_model(self, name: str) -> None:
        served = self._served_models()
        if served != [name]:
            raise EngineError(
                f"the engine at {self.endpoint.url} serves {short_repr(served)}, not {name!r}: it "
                "is another server, which took the port; the next start takes another one"
            )

    def _served_models(self) -> list[str]:
        served = self._call("/v1/models").get("data")
        if not isinstance(served, list):
            return []
        names = [one.get("id") for one in served if isinstance(one, dict)]
        return [name for name in names if isinstance(name, str)]

    def _call(self, path: str, body: Any = None) -> dict[str, Any]:
        answer = self.endpoint.call(
            path,
            body,
            timeout_s=self.config.start_timeout_s,
            optional=True,
            stop_requested=self.stop_requested,
        )
        if answer is None:
            raise EngineError(f"the engine at {self.endpoint.url} has no {path}: {self._must_have}")
        return answer


@dataclass
class VllmServer(Server):
    """Runs vLLM, or asks it at a URL, in its mode for development, which takes new weights.

    A process of ours is started anew where weights do not arrive in place: builds for CPUs pack
    most matrices away, and what they then read is wrong (seen with vLLM 0.32).
    """

    logprobs_mode: str
    _must_have: ClassVar[str] = _IN_PLACE
    _runs: bool = field(default=False, init=False)
    _in_place: bool = field(default=True, init=False)
    _sleeps: bool = field(default=False, init=False)
    _loaded: tuple[str, dict[str, Any]] | None = field(default=None, init=False)

    def load(self, weights: Weights) -> None:
        """Start it with `weights`, or have it read them in place; name the version to it."""
        if self.config.url is None and not (self._runs and self._in_place):
            self._start(weights)
        else:
            if not self._runs:
                self._find()
            self._reload(weights)
        self._runs = True
        self._check_memory(weights)
        self.require_version(weights)

    def restart(self, weights: Weights) -> bool:
        if self.config.url is not None or not self._in_place:
            return False
        self._in_place = False
        self.load(weights)
        return True

    def sleep(self) -> None:
        """Keep neither weights nor cache; end where the next version needs a new process anyway."""
        if not self._in_place:
            super().sleep()
            return
        # Level 1 would keep a copy of the weights in the memory of the CPU, but all of the next
        # version's are read.
        self._call("/sleep?level=2&mode=abort", {})
        self._sleeps = True

    def require_version(self, weights: Weights) -> None:
        found = self._call("/weight_info").get("weight_version")
        if found != weights.name:
            raise EngineError(
                f"the engine at {self.endpoint.url} holds the weights {short_repr(found)}, not "
                f"{weights.name!r}: it was started again, or another run uses it"
            )

    def _start(self, weights: Weights) -> None:
        (port,) = free_ports(1)
        command = [
            _vllm_python(self.config.python), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(weights.directory), "--dtype", weights.dtype,
            "--generation-config", "vllm", "--logprobs-mode", self.logprobs_mode,
            *(["--enable-sleep-mode"] if self.config.sleep else []),
        ]  # fmt: skip
        self._loaded, self._sleeps = None, False
        try:
            self._start_process(
                f"policy-{secrets.token_hex(4)}", port, command, VLLM_SERVER_DEV_MODE="1",
                HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1",
            )  # fmt: skip
        except EngineError as error:
            if self.config.sleep and _CANNOT_SLEEP in str(error):
                raise UserError(
                    "rollout.engine.sleep: this vLLM cannot sleep, as one for CPUs: leave it out"
                ) from None
            raise
        self._name(weights)

    def _reload(self, weights: Weights) -> None:
        if self._sleeps:
            # It is paused without a cache, whose memory comes last, and it samples again then: a
            # matrix may be there twice while it is read.
            self._call("/wake_up?tags=weights", {})
            after = ["/wake_up?tags=kv_cache"]
        else:
            # Nothing of ours runs; requests of a run that was killed may.
            self._call("/pause?mode=abort", {})
            after = ["/reset_prefix_cache", "/resume"]
        self._name(weights)  # while nothing is sampled: no completion of them has an older name
        arguments = {"weights_path": str(weights.directory)}
        self._call("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})
        for path in after:
            self._call(path, {})
        self._sleeps = False

    def _name(self, weights: Weights) -> None:
        self._call("/update_weight_version", {"new_version": weights.name})

    def _check_memory(self, weights: Weights) -> None:
        """Compare how the weights in its memory changed with how those on the disk did.

        Else an engine that read an old directory, or nothing, would go unnoticed: one update moves
        log-probabilities less than another dtype does.
        """
        checksums = self._call("/weight_checker", {"action": "checksum"}).get("checksums")
        if not isinstance(checksums, dict) or not checksums:
            raise EngineError(f"the engine at {self.endpoint.url} tells no checksums: {_IN_PLACE}")
        if _EMPTY in checksums.values():
            if self.config.url is not None:
                raise EngineError(
                    f"the engine at {self.endpoint.url} packs some of its weights away, as vLLM "
                    "for CPUs does, so that nothing shows whether new ones arrive: leave out the "
                    "url, and the stage starts one for each version"
                )
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


@dataclass
class GivenServer(Server):
    """Asks a server at a URL, which keeps the weights that it has."""

    def load(self, weights: Weights) -> None:
        self._find()

    def require_version(self, weights: Weights) -> None:
        """Require the model's name, all that it says of its weights."""
        if self.model not in (served := self._served_models()):
            raise EngineError(
                f"the engine at {self.endpoint.url} serves {short_repr(served)}, no longer "
                f"{self.model!r}"
            )


@dataclass
class FastDeployServer(Server):
    """Starts FastDeploy for each version: it takes weights in place from its own kit alone.

    Written against its source and a stand-in; it has no build for CPUs that could be tried.
    """

    def load(self, weights: Weights) -> None:
        port, metrics, queue, cache = free_ports(4)
        command = [
            os.path.expanduser(str(self.config.python)),
            "-m", "fastdeploy.entrypoints.openai.api_server",
            "--model", str(weights.directory), "--metrics-port", str(metrics),
            "--engine-worker-queue-port", str(queue), "--cache-queue-port", str(cache),
            "--enable-logprob", "--load-choices", "default_v1",
        ]  # fmt: skip
        self._start_process(weights.name, port, command)

    def require_version(self, weights: Weights) -> None:
        """Compare the name of the served model; every completion's is compared too."""
        self._require_model(weights.name)


def _environment(gpus: Sequence[int] | None) -> dict[str, str]:
    """Return the environment of a server: ours, without what says which rank of a job this is."""
    found = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PADDLE_") and name != "FLAGS_selected_gpus"
    }
    return found if gpus is None else {**found, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}


def _vllm_python(given: str | None) -> str:
    """Return the interpreter that is named, or that of the environment in `ERNIE_TRAIN_VLLM`."""
    if given is not None:
        return os.path.expanduser(given)
    if directory := os.environ.get(ENVIRONMENT):
        return str(Path(directory) / "bin" / "python")
    raise UserError(
        "rollout.engine: vllm needs a url, or the python of an environment that has it: make one "
        f"with tools/vllm.sh and name it in {ENVIRONMENT}"
    )
