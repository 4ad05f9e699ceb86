"""An RL stage on a toy: a real model of which the head alone trains, and rollouts from files.

Everything from the file of a rollout to the line of metrics is the stage's own code; the referee
gets the features that the frozen decoder has for each sequence alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from ernie_train.data.formats import Record
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rewards.score import Score
from ernie_train.rl import learner, loop
from ernie_train.rl.batch import TokenizedCompletion
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.critic import Critic
from ernie_train.rl.data import PreparedPrompts, Prompt
from ernie_train.rl.preference_data import TokenizedPair
from ernie_train.rl.rollout import ScoredCompletion, write_rollout
from ernie_train.train.optimizer import Optimizer
from ernie_train.train.stage import StageData, StageRun
from tests.rl.iteration_referee import Referee, Text
from tests.small_models import fill, make_config

SEED, VOCABULARY, GROUP = 5, 20, 4
R, W, T = Score.correct(), Score.wrong("no"), Score.timeout("slow")
# The marks of each group; format (0.3 beside the verdict) fails where the place is in `MALFORMED`.
MARKS = [[R, W, R, W], [R, R, R, R], [W, W, W, W], [R, T, W, W], [Score.marked(0.25), R, W, W]]
MALFORMED, CUT = {(0, 1), (1, 2), (2, 0), (4, 3)}, {(0, 3), (2, 2), (3, 2)}
LONGEST = 8


def toy_policy() -> Ernie4_5_MoeForCausalLM:
    """A dense model of one layer whose decoder does not train."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12}
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    model = Ernie4_5_MoeForCausalLM(
        make_config(**sizes, **shape, num_hidden_layers=1, moe_num_experts=0, rope_theta=10.0,
                    tie_word_embeddings=False)
    )  # fmt: skip
    fill(model)
    model.model.rope_theta = 50.0  # as a stage with another base than the configuration's has it
    freeze(model.model)
    return model


def freeze(layer: Any) -> None:
    for parameter in layer.parameters():
        parameter.stop_gradient = True


class HeadCritic(Critic):
    """A critic whose decoder does not train."""

    def __init__(self, policy: Ernie4_5_MoeForCausalLM) -> None:
        super().__init__(policy)
        freeze(self.model)


def toy_config(**changes: Any) -> UpoConfig:
    values: dict[str, Any] = {
        "name": "toy", "kind": "upo", "data": [{"path": "x"}], "canaries": 0, "iterations": 2,
        "reward": [{"name": "exact", "weight": 1.5}, {"name": "format", "weight": 0.3}],
        "rollout": {"prompts_per_iteration": 5, "group_size": GROUP, "max_new_tokens": LONGEST,
                    "temperature": 0.8, "replay": "rollouts"},
        "policy": {"minibatches": 2, "update_epochs": 2}, "micro_batch_size": 4,
        "optim": {"lr": 0.03, "schedule": "constant", "eps": 1e-3, "clip_grad_norm": 0.5},
        "samples_per_iteration": 20,
    }  # fmt: skip
    for key, change in changes.items():
        both = isinstance(change, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **change} if both else change
    return UpoConfig(**values)


def toy_prompt(number: int) -> list[int]:
    rng = np.random.default_rng([7, number])
    return [int(token) for token in rng.integers(0, VOCABULARY, 3 + number % 2)]


def toy_group(rng: np.random.Generator, prompt: int, weight: float) -> list[ScoredCompletion]:
    found, prompt_ids = [], toy_prompt(prompt)
    for at, score in enumerate(MARKS[prompt]):
        cut, formed = (prompt, at) in CUT, (prompt, at) not in MALFORMED
        length = LONGEST if cut else int(rng.integers(2, LONGEST + 1))
        mask = [n % 3 != 1 or n == length - 1 for n in range(length)] if at == 2 else None
        parts = {"exact": score.value, "format": float(formed)}
        found.append(
            ScoredCompletion(
                prompt_ids=prompt_ids, completion_ids=rng.integers(0, VOCABULARY, length).tolist(),
                sampled_mask=mask, prompt=prompt, domain="ab"[prompt % 2], task="t", text="x",
                finished=not cut, score=score, raw_reward=weight * score.value + 0.3 * formed,
                reward_parts=parts,
            )
        )  # fmt: skip
    return found


def toy_pairs(rng: np.random.Generator, count: int = 3) -> list[TokenizedPair]:
    def completion(prompt_ids: list[int]) -> TokenizedCompletion:
        ids = rng.integers(0, VOCABULARY, int(rng.integers(1, LONGEST))).tolist()
        return TokenizedCompletion(prompt_ids, ids)

    prompts = [rng.integers(0, VOCABULARY, 4).tolist() for _ in range(count)]
    return [TokenizedPair(completion(p), completion(p)) for p in prompts]


