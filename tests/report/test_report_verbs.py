"""The verbs `report` and `status --follow`."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from ernie_train.cli.main import main
from ernie_train.cli.status import print_status
from ernie_train.cli.watch import follow_status, report_runs
from ernie_train.core.cpu import __version__
from ernie_train.core.errors import UserError
from ernie_train.core.terminal import Terminal
from ernie_train.core.yaml import dump_yaml, load_yaml
from ernie_train.io.files import fingerprint, write_json
from ernie_train.io.run_dir import RunLock
from ernie_train.report import read_run
from tests.report.made_runs import HOSTILE, make_run
from tests.report.test_page import CONTROLS

# ---- the verbs


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("case", ["gone", "file", "other directory", "foreign out", "no parent"])
def test_mistakes_are_one_message(
    made: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.html").write_text("mine")
    (tmp_path / "empty").mkdir()
    arguments = {
        "gone": [tmp_path / "gone"],
        "file": [tmp_path / "notes.html"],
        "other directory": [tmp_path / "empty"],
        "foreign out": [made, "--out", tmp_path / "notes.html"],
        "no parent": [made, "--out", tmp_path / "no/r.html"],
    }[case]
    assert run("report", *arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "Traceback" not in told
    assert (tmp_path / "notes.html").read_text() == "mine"


def test_watching_ends_when_the_run_is_complete(made: Path, tmp_path: Path) -> None:
    done = (made / "02-rl/DONE").read_text()
    (made / "02-rl/DONE").unlink()
    out, sizes = tmp_path / "page.html", []

    def sleep(seconds: float) -> None:
        sizes.append(out.read_text().count(">done<"))
        assert len(sizes) < 4
        if len(sizes) == 2:
            (made / "02-rl/DONE").write_text(done)

    report_runs([made], out, Terminal(file=io.StringIO()), watch=True, sleep=sleep)
    assert sizes == [1, 1] and out.read_text().count(">done<") == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_status_follows_until_nobody_runs_it(tmp_path: Path, terminal: bool) -> None:
    made = make_run(tmp_path / "run", text=HOSTILE)
    path = made / "02-rl/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    (made / "02-rl/DONE").unlink()
    path.write_text("".join(lines[:3]))
    console = Terminal(file=io.StringIO(), force_terminal=terminal, width=160)
    lock = RunLock(made)
    lock.acquire()
    rounds: list[float] = []

    def sleep(seconds: float) -> None:
        rounds.append(seconds)
        if len(rounds) == 2:
            path.write_text("".join(lines))
        if len(rounds) == 4:
            lock.release()

    follow_status(made, console, sleep=sleep)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    if not terminal:
        steps = re.findall(r"rl  (\S+ ?\S*)  step (\d+) of 12", shown)
        assert steps == [("running", "3"), ("running", "12"), ("broken off", "12")]
        assert not CONTROLS.search(shown)
    else:
        assert shown.count("entropy fell to") == 1  # once, above the table
        for sequence in ("\x1b[2J", "\x1b]8", "\x1b]52", "\u202e"):
            assert sequence not in shown


def test_status_tells_a_stage_that_was_stopped_from_one_that_lost_steps(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    recipe = load_yaml(made / "recipe.yaml") | {"export": None}
    (made / "recipe.yaml").write_text(dump_yaml(recipe))
    written = {"ernie_train": __version__, "recipe": fingerprint(dump_yaml(recipe))}
    write_json(made / "environment.json", written)
    (made / "02-rl/DONE").unlink()

    def told() -> str:
        console = Terminal(file=io.StringIO(), width=200)
        print_status(made, console)
        return console.file.getvalue()  # type: ignore[attr-defined]

    assert "broken off" in told()
    (made / "02-rl/checkpoints/step_000012").mkdir(parents=True)
    assert "stopped, saved at step 12 of 12" in told() and "60 of 60" in told()
    with RunLock(made):
        assert "running" in told() and "stopped" not in told()


def test_a_directory_that_is_no_run_cannot_be_followed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        follow_status(tmp_path, Terminal(file=io.StringIO()))
    assert read_run(make_run(tmp_path / "run")).is_complete
