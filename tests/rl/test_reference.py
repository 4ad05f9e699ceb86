"""The reference of a DPO stage: its logprobs are computed before the first step, and kept."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ernie_train import parallel
from ernie_train.model.partial import adapter_off
from ernie_train.rl import dpo, estimators
from ernie_train.rl.batch import MicroBatch, RolloutBatch, TokenizedCompletion, micro_batches
from ernie_train.rl.estimators import sequence_logprobs
from ernie_train.rl.preference_data import OfflinePairSource, add_pairs
from ernie_train.train.trainer import Trainer
from tests.rl.records import make_sequences
from tests.rl.test_dpo import pairs, recipe_of, root, trained
from tests.rl.upo_stages import run
from tests.workspace import final_files, metrics_without_time, write_rows

__all__ = ["root"]

FILE = "01-d/reference_logprobs.bin"
# Of 6 pairs; the first epoch ends within the fourth step of 6, or with the third.
SETTINGS = {
    "steps": 6, "pairs_per_step": 2, "micro_batch_size": 2, "checkpoint": {"every_steps": 2},
    "optim": {"lr": 3e-3, "schedule": "constant"},
}  # fmt: skip


# ---- the curve -----------------------------------------------------------------------------------


def recorded(passes: list[Any]) -> Any:
    """`sequence_logprobs` that notes what goes through the model, and in which micro-batches."""

    def logprobs(model: Any, block: Any, **options: Any) -> Any:
        passes.append((options["batch_size"], [s.prompt_ids + s.completion_ids for s in block]))
        return sequence_logprobs(model, block, **options)

    return logprobs


def live_batches(self: Any) -> Iterator[MicroBatch]:
    """Batches with the logprobs of a second model, which passes each step's completions."""
    config, prepared = self.config, self.prepared
    reference = parallel.reference_model(self.stage.model)
    source = OfflinePairSource(prepared.pairs, config.pairs_per_step, self.stage.data.seed)

    def logprobs(sequences: list[TokenizedCompletion]) -> list[np.ndarray]:
        with adapter_off(reference):
            return dpo.sequence_logprobs(
                reference, sequences, temperature=1.0, batch_size=config.micro_batch_size
            ).logprobs

    sequences: list[TokenizedCompletion] = []
    held_out = add_pairs(sequences, prepared.validation)
    self.held_out = MicroBatch(
        tuple(sequences), (False,) * len(sequences), tuple(held_out),
        ref_logprobs=np.concatenate(logprobs(sequences)),
    )  # fmt: skip
    for step in range(self.trainer.step + 1, config.steps + 1):
        sequences = []
        step_pairs = add_pairs(sequences, source.take(step))
        batch = RolloutBatch(sequences, ref_logprobs=logprobs(sequences))
        yield from micro_batches(batch, [], step_pairs, config.micro_batch_size)


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss": "ipo"}, {"lora": {"rank": 2}}, {"lora": {"rank": 2}, "train": ["norm"]}],
    ids=["full", "ipo", "lora", "lora and norms"],
)
def test_the_curve_is_that_of_a_live_reference(root, tmp_path, monkeypatch, changes):
    """Bit for bit in the first epoch; later other completions share a micro-batch."""
    write_rows(root / "few.jsonl", pairs(3, first=20))
    settings = SETTINGS | {"validation": str(root / "few.jsonl")} | changes
    passes: dict[str, list[Any]] = {"run": [], "live": []}
    monkeypatch.setattr(dpo, "sequence_logprobs", recorded(passes["run"]))
    found = trained(root, tmp_path / "run", **settings)
    monkeypatch.setattr(dpo, "sequence_logprobs", recorded(passes["live"]))
    monkeypatch.setattr(dpo, "reference_logprobs", lambda *a, **k: {})
    monkeypatch.setattr(dpo._DpoRun, "batches", live_batches)
    expected = trained(root, tmp_path / "live", **settings)
    assert not (tmp_path / "live" / FILE).exists()
    # On this small model a micro-batch changes no bit, so what shares one is compared too.
    held_out, *others = passes["live"]
    steps = [one for one in others if one != held_out]  # without those of validation
    assert passes["run"][:4] == [held_out, *steps[:3]]
    assert found[:3] == expected[:3] and "validation_loss" in found[1]
    assert abs(found[-1]["preference"] - found[0]["preference"]) > 1e-3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


# ---- stops ---------------------------------------------------------------------------------------


def stop_at(patch: pytest.MonkeyPatch, owner: Any, name: str, number: int) -> None:
    """Send SIGTERM in the call of this number."""
    original, calls = getattr(owner, name), []

    def stopped(*given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*given, **options)

    patch.setattr(owner, name, stopped)


def test_a_stop_before_or_in_training_changes_no_bit(root, tmp_path, monkeypatch, capsys):
    """Three blocks make the reference; a stop in the second, then in the third step."""
    whole = trained(root, tmp_path / "run", **SETTINGS)
    path, cut = tmp_path / "cut.yaml", tmp_path / "cut"
    path.write_text(yaml.safe_dump(recipe_of(root, **SETTINGS)))
    for owner, name, number in ((estimators, "policy_logprobs", 3), (Trainer, "train_step", 3)):
        with monkeypatch.context() as patch:
            stop_at(patch, owner, name, number)
            assert run("run", path, "--run-dir", cut) == 3
    told = " ".join(capsys.readouterr().err.split())
    assert "reference log-probabilities of 4 of 12 completions are kept; nothing was to be" in told
    assert run("run", path, "--run-dir", cut) == 0
    assert metrics_without_time(cut, "01-d") == whole
    assert final_files(cut, "01-d") == final_files(tmp_path / "run", "01-d")
    assert (cut / FILE).read_bytes() == (tmp_path / "run" / FILE).read_bytes()


