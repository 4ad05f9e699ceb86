"""Names and hashes of inputs are a format on disk: run directories of earlier versions continue."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from ernie_train.core.config import parse_config
from ernie_train.core.errors import ConfigError, DataError
from ernie_train.rl.config import PolicyConfig, UpoConfig
from ernie_train.run import lineage
from ernie_train.run.lineage import (
    HashMemory,
    Lineage,
    hash_files,
    stage_changes,
    stage_record,
)
from ernie_train.run.stages import AnyStageConfig
from tests.weights.checkpoints import make_store, save


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_recorded_names_and_hashes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("1\n")
    first = Lineage("7", "m", "t").with_data([tmp_path / "a.jsonl"])
    data = sha256(sha256("1\n"))
    assert first.to_dict() == {"seed": "7", "model": "m", "tokenizer": "t", "data": data}
    after = first.after("pre", {"steps": 12, "checkpoint": "step_000012"})
    result = sha256('{"checkpoint":"step_000012","steps":12}')
    assert after.to_dict() == {**first.to_dict(), "after pre": result}
    again = after.after("sft", {"steps": 12, "checkpoint": "step_000012"})
    assert again.to_dict() == {**after.to_dict(), "after sft": result}
    assert Lineage("7", "m", "t", weights="w").to_dict()["weights"] == "w"


def test_the_hash_covers_every_file_below_a_directory(tmp_path: Path) -> None:
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "b").write_text("2")
    (tmp_path / "d" / "sub" / "c").write_text("3")
    (tmp_path / "a").write_text("1")
    expected = sha256(sha256("1") + sha256(sha256("2") + sha256("3")))
    assert hash_files([tmp_path / "a", tmp_path / "d"]) == expected
    with pytest.raises(DataError, match="nowhere: no such file"):
        hash_files([tmp_path / "nowhere"])


def test_the_hash_covers_what_lies_behind_links(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "elsewhere" / "a.jsonl").write_text("1")
    (tmp_path / "d" / "shard").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "circle").symlink_to(tmp_path / "d")
    assert hash_files([tmp_path / "d"]) == sha256(sha256("1"))


def test_the_hash_of_a_checkpoint_is_that_of_what_stays(tmp_path: Path) -> None:
    """Its run removes the optimizer state, while another run has begun from its weights."""
    store = make_store(tmp_path)
    paths = [tmp_path / "step_000010"]
    save(store, 10)
    before = hash_files(paths), hash_files([tmp_path])
    assert store.remove_optimizer() > 0
    assert (hash_files(paths), hash_files([tmp_path])) == before
    config = paths[0] / "config.json"
    config.write_text(config.read_text() + " ")
    assert hash_files(paths) != before[0]


def test_a_manifest_elsewhere_counts(tmp_path: Path) -> None:
    for text in ("1", "2"):
        (tmp_path / "MANIFEST.json").write_text(text)
        assert hash_files([tmp_path]) == sha256(sha256(text))


def test_the_hash_of_a_pattern_is_that_of_its_files(tmp_path: Path) -> None:
    for name, text in (("b.jsonl", "2"), ("a.jsonl", "1"), ("c.csv", "3")):
        (tmp_path / name).write_text(text)
    assert hash_files([tmp_path / "*.jsonl"]) == sha256(sha256("1") + sha256("2"))


def test_no_file_passes_from_one_path_to_another_unnoticed(tmp_path: Path) -> None:
    for name in ("one/a", "one/b", "two/c", "short/a", "long/b", "long/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name[-1])
    together = hash_files([tmp_path / "one", tmp_path / "two"])
    assert together != hash_files([tmp_path / "short", tmp_path / "long"])


def test_a_hash_is_remembered_until_size_or_time_changes(tmp_path, monkeypatch) -> None:
    file, kept = tmp_path / "a", tmp_path / "hashes.json"
    file.write_text("1")
    os.utime(file, (1, 1))
    first = HashMemory(kept)
    assert first.sha256(file) == sha256("1")
    first.save()
    with monkeypatch.context() as patch:
        patch.delattr(lineage, "digest_file")
        assert HashMemory(kept).sha256(file) == sha256("1")
    file.write_text("2")
    assert HashMemory(kept).sha256(file) == sha256("2")
    file.write_text("33")
    os.utime(file, (1, 1))
    assert HashMemory(kept).sha256(file) == sha256("33")
    kept.write_text("[1, 2")
    assert HashMemory(kept).sha256(file) == sha256("33")


STAGES = {
    "sft": {"data": [{"path": "a.jsonl"}], "seq_len": 32, "steps": 4},
    "dpo": {"data": "a.jsonl", "seq_len": 32, "steps": 4, "pairs_per_step": 2},
    "reward": {"data": "a.jsonl", "seq_len": 32, "steps": 4, "pairs_per_step": 2,
               "validation": "b.jsonl"},
    "upo": {
        "data": [{"path": "a.jsonl"}], "reward": "exact", "iterations": 4,
        "rollout": {"max_new_tokens": 4, "prompts_per_iteration": 2},
        "evaluation": {"path": "a.jsonl", "every_iterations": 2},
    },
}  # fmt: skip
COMMON = [
    {"checkpoint": {"every_steps": 7, "keep_last": 5}}, {"moe_health": {"probe_tokens": 9}},
    {"gate": {"metric": "eval/mean", "at_least": 0.5}}, {"max_bad_fraction": 0.5},
]  # fmt: skip
HARMLESS = {
    "sft": [*COMMON, {"data": [{"path": "moved/a.jsonl"}]}],
    "dpo": [*COMMON, {"data": "moved/a.jsonl"}],
    "reward": [
        *(change for change in COMMON if "gate" not in change), {"data": "moved/a.jsonl"},
        {"gate": {"metric": "eval/accuracy", "at_least": 0.5}}, {"validation": "moved/b.jsonl"},
    ],
    "upo": [
        *COMMON, {"samples_per_iteration": 1}, {"canaries": 0}, {"term_norms_every": 2},
        {"rollout": {**STAGES["upo"]["rollout"], "dump": True}},
        {"evaluation": {"path": "moved/a.jsonl", "every_iterations": 4}},
    ],
}  # fmt: skip
DECISIVE = {
    "sft": [{"seq_len": 64}, {"optim": {"lr": 2.0}}, {"data": [{"path": "a.jsonl", "weight": 2}]}],
    "dpo": [{"beta": 0.2}, {"seq_len": 64}, {"pairs_per_step": 4}],
    "reward": [{"center_coef": 0.2}, {"seq_len": 64}, {"pairs_per_step": 4}],
    "upo": [
        {"policy": {"aggregation": "sequence"}},
        {"rollout": {**STAGES["upo"]["rollout"], "top_k": 3}},
        {"reward": {"name": "exact", "weight": 2.0}}, {"curriculum": {"start": 1}},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "best", "scoring"),
    [
        ("sft", "validation_loss", {"validate_every_steps": 2}),
        ("reward", "eval/loss", {"validate_every_steps": 2}),
        ("upo", "eval/mean", {"evaluation": {"path": "a.jsonl", "every_iterations": 1}}),
    ],
)
@pytest.mark.parametrize(
    ("using", "counts"),
    [
        ({}, False), ({"load_best_at_end": True}, True), ({"early_stopping_patience": 3}, True),
    ],
)  # fmt: skip
def test_what_chooses_the_scored_checkpoints_counts_where_scores_are_used(
    kind: str, best: str, scoring: dict[str, Any], using: dict[str, Any], counts: bool
) -> None:
    settings = {"best_metric": best, **using}
    base = {"checkpoint": {"every_steps": 4, **settings}}
    base |= {"validation": [{"path": "b.jsonl"}]} if kind == "sft" else {}
    told = changes(kind, scoring, base)
    (name,) = scoring
    assert [name in line for line in told] == [True] * counts, told
    told = changes(kind, {"checkpoint": {"every_steps": 8, **settings}}, base)
    assert ["checkpoint.every_steps: 4 -> 8" in line for line in told][:1] == [True] * counts


def changes(kind: str, change: dict[str, Any], base: Mapping[str, Any] = {}) -> list[str]:
    parse = TypeAdapter(AnyStageConfig).validate_python
    common = {"name": "x", "kind": kind, "micro_batch_size": 2, "optim": {"lr": 1.0}}
    before, now = (parse({**common, **STAGES[kind], **base, **more}) for more in ({}, change))
    made_from = Lineage("7", "m", "t")
    return stage_changes(now, made_from, stage_record(before, made_from))


@pytest.mark.parametrize("kind", STAGES)
def test_settings_that_change_no_result_may_change(kind: str) -> None:
    assert [changes(kind, change) for change in HARMLESS[kind]] == [[]] * len(HARMLESS[kind])


@pytest.mark.parametrize("kind", STAGES)
def test_settings_that_came_later_are_no_change_at_their_defaults(kind: str) -> None:
    parse = TypeAdapter(AnyStageConfig).validate_python
    stage = parse(
        {"name": "x", "kind": kind, "micro_batch_size": 2, "optim": {"lr": 1.0}, **STAGES[kind]}
    )
    made_from = Lineage("7", "m", "t")
    record = stage_record(stage, made_from)
    for section, key in (("checkpoint", "early_stopping_patience"), ("optim", "eps")):
        del record["settings"][section][key]
    assert stage_changes(stage, made_from, record) == []
    record["settings"]["optim"]["lr"] = 2.0
    assert stage_changes(stage, made_from, record) == ["optim.lr: 2.0 -> 1.0"]


ROLLOUT = STAGES["upo"]["rollout"]
AUDIT = {"name": "exact", "share": 0.01}
IDLE = [
    ({"policy": {"clip_ratio": 0.3}}, {}),
    ({"policy": {"clip_ratio": 0.3, "clip_ratio_high": 0.4}}, {"policy": {}}),
    ({"share_prompts": True, "micro_batch_size": 1}, {"micro_batch_size": 1}),
    ({"audit_reward": AUDIT}, {}),
    ({"rollout": {**ROLLOUT, "replay": "x", "refill_rounds": 2}},
     {"rollout": {**ROLLOUT, "replay": "x"}}),
]  # fmt: skip


@pytest.mark.parametrize(("recorded", "now"), IDLE)
def test_a_stage_goes_on_without_settings_that_had_no_effect(recorded, now) -> None:
    made_from = Lineage("7", "m", "t")
    common = {"name": "x", "kind": "upo", "micro_batch_size": 2, "optim": {"lr": 1.0}}
    common |= STAGES["upo"]
    before = parse_config(UpoConfig, {**common, **recorded}, "stage", recorded=True)
    with pytest.raises(ConfigError):  # so that the lines must go
        parse_config(UpoConfig, {**common, **recorded}, "stage")
    record = stage_record(before, made_from)
    stage = parse_config(UpoConfig, {**common, **now}, "stage")
    assert stage_changes(stage, made_from, record) == []
    longer = stage.model_copy(update={"policy": PolicyConfig(minibatches=2, clip_ratio=0.3)})
    assert any("policy.clip_ratio" in line for line in stage_changes(longer, made_from, record))


@pytest.mark.parametrize("kind", STAGES)
def test_settings_that_change_results_may_not(kind: str) -> None:
    assert all(changes(kind, change) for change in DECISIVE[kind])
