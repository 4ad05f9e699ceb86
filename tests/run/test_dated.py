"""The date of templates that write one: fixed at a run's first start, the same ever after."""

from __future__ import annotations

import datetime

import pytest
import yaml

from ernie_train.cli.main import main
from ernie_train.data import shipped_template
from ernie_train.run import recipe as module
from tests.workspace import make_workspace


def test_a_run_that_goes_on_another_day_writes_the_first_one(tmp_path, monkeypatch, capsys):
    make_workspace(tmp_path)
    source = "{{- strftime_now('%d %b %Y\\n') -}}" + shipped_template("ernie_plain").source
    (tmp_path / "dated.jinja").write_text(source)

    class Day(datetime.date):
        now = datetime.date(2026, 1, 31)

        @classmethod
        def today(cls) -> datetime.date:
            return cls.now

    class Calendar:
        date = Day

    monkeypatch.setattr(module, "datetime", Calendar)
    arguments = ["run", str(tmp_path / "recipe.yaml"), "--run-dir", str(tmp_path / "run"),
                 "evaluation=null", "export=null", "stages.sft.steps=1", "stages.sft.validation=[]",
                 "stages.sft.checkpoint={every_steps: 1}", "stages.sft.validate_every_steps=null",
                 f"chat.template={tmp_path / 'dated.jinja'}"]  # fmt: skip

    def run(*more: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *more])
        return int(stopped.value.code or 0)

    assert run() == 0, capsys.readouterr().err
    recorded = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert str(recorded["chat"]["date"]) == "2026-01-31"
    exported = (tmp_path / "run/tokenizer/chat_template.jinja").read_text()
    assert exported == source, "a server writes its own day"
    Day.now = datetime.date(2026, 2, 1)
    assert run() == 0, "the same texts: the stage is done"
    assert run("chat.date=2026-02-01") == 2, "other texts"
    assert "input.tokenizer" in capsys.readouterr().err
