"""Every command that a document shows is run, checked, or said not to be run, with the reason.

A mark stands above each block of commands, which readers do not see:

    <!-- run -->                   tests/run/test_documents.py runs it on a small model
    <!-- run by PATH -->           that test or script does
    <!-- checked: REASON -->       too long to run; its recipes, settings and modules are checked
    <!-- not run: REASON -->
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from ernie_train.cli.main import app
from ernie_train.run.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("README*.md"), ROOT / "data/README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
MARK = re.compile(r"run|run by \S+|(?:checked|not run): .+", re.S)


def command_blocks(page: Path) -> list[tuple[str, str]]:
    """Return mark ("" for none) and text of a page's blocks of commands."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [
        (mark, text)
        for mark, language, text in found
        if language in ("bash", "sh") or re.match(r"(ernie-train|python) ", text)
    ]


def commands(text: str) -> list[list[str]]:
    """Return the commands of a block as lists of words."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_of_commands_has_a_mark(page: Path) -> None:
    for mark, text in command_blocks(page):
        assert MARK.fullmatch(mark), f"say above it whether it is run: {text}"
        if mark.startswith("run by "):
            assert (ROOT / mark.removeprefix("run by ")).is_file(), mark


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arguments_recipes_and_modules_are_accepted(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all commands of ours, run or not: options exist; recipes of ours take the settings."""
    monkeypatch.chdir(ROOT)
    for _, text in command_blocks(page):
        if "#!/bin/bash" in text:
            continue  # a program, whose commands are in quotes
        for words in commands(text):
            check_command(words)


def check_command(words: list[str]) -> None:
    """Raise if a command of ours would be refused for its arguments."""
    program = next((word for word in words if "=" not in word), "")
    assert program.strip("${}") != "ERNIE_TRAIN_VLLM", "a directory: run its bin/python"
    if words[:2] == ["python", "-m"] and words[2].startswith("tools."):
        assert importlib.util.find_spec(words[2]), words[2]
    if words[0] != "ernie-train":
        return
    verb, *arguments = words[1:]
    command = get_command(app).commands[verb]  # type: ignore[attr-defined]
    with command.make_context(verb, list(arguments)) as context:
        given = context.params
    recipe = given.get("recipe")
    if recipe and (ROOT / str(recipe)).is_file():
        load_recipe(recipe, list(given["overrides"] or []))


def test_a_mistake_is_found() -> None:
    for text in (
        "ernie-train run recipes/tiny.yaml stages.sft.optim.rate=1",
        "ernie-train run recipes/tiny.yaml --directory runs/x",
        "ernie-train teach recipes/tiny.yaml",
        "python -m tools.evidence.nothing",
        '"$ERNIE_TRAIN_VLLM" -m vllm.entrypoints.openai.api_server',
    ):
        with pytest.raises(Exception):  # noqa: B017  each layer has an error of its own
            check_command(shlex.split(text))
    assert not MARK.fullmatch("") and not MARK.fullmatch("not run: ")
