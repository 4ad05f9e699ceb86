"""Servers that are given versions of the weights, and what they may not get away with."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie_train.core.errors import EngineError, UserError
from ernie_train.core.processes import is_running, process_state
from ernie_train.generate import SamplingConfig
from ernie_train.generate.engines import EngineConfig, build_engine
from ernie_train.generate.engines.process import ServerProcess
from ernie_train.generate.engines.protocol import Engine
from ernie_train.model import Ernie4_5_MoeForCausalLM
from tests.generate import engine_stand_in
from tests.generate.engine_stand_in import StandIn, serving
from tests.small_models import fill, make_model

SETTINGS = SamplingConfig(8, temperature=1.0, seed=4)
PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7]]


class Tokens:
    """As much of a tokenizer as an engine needs."""

    vocab_size = 96
    stop_token_ids = [2, 3]

    def save_pretrained(self, directory: Path) -> None: ...


@pytest.fixture(scope="module")
def model() -> Ernie4_5_MoeForCausalLM:
    return make_model()


@pytest.fixture
def server() -> Iterator[StandIn]:
    with serving(StandIn()) as state:
        yield state


def engine_of(directory: Path, **settings: Any) -> Engine:
    return build_engine(
        EngineConfig(**settings), Tokens(), temperature=1.0, batch_size=8,  # type: ignore[arg-type]
        directory=directory, largest_gap=0.05, stop_requested=lambda: False,
    )  # fmt: skip


@pytest.fixture
def engine(server: StandIn, tmp_path: Path) -> Engine:
    return engine_of(tmp_path / "engine", kind="vllm", url=server.url)


def recomputed(model: Ernie4_5_MoeForCausalLM, prompt: list[int], ids: list[int]) -> np.ndarray:
    import paddle

    with paddle.no_grad():
        logits = model(paddle.to_tensor([prompt + ids])).logits[0].numpy().astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits[len(prompt) - 1 : -1][np.arange(len(ids)), ids]


def test_completions_are_of_the_weights_that_were_loaded(
    engine: Engine, model: Ernie4_5_MoeForCausalLM, tmp_path: Path
) -> None:
    """Referee: the model's own forward; weights reach the server by way of the disk alone."""
    for version in (1, 2):
        fill(model, version)
        engine.load_weights(model, version)
        found = engine.sample(PROMPTS, SETTINGS, limits=[8, 3, 8])
        for prompt, completion in zip(PROMPTS, found, strict=True):
            expected = recomputed(model, prompt, completion.ids)
            np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)
        assert len(found[1].ids) <= 3
        assert found[0].ids != found[2].ids, "equal prompts have seeds of their own"
        kept = [path.name for path in (tmp_path / "engine").glob("version_*")]
        assert kept == [f"version_{version:06d}"], "one version is kept on the disk"
    engine.close()
    assert not list((tmp_path / "engine").glob("version_*"))


def test_a_version_is_loaded_once_and_seeds_follow_the_sequence_ids(
    engine: Engine, server: StandIn, model: Ernie4_5_MoeForCausalLM
) -> None:
    engine.load_weights(model, 1)
    engine.load_weights(model, 1)
    assert server.counts["/collective_rpc"] == 1
    order = [path for path, _ in server.requests if path in ("/pause", "/collective_rpc",
             "/reset_prefix_cache", "/resume", "/update_weight_version")]  # fmt: skip
    assert order == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume",
                     "/update_weight_version"]  # fmt: skip
    whole = engine.sample(PROMPTS, SETTINGS, sequence_ids=[10, 11, 12])
    alone = engine.sample(PROMPTS[2:], SETTINGS, sequence_ids=[12])
    assert alone == whole[2:]
    assert engine.sample([], SETTINGS) == []


