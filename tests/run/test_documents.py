"""The commands that documents mark with `<!-- run -->`, run on a small model and a few rows.

What a page shows under `<!-- printed -->` they must print.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from ernie_train.cli.main import main
from tests import small_llama
from tests.repository.test_commands import PAGES, ROOT, command_blocks, commands
from tests.workspace import make_workspace, rows, save_model, write_rows

RUN_PAGES = [page for page in PAGES if any(mark == "run" for mark, _ in command_blocks(page))]
PRINTED = re.compile(r"<!-- printed -->\n```text\n(.*?)```", re.S)  # by the commands of a page
SHORT = ("chat", "eval", "generate")  # with few tokens, where the page does not say how many


def shown(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def stop_of(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: a model, rows, a finished run, functions of one's own."""
    base = tmp_path_factory.mktemp("documents")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        patch.delenv("ERNIE_TRAIN_REFEREE", raising=False)
        recipe = make_workspace(base)
        assert stop_of(["run", str(recipe), "--run-dir", "runs/tiny", "stages.sft.steps=4"]) == 0
    for name in ("recipes", "data"):
        (base / name).symlink_to(ROOT / name)
    for name in ("runs/other", "runs/tools"):
        shutil.copytree(base / "runs/tiny", base / name)
    save_model(base).rename(base / "my-model")
    small_llama.write_directory(base / "llama")
    write_rows(base / "my-data.jsonl", rows(40, 1))
    write_rows(base / "questions.jsonl", [{"prompt": "What is 1 + 1?"}, {"prompt": "And 2 + 2?"}])
    sums = [
        {"question": f"What is {n} + 1?", "answer": f"It is so.\n#### {n + 1}"} for n in range(9)
    ]
    (base / "gsm8k").mkdir()
    write_rows(base / "gsm8k/train.jsonl", sums[:6])
    write_rows(base / "gsm8k/test.jsonl", sums[6:])
    _write_rewards(base)
    _write_recipe(base)
    (base / "my_tools.py").write_text(
        'def double(x: int) -> int:\n    """Return twice x.\n\n    Args:\n        x: a number\n'
        '    """\n    return 2 * x\n'
    )
    return base


def _write_rewards(base: Path) -> None:
    """Write rows, completions and functions of the pages on rewards."""
    (reward,) = [text for text in shown("docs/my_reward.md", "python") if "def score(" in text]
    row, completions = shown("docs/my_reward.md", "json")
    (base / "my_reward.py").write_text(reward)
    (base / "my-prompts.jsonl").write_text(row * 4)
    (base / "my-completions.jsonl").write_text(completions)
    write_rows(base / "sums.jsonl", [{"prompt": f"{n} + {n}?", "answer": 2 * n} for n in (1, 2)])
    page = (ROOT / "docs/concepts/verifiers.md").read_text("utf-8")
    said = re.findall(r'"(.*?)"', page[page.index("To try one") : page.index("<!-- run -->")])
    write_rows(base / "sums-completions.jsonl", [{"completion": text} for text in said])


def _write_recipe(base: Path) -> None:
    """Write the recipes of the pages on resuming and on a reward, small."""
    (text,) = [text for text in shown("docs/my_reward.md", "yaml") if text.startswith("name:")]
    small = text.replace("max_new_tokens: 256", "max_new_tokens: 8, max_prompt_tokens: 64")
    assert small != text
    small = small.replace("prompts_per_iteration: 16", "prompts_per_iteration: 2")
    (base / "rl.yaml").write_text(small)
    mine = {
        "name": "mine",
        "model": {"path": "my-model"},
        "tokenizer": {"path": "my-model"},
        "stages": [
            {"name": "sft", "kind": "sft", "data": [{"path": "my-data.jsonl"}], "seq_len": 128,
             "micro_batch_size": 2, "epochs": 1, "optim": {"lr": 2e-4}}
        ],
    }  # fmt: skip
    (base / "my-recipe.yaml").write_text(yaml.safe_dump(mine))


@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_of_a_page_run(
    page: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = shutil.copytree(prepared, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(place)
    monkeypatch.delenv("ERNIE_TRAIN_REFEREE", raising=False)
    printed: list[str] = []
    for mark, text in command_blocks(page):
        for program, verb, *arguments in commands(text) if mark == "run" else ():
            assert program == "ernie-train", "commands of other programs are marked otherwise"
            monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/exit\n"))
            few = ["--max-new-tokens", "4"] if verb in SHORT else []
            status = stop_of([verb, *arguments, *few])
            captured = capsys.readouterr()
            assert status == 0, (verb, arguments, captured.err)
            printed += captured.out.splitlines()
    for text in PRINTED.findall(page.read_text("utf-8")):
        assert set(text.splitlines()) <= set(printed), "\n".join(printed)


def test_a_finished_run_was_made_for_the_pages(prepared: Path) -> None:
    receipt = json.loads((prepared / "runs/tiny/export/export_receipt.json").read_text())
    assert receipt["passed"]
