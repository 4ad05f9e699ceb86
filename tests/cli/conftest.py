"""What tests of the command line share: a directory with a small model, and the command in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ernie_train.cli.main import main
from tests.workspace import make_workspace, save_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("init")
    make_workspace(root)
    save_model(root)
    return root


@pytest.fixture
def cli(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(str(ended.value.code)), printed.out + printed.err

    return run
