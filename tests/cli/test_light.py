"""Commands that people wait for load neither Paddle nor numpy, and nothing else that takes long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ernie_train
from ernie_train import __main__ as program
from ernie_train.core.yaml import dump_yaml
from ernie_train.io.files import fingerprint, write_json, write_text
from ernie_train.io.run_dir import RunLock

HEAVY = {
    "paddle", "paddlenlp", "numpy", "pyarrow", "matplotlib", "visualdl", "scipy",
    "tokenizers", "sentencepiece", "jinja2", "safetensors", "threadpoolctl", "math_verify",
}  # fmt: skip
SHOW = (
    "import json, sys\nfrom ernie_train.cli.main import _run\n"
    "status, message = _run(sys.argv[1:])\n"
    "print('\\n' + json.dumps([status, message, sorted({n.split('.')[0] for n in sys.modules})]))"
)
RECIPE = {
    "name": "first",
    "stages": [
        {"name": "sft", "kind": "sft", "gate": None},
        {
            "name": "judge",
            "kind": "reward",
            "gate": {"metric": "eval/accuracy", "at_least": 0.9, "max_regression": None},
        },
        {
            "name": "rl",
            "kind": "upo",
            "gate": {"metric": "eval/mean", "at_least": 0.5, "max_regression": None},
        },
    ],
    "evaluation": {"path": "data/test"},
    "export": None,
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of this version whose stages are finished; the last one was evaluated."""
    text = dump_yaml(RECIPE)
    write_text(tmp_path / "recipe.yaml", text)
    facts = {"ernie_train": ernie_train.__version__, "recipe": fingerprint(text)}
    write_json(tmp_path / "environment.json", facts)
    for stage in ("01-sft", "02-judge", "03-rl"):
        done = {"settings": {}, "inputs": {}, "result": {"steps": 7}}
        (tmp_path / stage / "checkpoints" / "step_000007").mkdir(parents=True)
        write_json(tmp_path / stage / "DONE", {**done, "sha256": fingerprint(done)})
    trained = {"tasks": [], "domains": {}, "mean_accuracy": 0.25}
    write_json(tmp_path / "03-rl" / "evaluation.json", {"trained": trained})
    return tmp_path


def run_alone(*arguments: object) -> tuple[int, str, set[str], str]:
    """Exit status, message, top modules loaded and output of a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SHOW, *map(str, arguments)],
        env={**os.environ, "COLUMNS": "120", "OPENBLAS_CORETYPE": "Haswell"},
        capture_output=True,
        text=True,
        check=True,
    )
    output, _, last = done.stdout.rstrip("\n").rpartition("\n")
    found: list[Any] = json.loads(last)
    return found[0], found[1], set(found[2]), output


def test_help_loads_nothing_heavy() -> None:
    status, _, modules, output = run_alone("--help")
    assert status == 0 and "doctor" in output
    assert "ernie_train" in modules and sorted(modules & HEAVY) == []


def test_status_loads_nothing_heavy(run_dir: Path) -> None:
    status, message, modules, output = run_alone("status", run_dir)
    assert (status, message) == (0, "")
    assert sorted(modules & HEAVY) == []
    assert "gate not judged" not in output
    assert "gate missed" in output and "next: stage rl missed its gate" in output
    assert "no process runs it" in output


def test_status_names_the_process_that_runs_it(run_dir: Path) -> None:
    with RunLock(run_dir):
        output = run_alone("status", run_dir)[3]
    assert f"running: process {os.getpid()}" in output and "now: stage rl" in output
    assert "no process runs it" not in output and "next:" not in output


@pytest.mark.parametrize(("ends", "left"), [(None, [0]), (SystemExit(3), [3])])
def test_the_program_ends_at_once_with_the_status_of_its_command(
    ends: SystemExit | None, left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without clearing Paddle up, and its imports have waited."""
    steps: list[object] = []

    def main() -> None:
        steps.append("main")
        if ends is not None:
            raise ends

    monkeypatch.setattr(program, "main", main)
    monkeypatch.setattr(program, "defer_imports", lambda: steps.append("deferred"))
    monkeypatch.setattr(program.processes, "leave", steps.append)
    program.program()
    assert steps[:2] == ["deferred", "main"]
    assert steps[2:][: len(left)] == left


def test_a_message_in_place_of_a_status_is_pythons_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise SystemExit("in words")

    monkeypatch.setattr(program, "main", main)
    with pytest.raises(SystemExit, match="in words"):
        program.program()
