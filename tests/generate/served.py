"""An engine of a stand-in server, and what its completions should be."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie_train.core.errors import EngineError
from ernie_train.generate import SamplingConfig
from ernie_train.generate.engines import EngineConfig, build_engine, servers
from ernie_train.generate.engines.protocol import Engine
from ernie_train.model import Ernie4_5_MoeForCausalLM
from tests.generate.engine_stand_in import StandIn

SETTINGS = SamplingConfig(8, temperature=1.0, seed=4)
PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7]]


class Tokens:
    """As much of a tokenizer as an engine needs."""

    vocab_size = 96
    stop_token_ids = [2, 3]

    def save_pretrained(self, directory: Path) -> None: ...


def engine_of(
    run: Path, stop_requested: Callable[[], bool] = lambda: False, **settings: Any
) -> Engine:
    """Return the engine of a stage in the directory `run`; its recipe lies beside that."""
    return build_engine(
        EngineConfig(**settings), Tokens(), temperature=1.0, batch_size=8,  # type: ignore[arg-type]
        directory=run, base_dir=run.parent, largest_gap=0.05, stop_requested=stop_requested,
    )  # fmt: skip


def started_as(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have `server` be what a vLLM that is started becomes; return what happens to the process."""
    events: list[str] = []

    class Process:
        def __init__(self, command: list[str], environ: Any, log: Path) -> None:
            events.append("start")
            given = dict(pairwise(command))
            server.model, server.version = given["--served-model-name"], "default"
            server.can_sleep, server.asleep = "--enable-sleep-mode" in command, set()
            server.load(Path(given["--model"]))

        def require_alive(self) -> None: ...
        def close(self) -> None:
            events.append("end")

    port = int(server.url.rpartition(":")[2])
    monkeypatch.setattr(servers, "ServerProcess", Process)
    monkeypatch.setattr(servers, "free_ports", lambda count: [port] * count)
    return events


def recomputed(model: Ernie4_5_MoeForCausalLM, prompt: list[int], ids: list[int]) -> np.ndarray:
    import paddle

    with paddle.no_grad():
        logits = model(paddle.to_tensor([prompt + ids])).logits[0].numpy().astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits[len(prompt) - 1 : -1][np.arange(len(ids)), ids]


def refuses(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        action()
