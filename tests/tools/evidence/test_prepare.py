"""What sweeps make before their first run: whole or not at all."""

from __future__ import annotations

from pathlib import Path

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

    def measure(*arguments: str) -> None:
        Path(arguments[4]).write_text('{"pass@1": 0.5}')

    monkeypatch.setattr(make_data, "main", make)
    monkeypatch.setattr(prepare, "make_start", lambda out, given, overrides: out / "start")
    monkeypatch.setattr(prepare, "run_program", measure)
    with pytest.raises(KeyboardInterrupt):
        prepare.rl_start(tmp_path, "recipe.yaml", problems=3)
    for _ in range(2):
        starts = prepare.rl_start(tmp_path, "recipe.yaml", problems=3)
    assert len(calls) == 2 and (tmp_path / "rows/math.jsonl").read_text() == "{}\n" * 2
    assert starts == {"start": {"pass@1": 0.5}, "loose-start": {"pass@1": 0.5}}
