"""Mistakes on the command line: what other kits call otherwise, and names without their place."""

import pytest

from ernie_train.cli.main import main


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
