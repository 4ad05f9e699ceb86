"""Pairs of groups in which the policy gradient is silent, and by a second reward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from ernie_train import parallel
from ernie_train.core.errors import DataError
from ernie_train.data import load_tokenizer
from ernie_train.generate import Completion
from ernie_train.rewards.score import Score
from ernie_train.rewards.scoring import ComposedScore
from ernie_train.rl import data as rl_data
from ernie_train.rl import pairs as pairs_module
from ernie_train.rl.batch import RolloutBatch, TokenizedCompletion, minibatches
from ernie_train.rl.config import PreferenceConfig, RolloutConfig, UpoConfig
from ernie_train.rl.pairs import PairSources, all_wrong, shorter_pairs
from ernie_train.rl.preference_data import TokenizedPair, add_pairs
from ernie_train.rl.rollout import Rollout, SecondReward
from ernie_train.train.stage import StageData
from tests.rl.records import make_scored
from tests.rl.upo_stages import run_stage, stage
from tests.workspace import make_workspace, metrics_without_time, rows, write_rows

RIGHT, WRONG, UNKNOWN = Score.correct(), Score.wrong("no"), Score.timeout("slow")
SETTINGS = RolloutConfig(max_new_tokens=20, group_size=3)


def group(prompt: int, *members: tuple[Score, int], **values: Any) -> list[Any]:
    """Completions of a prompt with scores and lengths, marked by their place."""
    return [
        make_scored(
            prompt=prompt, score=score, raw_reward=score.value, completion_ids=[7] * length,
            text=f"{prompt}.{at}", prompt_ids=[1, 2, prompt + 3], **values,
        )
        for at, (score, length) in enumerate(members)
    ]  # fmt: skip


MIXED = group(0, (RIGHT, 4), (WRONG, 9), (WRONG, 5))
NONE_RIGHT = group(1, (WRONG, 4), (UNKNOWN, 6), (WRONG, 12))
ALL_RIGHT = group(2, (RIGHT, 8), (RIGHT, 3), (RIGHT, 5))
LIKE_LENGTHS = group(3, (RIGHT, 10), (RIGHT, 10), (RIGHT, 11))
NO_VERDICT = group(4, (UNKNOWN, 4), (UNKNOWN, 6), (UNKNOWN, 2))
ROLLOUT = Rollout.of([MIXED, NONE_RIGHT, ALL_RIGHT, LIKE_LENGTHS, NO_VERDICT], SETTINGS)


def test_groups_without_a_right_completion_are_all_wrong():
    (found,) = all_wrong(ROLLOUT)
    assert found.prompt == 1
    assert [c.text for c in found.completions] == ["1.0", "1.2"], "only those with a verdict"


def test_shorter_pairs_are_of_groups_that_are_all_right_and_differ_in_length():
    found = shorter_pairs(ROLLOUT)
    assert [(p.chosen.text, p.rejected.text) for p in found] == [("2.1", "2.0")]
    cut = [replace(c, finished=c.text != "2.0") for c in ALL_RIGHT]
    assert shorter_pairs(Rollout.of([cut], SETTINGS)) == []


class Sampler(SimpleNamespace):
    """What pair sources need of a sampler: solutions, an engine, a reward."""

    @classmethod
    def of(cls, solutions: dict[int, list[int]], engine: Any = None) -> Sampler:
        prompts = [SimpleNamespace(prompt_ids=[1, 2, at + 3]) for at in range(5)]
        tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
        data = SimpleNamespace(tokenizer=tokenizer, seed=3)
        return cls(
            prepared=SimpleNamespace(prompts=prompts, solutions=solutions),
            config=SimpleNamespace(rollout=SETTINGS), engine=engine, reward=None, scorers={},
            stage=SimpleNamespace(data=data, stop_requested=lambda: False, model="model"),
        )  # fmt: skip


def sources(monkeypatch, sampler: Sampler, marks: Any, **settings: Any) -> PairSources:
    """Pair sources whose reward is the function `marks` of a text."""

    def grade(reward, scorers, answers, prompts, stage):
        assert all(answer.tokens for answer in answers)
        return [ComposedScore(marks(a.text), Score.marked(marks(a.text)), {}) for a in answers]

    monkeypatch.setattr(pairs_module, "grade", grade)
    return PairSources(PreferenceConfig(coef=0.1, **settings), sampler, None, None)


@pytest.mark.parametrize(
    ("solution", "mark", "rejected"),
    [
        ([5] * 10, 1.0, "1.2"),  # 12 tokens are nearer to 10 than 4
        ([5] * 5, 1.0, "1.0"),
        ([5] * 5, 0.4, None),  # below the margin: the row's own solution is no better
        (None, 1.0, None),
    ],
)
def test_gold_is_the_rows_solution_against_the_wrong_one_nearest_in_length(
    monkeypatch, solution, mark, rejected
):
    known = {} if solution is None else {1: solution, 0: [9]}
    found, metrics = sources(monkeypatch, Sampler.of(known), lambda text: mark, pairs="gold").find(
        1, ROLLOUT
    )
    assert metrics == {"pairs/gold": len(found), "groups_all_wrong": 1}
    if rejected is None:
        assert found == []
        return
    (pair,) = found
    assert pair.rejected.text == rejected
    assert (pair.chosen.prompt_ids, pair.chosen.completion_ids) == ([1, 2, 4], solution)


def test_hinted_completions_begin_like_the_solution_and_the_best_is_chosen(monkeypatch):
    asked = {}

    class Engine:
        def load_weights(self, model, version):
            asked["weights"] = (model, version)

        def sample(self, prompts, settings, *, limits, stop_requested):
            asked.update(prompts=prompts, limits=limits)
            ends = [([30, 2], True), ([31, 2], True), ([32], False)]
            return [Completion(ids, [0.0] * len(ids), end) for ids, end in ends]

    sampler = Sampler.of({1: [5, 6, 7, 8, 9]}, Engine())
    hint = {"share": 0.5, "samples": 3}
    found, metrics = sources(
        monkeypatch,
        sampler,
        lambda text: {"5 6 31": 0.9, "5 6": 1.0}.get(text, 0.6),
        pairs="hint",
        hint=hint,
    ).find(4, ROLLOUT)
    assert asked["prompts"] == [[1, 2, 4, 5, 6]] * 3 and asked["limits"] == [18] * 3
    assert asked["weights"] == ("model", 4)
    (pair,) = found
    assert (pair.chosen.prompt_ids, pair.chosen.completion_ids) == ([1, 2, 4], [5, 6, 31, 2])
    assert metrics["pairs/hint"] == 1


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.3, 1 / 7, 0.04])
def test_a_second_reward_judges_its_share_evenly_wherever_iterations_are_cut(share):
    second = SecondReward(share, None, {}, [], None)
    whole = second.places(0, 100)
    assert len(whole) == pytest.approx(100 * share, abs=1)
    assert max(np.diff(whole), default=1) <= np.ceil(1 / share)
    cut = [first + at for first in range(0, 100, 5) for at in second.places(first, 5)]
    assert cut == whole


def test_a_second_reward_ranks_pairs_of_its_share_where_the_first_sees_no_difference():
    class Judge(SecondReward):
        def scores(self, groups):
            values = [[0.2, 0.9, 0.1], [0.5, 0.6, 0.7]][: len(groups)]
            return [[ComposedScore(v, Score.marked(v), {}) for v in row] for row in values]

    rollout = Rollout.of([MIXED, ALL_RIGHT, NONE_RIGHT, LIKE_LENGTHS], SETTINGS)
    config = PreferenceConfig(coef=0.1, pairs="online", pair_reward={"name": "exact", "share": 0.5})
    sampler = SimpleNamespace(
        config=SimpleNamespace(rollout=SimpleNamespace(prompts_per_iteration=4))
    )
    found, metrics = PairSources(config, sampler, None, Judge(0.5, None, {}, [], None)).find(
        1, rollout
    )
    assert [(p.chosen.text, p.rejected.text) for p in found] == [("2.1", "2.2")]
    assert (metrics["pairs"], metrics["pairs/below_margin"]) == (1, 1)


def test_an_audit_takes_the_place_of_the_reward():
    class Audit(SecondReward):
        def scores(self, groups):
            verdict = ComposedScore(0.25, Score.marked(0.25), {"row": 0.25})
            return [[verdict for _ in group] for group in groups]

    audited = Audit(0.5, None, {}, [], None).audited([MIXED, ALL_RIGHT, NONE_RIGHT], first=2)
    assert audited[0] == MIXED and audited[2] == NONE_RIGHT
    assert all((c.raw_reward, c.reward_parts) == (0.25, {"audit/row": 0.25}) for c in audited[1])
    assert [c.completion_ids for c in audited[1]] == [c.completion_ids for c in ALL_RIGHT]


def test_completions_of_the_same_tokens_stay_two():
    one, other = (make_scored(sampled_logprobs=np.zeros(1, np.float32)) for _ in range(2))
    sequences: list[TokenizedCompletion] = [one, other]
    assert add_pairs(sequences, [TokenizedPair(one, other)]) == [(0, 1)] and len(sequences) == 2
    assert one != other and len({one, other}) == 2


def test_a_pair_with_a_solution_goes_where_its_group_goes():
    completions = [c for g in (MIXED, NONE_RIGHT) for c in g]
    gold = TokenizedCompletion([1, 2, 4], [5])
    sequences: list[TokenizedCompletion] = list(completions)
    given = [TokenizedPair(gold, completions[4]), TokenizedPair(completions[0], completions[1])]
    placed = add_pairs(sequences, [*given, given[0]])
    assert placed == [(6, 4), (0, 1), (6, 4)] and len(sequences) == 7
    for key in range(6):
        parts = minibatches(RolloutBatch(sequences, placed, 2, 3), 2, key)
        for part in parts:
            homes = {index // 3 for index in part.trained}
            assert {min(pair) // 3 for pair in part.pairs} <= homes


# ---- whole stages --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    recipe = yaml.safe_load(make_workspace(root).read_text())
    (root / "recipe.yaml").write_text(
        yaml.safe_dump({**recipe, "evaluation": None, "export": None})
    )
    write_rows(root / "prompts.jsonl", rows(12, 7))
    return root


def test_solutions_teach_where_every_completion_is_wrong(workspace, tmp_path):
    """The policy gradient has nothing to say; pairs with the rows' solutions have."""
    preference = {"coef": 1.0, "pairs": ["online", "gold"], "rpo_alpha": 0.5}
    changes = {"reward": "row", "preference": preference, "iterations": 3,
               "rollout": {"max_new_tokens": 40, "group_size": 2}}  # fmt: skip
    assert run_stage(workspace, tmp_path / "gold", **changes) == 0
    lines = metrics_without_time(tmp_path / "gold", "01-rl")
    assert [line["pairs/gold"] for line in lines] == [6] * 3
    assert all(line["pairs"] == 0 for line in lines)
    assert lines[-1]["nll_loss"] < lines[0]["nll_loss"] - 0.05
    assert lines[-1]["rewards/margins"] > 0


