"""Servers that give their memory to the learner between sampling and the next weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie_train.core import devices
from ernie_train.core.errors import UserError
from ernie_train.generate.engines import EngineConfig
from ernie_train.generate.engines.protocol import Engine
from ernie_train.model import Ernie4_5_MoeForCausalLM
from tests.generate.engine_stand_in import StandIn
from tests.generate.served import (
    PROMPTS,
    SETTINGS,
    engine_of,
    recomputed,
    refuses,
    started_as,
)
from tests.small_models import fill


def started(tmp_path: Path, **settings: Any) -> Engine:
    given = {"kind": "vllm", "python": "python", **settings}
    return engine_of(tmp_path / "engine", **given)


def sample_of(engine: Engine, model: Ernie4_5_MoeForCausalLM) -> None:
    """Referee: the model's own forward."""
    for prompt, completion in zip(PROMPTS, engine.sample(PROMPTS, SETTINGS), strict=True):
        expected = recomputed(model, prompt, completion.ids)
        np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)


MEMORY = ("/sleep", "/wake_up", "/pause", "/resume", "/collective_rpc", "/reset_prefix_cache",
          "/update_weight_version")  # fmt: skip


def calls_about_memory(server: StandIn) -> list[str]:
    found = [call for call in server.calls if call.partition("?")[0] in MEMORY]
    server.calls.clear()
    return found


def test_it_sleeps_until_the_next_weights(
    server: StandIn, model: Ernie4_5_MoeForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights get their memory first, and are read before the cache gets its own."""
    events = started_as(server, monkeypatch)
    engine = started(tmp_path, sleep=True)
    engine.sleep()
    assert not server.requests, "there is no server yet"
    fill(model, 1)
    engine.load_weights(model, 1)
    sample_of(engine, model)
    calls_about_memory(server)
    for version in (2, 3):
        engine.sleep()
        engine.sleep()
        assert server.asleep == {"weights", "kv_cache"}
        with pytest.raises(ValueError, match="load_weights comes before sample"):
            engine.sample(PROMPTS, SETTINGS)
        fill(model, version)
        engine.load_weights(model, version)
        assert calls_about_memory(server) == [
            "/sleep?level=2&mode=abort", "/wake_up?tags=weights", "/update_weight_version",
            "/collective_rpc", "/wake_up?tags=kv_cache",
        ]  # fmt: skip
        sample_of(engine, model)
    assert events == ["start"], "the process stays"
    engine.close()


def test_the_version_it_slept_on_is_read_again(
    server: StandIn, model: Ernie4_5_MoeForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Level 2 keeps no weights, so that even the same ones must come anew."""
    started_as(server, monkeypatch)
    engine = started(tmp_path, sleep=True)
    engine.load_weights(model, 1)
    engine.sleep()
    engine.load_weights(model, 1)
    sample_of(engine, model)


def test_without_the_setting_it_stays_awake(
    server: StandIn, model: Ernie4_5_MoeForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started_as(server, monkeypatch)
    engine = started(tmp_path)
    engine.load_weights(model, 1)
    engine.sleep()
    sample_of(engine, model)
    assert not server.counts["/sleep"] and not server.can_sleep


def test_one_that_takes_no_weights_in_place_ends_instead(
    server: StandIn, model: Ernie4_5_MoeForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started anew for each version anyway."""
    events = started_as(server, monkeypatch)

    def scrambled(state: StandIn, body: dict[str, Any]) -> Any:
        state.usual("/collective_rpc", body)
        fill(state.policy, 99)
        return {"results": [None]}

    server.faults["/collective_rpc"] = scrambled
    engine = started(tmp_path, sleep=True)
    for version in (1, 2, 3):
        fill(model, version)
        engine.load_weights(model, version)
        sample_of(engine, model)
        engine.sleep()
    assert server.counts["/sleep"] == 1, "after the first, whose successor failed"
    assert events == ["start", "end", "start", "end", "start", "end"]


def test_one_that_does_not_sleep_ends_the_stage(
    server: StandIn, model: Ernie4_5_MoeForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started_as(server, monkeypatch)
    engine = started(tmp_path, sleep=True)
    engine.load_weights(model, 1)
    server.can_sleep = False
    refuses(engine.sleep, "answered /sleep.* with HTTP status 500: .*sleep mode is off")


def test_a_vllm_that_cannot_sleep_is_a_mistake_with_one_message(
    model: Ernie4_5_MoeForCausalLM, tmp_path: Path
) -> None:
    """As vLLM 0.32 for CPUs ends when it is told --enable-sleep-mode."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        "echo '  Value error, Sleep mode is not supported on current platform. [type=value]'\n"
        "echo '    For further information visit https://errors.pydantic.dev'\nexit 1\n"
    )
    python.chmod(0o755)
    engine = engine_of(tmp_path / "engine", kind="vllm", python=str(python), sleep=True)
    with pytest.raises(UserError, match=r"rollout\.engine\.sleep: this vLLM cannot sleep"):
        engine.load_weights(model, 1)
    engine.close()


def test_a_learner_gives_up_its_spare_memory_first(
    server: StandIn, model: Ernie4_5_MoeForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the server starts, and before it wakes."""
    started_as(server, monkeypatch)
    seen: list[int] = []
    monkeypatch.setattr(devices, "release_cached_memory", lambda: seen.append(len(server.requests)))
    engine = started(tmp_path, sleep=True)
    engine.load_weights(model, 1)
    assert seen == [0]
    engine.sleep()
    before = len(server.requests)
    engine.load_weights(model, 2)
    assert seen == [0, before]


@pytest.mark.parametrize("settings", [{"kind": "vllm", "url": "http://x:1"}, {"kind": "own"}])
def test_sleep_is_refused_where_nothing_is_started(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sleep: no effect"):
        EngineConfig(**settings, sleep=True)
