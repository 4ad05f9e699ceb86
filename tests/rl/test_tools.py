"""An RL stage with tools: several turns, the mask, resume and replay to the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from ernie_train.core.errors import Interrupted
from ernie_train.data import load_tokenizer
from ernie_train.data.completion_format import tool_call_block
from ernie_train.environments.calculator import Calculator
from ernie_train.generate.engine import Completion
from ernie_train.generate.engines import OwnEngine
from ernie_train.rl import loop
from ernie_train.rl.batch import TokenizedCompletion
from ernie_train.rl.estimators import sequence_logprobs
from ernie_train.rl.rollout import RolloutSampler, read_rollout
from tests.rl.upo_stages import GAE, run_stage, stage
from tests.workspace import make_workspace, metrics_without_time, rows, write_rows

REWARD = '''
def score(row, completion):
    """A mark that nearly every completion has another of."""
    return (sum(map(ord, completion)) % 97) / 97
'''
TOOLS = {
    "environment": {"tools": ["calculator"], "max_turns": 2, "max_tool_tokens": 24},
    "rollout": {"max_prompt_tokens": 400, "max_new_tokens": 120, "prompts_per_iteration": 2},
    "iterations": 2, "checkpoint": {"every_steps": 1},
}  # fmt: skip


class CallingEngine(OwnEngine):
    """Writes a call into two of three first turns, with the policy's own logprobs of it."""

    def sample(self, prompts, settings, *, sequence_ids=None, limits=None, **options):
        found = super().sample(
            prompts, settings, sequence_ids=sequence_ids, limits=limits, **options
        )
        opening = self.tokenizer.token_id("<tool_response>")
        chosen = [
            at for at, (number, prompt) in enumerate(zip(sequence_ids, prompts, strict=True))
            if number % 3 and opening not in prompt
        ]  # fmt: skip
        turns = []
        for at in chosen:
            name, arguments = (
                ("calculator", {"expression": f"{sequence_ids[at]} * 7"})
                if sequence_ids[at] % 3 == 1 else ("lookup", {"key": "gone"})
            )  # fmt: skip
            text = "x\n</think>\n\n" + tool_call_block(name, arguments)
            ids = [*self.tokenizer.encode(text), self.tokenizer.stop_token_ids[0]]
            turns.append(TokenizedCompletion(list(prompts[at]), ids))
        if turns:
            logprobs = sequence_logprobs(
                self._model, turns, temperature=settings.temperature, batch_size=64
            ).logprobs
            for at, turn, array in zip(chosen, turns, logprobs, strict=True):
                found[at] = Completion(turn.completion_ids, array.tolist(), True)
        return found


def calling_engine(settings, tokenizer, *, batch_size, record_experts, **others):
    CallingEngine.tokenizer = tokenizer
    return CallingEngine(tokenizer.stop_token_ids, batch_size, record_experts=record_experts)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tools")
    recipe = yaml.safe_load(make_workspace(root).read_text())
    made = rows(12, 7)
    for row in made:
        row["messages"] = row["messages"][:1]
    write_rows(root / "prompts.jsonl", made)
    (root / "reward.py").write_text(REWARD)
    recipe["model"]["max_position_embeddings"] = 600
    recipe |= {"evaluation": None, "export": None, "stages": [stage(root)]}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(autouse=True)
