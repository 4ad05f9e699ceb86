"""The page for notebooks runs, and what it trains learns."""

import re
import shutil
from pathlib import Path

import paddle

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_runs(tmp_path, monkeypatch):
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.S)
    for name in ("tokenizer", "validation"):
        shutil.copytree(ROOT / "data" / name, tmp_path / "data" / name)
    monkeypatch.chdir(tmp_path)
    paddle.seed(1)
    names: dict = {}
    exec(source, names)
    losses = names["losses"]
    assert len(losses) == 10 and losses[-1] < losses[0] - 1
    assert names["report"].total().kept == 200
    assert 0 < len(names["completion"].ids) <= 16 and isinstance(names["text"], str)
    assert (tmp_path / "my-model/chat_template.jinja").exists()
    ours, read = (m.state_dict() for m in (names["model"], names["same"]))
    assert ours.keys() == read.keys()
