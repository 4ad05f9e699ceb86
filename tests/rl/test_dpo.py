"""DPO stages: rows of other kits, the losses, validation, pairs of several turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ernie_train.core.errors import DataError
from ernie_train.data import load_tokenizer
from ernie_train.data.packing import permutation
from ernie_train.plan.workload import recipe_workloads
from ernie_train.rl import dpo, pair_stage, preference_data
from ernie_train.rl.batch import MicroBatch, PreferencePair
from ernie_train.rl.estimators import sequence_logprobs
from ernie_train.rl.loss import PairTerm
from ernie_train.run.recipe import Recipe
from ernie_train.train.stage import StageData
from tests.rl.records import make_sequences
from tests.rl.upo_stages import run
from tests.small_models import fill, make_model
from tests.workspace import make_workspace, metrics_without_time, write_rows


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dpo")
    make_workspace(root)
    write_rows(root / "pairs.jsonl", pairs(6))
    return root


def pairs(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"What is {a} + 1?", "chosen": f"{a + 1}. " * (1 + a % 3), "rejected": "none"}
        for a in range(first, first + count)
    ]


def recipe_of(root: Path, **changes: Any) -> dict[str, Any]:
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    stage = {
        "name": "d", "kind": "dpo", "data": str(root / "pairs.jsonl"), "seq_len": 96, "steps": 1,
        "pairs_per_step": 2, "micro_batch_size": 4, "optim": {"lr": 1e-3, "schedule": "constant"},
    } | changes  # fmt: skip
    recipe["model"]["max_position_embeddings"] = 512
    return {**recipe, "evaluation": None, "export": None, "stages": [stage]}


def trained(root: Path, run_dir: Path, **changes: Any) -> list[dict[str, Any]]:
    """Run one stage in this process; return its metrics."""
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe_of(root, **changes)))
    assert run("run", path, "--run-dir", run_dir) == 0
    return metrics_without_time(run_dir, "01-d")


FIRST = {"role": "user", "content": "Is 8 even?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))
OF_OTHER_KITS = {
    "erniekit": {"src": ["Is 8 even?"], "tgt": [], "response": [["no"], ["yes"]], "sort": [0, 1]},
    "erniekit, later turn": {
        "src": ["Hi", "Is 8 even?"], "tgt": ["Hello"], "response": [["yes"], ["no"]],
        "sort": [2, 1],
    },
    "erniekit, system": {
        "src": ["Be brief.", "Is 8 even?"], "tgt": [], "is_system": 1,
        "response": [["yes"], ["no"]], "sort": [1, 0],
    },
    "paddleformers": {"messages": [FIRST], "chosen_response": [YES], "rejected_response": [NO]},
    "ms-swift": {"messages": [FIRST, YES], "rejected_response": "no"},
    "trl": {"prompt": [FIRST], "chosen": [YES], "rejected": [NO]},
    "trl, implicit prompt": {"chosen": [FIRST, YES], "rejected": [FIRST, NO]},
    "alpaca": {"instruction": "Is 8 even?", "input": "", "chosen": "yes", "rejected": "no"},
}  # fmt: skip


@pytest.mark.parametrize("row", OF_OTHER_KITS.values(), ids=OF_OTHER_KITS)
def test_preferences_of_other_kits_train_a_stage(root, tmp_path, row):
    write_rows(tmp_path / "rows.jsonl", [row])
    (line,) = trained(root, tmp_path / "run", data=str(tmp_path / "rows.jsonl"), seq_len=128)
    assert line["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert line["grad_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "first_loss"),
    [
        ({"length_normalize": True}, np.log(2)),
        ({"loss": "ipo"}, (1 / 4) ** 2),
        ({"loss": "ipo", "length_normalize": False}, 5.0**2),
    ],
)
def test_at_the_reference_every_loss_has_its_closed_form(root, tmp_path, settings, first_loss):
    """Beta is 2 on means over tokens and 0.1 on sums: IPO's target is 1 / (2 beta)."""
    (line,) = trained(root, tmp_path / "run", **settings)
    assert line["preference"] == pytest.approx(first_loss, rel=1e-4)


