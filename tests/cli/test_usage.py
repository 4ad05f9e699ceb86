"""Mistakes on the command line: what other kits call otherwise, and names without their place."""

import pytest
from typer.main import get_command

from ernie_train.cli.main import app, main


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "r.yaml"], "No such command 'train'; here it is ernie-train run RECIPE"),
        (["infer", "m"], "here it is ernie-train generate MODEL"),
        (["run", "r.yaml", "--max-steps", "3"], "without dashes: stages.0.steps=..."),
        (["check", "r.yaml", "--learning_rate=1"], "without dashes: stages.0.optim.lr=..."),
        (["run", "r.yaml", "--output_dir", "o"], "where to write is said by --run-dir"),
        (["run", "r.yaml", "--nonsense"], "without dashes: stages.0.optim.lr=..."),
        (["run", "mine"], "mine: no such file; did you mean mine.yaml?"),
        (["chat", "mine"], "did you mean runs/mine?"),
        (["status", "mine"], "did you mean runs/mine?"),
        (["report", "mine"], "did you mean runs/mine?"),
    ],
)
def test_names_of_other_kits_and_short_names_are_told_in_ours(
    tmp_path, monkeypatch, capsys, arguments, told
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("{}")
    (tmp_path / "runs/mine").mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())


EVAL = ["eval", "m", "--data", "d.jsonl"]
SCORE = ["score", "--reward", "math", "--data", "d.jsonl", "--completions", "c.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["export", "m", "o", "--adapter", "--dtype", "float32"], "--dtype and --adapter exclude"),
        (["export", "m", "o", "--adapter", "--max-shard-size", "1GB"], "--max-shard-size and"),
        (["export", "m", "o", "--adapter", "--referee", "p"], "--referee and --adapter exclude"),
        (["export", "m", "o", "--adapter", "--quantize", "int8"], "--quantize and --adapter"),
        ([*EVAL, "--force"], "--force replaces what lies at --out"),
        ([*SCORE, "--force"], "--force replaces what lies at --out"),
        (["chat", "m", "--force"], "--force replaces what lies at --transcript"),
        (["preview", "d.jsonl", "--row", "1", "--rows", "3"], "--rows and --row exclude"),
        (["preview", "d.jsonl", "--row", "1", "--max-rows", "9"], "--max-rows and --row exclude"),
        (["preview", "d.jsonl", "--seq-len", "9"], "--seq-len needs --model or --tokenizer"),
        (["preview", "d.jsonl", "--max-tokens", "9"], "--max-tokens needs --model or --tokenizer"),
        (["preview", "d.jsonl", "--template", "x"], "--template needs --model or --tokenizer"),
        (["import", "m", "o", "--seed", "0"], "--seed needs --experts and --top-k"),
        (["import", "m", "o", "--noise", "0.1"], "--noise needs --experts and --top-k"),
    ],
)
def test_an_option_without_an_effect_is_refused_before_any_work(
    tmp_path, monkeypatch, capsys, arguments, told
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_what_the_environment_sets_is_no_mistake(tmp_path, monkeypatch, capsys):
    """ERNIE_TRAIN_REFEREE holds for every export, also for one that it has nothing to prove of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERNIE_TRAIN_REFEREE", "python")
    with pytest.raises(SystemExit):
        main(["export", "m", "o", "--adapter"])
    told = capsys.readouterr().err
    assert "exclude" not in told and "m: " in told


def test_every_argument_and_option_says_what_it_means():
    for verb, command in get_command(app).commands.items():
        silent = [one.name for one in command.params if not (one.help or "").strip()]
        assert silent == [], verb