@pytest.mark.parametrize("lacks", ["a byte", "all"])
def test_a_resumed_run_computes_only_what_its_file_lacks(root, tmp_path, monkeypatch, lacks):
    path, cut = tmp_path / "cut.yaml", tmp_path / "cut"
    path.write_text(yaml.safe_dump(recipe_of(root, **SETTINGS)))
    with monkeypatch.context() as patch:
        stop_at(patch, Trainer, "train_step", 3)
        assert run("run", path, "--run-dir", cut) == 3
    before = (cut / FILE).read_bytes()
    if lacks == "all":  # as in a run of an earlier version
        (cut / FILE).unlink()
    else:  # as a power cut may leave it
        (cut / FILE).write_bytes(before[:-1])
    passes: list[Any] = []
    monkeypatch.setattr(dpo, "sequence_logprobs", recorded(passes))
    assert run("run", path, "--run-dir", cut) == 0
    assert len(passes) == (3 if lacks == "all" else 1) and (cut / FILE).read_bytes() == before
    assert metrics_without_time(cut, "01-d") == trained(root, tmp_path / "run", **SETTINGS)


def test_other_rows_after_a_stop_before_the_first_step_begin_anew(root, tmp_path, monkeypatch):
    path, cut, data = tmp_path / "cut.yaml", tmp_path / "cut", tmp_path / "rows.jsonl"
    settings = SETTINGS | {"data": str(data)}
    path.write_text(yaml.safe_dump(recipe_of(root, **settings)))
    write_rows(data, pairs(6))
    with monkeypatch.context() as patch:
        stop_at(patch, estimators, "policy_logprobs", 3)
        assert run("run", path, "--run-dir", cut) == 3
    write_rows(data, pairs(6, first=1))
    assert run("run", path, "--run-dir", cut) == 0
    assert metrics_without_time(cut, "01-d") == trained(root, tmp_path / "run", **settings)
    assert (cut / "01-d.before-1" / Path(FILE).name).exists()


# ---- what was changed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 6}, "seed: 5 -> 6"),
        ({"pairs": pairs(6, first=1)}, "data:"),
        ({"d": {"seq_len": 64}}, "something else: pairs:"),
        ({"sft": {"optim": {"lr": 2e-3}}}, "something else: start:"),
    ],
    ids=["seed", "rows", "other completions", "weights"],
)
def test_logprobs_of_other_pairs_or_weights_are_refused(root, tmp_path, capsys, changes, says):
    """In a directory that holds them by another way than a run of this recipe."""
    sft = {
        "name": "sft", "kind": "sft", "data": [{"path": str(root / "train.jsonl")}],
        "seq_len": 128, "micro_batch_size": 2, "steps": 1, "optim": {"lr": 1e-3},
    }  # fmt: skip
    rows = pairs(6)
    rows[0] |= {"chosen": "so " * 12}  # within 96 tokens, not within 64
    runs = []
    for name, given in (("one", {}), ("other", changes)):
        data = tmp_path / f"{name}.jsonl"
        write_rows(data, given.get("pairs", rows))
        recipe = recipe_of(root, **SETTINGS | {"data": str(data), "steps": 1} | given.get("d", {}))
        recipe |= {"seed": given.get("seed", 5), "stages": [sft | given.get("sft", {}),
                                                            *recipe["stages"]]}  # fmt: skip
        runs.append(tmp_path / name)
        runs[-1].with_suffix(".yaml").write_text(yaml.safe_dump(recipe))
        assert run("run", runs[-1].with_suffix(".yaml"), "--run-dir", runs[-1]) == 0
    place = "02-d/reference_logprobs.bin"
    (runs[0] / place).replace(runs[1] / place)
    (runs[1] / "02-d/DONE").unlink()
    assert run("run", runs[1].with_suffix(".yaml"), "--run-dir", runs[1]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("error:") == 1 and "was computed from something else" in told
    assert says in told and "--from d to repeat the stage" in told


def test_every_token_counts_for_the_hash_and_so_do_the_blocks():
    blocks = [make_sequences(4), make_sequences(2, seed=1)]
    hashes = {dpo.hash_blocks(blocks), dpo.hash_blocks([blocks[0] + blocks[1]])}
    first = blocks[0][0]
    ids, prompt = first.completion_ids, first.prompt_ids
    for changed in (
        TokenizedCompletion([*prompt[:-1], prompt[-1] + 1], ids),
        TokenizedCompletion(prompt, [*ids[:-1], ids[-1] + 1]),
        TokenizedCompletion(prompt[:-1], [prompt[-1], *ids]),
        TokenizedCompletion(prompt, ids, sampled_mask=[True] * len(ids)),
        TokenizedCompletion(prompt, ids, sampled_mask=[True] * (len(ids) - 1) + [False]),
    ):
        hashes.add(dpo.hash_blocks([[changed, *blocks[0][1:]], blocks[1]]))
    assert len(hashes) == 7
    assert dpo.hash_blocks([make_sequences(4), make_sequences(2, seed=1)]) in hashes


def test_a_short_stage_computes_its_own_pairs_alone(root, tmp_path):
    short, whole = tmp_path / "short", tmp_path / "whole"
    write_rows(root / "few.jsonl", pairs(1, first=20))
    settings = SETTINGS | {"validation": str(root / "few.jsonl")}
    trained(root, short, **settings | {"steps": 2})
    trained(root, whole, **settings | {"steps": 4})
    two, three = ((path / FILE).read_bytes() for path in (short, whole))  # blocks beside held-out
    assert three.startswith(two) and len(two) < len(three)
