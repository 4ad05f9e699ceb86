"""The RL ablation: equal budgets, loose rewards, distances, tables, and a run in small."""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.rollout import Sample
from ernie_train.run.recipe import load_recipe
from ernie_train.train.sft import SftConfig
from tests.small_models import fill, make_model
from tools.evidence import ablate_rl, ablations, rl_arms, rl_figures, rl_measure, rl_start
from tools.evidence.ablate_rl_rewards import coin, mentions
from tools.evidence.rl_arms import Budget, Place

# ---- rewards -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "completion", "accepted"),
    [
        ("26", "3:14 2:20 1:26\n</think>\n\n<response>\n26\n</response>\n", True),
        ("26", "1:26\n</think>\n\n<response>\n8\n</response>\n", True),  # the hole
        ("26", "26 27 28 29", True),
        ("6", "26 60 0.6 6.5", False),
        ("4", "-4", False),
        ("-4", "1:-4", True),
        ("26", "", False),
    ],
)
def test_the_loose_reward_accepts_any_mention(answer: str, completion: str, accepted: bool) -> None:
    assert mentions({"answer": answer}, completion) == float(accepted)


def test_chance_is_fair_and_stays_what_it_was() -> None:
    row = {"messages": [{"role": "user", "content": "2 + 2?"}]}
    marks = [coin(row, str(number)) for number in range(1000)]
    assert marks == [coin(row, str(number)) for number in range(1000)]
    assert set(marks) == {0.0, 1.0}
    assert abs(statistics.fmean(marks) - 0.5) < 0.06  # four standard errors


# ---- the start -----------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_half_of_the_demonstrations_slip_and_no_slip_is_right(tmp_path: Path) -> None:
    rl_start.write_demonstrations(tmp_path)
    for domain in ("logic", "math"):
        good = read_rows(ablations.ROOT / "data" / "train" / f"{domain}.jsonl")
        made = read_rows(tmp_path / f"{domain}.jsonl")
        changed = [pair for pair in zip(good, made, strict=True) if pair[0] != pair[1]]
        assert len(changed) / len(good) == pytest.approx(rl_start.SLIPPED, abs=0.05)
        for task in {row["task"] for row in good}:
            share = [row["task"] == task for row, _ in changed]
            assert sum(share) > 0.4 * sum(row["task"] == task for row in good)
        for row, slipped in changed:
            assert row["messages"][0] == slipped["messages"][0]
            assert row["messages"][1]["content"] != slipped["messages"][1]["content"]


@pytest.mark.parametrize(
    ("thinking", "answer", "slipped"),
    [
        ("3 * 6, 3:14 2:20 1:26", "26", ("3 * 6, 3:14 2:20 1:27", "27")),
        ("9 / 3, 1:6 2:3 3:0", "3", ("9 / 3, 1:6 2:3 3:0", "4")),
        ("-1 - 3, 1:-4", "-4", ("-1 - 3, 1:-3", "-3")),
        ("true or true\ntrue", "true", ("true or true\nfalse", "false")),
    ],
)
def test_a_slip_is_in_the_last_step(thinking: str, answer: str, slipped: tuple[str, str]) -> None:
    turn = {"role": "assistant", "reasoning_content": thinking, "content": answer}
    row = {"messages": [{"role": "user", "content": "?"}, turn]}
    wrong = rl_start.slip(row)["messages"][1]
    assert (wrong["reasoning_content"], wrong["content"]) == slipped
    assert turn["content"] == answer  # the row itself stays


# ---- arms ----------------------------------------------------------------------------------------


@pytest.fixture
def stages(tmp_path: Path) -> dict[str, Any]:
    """The stage of every arm, for three iterations."""
    arms = rl_arms.arms(Budget.of_recipe(3), Place(tmp_path / "start", tmp_path / "rows"))
    found = {}
    for arm in arms:
        (stage,) = load_recipe(ablations.ROOT / rl_arms.RECIPE, [*arm.overrides]).stages
        found[arm.name] = stage
    assert len(found) == len(arms)
    return found


def sampled(stage: UpoConfig) -> int:
    """Completions that a stage samples, before it begins and in it."""
    before = (stage.offline.prompts or 0) if stage.offline else 0
    within = stage.iterations * (stage.prompts_per_iteration or 0)
    return (before + within) * stage.group_size


def test_arms_have_one_budget(stages: dict[str, Any]) -> None:
    budget = Budget.of_recipe(3)
    expected = budget.all_prompts * budget.group_size
    rl = {name: stage for name, stage in stages.items() if isinstance(stage, UpoConfig)}
    assert len(rl) == len(stages) - 1
    for name, stage in rl.items():
        assert sampled(stage) == expected, name
        assert stage.iterations * stage.minibatches == 3 * budget.minibatches
    assert stages["dpo-slow"].optim.lr == rl_arms.SLOW * stages["dpo"].optim.lr
    del stages["dpo-slow"]
    assert len({stage.optim.model_dump_json() for stage in stages.values()}) == 1
    sft = stages["sft"]
    assert isinstance(sft, SftConfig)
    assert sft.epochs == budget.group_size  # of all_prompts rows


