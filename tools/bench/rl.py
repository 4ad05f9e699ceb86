"""Seconds of a whole GRPO iteration of ours beside that of TRL's GRPOTrainer.

    python -m tools.bench.rl --model-135m DIRECTORY [--threads 1] [--model tiny]

An iteration samples a group of completions for each prompt, scores them by one Python function
(`trl/reward.py`), computes their old logprobs and makes two optimizer steps: with one, TRL spares
itself the old logprobs. Both sides have the same exported model, prompts and settings: no
reference, clipping at 0.2, advantages divided by the group's deviation, loss per token. Prompts ask
for long stories, so that completions are cut at the same length; both stop at the model's end of a
turn, and their numbers of tokens must agree. TRL's batch, cache and memory settings are its fastest
of those tried. `trl/runs.py` says how runs are measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, ClassVar

from tools.bench.trl import runs
from tools.bench.trl.runs import OPTIM, WARM_UP, Comparison, Line, Run

HEROES = (
    "a baker", "an old robot", "two sisters", "a lighthouse", "a clever fox", "the last train",
    "a village in the hills", "a lost letter",
)  # fmt: skip
UPDATES = 2
TOKENS_TOLERANCE = 0.03  # completions end by chance
REWARD_ERRORS = 4.0  # standard errors by which the mean rewards of the sides may differ


class RlComparison(Comparison):
    kind = "rl"
    defaults: ClassVar = {
        "tiny": {
            "rounds": 3, "steps": 3, "trial_steps": 3,
            "prompts": 4, "group": 8, "new_tokens": 64, "micro_batch": 8,
        },
        "135m": {
            "rounds": 2, "steps": 2, "trial_steps": 1,
            "prompts": 4, "group": 8, "new_tokens": 32, "micro_batch": 8,
        },
    }  # fmt: skip

    def title(self) -> str:
        o = self.options
        return (
            f"GRPO iteration, model {self.model}, {o.prompts} prompts x {o.group} completions of "
            f"{o.new_tokens} tokens, {UPDATES} optimizer steps, our prompts "
            + ("computed for each completion" if o.separate_prompts else "shared in a group")
        )

    def write_rows(self) -> None:
        from ernie_train.data import load_tokenizer, prompt_ids

        asked = [
            f"Write a very long story about {HEROES[i % len(HEROES)]}, part {i + 1}."
            for i in range(self.options.prompts)
        ]
        rows = [{"messages": [{"role": "user", "content": text}]} for text in asked]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.directory / "peer.jsonl").write_text(text)
        (self.directory / "ours.jsonl").write_text(text)
        tokenizer = load_tokenizer(self.model_directory)
        self.prompt_tokens = self.options.group * sum(
            len(prompt_ids(tokenizer, row["messages"])) for row in rows
        )

    def stage(self) -> dict[str, Any]:
        o = self.options
        return {
            "name": self.kind, "kind": "upo", "data": [{"path": f"{self.directory}/ours.jsonl"}],
            "reward": [{"python": "tools/bench/trl/reward.py:score"}],
            "iterations": WARM_UP + o.steps, "micro_batch_size": o.micro_batch,
            "rollout": {
                "prompts_per_iteration": o.prompts, "group_size": o.group,
                "max_new_tokens": o.new_tokens, "temperature": o.temperature,
            },
            "policy": {"minibatches": UPDATES, "clip_ratio": 0.2},
            "share_prompts": not o.separate_prompts, "samples_per_iteration": 0, "canaries": 0,
            "optim": {**OPTIM, "schedule": "constant", "warmup_steps": 0},
        }  # fmt: skip

    def peer_request(self) -> dict[str, Any]:
        o = self.options
        return {
            "group_size": o.group, "new_tokens": o.new_tokens,
            "temperature": o.temperature, "updates": UPDATES,
        }  # fmt: skip

    def peer_settings(self) -> Iterator[dict[str, Any]]:
        half = self.options.prompts * self.options.group // UPDATES
        best = {"batch": half, "cache": None, "keep_freed_memory": True}
        yield best
        if not self.options.quick:
            yield {**best, "keep_freed_memory": False}
            yield {**best, "cache": "static"}
            yield {**best, "batch": max(1, half // 2)}
            yield {**best, "batch": max(1, half // 4)}

    def check(self, ours: Run, peer: Run) -> str:
        told = peer.lines[0]["prompt_tokens"]
        if told != self.prompt_tokens:
            raise RuntimeError(f"prompts have {self.prompt_tokens} tokens (ours), {told} (TRL)")
        count = self.options.prompts * self.options.group
        tokens = [
            ours.mean(lambda line: line["completions/mean_length"] * count),
            peer.mean(lambda line: line["completion_tokens"]),
        ]
        check_near("tokens", tokens[0], tokens[1], TOKENS_TOLERANCE)
        rewards = [side.mean(lambda line: line["reward"]) for side in (ours, peer)]
        error = math.hypot(*(mean_reward_error(side, count) for side in (ours, peer)))
        if not abs(rewards[0] - rewards[1]) <= REWARD_ERRORS * error:
            raise RuntimeError(
                f"the sides do different work: rewards {rewards[0]:g} (ours), {rewards[1]:g} "
                f"(TRL), standard error of the difference {error:g}"
            )
        return (
            f"same work: {told} prompt tokens; an iteration samples {tokens[0]:.0f} tokens (ours), "
            f"{tokens[1]:.0f} (TRL); mean reward {rewards[0]:.3f}, {rewards[1]:.3f}, standard "
            f"error of their difference {error:.3f}"
        )

    def phases(self, line: Line, side: str) -> dict[str, float]:
        if side == "TRL":
            told = {
                name: line["phases"].get(name, 0.0) for name in ("sampling", "scoring", "logprobs")
            }
        else:
            time = line["time"]
            told = {
                "sampling": time["rollout_seconds"], "scoring": time["scoring_seconds"],
                "logprobs": time["training_seconds"] - time["update_seconds"],
            }  # fmt: skip
        return {**told, "update and rest": line["seconds"] - math.fsum(told.values())}


def mean_reward_error(run: Run, completions: int) -> float:
    """Return the standard error of a run's mean reward, from the deviations within groups."""
    variance = run.mean(lambda line: line["reward_std"] ** 2)
    return math.sqrt(variance / (completions * len(run.lines)))


def check_near(name: str, ours: float, peer: float, tolerance: float) -> None:
    """Raise `RuntimeError` where the sides differ by more than a share of TRL's value."""
    if not abs(ours - peer) <= tolerance * abs(peer):
        raise RuntimeError(f"the sides do different work: {name} {ours:g} (ours), {peer:g} (TRL)")


def main() -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--group", type=int)
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--micro-batch", type=int, help="sequences in one of ours")
    parser.add_argument(
        "--separate-prompts", action="store_true", help="compute the prompt for each completion"
    )
    runs.compare(parser, RlComparison)


if __name__ == "__main__":
    main()
