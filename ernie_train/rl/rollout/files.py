"""Files of rollouts: one JSON line a completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ernie_train.core.errors import CheckpointError, storage_errors
from ernie_train.core.foreign_files import open_regular, parse_json
from ernie_train.io.files import write_jsonl
from ernie_train.rewards.score import Score
from ernie_train.rl.rollout.records import PromptGroup, ScoredCompletion
from ernie_train.rl.routing import packed_experts, unpacked_experts


def write_rollout(path: Path, groups: Sequence[PromptGroup]) -> None:
    """Write groups as JSON lines, one a completion; logprobs keep their bits."""
    rows = []
    for number, group in enumerate(groups):
        for c in group:
            row = {
                "group": number, "prompt": c.prompt, "prompt_ids": c.prompt_ids,
                "completion_ids": c.completion_ids, "sampled_mask": c.sampled_mask,
                "turns": c.turns,
                "domain": c.domain, "task": c.task,
                "text": c.text, "finished": c.finished, "raw_reward": c.raw_reward,
                "reward_parts": c.reward_parts,
                "score": [c.score.value, c.score.status, c.score.detail],
                "logprobs": None if c.sampled_logprobs is None
                else [float(x) for x in c.sampled_logprobs],
            }  # fmt: skip
            if (routing := c.routing) is not None and routing.min() >= 0:
                row |= packed_experts(routing)
            rows.append(row)
    with storage_errors("cannot write the rollout", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, rows)


def read_rollout(path: Path) -> list[PromptGroup]:
    """Read the groups of a file of `write_rollout`; `CheckpointError` for anything else."""
    groups: dict[int, list[ScoredCompletion]] = {}
    try:
        with open_regular(path) as stream:
            for line in stream:
                row = parse_json(line)
                groups.setdefault(row["group"], []).append(_read_completion(row))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a rollout that can be replayed: {error}") from None
    return [groups[number] for number in sorted(groups)]


def _read_completion(row: dict[str, Any]) -> ScoredCompletion:
    logprobs = row["logprobs"]
    names = (
        "prompt_ids", "completion_ids", "sampled_mask", "turns", "prompt", "domain", "task", "text",
        "finished", "raw_reward", "reward_parts",
    )  # fmt: skip
    read = ScoredCompletion(
        **{name: row[name] for name in names},
        score=Score(*row["score"]),
        sampled_logprobs=None if logprobs is None else np.array(logprobs, np.float32),
    )
    if "experts" in row:
        sizes = len(read.prompt_ids) - 1, len(read.completion_ids)
        prompt, completion = unpacked_experts(row, *sizes)
        read = replace(read, prompt_expert_ids=prompt, expert_ids=completion)
    if logprobs is not None and len(logprobs) != read.num_sampled:
        raise ValueError(f"{len(logprobs)} logprobs for {read.num_sampled} sampled tokens")
    return read


def read_replay(path: Path) -> list[PromptGroup]:
    """Read groups to train on; `CheckpointError` where nothing tells which policy sampled them."""
    groups = read_rollout(path)
    if any(c.sampled_logprobs is None for group in groups for c in group):
        raise CheckpointError(
            f"{path}: a completion has no logprobs, so that a replay cannot tell whether this "
            "policy sampled it or another one; dump rollouts of a sampler that gives them"
        )
    return groups