def text_of(model: Ernie4_5_MoeForCausalLM, sequence: TokenizedCompletion) -> Text:
    """The features of a sequence that goes through the decoder alone."""
    ids = (sequence.prompt_ids + sequence.completion_ids)[:-1]
    with paddle.no_grad():
        hidden = model.model(paddle.to_tensor([ids])).hidden.numpy().astype(np.float64)
    mask = sequence.sampled_mask or [True] * len(sequence.completion_ids)
    places = np.flatnonzero(mask)
    tokens = np.array(sequence.completion_ids)[places]
    return Text(hidden[len(sequence.prompt_ids) - 1 + places], tokens)


class Outcome:
    """Lines of metrics, gradients step by step, mean advantages, and the weights at the end."""

    def __init__(self, lines: Any, gradients: Any, advantages: Any, weights: Any) -> None:
        self.lines, self.gradients, self.advantages = lines, gradients, advantages
        self.weights = weights


def expected(config: UpoConfig, directory: Path) -> Outcome:
    """What the referee makes of the stage; writes the rollouts that it is about."""
    rng, model = np.random.default_rng(3), toy_policy()
    head = model.head()[0].numpy().astype(np.float64)
    referee, given = Referee(config, head, SEED), toy_pairs(rng)
    lines, advantages = [], []
    for number in range(1, config.iterations + 1):
        groups = [toy_group(rng, p, config.reward.parts[0].weight) for p in range(len(MARKS))]
        flat = [c for group in groups for c in group]
        texts = [text_of(model, c) for c in flat]
        for c, text in zip(flat, texts, strict=True):
            noise = 0.002 * rng.normal(size=len(text.tokens))
            sampled = (referee.logprobs(text) + noise).astype(np.float32)
            object.__setattr__(c, "sampled_logprobs", sampled)
        write_rollout(directory / f"rollouts/{number:06d}.jsonl", groups)
        offline = offline_numbers(config, number, len(given))
        taken = list(dict.fromkeys(offline))  # each of them stands in the batch once
        texts += [text_of(model, s) for n in taken for s in given[n].completions]
        places = [taken.index(n) for n in offline]
        lines.append(referee.iterate(number, groups, texts, places))
        means = [float(a.mean()) for a in referee.advantages[: len(flat)]]
        told = [t and config.policy.coef > 0 for t in referee.trained]
        advantages.append([a if t else None for a, t in zip(means, told, strict=True)])
    weights = referee.policy | (referee.critic if config.critic else {})
    return Outcome(lines, referee.gradients, advantages, weights)


def offline_numbers(config: UpoConfig, iteration: int, count: int) -> list[int]:
    """The pairs of an iteration: each epoch of them in an order of its own."""
    from ernie_train.data.packing import permutation

    offline = config.preference.offline if config.preference else None
    if offline is None:
        return []
    first = (iteration - 1) * offline.per_iteration
    return [
        int(permutation(count, SEED, at // count, 7)[at % count])
        for at in range(first, first + offline.per_iteration)
    ]


def observed(
    config: UpoConfig, rollouts: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> Outcome:
    """What the stage makes of the rollouts."""
    rng, model = np.random.default_rng(3), toy_policy()
    gradients: list[dict[str, np.ndarray]] = []
    original = Optimizer.step

    def step(self: Optimizer, lr: float, norm: float) -> None:
        gradients.append({n: p.grad.numpy().astype(np.float64) for n, p in self.parameters.items()})
        original(self, lr, norm)

    kept: list[learner.Learner] = []
    made = learner.Learner

    def remembered(*arguments: Any) -> learner.Learner:
        kept.append(made(*arguments))
        return kept[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", step)
        patch.setattr(learner, "Critic", HeadCritic)
        patch.setattr(loop, "Learner", remembered)
        data = StageData(rollouts, SimpleNamespace(stop_token_ids=[0]), SEED)  # type: ignore[arg-type]
        stop = SimpleNamespace(requested=False)
        stage = StageRun(data, directory / "01-toy", model, stop, terminal=False)  # type: ignore[arg-type]
        stage.directory.mkdir(parents=True, exist_ok=True)
        loop.run(config, stage, prepared(rng))
    lines = list(read_lines(stage.directory / "metrics.jsonl"))
    advantages: dict[int, list[float | None]] = {}
    for row in read_lines(stage.directory / "samples.jsonl"):
        advantages.setdefault(row["step"], []).append(row["advantage"])
    weights = {"head": model.head()[0].numpy()}
    if kept[0].critic is not None:
        head = kept[0].critic.model.value_head
        weights |= {"weight": head.weight.numpy(), "bias": head.bias.numpy()}
    renamed = [{n.rpartition(".")[2] if "value" in n else "head": g for n, g in grads.items()}
               for grads in gradients]  # fmt: skip
    return Outcome(lines, renamed, list(advantages.values()), weights)


def prepared(rng: np.random.Generator) -> PreparedPrompts:
    record = Record("prompt", [{"role": "user", "content": "?"}], source="x:1")
    prompts = [Prompt(record, toy_prompt(number), "a", "t", 1) for number in range(len(MARKS))]
    return PreparedPrompts(prompts, [5], [1.0], None, [], toy_pairs(rng))  # type: ignore[arg-type]


def read_lines(path: Path) -> Iterator[Any]:
    for line in path.read_text().splitlines():
        yield json.loads(line)
