"""An RL stage whose completions come from a server: a stand-in, and vLLM itself (slow)."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_train.core.errors import StorageError
from ernie_train.data import load_tokenizer
from ernie_train.eval.evaluation import EvalConfig, evaluate
from ernie_train.eval.problems import load_problems
from ernie_train.generate.engines import served
from ernie_train.rl.learner import Learner
from ernie_train.weights import load_pretrained, save_pretrained
from tests.conftest import REPOSITORY
from tests.generate.engine_stand_in import BAD, StandIn, serving
from tests.generate.served import started_as
from tests.parallel.test_runs import apart, run_on
from tests.rl.upo_stages import run, stage


@pytest.fixture
def server() -> Iterator[StandIn]:
    with serving(StandIn()) as state:
        yield state


def recipe_with(
    root: Path, name: str, engine: dict[str, Any], model: Any = None, **changes: Any
) -> Path:
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    recipe["model"] = model or recipe["model"]
    rollout = {"prompts_per_iteration": 3, "max_new_tokens": 6, "engine": engine}
    changes = {"iterations": 3, "rollout": rollout, **changes}
    recipe["stages"] = [stage(root, **changes)]
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_with(root: Path, directory: Path, *given: Any, **changes: Any) -> int:
    path = recipe_with(root, directory.name, *given, **changes)
    return run("run", path, "--run-dir", directory)


def lines(directory: Path) -> list[dict[str, Any]]:
    path = directory / "01-rl" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_stage_learns_from_a_server_as_from_our_own_sampler_and_replays_to_the_bit(
    workspace: Path,
    tmp_path: Path,
    server: StandIn,
) -> None:
    directory, engine = tmp_path / "served", {"kind": "vllm", "url": server.url}
    both = {"prompts_per_iteration": 3, "max_new_tokens": 6}
    dumped = {**both, "engine": engine, "dump": True}
    assert run_with(workspace, directory, engine, rollout=dumped) == 0
    found = lines(directory)
    assert [line["step"] for line in found] == [1, 2, 3]
    assert server.counts["/collective_rpc"] == 3, "each iteration samples with its own weights"
    # Weights went by way of the disk in each iteration; old ones would show here.
    assert all(line["logprob_mismatch"] < 1e-4 for line in found if "logprob_mismatch" in line)
    assert any("logprob_mismatch" in line for line in found)
    assert not list((directory / "01-rl" / "engine").glob("version_*"))
    replayed = {**both, "replay": str(directory / "01-rl" / "rollouts")}
    assert run_with(workspace, tmp_path / "replayed", engine, rollout=replayed) == 0
    weights = [next((d / "01-rl/checkpoints").glob("step_000003/*.safetensors")).read_bytes()
               for d in (directory, tmp_path / "replayed")]  # fmt: skip
    assert weights[0] == weights[1]


def test_a_server_that_dies_loses_nothing(
    workspace: Path,
    tmp_path: Path,
    server: StandIn,
    capsys: Any,
) -> None:
    """It dies in the third iteration; two are saved, though no checkpoint was due."""

    def dies(state: StandIn, body: dict[str, Any]) -> Any:
        return BAD if state.counts["/collective_rpc"] == 3 else state.completion(body)

    server.faults["/v1/completions"] = dies
    directory, engine = tmp_path / "dies", {"kind": "vllm", "url": server.url}
    assert run_with(workspace, directory, engine) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "cannot be reached" in said and "Nothing of this iteration was learnt" in said
    assert "step_000002 is saved" in said and "The same command goes on from there" in said
    assert said.count("error") <= 1 and "Traceback" not in said
    del server.faults["/v1/completions"]
    assert run_with(workspace, directory, engine) == 0
    assert [line["step"] for line in lines(directory)] == [1, 2, 3]


def test_two_ranks_learn_from_one_server(workspace: Path, tmp_path: Path, server: StandIn) -> None:
    """As one rank does; where the server dies, both end, with one message."""

    def dies(state: StandIn, body: dict[str, Any]) -> Any:
        return BAD if state.counts["/collective_rpc"] == 4 else state.completion(body)

    server.faults["/v1/completions"] = dies
    two, dead, one = (tmp_path / name for name in ("two", "dead", "one"))
    path = recipe_with(workspace, "two", {"kind": "vllm", "url": server.url}, iterations=2)
    commands = [["run", str(path), "parallel.data=2", "--run-dir", str(d)] for d in (two, dead)]
    statuses, printed = run_on(2, tmp_path, commands)
    assert statuses == [[0, 1], [0, 1]]
    assert printed.count("cannot be reached") == 1 and "Traceback" not in printed
    assert "step_000001 is saved" in " ".join(printed.split())
    assert server.counts["/collective_rpc"] == 4, "the main rank alone talks to it"
    assert run("run", path, "--run-dir", one) == 0
    for ours, theirs in zip(lines(one), lines(two), strict=True):
        assert theirs["reward"] == pytest.approx(ours["reward"], rel=1e-6)
        assert theirs["logprob_mismatch"] < 1e-4
    ends = [directory / "01-rl/checkpoints/step_000002" for directory in (one, two)]
    assert apart(*ends) < 1e-4


def test_a_disk_that_fills_with_weights_for_a_server_loses_nothing(
    workspace: Path, tmp_path: Path, server: StandIn, capsys: Any, monkeypatch: Any
) -> None:
    write = served.save_pretrained

    def full(model: Any, directory: Path, *arguments: Any, **options: Any) -> None:
        if directory.name == "version_000003":
            raise StorageError(f"cannot write {directory}: the disk is full")
        write(model, directory, *arguments, **options)

    monkeypatch.setattr(served, "save_pretrained", full)
    directory, engine = tmp_path / "full", {"kind": "vllm", "url": server.url}
    assert run_with(workspace, directory, engine) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "version_000003: the disk is full" in said and "step_000002 is saved" in said


LENGTHS = """
def score(row, completion):
    return len(completion) % 7 / 10  # differs between completions of random weights
