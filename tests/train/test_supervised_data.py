"""Data of the phases of a stage, in pre-training and SFT, and a rise of the base that resumes."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from ernie_train.core.config import parse_config
from ernie_train.core.errors import ConfigError, DataError
from ernie_train.data import EncodedDocument
from ernie_train.train.rope_schedule import Phase, RopeSchedule
from ernie_train.train.supervised_data import (
    PretrainConfig,
    SftConfig,
    _loaders,
    batch_source,
    total_steps,
)
from ernie_train.train.trainer import Trainer
from tests.train.test_rope_schedule import PHASES, documents, run, stage
from tests.workspace import as_documents, final_files, make_workspace, metrics_without_time

DATA = SimpleNamespace(seed=3, tokenizer=SimpleNamespace(pad_token_id=0))


def loaders(schedule, parts, kind="pretrain", **keys):
    config = {"pretrain": PretrainConfig, "sft": SftConfig}[kind](
        **stage(schedule, kind=kind, data=[{"path": str(n)} for n in range(len(parts))], **keys)
    )
    return config, _loaders(config, DATA, parts)


# ---- data ----------------------------------------------------------------------------------------


def upsampled(longer_than):
    return [PHASES[0], {**PHASES[1], "upsample": {"longer_than": longer_than, "factor": 4}}]


def test_upsampling_without_a_document_that_long_is_refused():
    loaders(upsampled(45), [documents(10, 50)])
    with pytest.raises(DataError, match=r"rope_schedule\.1\.upsample\.longer_than=50: no document"):
        loaders(upsampled(50), [documents(10, 50)])


def test_an_epoch_holds_long_documents_as_often_as_the_factor_says():
    """Twelve short documents and three long ones, four times as often: as many as the short."""
    parts = [documents(*range(4, 16), 50, 51, 52)]
    _, (_, second) = loaders(upsampled(40), parts)
    found = []
    epoch = [next(iterator) for iterator in [iter(second)] for _ in range(len(second))]
    for batch in epoch:
        for row in batch.document_ids:
            found += [int((row == n).sum()) for n in np.unique(row[row > 0])]
    assert sorted(found) == sorted([*range(4, 16), *[50, 51, 52] * 4])


def test_a_phase_has_all_tokens_of_documents_that_are_longer_than_it():
    """Split to its length: neighbours share a token, so that each of the others is predicted."""
    _, (first, second) = loaders(PHASES, [documents(100, 20)])
    for loader, seq_len in ((first, 32), (second, 64)):
        iterator = iter(loader)
        batches = [next(iterator) for _ in range(len(loader))]
        labels = [b.labels[b.loss_mask > 0] for b in batches]
        assert all(b.input_ids.shape == (1, seq_len) for b in batches)
        assert sorted(np.concatenate(labels)) == sorted([*range(2, 101), *range(2, 21)])


def test_sft_has_phases_too_and_drops_what_is_longer_than_one():
    rows = [np.arange(1, n + 1, dtype=np.int32) for n in (14, 50)]
    answers = [np.arange(len(r)) >= 10 for r in rows]
    both = as_documents(list(map(EncodedDocument, rows, answers)))
    config, made = loaders(PHASES, [both], kind="sft")
    assert config.lengths() == {"rope_schedule.0.seq_len": 32, "rope_schedule.1.seq_len": 64}
    held = [int(next(iter(loader)).loss_mask.sum()) for loader in made]
    assert held == [4, 4 + 40]
    with pytest.raises(DataError, match="nothing to train on"):
        loaders(PHASES, [documents(50, 60)], kind="sft")


def test_batches_change_their_shape_exactly_with_the_phase():
    config, made = loaders(
        [{**PHASES[0], "micro_batch_size": 3}, {**PHASES[1], "tokens": 300, "steps": None}],
        [documents(10, 50)],
        grad_accum_steps=2,
    )
    prepared = SimpleNamespace(loaders=made)
    iterator = iter(batch_source(config, prepared))
    assert total_steps(config, prepared) == 4 + 3  # 300 tokens, 1 x 2 x 64 a step
    shapes = [next(iterator).input_ids.shape for _ in range(2 * 7)]
    assert shapes == [(3, 32)] * 8 + [(1, 64)] * 6


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "says"),
    [
        ({"rope_theta": 1.0}, r"rope_schedule\.1\.rope_theta: must be > 1"),
        ({"seq_len": 1}, r"rope_schedule\.1\.seq_len: must be >= 2"),
        ({"tokens": 0, "steps": None}, r"rope_schedule\.1\.tokens: must be >= 1"),
        ({"start_step": 9}, r"rope_schedule\.1\.start_step: unknown"),
        ({"upsample": {"longer_than": 8, "factor": 1.0}}, r"upsample\.factor: must be > 1"),
        ({"rope_theta": 100.0}, r"rope_schedule\.1\.rope_theta=100 lies below the 10000"),
    ],
)
def test_a_mistake_in_a_phase_has_its_path(phase, says):
    """A phase has a duration and no start, so that a schedule cannot have gaps."""
    second = {k: v for k, v in {**PHASES[1], **phase}.items() if v is not None}
    with pytest.raises(ConfigError, match=says):
        parse_config(PretrainConfig, stage([PHASES[0], second]), "recipe.yaml")


# ---- the base of every step ----------------------------------------------------------------------


def test_after_a_phase_that_keeps_the_base_and_beyond_the_end():
    found = RopeSchedule([Phase(16, 1, 2), Phase(32, 1, 2, 800.0, smooth=True)], 200.0)
    assert [found.at(step) for step in (1, 2, 3, 4, 9)] == [
        (200.0, 16), (200.0, 16), (pytest.approx(400.0), 32), (800.0, 32), (800.0, 32),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """One smooth phase that begins at the model's own base."""
    root = tmp_path_factory.mktemp("rise")
    recipe = yaml.safe_load(make_workspace(root).read_text())
    recipe["model"] |= {"rope_theta": 50.0}
    sft = {k: v for k, v in recipe["stages"][0].items() if k not in ("seq_len", "steps")}
    rise = {"rope_theta": 5000.0, "seq_len": 128, "steps": 4, "transition": "smooth"}
    recipe |= {"evaluation": None, "export": None}
    recipe["stages"] = [{**sft, "rope_schedule": [rise], "checkpoint": {"every_steps": 100}}]
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def test_a_rise_from_the_models_base_goes_on_from_where_the_stage_began(
    workspace, tmp_path, monkeypatch
):
    """The base that the stage began with is not the one in the checkpoint."""
    assert run("run", workspace / "recipe.yaml", "--run-dir", tmp_path / "whole") == 0
    whole = metrics_without_time(tmp_path / "whole")
    expected = [50 * 100 ** (i / 4) for i in (1, 2, 3, 4)]
    assert [line["rope_theta"] for line in whole] == pytest.approx(expected)
    original = Trainer.train_step

    def step_with_signal(self, *arguments):
        result = original(self, *arguments)
        if result.step == 2 and not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(Trainer, "train_step", step_with_signal)
    directory = tmp_path / "cut"
    assert run("run", workspace / "recipe.yaml", "--run-dir", directory) == 3
    saved = directory / "01-sft/checkpoints/step_000002/config.json"
    assert json.loads(saved.read_text())["rope_theta"] == pytest.approx(500.0)
    assert run("run", workspace / "recipe.yaml", "--run-dir", directory) == 0
    assert metrics_without_time(directory) == whole
    assert final_files(directory) == final_files(tmp_path / "whole")