def test_simpo_asks_no_reference_and_plan_counts_none(root, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "reference_logprobs", lambda *a, **k: pytest.fail("a reference"))
    lines = trained(root, tmp_path / "run", loss="simpo", rpo_alpha=0.5, steps=3, pairs_per_step=6)
    assert lines[0]["loss"] == pytest.approx(
        lines[0]["preference"] + 0.5 * lines[0]["nll_loss"], rel=1e-6
    )
    assert lines[-1]["nll_loss"] < lines[0]["nll_loss"]
    for settings, reference in (
        ({"loss": "simpo"}, False),
        ({"loss": "orpo"}, False),
        ({"loss": "ipo"}, True),
    ):
        (load,) = recipe_workloads(Recipe(**recipe_of(root, **settings)))
        assert (load.reference, load.scoring_models) == (False, int(reference))


def test_dpo_has_sums_unless_told_otherwise(root):
    stage = recipe_of(root)["stages"][0]
    for changes, normalized, beta in (
        ({}, False, 0.1),
        ({"length_normalize": True}, True, 2.0),
        ({"loss": "ipo"}, True, 2.0),
        ({"loss": "simpo"}, True, 2.0),
        ({"loss": "orpo"}, True, 0.1),
        ({"beta": 0.3}, False, 0.3),
    ):
        config = dpo.DpoConfig(**stage, **changes)
        assert (config.is_length_normalized, config.beta_of_loss) == (normalized, beta)
        assert config.rpo_alpha == (changes.get("loss") == "orpo")


def test_orpo_trains_the_likelihood_beside_its_odds_and_asks_no_reference(
    root, tmp_path, monkeypatch
):
    monkeypatch.setattr(dpo, "reference_logprobs", lambda *a, **k: pytest.fail("a reference"))
    lines = trained(root, tmp_path / "run", loss="orpo", steps=3, pairs_per_step=6)
    assert lines[0]["loss"] == pytest.approx(lines[0]["preference"] + lines[0]["nll_loss"])
    assert 0 < lines[0]["preference"] < 0.2  # 0.1 of the log of an odds ratio near 1
    assert lines[-1]["nll_loss"] < lines[0]["nll_loss"]


# ---- validation ----------------------------------------------------------------------------------


def test_held_out_pairs_choose_the_checkpoint_and_a_stop_changes_nothing(
    root, tmp_path, monkeypatch
):
    write_rows(root / "held_out.jsonl", pairs(5, first=20))
    settings = {
        "validation": str(root / "held_out.jsonl"), "validate_every_steps": 2, "steps": 5,
        "checkpoint": {"every_steps": 2, "best_metric": "validation_loss", "keep_last": 1},
    }  # fmt: skip
    whole = trained(root, tmp_path / "run", **settings)
    losses = {line["step"]: line["validation_loss"] for line in whole if "validation_loss" in line}
    assert sorted(losses) == [2, 4, 5]
    kept = sorted(path.name for path in (tmp_path / "run/01-d/checkpoints").glob("step_*"))
    best = min(losses, key=lambda step: losses[step])
    assert kept == sorted({f"step_{best:06d}", "step_000005"})
    original, calls = dpo.validation_metrics, []

    def stopped(*given, stop_requested):
        calls.append(given)
        return original(*given, stop_requested=lambda: len(calls) == 2)

    path = tmp_path / "cut.yaml"
    path.write_text(yaml.safe_dump(recipe_of(root, **settings)))
    monkeypatch.setattr(dpo, "validation_metrics", stopped)
    assert run("run", path, "--run-dir", tmp_path / "cut") == 3
    assert run("run", path, "--run-dir", tmp_path / "cut") == 0
    assert metrics_without_time(tmp_path / "cut", "01-d") == whole
    file = "01-d/checkpoints/step_000005/model.safetensors"
    assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "run" / file).read_bytes()


def test_validation_is_the_loss_by_definition():
    """Of one policy against another."""
    sequences = make_sequences(8)
    model, other = make_model(), make_model()
    fill(other, seed=3)
    reference = sequence_logprobs(other, sequences, temperature=1.0, batch_size=3).logprobs
    places = tuple(PreferencePair(2 * at, 2 * at + 1) for at in range(4))
    held_out = MicroBatch(
        tuple(sequences), (False,) * len(sequences), places,
        ref_logprobs=np.concatenate(reference),
    )  # fmt: skip
    found = dpo.validation_metrics(model, held_out, PairTerm(beta=0.3, rpo_alpha=0.5), 4)
    own = sequence_logprobs(model, sequences, temperature=1.0, batch_size=1).logprobs
    ratios = [0.3 * (a.astype(np.float64) - b).sum() for a, b in zip(own, reference, strict=True)]
    margins = np.array([ratios[a] - ratios[b] for a, b in places])
    likelihood = -np.mean([own[a].mean() for a, _ in places])
    loss = np.log1p(np.exp(-margins)).mean() + 0.5 * likelihood
    assert found["validation_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["validation/accuracies"] == (margins > 0).mean()
    assert found["validation/margins"] == pytest.approx(margins.mean(), rel=1e-4)


# ---- several turns -------------------------------------------------------------------------------

CALL = {"name": "add", "arguments": {"a": 2, "b": 3}}
TOOL = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
WITH_TOOL = [
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "the sum is 5"},
    {"role": "assistant", "content": "5"},
]