"""


def by_length(root: Path) -> dict[str, str]:
    """A reward by which every iteration has something to learn."""
    (root / "lengths.py").write_text(LENGTHS)
    return {"python": str(root / "lengths.py") + ":score"}


@pytest.mark.parametrize(
    ("sizes", "lora"), [({"moe_num_experts": 0}, {"rank": 2}), ({}, {"rank": 2, "dora": True})]
)
def test_a_server_gets_the_pairs_of_lora_merged(
    workspace: Path, tmp_path: Path, server: StandIn, sizes: dict[str, Any], lora: dict[str, Any]
) -> None:
    """Bit for bit what the checkpoint of those weights is exported as."""

    def keeps(state: StandIn, body: dict[str, Any]) -> Any:
        number = state.counts["/collective_rpc"]
        shutil.copytree(body["kwargs"]["weights_path"], tmp_path / f"sent_{number}")
        return state.usual("/collective_rpc", body)

    server.faults["/collective_rpc"] = keeps
    directory, engine = tmp_path / "lora", {"kind": "vllm", "url": server.url}
    changes = {
        "lora": lora, "checkpoint": {"every_steps": 1, "keep_last": 9},
        "reward": by_length(workspace),
    }  # fmt: skip
    model = yaml.safe_load((workspace / "recipe.yaml").read_text())["model"] | sizes
    assert run_with(workspace, directory, engine, model, **changes) == 0
    found = lines(directory)
    assert any("logprob_mismatch" in line for line in found)
    assert all(line.get("logprob_mismatch", 0) < 1e-4 for line in found)
    sent = {}
    for number in (2, 3):
        checkpoint = directory / f"01-rl/checkpoints/step_{number - 1:06d}"
        assert (checkpoint / "adapter_model.safetensors").exists()
        save_pretrained(load_pretrained(checkpoint), tmp_path / f"merged_{number}")
        sides = (tmp_path / f"{side}_{number}" / "model.safetensors" for side in ("sent", "merged"))
        sent[number], merged = (side.read_bytes() for side in sides)
        assert sent[number] == merged
    assert sent[2] != sent[3]


def test_a_server_sleeps_while_the_policy_learns(
    workspace: Path, tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics are those of a server that stays awake; held-out problems are solved by it too."""
    learner, told = Learner.prepare, []

    def noted(self: Learner, *arguments: Any) -> Any:
        told.append(set(server.asleep))
        return learner(self, *arguments)

    monkeypatch.setattr(Learner, "prepare", noted)
    events = started_as(server, monkeypatch)
    changes = {
        "iterations": 3, "reward": by_length(workspace),
        "evaluation": {"path": str(workspace / "test.jsonl"), "every_iterations": 2},
    }  # fmt: skip
    found = {}
    for name, sleep in {"awake": False, "sleeping": True}.items():
        engine = {"kind": "vllm", "python": sys.executable, "sleep": sleep}
        server.calls.clear()
        assert run_with(workspace, tmp_path / name, engine, **changes) == 0
        found[name] = [
            {key: value for key, value in line.items() if key != "time"}
            for line in lines(tmp_path / name)
        ]
    assert told == [set()] * 3 + [{"weights", "kv_cache"}] * 3
    assert found["sleeping"] == found["awake"]
    assert [line["step"] for line in found["awake"] if "eval/mean" in line] == [2, 3]
    turns = [call for call in server.calls if call.startswith(("/sleep", "/collective_rpc"))]
    # A rollout has the weights that the evaluation before it had; the start needs no reload.
    assert turns == ["/sleep?level=2&mode=abort", "/collective_rpc"] * 3
    assert events == ["start", "end"] * 2