def refuses(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        action()


def test_weights_that_did_not_arrive_are_noticed(
    engine: Engine, server: StandIn, model: Ernie4_5_MoeForCausalLM
) -> None:
    """The server says that it read the new directory, and names the version, but did not."""
    engine.load_weights(model, 1)
    server.faults["/collective_rpc"] = lambda state, body: {"results": [None]}
    engine.load_weights(model, 2)  # the weights are the same: nothing had to change
    fill(model, 7)
    refuses(lambda: engine.load_weights(model, 3), "weights in its memory did not change")
    with pytest.raises(ValueError, match="load_weights comes before sample"):
        engine.sample(PROMPTS, SETTINGS)


def test_weights_that_were_read_wrongly_are_noticed(
    engine: Engine, server: StandIn, model: Ernie4_5_MoeForCausalLM
) -> None:
    """They changed in memory, but log-probabilities are not those of the model."""

    def scrambled(state: StandIn, body: dict[str, Any]) -> Any:
        state.usual("/collective_rpc", body)
        fill(state.policy, 99)
        return {"results": [None]}

    server.faults["/collective_rpc"] = scrambled
    refuses(lambda: engine.load_weights(model, 1), "differ from the model's by .* other weights")


def test_weights_that_someone_else_changed_are_noticed(
    engine: Engine, server: StandIn, model: Ernie4_5_MoeForCausalLM
) -> None:
    engine.load_weights(model, 1)
    server.faults["/weight_checker"] = lambda state, body: {"checksums": {"a": "other"}}
    refuses(lambda: engine.load_weights(model, 2), "weights in its memory changed")


@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_server_that_was_started_again_is_noticed(
    engine: Engine, server: StandIn, model: Ernie4_5_MoeForCausalLM, moment: str
) -> None:
    """It holds the weights that it began with, of which it says "default"."""
    engine.load_weights(model, 1)

    def restarted(state: StandIn, body: dict[str, Any]) -> Any:
        state.version = "default"
        return state.completion(body)

    if moment == "before":
        server.version = "default"
    else:
        server.faults["/v1/completions"] = restarted
    refuses(lambda: engine.sample(PROMPTS, SETTINGS), "holds the weights 'default', not")


def test_two_runs_at_one_server_notice_each_other(
    server: StandIn, model: Ernie4_5_MoeForCausalLM, tmp_path: Path
) -> None:
    """Both call their weights version 1."""
    engines = [engine_of(tmp_path / name, kind="vllm", url=server.url) for name in "ab"]
    for engine in engines:
        engine.load_weights(model, 1)
    refuses(lambda: engines[0].sample(PROMPTS, SETTINGS), "or another run uses it")
    assert engines[1].sample(PROMPTS, SETTINGS)


@pytest.mark.parametrize("path", ["/pause", "/collective_rpc", "/weight_checker", "/weight_info"])
def test_a_server_that_takes_no_weights_in_place_is_refused(
    engine: Engine, server: StandIn, model: Ernie4_5_MoeForCausalLM, path: str
) -> None:
    server.faults[path] = lambda state, body: None  # HTTP 404
    refuses(lambda: engine.load_weights(model, 1), f"has no {path}.*VLLM_SERVER_DEV_MODE=1")


@pytest.mark.parametrize("answer", [{}, {"data": []}, {"data": ["x"]}])
def test_a_server_without_a_model_is_refused(
    engine: Engine, server: StandIn, model: Ernie4_5_MoeForCausalLM, answer: Any
) -> None:
    server.faults["/v1/models"] = lambda state, body: answer
    refuses(lambda: engine.load_weights(model, 1), "serves no model")


# ---- processes -----------------------------------------------------------------------------------


def script(tmp_path: Path, text: str) -> Path:
    """A program that stands in for an interpreter with an engine: it ignores `-m module`."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


def test_fastdeploy_is_started_with_the_weights_under_their_name(
    model: Ernie4_5_MoeForCausalLM, tmp_path: Path
) -> None:
    """A stand-in with FastDeploy's command line and field names, as its source has them."""
    root = Path(engine_stand_in.__file__).parents[2]
    python = script(
        tmp_path,
        f"import sys\nsys.path.insert(0, {str(root)!r})\nsys.argv[1:3] = []\n"
        "import ernie_train\nfrom tests.generate import engine_stand_in\nengine_stand_in.main()\n",
    )
    engine = engine_of(
        tmp_path / "engine", kind="fastdeploy", python=str(python), start_timeout_s=120.0
    )
    try:
        fill(model, 5)
        engine.load_weights(model, 5)
        found = engine.sample(PROMPTS, SETTINGS)
        for prompt, completion in zip(PROMPTS, found, strict=True):
            expected = recomputed(model, prompt, completion.ids)
            np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)
    finally:
        engine.close()


def test_a_server_that_dies_at_once_says_why(
    model: Ernie4_5_MoeForCausalLM, tmp_path: Path
) -> None:
    python = script(tmp_path, "import sys\nprint('no such device')\nsys.exit(3)\n")
    engine = engine_of(tmp_path / "engine", kind="vllm", python=str(python))
    refuses(
        lambda: engine.load_weights(model, 1),
        r"process ended with status 3; the end of .*engine\.log: no such device",
    )
    engine.close()


def test_an_interpreter_that_is_not_there_is_a_mistake(
    model: Ernie4_5_MoeForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ERNIE_TRAIN_VLLM", raising=False)
    with pytest.raises(UserError, match=r"tools/vllm\.sh and name it in ERNIE_TRAIN_VLLM"):
        engine_of(tmp_path / "engine", kind="vllm").load_weights(model, 1)
    missing = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"cannot be started: no program {re.escape(missing)}"):
        engine_of(tmp_path / "engine", kind="vllm", python=missing).load_weights(model, 1)


FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[1] + ".tmp", "w") as stream:
    stream.write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(600)
"""
OWNER = """
import sys, time
from pathlib import Path
from ernie_train.generate.engines.process import ServerProcess
server = ServerProcess([sys.executable, "-c", sys.argv[1], sys.argv[2]], {}, Path(sys.argv[3]))
time.sleep(600)
"""


def wait_for(condition: Callable[[], Any], limit_s: float = 60.0) -> Any:
    end = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found


def family(path: Path) -> list[tuple[int, int]]:
    """Ids and starts of the server and its child."""
    wait_for(path.exists)
    states = [(int(word), process_state(int(word))) for word in path.read_text().split()]
    return [(pid, state.started) for pid, state in states if state is not None]


def test_closing_ends_the_server_and_what_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    server = ServerProcess([sys.executable, "-c", FAMILY, str(pids)], {}, tmp_path / "log")
    members = family(pids)
    assert len(members) == 2
    server.require_alive()
    server.close()
    assert not any(is_running(*member) for member in members)


@pytest.mark.timeout(120)
def test_nothing_outlives_an_owner_that_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    arguments = [sys.executable, "-c", OWNER, FAMILY, str(pids), str(tmp_path / "log")]
    owner = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": os.getcwd()})
    members = family(pids)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    wait_for(lambda: not any(is_running(*member) for member in members))