def calling(workspace, monkeypatch):
    monkeypatch.setattr(loop, "build_engine", calling_engine)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(workspace, tmp_path_factory) -> Path:
    """The run that was never stopped, with its rollouts."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "build_engine", calling_engine)
        assert run_stage(workspace, directory, **_merged(rollout={"dump": True})) == 0
    return directory


def _merged(**changes):
    found = {**TOOLS}
    for key, value in changes.items():
        found[key] = {**found[key], **value} if key in found else value
    return found


def test_turns_are_played_told_and_dumped(whole, workspace):
    lines = metrics_without_time(whole, "01-rl")
    for line in lines:
        assert line["episodes/turns"] > 1 and line["episodes/tool_calls"] > 0.5
        assert 0 < line["episodes/tool_errors"] < 1, "there is no lookup"
        assert line["logprob_mismatch"] < 1e-5
        assert line["frac_reward_zero_std"] < 1
    times = [line["time"] for line in lines_of(whole / "01-rl/metrics.jsonl")]
    assert all(time["tool_seconds"] > 0 for time in times)
    samples = lines_of(whole / "01-rl/samples.jsonl")
    told = [turn["content"] for sample in samples for turn in sample["turns"]
            if turn["role"] == "tool"]  # fmt: skip
    assert any(text.isdecimal() for text in told)
    assert any(text.startswith("error: there is no tool") for text in told)
    tokenizer = load_tokenizer(workspace / "tokenizer")
    for iteration in (1, 2):
        for group in read_rollout(whole / f"01-rl/rollouts/{iteration:06d}.jsonl"):
            for c in group:
                assert len(c.sampled_logprobs) == c.num_sampled
                if c.sampled_mask is None:
                    continue
                ids = np.array(c.completion_ids)
                between = tokenizer.decode(ids[~np.array(c.sampled_mask)].tolist())
                assert between.startswith("\n\n<|im_start|>user\n<tool_response>\n")
                assert between.endswith("<|im_start|>assistant\n<think>\n")
                sampled = tokenizer.decode(ids[np.array(c.sampled_mask)].tolist())
                assert sampled.startswith("x\n</think>\n\n<tool_call>")
                assert sampled.endswith(c.text + "<|im_end|>" * c.finished)


def test_a_stopped_stage_continues_to_the_same_bits(whole, workspace, tmp_path, monkeypatch):
    original = RolloutSampler._sample_turn

    def stopping(when):
        count = 0

        def sample_turn(self, *arguments, **options):
            nonlocal count
            count += 1
            if count == when:
                raise Interrupted("stopped on a signal")
            return original(self, *arguments, **options)

        return sample_turn

    stopped = tmp_path / "stopped"
    monkeypatch.setattr(RolloutSampler, "_sample_turn", stopping(4))
    assert run_stage(workspace, stopped, **TOOLS) == 3, "between two turns of the second iteration"
    monkeypatch.setattr(RolloutSampler, "_sample_turn", original)
    assert run_stage(workspace, stopped, **TOOLS) == 0
    _assert_same_run(stopped, whole)


def test_a_stage_whose_tool_cannot_run_saves_and_continues(
    whole, workspace, tmp_path, monkeypatch, capsys
):
    original, count = Calculator.call, 0

    def failing(self, arguments, context):
        nonlocal count
        count += 1
        if count == 6:  # of the second iteration
            raise OSError(24, "Too many open files")
        return original(self, arguments, context)

    failed = tmp_path / "failed"
    rare = {"checkpoint": {"every_steps": 2}}
    monkeypatch.setattr(Calculator, "call", failing)
    assert run_stage(workspace, failed, **{**TOOLS, **rare}) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "the tool calculator cannot run: [Errno 24] Too many open files" in told
    assert "step_000001 is saved. The same command goes on from there" in told
    assert run_stage(workspace, failed, **{**TOOLS, **rare}) == 0
    _assert_same_run(failed, whole)


def test_a_replay_gives_the_same_bits(whole, workspace, tmp_path):
    replay = {"replay": str(whole / "01-rl/rollouts")}
    assert run_stage(workspace, tmp_path / "replayed", **_merged(rollout=replay)) == 0
    _assert_same_run(tmp_path / "replayed", whole, but={"experts_changed"})


def _assert_same_run(one: Path, other: Path, but=frozenset()) -> None:
    def lines(directory):
        found = metrics_without_time(directory, "01-rl")
        return [{k: v for k, v in line.items() if k not in but} for line in found]

    assert lines(one) == lines(other)
    assert lines_of(one / "01-rl/samples.jsonl") == lines_of(other / "01-rl/samples.jsonl")
    weights = [
        (directory / "01-rl/checkpoints/step_000002/model.safetensors").read_bytes()
        for directory in (one, other)
    ]
    assert weights[0] == weights[1]


def test_with_a_critic_pairs_and_kl_it_learns_too(workspace, tmp_path):
    changes = {key: value for key, value in GAE.items() if key != "curriculum"}
    changes["preference"] = {
        "coef": 0.2, "pairs": "online", "margin": 0.01,
    }  # fmt: skip
    changes["rollout"] = TOOLS["rollout"]
    changes["audit_reward"] = {"name": "exact", "share": 0.5}  # one of two groups
    assert run_stage(workspace, tmp_path / "gae", **{**TOOLS, **changes, "iterations": 1}) == 0
    (*_, line) = metrics_without_time(tmp_path / "gae", "01-rl")
    assert line["pairs"] > 0 and np.isfinite([line["policy"], line["critic/value_loss"]]).all()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"environment": {"max_tool_tokens": 120}}, "leaves no room in rollout.max_new_tokens=120"),
        ({"environment": {"tools": []}}, "at least 1 item"),
        ({"environment": {"tools": ["shell"]}}, "environment.tools"),
        ({"environment": {"tools": [{"python": "gone.py"}]}}, "gone.py"),
        ({"environment": {"max_turns": 1}}, ">= 2"),
        ({"data": "own.jsonl"}, "environment of stage rl has no effect: every row has"),
    ],
)
def test_environments_that_cannot_work_are_refused(workspace, tmp_path, capsys, changes, told):
    own = [{**row, "tools": [{"name": "weather"}]} for row in lines_of(workspace / "prompts.jsonl")]
    write_rows(workspace / "own.jsonl", own)
    if "data" in changes:
        changes = {"data": [{"path": str(workspace / changes["data"])}]}
    assert run_stage(workspace, tmp_path / "refused", **_merged(**changes)) == 2
    assert told in " ".join(capsys.readouterr().err.split())