def test_pairs_against_the_last_iteration_begin_at_ln_2_each_time(workspace, tmp_path, monkeypatch):
    preference = {"coef": 1.0, "pairs": "gold", "reference": "last_iteration"}
    rollout = {"max_new_tokens": 40, "prompts_per_iteration": 3, "group_size": 2}
    policy = {"minibatches": 1}
    changes = {"reward": "row", "iterations": 2, "policy": policy, "rollout": rollout}
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "reference_model", lambda model: pytest.fail("a second model"))
        assert run_stage(workspace, tmp_path / "last", preference=preference, **changes) == 0
    preference["reference"] = "start"
    assert run_stage(workspace, tmp_path / "start", preference=preference, **changes) == 0
    last, start = (metrics_without_time(tmp_path / name, "01-rl") for name in ("last", "start"))
    assert [line["preference"] for line in last] == pytest.approx([np.log(2)] * 2, abs=1e-5)
    assert start[0]["preference"] == pytest.approx(np.log(2), abs=1e-5)
    assert start[-1]["preference"] < np.log(2) - 1e-3


def test_rows_without_a_fitting_solution_are_told(workspace):
    data = StageData(workspace, load_tokenizer(workspace / "tokenizer"), 0)
    some = rows(6, 1)
    some[0]["messages"] = some[0]["messages"][:1]
    some[1]["messages"][1]["weight"] = 0  # not to be trained
    some[2]["messages"][1]["content"] = f"<think>\n{'so ' * 60}\n</think>\n\n2"
    write_rows(workspace / "some.jsonl", some)
    preference = {"coef": 0.1, "pairs": "gold"}
    values = stage(workspace, data=[{"path": "some.jsonl"}], reward="row", preference=preference)
    values["rollout"]["max_new_tokens"] = 40
    prepared = rl_data.prepare(UpoConfig(**values), data)
    assert sorted(prepared.solutions) == [3, 4, 5]
    told = " ".join(text.plain for text in prepared.report.warnings)
    assert "2 of 6 prompts have no solution" in told
    assert "the solutions of 1 of 6 prompts" in told and "rollout.max_new_tokens=40" in told
    values["rollout"]["max_new_tokens"] = 3
    with pytest.raises(DataError, match="none of 6 prompts has a solution"):
        rl_data.prepare(UpoConfig(**values), data)
