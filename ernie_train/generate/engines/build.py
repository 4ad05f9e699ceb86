"""Build the engine that a recipe asks for."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

from ernie_train.core import consensus
from ernie_train.core.config import parse_config
from ernie_train.data import Tokenizer
from ernie_train.generate.engines.config import EngineConfig
from ernie_train.generate.engines.own import OwnEngine
from ernie_train.generate.engines.protocol import Engine

_A_DAY_S = 86400.0  # a user ends what takes too long
# A `logprob_gap`: two programs in bfloat16 differ by some 0.02.
_GAP_OF_ANOTHER_DTYPE = 0.1


def build_engine(
    config: EngineConfig,
    tokenizer: Tokenizer,
    *,
    temperature: float,
    batch_size: int,
    record_experts: bool = False,
    directory: Path,
    base_dir: Path,
    largest_gap: float,
    stop_requested: Callable[[], bool],
) -> Engine:
    """Return the engine of `config`; a server is started with the first weights.

    temperature: of the rollouts; batch_size, record_experts: of our own sampler; directory: for the
    log of a server, and its weights unless `config` names another; base_dir: where relative paths
    of the recipe start; largest_gap: the `logprob_gap` between a server and the model, above which
    the server is refused. Every rank must call it.
    """
    if config.kind == "own":
        return OwnEngine(tokenizer.stop_token_ids, batch_size, record_experts)
    directory = directory.absolute()  # a server may run elsewhere on this disk
    weights = directory
    if config.directory is not None:
        shared = (base_dir / os.path.expanduser(config.directory)).absolute()
        weights = shared / f"engine-{_run_id(directory)}"
    # Takes 0.2 s, for the HTTP client.
    from ernie_train.generate.engines.served import ServedEngine
    from ernie_train.generate.engines.servers import FastDeployServer, Server, VllmServer

    server: Server
    if config.kind == "fastdeploy":
        server = FastDeployServer(config, directory, stop_requested)
    else:
        # At temperature 1 those of the whole distribution are wanted, before top-p and top-k
        # truncate it; at others vLLM has those of the tempered one only after its truncation,
        # which the recipe then does not ask for.
        mode = "raw_logprobs" if temperature == 1 else "processed_logprobs"
        server = VllmServer(config, directory, stop_requested, mode)
    return ServedEngine(config, server, tokenizer, weights, largest_gap)


def ask_engine(url: str, tokenizer: Tokenizer, stop_requested: Callable[[], bool]) -> Engine:
    """Return an engine that samples with the vLLM server at `url` as it is.

    `load_weights` changes nothing there: it raises `EngineError` unless the server has the weights
    of that model, by its log-probabilities. Raises `ConfigError` for what is no URL.
    """
    settings = {"kind": "vllm", "url": url, "timeout_s": _A_DAY_S, "start_timeout_s": 120.0}
    config = parse_config(EngineConfig, settings, "--engine")
    from ernie_train.generate.engines.served import ServedEngine
    from ernie_train.generate.engines.servers import GivenServer

    server = GivenServer(config, Path(), stop_requested)
    return ServedEngine(config, server, tokenizer, None, _GAP_OF_ANOTHER_DTYPE)


def _run_id(directory: Path) -> str:
    """Return a name for a stage's run, the same at each start: of the host and its directory."""
    host = consensus.run_on_main(socket.gethostname)
    return hashlib.sha256(f"{host}:{directory}".encode()).hexdigest()[:12]
