"""The commands of README, docs/quick_start.md and docs/own_model.md, on a small model."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest

from ernie_train.cli.main import main
from tests.small_llama import TOKENIZER, write_gguf
from tests.workspace import write_rows
from tools.evidence import own_rows

ROOT = Path(__file__).resolve().parents[2]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def commands(page: str, heading: str) -> list[list[str]]:
    """Return the commands of a section's first block as lists of words."""
    section = (ROOT / page).read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    (block, *_) = re.findall(r"```bash\n(.*?)```", section, re.S)
    return [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a verb that must succeed; return what it printed."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    told = capsys.readouterr()
    assert not stopped.value.code, told.err
    return told.out


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the recipes and the data of a clone, to run commands in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ERNIE_TRAIN_REFEREE", raising=False)
    shutil.copytree(ROOT / "recipes", "recipes")
    return tmp_path


def write_model(path: Path) -> None:
    metadata = {**TOKENIZER, "tokenizer.chat_template": CHATML}
    path.parent.mkdir(exist_ok=True)
    write_gguf(path, metadata=metadata, vocab_size=256, max_position_embeddings=1024)


def test_three_commands_lead_to_a_proven_export(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"}
            for n in range(60)]  # fmt: skip
    write_rows(place / "my-data.jsonl", made)
    shown = [words[1:] for words in commands("README.md", "Your model and your data")]
    assert [arguments[0] for arguments in shown] == ["import", "init", "run"]
    write_model(place / shown[0][1])
    for arguments in shown:
        run(arguments, capsys)
    export = place / "runs" / "my-recipe" / "export"
    assert json.loads((export / "export_receipt.json").read_text())["passed"]
    assert (export / "chat_template.jinja").read_text() == CHATML
    losses = [json.loads(line)["loss"] for line in
              (place / "runs/my-recipe/01-sft/metrics.jsonl").read_text().splitlines()]  # fmt: skip
    assert len(losses) > 1 and all(map(math.isfinite, losses))


def test_the_quick_start(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the import on, with the row that the page shows."""
    page = (ROOT / "docs/quick_start.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"```json\n(.*?)```", page, re.S)
    (place / "my-data.jsonl").write_text(row * 60)
    *_, imported = commands("docs/quick_start.md", "A model")
    write_model(place / imported[2])
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/exit\n"))
    later = [commands("docs/quick_start.md", heading) for heading in ("Train", "Look, talk, serve")]
    shown = [imported, *later[0], *later[1]]
    verbs = [words[1] for words in shown]
    assert verbs == ["import", "init", "check", "run", "report", "generate", "chat"]
    for _, verb, *arguments in shown:
        short = ["--max-new-tokens", "4"] if verb in ("generate", "chat") else []
        run([verb, *arguments, *short], capsys)
    assert (place / "runs/my-recipe/report.html").exists()
    assert json.loads((place / "runs/my-recipe/export/export_receipt.json").read_text())["passed"]


def test_the_commands_of_the_page(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All but those of pip: shorter rows, fewer steps and problems, the same options."""
    fetching, shown = [], []
    for words in commands("docs/own_model.md", "Try it"):
        (shown if words[0] == "ernie-train" else fetching).append(words)
    assert [words[2] for words in fetching] == ["pip", "zipfile", "tools.evidence.own_rows"]
    for kind in ("questions", "tool_calls"):
        own_rows.write_rows(kind, None, place / fetching[2][3], 3, 60)
    write_model(place / shown[0][2])
    for _, verb, *arguments in shown:
        short = {"run": ["stages.sft.steps=4"], "eval": ["--max-new-tokens", "4"]}.get(verb, [])
        told = run([verb, *arguments, *short], capsys)
    receipt = json.loads((place / "runs/calls/export/export_receipt.json").read_text())
    assert receipt["passed"]
    assert "tool_calls" in told
    assert (place / "my-adapter" / "adapter_config.json").exists()
