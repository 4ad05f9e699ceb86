"""Servers that are given versions of the weights, and what they may not get away with."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie_train.core.errors import Interrupted
from ernie_train.generate.engine import Completion
from ernie_train.generate.engines import EngineConfig
from ernie_train.generate.engines.answer import Request
from ernie_train.generate.engines.endpoint import Endpoint
from ernie_train.generate.engines.protocol import Engine
from ernie_train.generate.engines.servers import FastDeployServer, Weights
from ernie_train.model import Ernie4_5_MoeForCausalLM
from tests.generate.engine_stand_in import StandIn
from tests.generate.served import PROMPTS, SETTINGS, Tokens, engine_of, recomputed, refuses
from tests.small_models import fill


@pytest.fixture
def engine(server: StandIn, tmp_path: Path) -> Engine:
    return engine_of(tmp_path / "engine", kind="vllm", url=server.url)


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
    # No weights may answer under the name of those before.
    assert order == ["/pause", "/update_weight_version", "/collective_rpc", "/reset_prefix_cache",
                     "/resume"]  # fmt: skip
    whole = engine.sample(PROMPTS, SETTINGS, sequence_ids=[10, 11, 12])
    alone = engine.sample(PROMPTS[2:], SETTINGS, sequence_ids=[12])
    assert alone == whole[2:]
    assert engine.sample([], SETTINGS) == []


def test_equal_prompts_share_the_experts_that_the_server_chose(
    engine: Engine, model: Ernie4_5_MoeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group's prompt would travel, and be kept, once a completion."""
    engine.load_weights(model, 1)

    def complete(requests: list[Request], **others: Any) -> list[Completion]:
        tables = [np.zeros((len(r.prompt) - 1, 2, 2), np.uint8) for r in requests]
        return [Completion([2], [-1.0], True, table[:1], table) for table in tables]

    monkeypatch.setattr(engine.server.endpoint, "complete", complete)  # type: ignore[attr-defined]
    found = [completion.prompt_expert_ids for completion in engine.sample(PROMPTS, SETTINGS)]
    assert found[0] is found[2] and found[0] is not found[1]


@pytest.mark.parametrize(
    ("limits", "message"), [([9, 8, 8], "limits must lie"), ([8, 0, 8], "limits must lie")]
)
def test_calls_that_our_own_sampler_refuses_are_refused(
    engine: Engine, model: Ernie4_5_MoeForCausalLM, limits: list[int], message: str
) -> None:
    engine.load_weights(model, 1)
    with pytest.raises(ValueError, match=message):
        engine.sample(PROMPTS, SETTINGS, limits=limits)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.sample([[5], []], SETTINGS)


def sent_weights(server: StandIn) -> Path:
    """The directory that the server was told of last."""
    bodies = [body for path, body in server.requests if path == "/collective_rpc"]
    return Path(bodies[-1]["kwargs"]["weights_path"])


def test_runs_that_share_a_directory_leave_one_another_alone(
    server: StandIn, model: Ernie4_5_MoeForCausalLM, tmp_path: Path
) -> None:
    """Only what a run wrote itself is deleted, also what it left behind when it was killed."""
    from ernie_train.weights.saving import save_pretrained

    shared = tmp_path / "shared"
    settings = {"kind": "vllm", "url": server.url, "directory": str(shared)}
    users = shared / "version_000007"
    save_pretrained(model, users, Tokens())
    sent = []
    for run in "ab":
        engine = engine_of(tmp_path / run, **settings)
        engine.load_weights(model, 1)
        sent.append(sent_weights(server))
    assert sent[0] != sent[1] and all(path.is_dir() for path in (*sent, users))
    engine.close()
    assert sent[0].is_dir() and users.is_dir() and not sent[1].parent.exists()
    again = engine_of(tmp_path / "a", **settings)
    again.load_weights(model, 2)
    assert not sent[0].exists() and sent_weights(server).parent == sent[0].parent
    again.close()
    assert [path.name for path in shared.iterdir()] == [users.name]


@pytest.mark.parametrize("directory", [None, "here/weights", "~/weights"])
def test_a_server_is_sent_absolute_paths(
    server: StandIn,
    model: Ernie4_5_MoeForCausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    directory: str | None,
) -> None:
    """Relative ones start where those of the recipe do, which is not where the server runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    engine = engine_of(Path("run"), kind="vllm", url=server.url, directory=directory)
    engine.load_weights(model, 1)
    found = sent_weights(server)
    above = {None: "run", "here/weights": "here/weights", "~/weights": "home/weights"}[directory]
    assert found.is_absolute() and tmp_path / above in found.parents and found.is_dir()


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


def test_a_url_whose_weights_cannot_be_compared_is_refused(
    engine: Engine, server: StandIn, model: Ernie4_5_MoeForCausalLM
) -> None:
    """As of vLLM for CPUs, which packs matrices away: what is left may be of old weights."""
    packed = {"norm": "1", "experts": hashlib.sha256(b"").hexdigest()}
    server.faults["/weight_checker"] = lambda state, body: {"checksums": packed}
    refuses(lambda: engine.load_weights(model, 1), "packs some of its weights away")


@pytest.mark.parametrize("path", ["/collective_rpc", "/v1/completions", "/health"])
def test_a_stop_is_heard_while_weights_load(
    server: StandIn, model: Ernie4_5_MoeForCausalLM, tmp_path: Path, path: str
) -> None:
    asked: list[float] = []

    def slow(state: StandIn, body: dict[str, Any]) -> None:
        asked.append(time.monotonic())
        time.sleep(3.0)

    server.faults[path] = slow
    engine = engine_of(tmp_path / "run", lambda: bool(asked), kind="vllm", url=server.url)
    with pytest.raises(Interrupted):
        engine.load_weights(model, 1)
    assert time.monotonic() - asked[0] < 1.0


def test_a_stop_is_heard_before_weights_are_computed(
    server: StandIn, model: Ernie4_5_MoeForCausalLM, tmp_path: Path
) -> None:
    engine = engine_of(tmp_path / "run", lambda: True, kind="vllm", url=server.url)
    with pytest.raises(Interrupted):
        engine.load_weights(model, 1)
    assert not server.requests


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


NO_MODEL: list[Any] = [{}, {"data": []}, {"data": ["x"]}, {"data": 5}, {"data": [{"id": 5}]}]


@pytest.mark.parametrize("answer", NO_MODEL)
def test_fastdeploy_without_its_model_is_refused(
    server: StandIn, tmp_path: Path, answer: Any
) -> None:
    server.faults["/v1/models"] = lambda state, body: answer
    fastdeploy = FastDeployServer(
        EngineConfig(kind="fastdeploy", python="p"), tmp_path, lambda: False
    )
    fastdeploy.endpoint = Endpoint(server.url, 1)
    weights = Weights("run-1", tmp_path, "", "float32")
    refuses(lambda: fastdeploy.require_version(weights), r"serves \[\], not 'run-1'")


@pytest.mark.parametrize("answer", NO_MODEL)
def test_a_server_without_a_model_is_refused(
    engine: Engine, server: StandIn, model: Ernie4_5_MoeForCausalLM, answer: Any
) -> None:
    server.faults["/v1/models"] = lambda state, body: answer
    refuses(lambda: engine.load_weights(model, 1), "serves no model")