def of_turns(root: Path, chosen: list[dict[str, Any]], **row: Any) -> pair_stage.PreparedPairs:
    question = [{"role": "user", "content": "What is 2 + 3?"}]
    values = {"messages": question, "tools": [TOOL], "chosen": chosen, "rejected": [NO], **row}
    write_rows(root / "turns.jsonl", [values])
    data = StageData(root, load_tokenizer(root / "tokenizer"), 0)
    stage = recipe_of(root, data="turns.jsonl", seq_len=400)["stages"][0]
    return pair_stage.prepare(dpo.DpoConfig(**stage), data)


def test_results_of_tools_are_context_of_a_completion_and_not_compared(root):
    (pair,) = of_turns(root, WITH_TOOL).pairs
    tokenizer = load_tokenizer(root / "tokenizer")
    chosen = pair.chosen
    assert chosen.prompt_ids == pair.rejected.prompt_ids and pair.rejected.sampled_mask is None
    written = np.array(chosen.completion_ids)[chosen.sampled_places].tolist()
    others = np.delete(chosen.completion_ids, chosen.sampled_places).tolist()
    assert "the sum is 5" in tokenizer.decode(others)
    assert "the sum is 5" not in tokenizer.decode(written) and "add" in tokenizer.decode(written)
    assert "the sum is 5" in tokenizer.decode(chosen.completion_ids)


def test_a_stage_trains_on_completions_of_several_turns(root, tmp_path):
    of_turns(root, WITH_TOOL)
    (line,) = trained(root, tmp_path / "run", data=str(root / "turns.jsonl"), seq_len=400)
    assert line["loss"] == pytest.approx(np.log(2), abs=1e-5) and line["grad_norm"] > 0


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ([*WITH_TOOL[:2]], "must begin and end with an answer of the assistant"),
        ([WITH_TOOL[1], WITH_TOOL[2]], "must begin alike and end differently"),
        (
            [{**YES, "reasoning_content": "hm"}, FIRST, YES],
            "shows an earlier turn of a completion otherwise than it was written",
        ),
    ],
)
def test_turns_that_cannot_be_compared_as_one_are_told(root, chosen, says):
    with pytest.raises(DataError, match=says):
        of_turns(root, chosen)


def test_pairs_of_several_turns_that_are_too_long_are_counted(root):
    long = [*WITH_TOOL[:1], {"role": "tool", "content": "so " * 400}, WITH_TOOL[2]]
    values = {"tools": [TOOL], "rejected": "no", "prompt": "What is 2 + 3?"}
    write_rows(root / "long.jsonl", [{**values, "chosen": long}, {**values, "chosen": WITH_TOOL}])
    data = StageData(root, load_tokenizer(root / "tokenizer"), 0)
    stage = recipe_of(root, data="long.jsonl", seq_len=400)["stages"][0]
    prepared = pair_stage.prepare(dpo.DpoConfig(**stage), data)
    assert len(prepared.pairs) == 1 and prepared.report.pairs["too_long"] == 1
    (told,) = prepared.report.warnings
    assert "1 of 2 pairs of long.jsonl are longer than seq_len=400 and left out" in told.plain


def test_pairs_come_in_an_order_that_is_made_once_an_epoch(monkeypatch):
    epochs: list[int] = []

    def counted(count, *key):
        epochs.append(key[1])
        return permutation(count, *key)

    monkeypatch.setattr(preference_data, "permutation", counted)
    source = preference_data.OfflinePairSource(list("abcdefg"), 3, seed=5)
    taken = [pair for iteration in (1, 2, 3, 4) for pair in source.take(iteration)]
    orders = [permutation(7, 5, epoch, 7) for epoch in (0, 1)]
    assert taken == ["abcdefg"[at] for at in np.concatenate(orders)[:12]]
    assert epochs == [0, 1]