def test_held_out_problems_are_solved_by_the_server_as_by_our_own_sampler(
    workspace: Path, tmp_path: Path, server: StandIn
) -> None:
    """Greedy completions of the weights after the update."""
    changes = {
        "iterations": 1, "reward": by_length(workspace),
        "evaluation": {"path": str(workspace / "test.jsonl"), "every_iterations": 1},
    }  # fmt: skip
    directory = tmp_path / "served"
    assert run_with(workspace, directory, {"kind": "vllm", "url": server.url}, **changes) == 0
    problems = load_problems(workspace / "test.jsonl")
    assert server.counts["/v1/completions"] == 3 * 4 + len(problems) + 2 * 16  # and two probes
    model = load_pretrained(directory / "01-rl/checkpoints/step_000001")
    tokenizer = load_tokenizer(workspace / "tokenizer")
    own = evaluate(model, tokenizer, problems, EvalConfig(max_new_tokens=6))
    asked = [body for path, body in server.requests if path == "/v1/completions"]
    greedy = [body for body in asked if body["temperature"] == 0 and body["max_tokens"] == 6]
    assert len(greedy) == len(problems)
    assert lines(directory)[0]["eval/mean"] == own.mean_accuracy


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "keys of others": ({"engine": {"url": "http://x:1"}}, "url: no effect with kind: own"),
    "url and python": (
        {"engine": {"kind": "vllm", "url": "http://x:1", "python": "p"}}, "no effect beside a url"
    ),
    "fastdeploy at a url": (
        {"engine": {"kind": "fastdeploy", "url": "http://x:1"}}, "cannot be given new weights"
    ),
    "fastdeploy from nowhere": ({"engine": {"kind": "fastdeploy"}}, "needs python"),
    "no url": ({"engine": {"kind": "vllm", "url": "localhost:8000"}}, "url"),
    "a query": ({"engine": {"kind": "vllm", "url": "http://x:1?key=a"}}, "without a query"),
    "a fragment": ({"engine": {"kind": "vllm", "url": "http://x#f"}}, "without a query"),
    "no port": ({"engine": {"kind": "vllm", "url": "http://x:80a"}}, "port"),
    "a port beyond the last": ({"engine": {"kind": "vllm", "url": "http://x:65536"}}, "port"),
    "no host": ({"engine": {"kind": "vllm", "url": "http://:80"}}, "host"),
    "half an address": ({"engine": {"kind": "vllm", "url": "http://[::1"}}, "url"),
    "an empty part of a host": ({"engine": {"kind": "vllm", "url": "http://a..b"}}, "host"),
    "a host of no name": ({"engine": {"kind": "vllm", "url": "http://xn--"}}, "host"),
    "with /v1": ({"engine": {"kind": "vllm", "url": "http://x:1/v1"}}, "url"),
    "truncation at a temperature": (
        {"engine": {"kind": "vllm"}, "temperature": 0.7, "top_p": 0.9}, "before top_p and top_k"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_contradict_are_refused(case: str) -> None:
    from ernie_train.rl.config import RolloutConfig

    given, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        RolloutConfig(max_new_tokens=4, **given)


# ---- vLLM ----------------------------------------------------------------------------------------


def vllm_python() -> str:
    home = Path(os.environ.get("ERNIE_TRAIN_VLLM") or REPOSITORY / ".venv-vllm")
    python = home / "bin" / "python"
    if not python.exists():
        pytest.fail(f"no {python}: make it with tools/vllm.sh", pytrace=False)
    return str(python)


@pytest.mark.slow
@pytest.mark.parametrize("trains", [{}, {"lora": {"rank": 4}}])
def test_a_stage_learns_from_vllm(
    workspace: Path, tmp_path: Path, monkeypatch: Any, trains: dict[str, Any]
) -> None:
    """Log-probabilities of its float32 are ours up to rounding, in each iteration's weights."""
    # Its first request compiles a sampler for minutes otherwise.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    arguments = ["--enforce-eager", "--max-model-len", "256"]
    engine = {"kind": "vllm", "python": vllm_python(), "args": arguments}
    directory = tmp_path / "vllm"
    rollout = {"prompts_per_iteration": 8, "max_new_tokens": 24, "engine": engine, "dump": True}
    model = {"preset": "tiny", "vocab_size": 384}  # vLLM's attention needs heads of 32 and more
    changes = {
        "iterations": 2, "rollout": rollout, "reward": by_length(workspace),
        "evaluation": {"path": str(workspace / "test.jsonl"), "every_iterations": 2}, **trains,
    }  # fmt: skip
    assert run_with(workspace, directory, engine, model, **changes) == 0
    for line in lines(directory):
        path = directory / "01-rl" / "rollouts" / f"{line['step']:06d}.jsonl"
        rows = [json.loads(text) for text in path.read_text().splitlines()]
        tokens = sum(len(row["completion_ids"]) for row in rows)
        seconds = line["time"]["rollout_seconds"]
        print(
            f"gap {line['logprob_mismatch']:.1e}; {tokens} tokens in {seconds:.1f} s, new weights"
        )
        assert line["logprob_mismatch"] < 1e-3
