"""One rank whose disk is full, or shows it less than others see: all end, or go on, together."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from ernie_train.io.run_dir import LOCK
from tests.parallel.ranks import start_on_ranks
from tests.rl.upo_stages import GAE, REWARD, merged, stage, write_prompts
from tests.workspace import make_workspace

RANKS = 2
# What fails, on which rank, in which recipe.
FAULTS: list[tuple[str, int, dict[str, str]]] = [
    ("sft", 0, {"call": "ernie_train.io.metrics_log:MetricsWriter.__init__"}),
    ("sft", 0, {"call": "ernie_train.io.metrics_log:MetricsWriter.log"}),
    ("sft", 0, {"call": "ernie_train.io.metrics_log:MetricsWriter.sync"}),
    ("sft", 0, {"call": "ernie_train.io.metrics_log:MetricsWriter.close"}),
    ("sft", 0, {"call": "ernie_train.weights.checkpoint:CheckpointStore.sweep"}),
    ("sft", 0, {"call": "ernie_train.weights.checkpoint:CheckpointStore._retain"}),
    ("sft", 0, {"file": "README.md"}),
    ("rl", 0, {"call": "ernie_train.rl.loop:cut_after"}),
    ("rl", 0, {"call": "ernie_train.rl.loop:append_samples"}),
    ("rl", 0, {"call": "ernie_train.rl.rollout.sampler:write_rollout"}),
    ("rl", 1, {"call": "ernie_train.rl.loop:build_reward"}),
]
UNSEEN = ["DONE", "evaluation.json", "export.json", "offline_pairs.jsonl"]


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("faults")
    recipe = yaml.safe_load(make_workspace(root).read_text())
    recipe["parallel"] = {"data": RANKS, "sharding": True}
    recipe["evaluation"] |= {"max_examples": 2, "untrained_examples": 1, "max_new_tokens": 4}
    sft = recipe["stages"][0]
    sft |= {"steps": 2, "validation": [], "validate_every_steps": None}
    sft["checkpoint"] = {"every_steps": 1, "keep_last": 1}
    (root / "sft.yaml").write_text(yaml.safe_dump(recipe))
    write_prompts(root)
    (root / "reward.py").write_text(REWARD)
    rl = stage(root, **merged(GAE, {"rollout": {"dump": True}}), iterations=1)
    values = recipe | {"stages": [rl], "evaluation": None, "export": None}
    (root / "rl.yaml").write_text(yaml.safe_dump(values))

    def command(name: str, directory: str, **fault: Any) -> dict[str, Any]:
        path = str(root / f"{name}.yaml")
        return {"arguments": ["run", path, "--run-dir", str(root / directory)], **fault}

    commands = [
        command(name, f"run-{number}", rank=rank, **what)
        for number, (name, rank, what) in enumerate(FAULTS)
    ]
    commands += [command("rl", "rl", rank=1, blind=UNSEEN), command("sft", "sft")]
    commands += [command("sft", "sft", rank=1, blind=UNSEEN)]
    commands += [command("sft", "unshared", rank=1, blind=[LOCK])]
    listed = root / "commands.json"
    listed.write_text(json.dumps(commands))
    printed = start_on_ranks(RANKS, "faults.py", listed, timeout_s=500)
    statuses = [json.loads(listed.with_name(f"commands.json.status-{rank}.json").read_text())
                for rank in range(RANKS)]  # fmt: skip
    return {"statuses": statuses, "printed": " ".join(printed.split())}


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_a_rank_that_cannot_write_ends_all_with_its_message(told, number):
    assert [rank[number] for rank in told["statuses"]] == [1] * RANKS
    name = next(iter(FAULTS[number][2].values())).partition(":")[2]
    message = f"error: no room for {name} " if name else "cannot write: the disk is full"
    assert told["printed"].count(message) == 1
    assert told["printed"].count("error:") == len(FAULTS) + 1, "one message each"


def test_rank_0_alone_decides_what_is_there(told):
    """Offline pairs, a finished stage, evaluation and export that another rank does not see yet."""
    assert [rank[len(FAULTS) : -1] for rank in told["statuses"]] == [[0, 0, 0]] * RANKS
    assert "done before, 2 steps" in told["printed"]


def test_a_run_directory_that_is_another_one_on_a_rank_is_refused_before_anything_is_trained(told):
    """As on machines that share no disk: each rank writes a part of every checkpoint."""
    assert [rank[-1] for rank in told["statuses"]] == [2] * RANKS
    assert "does not see what rank 0 (process" in told["printed"]
    assert "a run directory that all of them share" in told["printed"]
