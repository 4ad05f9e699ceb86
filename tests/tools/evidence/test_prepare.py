"""What sweeps make before their first run: whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.data import make_data
from tools.evidence import prepare


def test_rows_of_an_interrupted_command_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def make(arguments: list[str]) -> None:
        calls.append(arguments)
        rows = tmp_path / "rows"
        rows.mkdir(exist_ok=True)
        (rows / "math.jsonl").write_text("{}\n" * len(calls))
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(make_data, "main", make)
    monkeypatch.setattr(prepare, "make_start", lambda out, given, overrides: None)
    with pytest.raises(KeyboardInterrupt):
        prepare.rl_start(tmp_path, "recipe.yaml")
    for _ in range(2):
        assert prepare.rl_start(tmp_path, "recipe.yaml") == {}
    assert len(calls) == 2 and (tmp_path / "rows/math.jsonl").read_text() == "{}\n" * 2


def test_starts_of_rl_are_measured_once_and_on_fresh_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []
    measured: list[dict[str, Any]] = []

    def make(arguments: list[str]) -> None:
        made.append(arguments)
        Path(arguments[1]).mkdir()

    def measure(*arguments: str) -> None:
        measured.append(json.loads(arguments[5]))
        Path(arguments[4]).write_text(json.dumps({"accuracy": len(measured)}))

    monkeypatch.setattr(make_data, "main", make)
    monkeypatch.setattr(prepare, "run_program", measure)
    for _ in range(2):
        starts = prepare.rl_test(tmp_path, "recipe.yaml", problems=3)
    assert starts == {"start": {"accuracy": 1}, "loose-start": {"accuracy": 2}}
    assert len(made) == 1 and str(make_data.SEED) not in made[0]
    held_out = str(tmp_path / "problems" / "test")
    assert made[0][1] == str(tmp_path / "problems")
    assert [(m["domain"], m["problems"], m["held_out"]) for m in measured] == [
        (measure_domain, 3, held_out) for measure_domain in ("logic", "math")
    ]
