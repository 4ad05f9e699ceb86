"""A stage with tools and router replay that is killed again and again continues to the same bits.

The policy learns to call before, so that what runs is the command line: nothing is patched.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_train.data import load_tokenizer, render_chat, shipped_template, train_tokenizer
from ernie_train.environments import EnvironmentConfig, open_toolbox
from tests.kills import Begin, Pace, finish, kill_often, kill_until_through
from tests.rl.test_tools import REWARD
from tests.rl.upo_stages import stage
from tests.workspace import (
    final_files,
    make_workspace,
    metrics_without_time,
    rows,
    start,
    write_rows,
)

pytestmark = pytest.mark.slow

STAGE, KILLS = "02-rl", 20
METRICS = f"{STAGE}/metrics.jsonl"
OWN_TOOL = '''
def count(code: str) -> int:
    """Return the number of characters of a text."""
    return len(code)
'''
ARGUMENTS = {"code": "print(6 * 7)"}  # of all tools, so that a call is right whichever is named


def demonstrations(schemas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Questions, and a call of one of the tools, whatever is asked."""
    made = rows(60, 7)
    for number, row in enumerate(made):
        name = ("python", "count")[number % 2]
        called = {"type": "function", "function": {"name": name, "arguments": ARGUMENTS}}
        told = ("12", "42")[number // 2 % 2]
        row["tools"] = schemas
        row["messages"][1:] = [
            {"role": "assistant", "reasoning_content": name, "tool_calls": [called]},
            {"role": "tool", "name": name, "content": "12"},
            {"role": "assistant", "reasoning_content": "so", "content": told},
        ]
    return made


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A recipe of SFT on calls and RL with them; `taught` is a run whose SFT is done."""
    root = tmp_path_factory.mktemp("kills")
    recipe = yaml.safe_load(make_workspace(root).read_text())
    (root / "own.py").write_text(OWN_TOOL)
    (root / "reward.py").write_text(REWARD)
    tools = ["python", {"python": str(root / "own.py")}]
    config = EnvironmentConfig(tools=tools, max_turns=2, max_tool_tokens=24)
    with open_toolbox(config, load_tokenizer(root / "tokenizer"), root) as box:
        made = demonstrations([tool.schema for tool in box.tools.values()])
    write_rows(root / "calls.jsonl", made)
    write_rows(root / "prompts.jsonl", [{**row, "messages": row["messages"][:1], "tools": None}
                                        for row in made])  # fmt: skip
    template = shipped_template("ernie_thinking")
    texts = [render_chat(template, row["messages"], row["tools"]) for row in made]
    train_tokenizer(texts, 500, root / "tokenizer")
    recipe["model"] |= {"max_position_embeddings": 1024, "vocab_size": 512}
    sft = {
        "name": "sft", "kind": "sft", "data": [{"path": str(root / "calls.jsonl")}],
        "seq_len": 512, "micro_batch_size": 1, "steps": 200,
        "optim": {"lr": 1e-2, "warmup_steps": 4}, "checkpoint": {"every_steps": 200},
    }  # fmt: skip
    rl = stage(
        root, iterations=4, optim={"lr": 1e-4}, policy={"router_replay": True},
        environment=config.model_dump(),
        rollout={"max_prompt_tokens": 600, "max_new_tokens": 160, "prompts_per_iteration": 3,
                 "dump": True},
        checkpoint={"every_steps": 1, "keep_last": 2},
    )  # fmt: skip
    recipe |= {"evaluation": None, "export": None, "stages": [sft, rl]}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    process = run(root, root / "taught", "--until", "sft")
    _, told = process.communicate()
    assert process.returncode == 0, told
    return root


def run(root: Path, directory: Path, *options: str) -> subprocess.Popen[str]:
    return start("run", root / "recipe.yaml", "--run-dir", directory, *options)


def begin(root: Path, directory: Path, *options: str) -> Begin:
    return lambda: run(root, directory, *options)


@pytest.fixture(scope="module")
def whole(workspace) -> tuple[Path, Pace]:
    """The run that nobody killed, and how fast its stage with tools is."""
    directory = shutil.copytree(workspace / "taught", workspace / "whole")
    return directory, finish(begin(workspace, directory), directory / METRICS)


def results(directory: Path) -> list[Any]:
    """All that the stage leaves but times and seconds."""
    found = directory / STAGE
    rollouts = [path.read_bytes() for path in sorted((found / "rollouts").iterdir())]
    samples = (found / "samples.jsonl").read_bytes()
    return [
        metrics_without_time(directory, STAGE),
        final_files(directory, STAGE),
        samples,
        rollouts,
    ]


def test_the_policy_calls_tools_learns_and_no_token_changes_its_experts(whole):
    lines = metrics_without_time(whole[0], STAGE)
    assert [line["experts_changed"] for line in lines] == [0.0] * 4
    for line in lines:
        assert line["episodes/tool_calls"] > 0.5 and line["episodes/tool_errors"] < 0.5
        assert line["grad_norm"] > 0


@pytest.mark.parametrize("replayed", [False, True], ids=["sampled", "replayed"])
def test_twenty_kills_at_random_moments_change_nothing(workspace, whole, tmp_path, replayed):
    """SIGKILL while episodes are played, tools run, weights are updated or saved."""
    directory, pace = whole
    options = []
    if replayed:
        options = [f"stages.rl.rollout.replay={directory / STAGE / 'rollouts'}"]
        directory = shutil.copytree(workspace / "taught", tmp_path / "replayed")
        pace = finish(begin(workspace, directory, *options), directory / METRICS)
        assert results(directory)[2:] == results(whole[0])[2:]
    expected, rng = results(directory), random.Random(5)

    def killed_run(number: int) -> int:
        killed = shutil.copytree(workspace / "taught", tmp_path / f"killed-{number}")
        again = begin(workspace, killed, *options)
        kills = kill_until_through(again, killed / METRICS, pace, rng)
        assert results(killed) == expected
        shutil.rmtree(killed)
        return kills

    kill_often(KILLS, killed_run)