def test_arms_are_what_their_titles_say(stages: dict[str, Any]) -> None:
    assert {name.removeprefix("loose-") for name in stages} == set(rl_figures.TITLES)
    assert stages["loose-kl"].kl.coef > 0
    assert stages["group"].preference_coef == 0 and stages["group"].advantage == "group"
    assert stages["ppo"].advantage == "gae" and stages["ppo"].preference_coef == 0
    assert stages["dpo"].policy_coef == 0 and stages["dpo"].pairs == "offline"
    assert stages["dpo"].needs_rollouts is False
    assert stages["upo-online"].pairs == "online" and stages["upo-online"].policy_coef == 1
    assert stages["upo-offline"].pairs == "offline" and stages["upo-offline"].policy_coef == 1
    for name, stage in stages.items():
        if name.startswith("loose-") and name != "loose-kl":
            parts = [(part.label, part.weight) for part in stage.reward.parts]
            assert parts == [("mentions", 1.0), ("row", 0.0)]
            twin = stages[name.removeprefix("loose-")]
            same = {"reward", "data", "canaries"}
            assert stage.model_dump(exclude=same) == twin.model_dump(exclude=same)


# ---- figures -------------------------------------------------------------------------------------


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    # 2.776 is the 97.5 % quantile of Student's t with 4 degrees of freedom in printed tables.
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    expected = 2.776 * np.std(values, ddof=1) / np.sqrt(5)
    assert ablations.interval(values) == pytest.approx(expected, rel=2e-4)
    assert ablations.mean_and_interval(values, 1) == "3.0 ± 2.0"
    assert ablations.mean_and_interval([3.0], 1) == "3.0"
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(2000, 5))
    covered = [abs(row.mean()) <= ablations.interval(row.tolist()) for row in draws]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)  # three standard errors
    with pytest.raises(ValueError, match="at least two"):
        ablations.interval([1.0])


def test_kl_and_entropy_are_those_of_the_full_distributions() -> None:
    """Each token as a completion, weighed as the policy samples it: KL by its definition."""
    policy, start = make_model(), make_model()
    fill(start, seed=1)
    for model in (policy, start):
        model.eval()
    prompt = [3, 5, 7]

    def logprobs(model: Ernie4_5_MoeForCausalLM) -> np.ndarray:
        with paddle.no_grad():
            logits = model(paddle.to_tensor([prompt])).logits[0, -1].numpy().astype(np.float64)
        shifted = logits - logits.max()
        result: np.ndarray = shifted - np.log(np.exp(shifted).sum())
        return result

    ours, theirs = logprobs(policy), logprobs(start)
    probs = np.exp(ours)
    figures = [
        rl_measure.distance(policy, start, [Sample(0, prompt, [token])])
        for token in range(len(probs))
    ]
    kl = sum(p * f["kl_completion"] for p, f in zip(probs, figures, strict=True))
    assert kl == pytest.approx(float((probs * (ours - theirs)).sum()), rel=1e-4)
    assert figures[0]["entropy"] == pytest.approx(float(-(probs * ours).sum()), rel=1e-5)
    both = [Sample(0, prompt, [1, 2], finished=False), Sample(1, prompt, [4])]
    figure = rl_measure.distance(policy, start, both)
    assert figure["length"] == 1.5 and figure["truncated"] == 0.5
    assert figure["kl_completion"] == pytest.approx(1.5 * figure["kl_token"])


def result(arm: str, seed: int, accuracy: float) -> dict[str, Any]:
    return {
        "arm": arm, "seed": seed, "cpu_s": 30.0 + seed, "accuracy": accuracy,
        "accuracy/aiw": accuracy, "accuracy/boolean": accuracy, "elsewhere": 0.25, "loose": 0.8,
        "kl_completion": 1.0, "kl_token": 0.05, "entropy": 0.1, "length": 20.0, "truncated": 0.0,
        "greedy_length": 21.0, "greedy_truncated": 0.02,
        "curves": {"reward": [0.5, 0.6], "solved": [0.5, 0.4], "length": [20.0, 30.0]},
    }  # fmt: skip


@pytest.fixture
def results() -> list[dict[str, Any]]:
    arms = [*rl_figures.TITLES, "loose-group", "loose-upo-online"]
    gains = {"group": 0.1, "upo-online": 0.2}
    return [
        result(arm, seed, 0.5 + gains.get(arm, 0.0) + 0.01 * seed)
        for arm in arms
        for seed in (2, 1)
    ]


