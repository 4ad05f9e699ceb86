"""`run --extend`: a last stage trained on, as if it had been as long from the start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_train.cli.main import main
from ernie_train.rewards.scoring import composition
from ernie_train.train.trainer import Trainer
from tests.run.recipe_spies import ScoringHere
from tests.workspace import final_files, make_workspace, metrics_without_time, rows, write_rows

RATE = {"lr": 0.003, "schedule": "constant"}
DATA = [{"path": "{root}/train.jsonl", "max_examples": 24}]
KINDS: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft", "data": DATA, "seq_len": 64, "steps": 2},
    "epochs": {"kind": "sft", "data": DATA, "seq_len": 64, "epochs": 1, "micro_batch_size": 4},
    "lora": {"kind": "sft", "data": DATA, "seq_len": 64, "steps": 2, "lora": {"rank": 2}},
    "phases": {
        "kind": "pretrain", "data": [{"path": "{root}/texts.jsonl"}],
        "rope_schedule": [{"rope_theta": 1e6, "seq_len": 32, "steps": 1},
                          {"rope_theta": 2e6, "seq_len": 64, "steps": 1}],
    },
    "dpo": {"kind": "dpo", "data": "{root}/pairs.jsonl", "seq_len": 64, "steps": 2,
            "pairs_per_step": 2},
    "upo": {
        "kind": "upo", "data": [{"path": "{root}/prompts.jsonl"}], "iterations": 2,
        "reward": {"parts": [{"name": "exact"}, {"python": "{root}/reward.py:score"}]},
        "rollout": {"prompts_per_iteration": 2, "group_size": 4, "max_new_tokens": 4,
                    "max_prompt_tokens": 64},
        # A KL in the reward, so that groups without a right answer are learnt from too.
        "policy": {"kl": {"coef": 0.1, "place": "reward"}}, "canaries": 0,
    },
}  # fmt: skip
LONGER: dict[str, dict[str, Any]] = {
    "sft": {"steps": 4}, "lora": {"steps": 4}, "dpo": {"steps": 4}, "upo": {"iterations": 3},
    "epochs": {"epochs": 2},
    "phases": {"rope_schedule": [KINDS["phases"]["rope_schedule"][0],
                                 {**KINDS["phases"]["rope_schedule"][1], "steps": 3}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("extend")
    make_workspace(root)
    write_rows(root / "prompts.jsonl", [{**r, "messages": r["messages"][:1]} for r in rows(8, 7)])
    write_rows(root / "texts.jsonl", [{"text": "1 + 2 = 3. " * n} for n in range(1, 13)])
    pairs = [{"prompt": f"{a}?", "chosen": f"{a}. " * 3, "rejected": f"{a}"} for a in range(6)]
    write_rows(root / "pairs.jsonl", pairs)
    (root / "reward.py").write_text(
        "def score(row, completion):\n    return float(sum(map(ord, completion)) % 2)\n"
    )
    return root


@pytest.fixture
def run(root, capsys, monkeypatch):
    monkeypatch.setattr(composition, "ScoringService", ScoringHere)
    monkeypatch.delenv("ERNIE_TRAIN_REFEREE", raising=False)

    def started(run_dir: Path, kind: str, *options: str, more: Any = (), **changes: Any) -> str:
        recipe = yaml.safe_load((root / "recipe.yaml").read_text())
        stage = {"name": "sft", "micro_batch_size": 2, "optim": RATE,
                 "checkpoint": {"every_steps": 50}, **KINDS[kind], **changes}  # fmt: skip
        recipe |= {"stages": [stage], "evaluation": None, "export": None, **dict(more)}
        path = root / f"{run_dir.name}.yaml"
        path.write_text(yaml.safe_dump(recipe).replace("{root}", str(root)))
        with pytest.raises(SystemExit) as stopped:
            main(["run", str(path), "--run-dir", str(run_dir), *options])
        out, err = capsys.readouterr()
        return f"{stopped.value.code or 0} " + " ".join((out + err).split())

    return started


def _without_paths(run_dir: Path) -> dict[str, bytes]:
    """Return the last checkpoint's files; those of LoRA name the base's directory."""
    name = str(run_dir).encode()
    return {file: content.replace(name, b"RUN") for file, content in final_files(run_dir).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_extended_stage_is_one_of_that_length_from_the_start(run, tmp_path, kind):
    assert run(tmp_path / "extended", kind)[0] == "0"
    told = run(tmp_path / "extended", kind, "--extend", **LONGER[kind])
    assert told[0] == "0" and "stage sft is trained on from step" in told
    assert run(tmp_path / "whole", kind, **LONGER[kind])[0] == "0"
    expected, found = (_without_paths(tmp_path / name) for name in ("whole", "extended"))
    assert len(expected) > 2 and found == expected
    of_both = [metrics_without_time(tmp_path / name) for name in ("extended", "whole")]
    assert of_both[0] == of_both[1]


def test_another_rate_acts_and_what_was_made_of_the_old_model_is_made_anew(run, root, tmp_path):
    more = {"evaluation": {"path": f"{root}/test.jsonl", "max_new_tokens": 2, "max_examples": 2},
            "export": {"dtype": "float32"}}  # fmt: skip
    place = tmp_path / "run"
    assert run(place, "sft", more=more)[0] == "0"
    before = {name: (place / name).read_bytes() for name in ("evaluation.json", "export.json")}
    wanted = {"steps": 5, "optim": {"lr": 0.001, "schedule": "linear"}}
    refused = run(place, "sft", more=more, **wanted)
    assert refused[0] == "2" and "optim.lr: 0.003 -> 0.001" in refused
    assert "or --extend to train it on with these settings" in refused
    assert run(place, "sft", "--extend", more=more, **wanted)[0] == "0"
    lines = metrics_without_time(place)
    assert [line["lr"] for line in lines] == pytest.approx([0.003] * 2 + [0.0006, 0.0004, 0.0002])
    for name, content in before.items():
        assert (place / f"{name}.before-1").read_bytes() == content
        assert (place / name).read_bytes() != content
    exported = [(place / name / "model.safetensors").read_bytes()
                for name in ("export", "export.before-1")]  # fmt: skip
    assert exported[0] != exported[1]
    record = json.loads((place / "01-sft/stage.json").read_text())
    (extension,) = record["extensions"]
    assert extension["at_step"] == 2 and extension["settings"]["steps"] == 2
    again = run(place, "sft", "--extend", more=more, **wanted)
    assert again[0] == "0" and "was not trained with other settings" in again


@pytest.fixture
def not_finite_at_step(monkeypatch):
    """Return a function that makes gradients NaN in the step after so many, or 0 for none."""
    refuse, broken = Trainer._refuse_non_finite, [0]

    def after(trainer: Any, metrics: dict[str, float]) -> None:
        if trainer.step == broken[0] > 0:
            metrics["grad_norm"] = float("nan")
        refuse(trainer, metrics)

    monkeypatch.setattr(Trainer, "_refuse_non_finite", after)
    return lambda steps: broken.__setitem__(0, steps)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_before_one_that_is_not_finite_are_kept(run, tmp_path, not_finite_at_step, kind):
    """With the fault gone the same command ends with the bits of a run that had none."""
    assert run(tmp_path / "whole", kind)[0] == "0"
    not_finite_at_step(1)
    told = run(tmp_path / "cut", kind)
    assert told[0] == "4" and "--extend allows; " in told and "step_000001 is saved" in told, told
    if kind == "phases":  # not that of the step that failed
        config = json.loads(
            (tmp_path / "cut/01-sft/checkpoints/step_000001/config.json").read_text()
        )
        assert config["rope_theta"] == 1e6
    not_finite_at_step(0)
    assert run(tmp_path / "cut", kind)[0] == "0"
    expected, found = (_without_paths(tmp_path / name) for name in ("whole", "cut"))
    assert len(expected) > 2 and found == expected
    of_both = [metrics_without_time(tmp_path / name) for name in ("cut", "whole")]
    assert of_both[0] == of_both[1]


def test_an_iteration_that_was_updated_in_part_is_not_saved(run, tmp_path, not_finite_at_step):
    twice = {"policy": {**KINDS["upo"]["policy"], "update_epochs": 2}}
    not_finite_at_step(3)  # the second of two steps of the second iteration
    told = run(tmp_path / "cut", "upo", **twice)
    assert told[0] == "4" and "nothing was to be saved yet" in told, told


def test_a_lower_rate_goes_on_in_a_stage_that_others_follow(run, tmp_path, not_finite_at_step):
    def two(lr: float) -> dict[str, Any]:
        stage = {**KINDS["sft"], "micro_batch_size": 2, "optim": {**RATE, "lr": lr}}
        return {"stages": [{**stage, "name": "one"}, {**stage, "name": "two"}]}

    not_finite_at_step(1)
    assert run(tmp_path / "run", "sft", more=two(0.003))[0] == "4"
    not_finite_at_step(0)
    refused = run(tmp_path / "run", "sft", more=two(0.001))
    assert refused[0] == "2" and "or --extend to train it on" in refused, refused
    assert run(tmp_path / "run", "sft", "--extend", more=two(0.001))[0] == "0"
    rates = [line["lr"] for line in metrics_without_time(tmp_path / "run", "01-one")]
    assert rates == [0.003, 0.001]
    assert (tmp_path / "run/02-two/DONE").exists()


def test_a_kill_while_a_stage_is_opened_again_loses_nothing(run, tmp_path):
    assert run(tmp_path / "run", "sft")[0] == "0"
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    (tmp_path / "killed/01-sft/DONE").unlink()
    for name in ("run", "killed"):
        assert run(tmp_path / name, "sft", "--extend", steps=4)[0] == "0"
    assert final_files(tmp_path / "killed") == final_files(tmp_path / "run")


def test_the_hint_names_extend_only_where_it_would_be_taken(run, tmp_path):
    place, slower = tmp_path / "run", {"optim": {**RATE, "lr": 0.001}}
    assert run(place, "sft")[0] == "0"
    for changes, offered in (
        ({"steps": 5}, True),
        ({"steps": 5, **slower}, True),
        (slower, False),
        ({"steps": 1}, False),
        ({"steps": None, "epochs": 2}, False),
        ({"steps": 5, "seq_len": 96}, False),
    ):
        told = run(place, "sft", **changes)
        assert told[0] == "2" and "or --from sft to repeat it" in told.replace(", or", " or")
        assert ("--extend" in told) == offered, told
    (place / "01-sft/DONE").unlink()
    assert "--extend" in run(place, "sft", **slower), "an unfinished one may get a rate alone"


def test_a_stage_whose_checkpoints_are_gone_is_not_extended(run, tmp_path):
    place = tmp_path / "run"
    assert run(place, "sft")[0] == "0"
    shutil.rmtree(place / "01-sft/checkpoints")
    before = sorted((p, p.stat().st_mtime_ns) for p in (place / "01-sft").rglob("*"))
    told = run(place, "sft", "--extend", steps=4)
    assert told[0] == "2" and "no checkpoint" in told and "--from sft" in told, told
    assert sorted((p, p.stat().st_mtime_ns) for p in (place / "01-sft").rglob("*")) == before
    assert "--extend" not in run(place, "sft", steps=4)


def test_what_is_no_extension_is_refused(run, tmp_path):
    place = tmp_path / "run"
    assert run(place, "sft")[0] == "0"
    done = (place / "01-sft/DONE").read_bytes()
    for changes, told in (
        ({"steps": 1}, "has been trained with steps=2; give it more"),
        ({"optim": {**RATE, "lr": 0.001}}, "has been trained with steps=2; give it more"),
        ({"steps": None, "epochs": 2}, "lengthen it in the same unit"),
        ({"steps": 5, "seq_len": 96}, "seq_len: 64 -> 96"),
    ):
        message = run(place, "sft", "--extend", **changes)
        assert message[0] == "2" and told in message, message
    assert "give one" in run(place, "sft", "--extend", "--from", "sft", steps=5)
    assert (place / "01-sft/DONE").read_bytes() == done
