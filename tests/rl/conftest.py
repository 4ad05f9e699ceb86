"""A project on disk for RL stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.rl.upo_stages import (
    REWARD,
    stage,
    write_prompts,
)
from tests.workspace import make_workspace, write_rows


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("upo")
    recipe = yaml.safe_load(make_workspace(root).read_text())
    made = write_prompts(root)
    preferences = [
        {"prompt": row["messages"][0]["content"],
         "chosen": f"<think>\n1 + 1\n</think>\n\n<response>\n{row['answer']}\n</response>",
         "rejected": "<think>\nno idea\n</think>\n\n<response>\nnone\n</response>"}
        for row in made[:10]
    ]  # fmt: skip
    write_rows(root / "preferences.jsonl", preferences)
    (root / "reward.py").write_text(REWARD)
    recipe |= {"evaluation": None, "export": None, "stages": [stage(root)]}
    recipe["parallel"] = {"data": 1}  # longer ones would start ranks, which import Paddle first
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root