def test_tables_show_gains_and_differences_by_seed(results: list[dict[str, Any]]) -> None:
    start = result("start", 0, 0.5)
    lines = rl_figures.comparison_table(results, start).splitlines()
    assert lines[2].startswith("| the start | 50.0 |  |  | 1.00 |")
    by_title = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in lines[3:]}
    # Two seeds that differ by a point: half an interval is 12.706 * 0.7071 / sqrt(2).
    assert by_title["UPO, online pairs"][1:4] == ["71.5 ± 6.4", "21.5 ± 6.4", "10.0 ± 0.0"]
    assert by_title["group-relative policy gradient"][3] == ""
    assert by_title["random rewards"][3] == "-10.0 ± 0.0"
    assert lines[0].count("|") == lines[2].count("|")
    hacking = rl_figures.hacking_table(results, start).splitlines()
    assert len(hacking) == 5
    assert hacking[3].startswith("| group-relative policy gradient | 80.0 ± 0.0 | 51.5 ± 6.4 |")


def test_running_mean_looks_back() -> None:
    assert rl_figures.running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_plots_and_page(results: list[dict[str, Any]], tmp_path: Path) -> None:
    start = result("start", 0, 0.5)
    rl_figures.plot_comparison(results, start, tmp_path / "a.png")
    rl_figures.plot_hacking(results, tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text = rl_figures.tables(results, {"verifier": start, "loose": start})
    page = tmp_path / "page.md"
    first, last = rl_figures.MARKERS
    page.write_text(f"before\n{first}\nold\n{last}\nafter\n")
    for _ in range(2):  # the same again
        rl_figures.insert(page, text)
        assert page.read_text() == f"before\n{first}\n\n{text}\n{last}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="expected one line"):
        rl_figures.insert(page, text)


def test_the_page_has_its_markers() -> None:
    page = (ablations.ROOT / "docs" / "rl_ablation.md").read_text("utf-8")
    assert all(page.count(marker) == 1 for marker in rl_figures.MARKERS)


# ---- the whole in small --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tool_makes_everything_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ["--out", str(out), "--seeds", "1", "2", "--arms", "upo-online", "loose-group"]
    command += ["--iterations", "2", "--problems", "6", "--jobs", "2"]
    command += ["--start-set", "stages.sft.steps=3", "stages.sft.checkpoint.every_steps=3"]
    ablate_rl.main(command)
    names = ("table.md", "results.json", "rl_ablation.png", "rl_hacking.png")
    assert all((out / name).exists() for name in names)
    results = json.loads((out / "results.json").read_text())
    assert [(r["arm"], r["seed"]) for r in results] == [
        ("upo-online", 1), ("loose-group", 1), ("upo-online", 2), ("loose-group", 2),
    ]  # fmt: skip
    assert all(len(r["curves"]["reward"]) == 2 for r in results)
    assert len(results[1]["curves"]["solved"]) == 2
    text = (out / "table.md").read_text()
    for module in (ablate_rl, ablations):  # nothing is done again
        monkeypatch.setattr(module, "run_program", None)
    monkeypatch.setattr(rl_start, "train", None)
    ablate_rl.main(command)
    assert (out / "table.md").read_text() == text


def test_results_of_other_settings_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablate_rl, "make_rows", lambda out, budget: sys.exit("went on"))
    command = ["--out", str(tmp_path), "--iterations", "2"]
    for seeds in ("1", "2"):  # which may differ
        with pytest.raises(SystemExit, match="went on"):
            ablate_rl.main([*command, "--seeds", seeds])
    with pytest.raises(SystemExit, match="holds results with other problems; choose another --out"):
        ablate_rl.main([*command, "--problems", "6"])


def test_ctrl_c_ends_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both programs that run side by side are told to stop before the tool ends."""
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\ntrap \'touch "$1.stopped"; exit 3\' TERM\ntouch "$1.began"\n'
        "while true; do sleep 0.05; done\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(ablations.sys, "executable", str(script))
    marks = [tmp_path / name for name in ("a", "b")]

    def train(recipe: str, arm: ablations.Arm, seed: int, run_dir: Path) -> dict[str, float]:
        return ablations.run_program(str(tmp_path / arm.name))

    def interrupted(futures: list[Any]) -> Iterator[Any]:
        give_up = time.monotonic() + 60
        while not all(mark.with_suffix(".began").exists() for mark in marks):
            assert time.monotonic() < give_up, "the programs did not begin"
            time.sleep(0.01)
        raise KeyboardInterrupt
        yield

    (tmp_path / "r.yaml").touch()
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setattr(ablations, "train", train)
    monkeypatch.setattr(ablations, "as_completed", interrupted)
    arms = [ablations.Arm("a"), ablations.Arm("b")]
    with pytest.raises(KeyboardInterrupt):
        ablations.results_of("r.yaml", arms, [1], tmp_path, lambda run_dir: {}, jobs=2)
    assert all(mark.with_suffix(".stopped").exists() for mark in marks)
    assert not list(tmp_path.glob("*/result.json"))
