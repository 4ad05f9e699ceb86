"""The gallery shows every recipe, with what runs gave; one command takes a run in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ernie_train.core.foreign_files import read_json
from tools.evidence import gallery
from tools.evidence.gallery import IMAGES, KEPT, PAGE, RECIPES, draw, figures_of, render

PAGE_TEXT = PAGE.read_text("utf-8")


def test_the_page_is_that_of_what_is_kept_and_has_every_recipe() -> None:
    kept = read_json(KEPT)
    assert render(kept) == PAGE_TEXT, "run: python -m tools.evidence.gallery"
    for recipe in RECIPES.glob("*.yaml"):
        entry = PAGE_TEXT.partition(f"\n## {recipe.stem}\n")[2].partition("\n## ")[0]
        assert "```bash" in entry and "Stages: `" in entry, recipe
        assert (recipe.stem in kept["runs"]) == (IMAGES / f"{recipe.stem}.png").exists()


def test_recipes_of_gpus_are_planned_and_say_so() -> None:
    for name in ("ernie-21b-a3b-sft", "ernie-21b-a3b-prl"):
        entry = PAGE_TEXT.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert "**Planned, never run.**" in entry and "- it fits" in entry
        assert f"![curves of {name}]" not in entry
        assert f"\nernie-train run {name} --nproc 8\n" in entry  # as its layout needs


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    def write(name: str, rows: list[dict[str, object]]) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    (tmp_path / "recipe.yaml").write_text("name: tiny\n")
    write("environment.json", [{"ernie_train": "9.9.0", "code": {"commit": "abcdef0123"}}])
    time = [{"time": {"unix_s": at}} for at in (100.0, 160.0, 220.0)]
    write(
        "01-sft/metrics.jsonl",
        [t | {"loss": v} for t, v in zip(time, (4.0, 3.0, 2.0), strict=True)],
    )
    (tmp_path / "01-sft/DONE").write_text("{}")
    rewards = zip(time, (0.1, 0.3, 0.2), strict=True)
    write("02-rl/metrics.jsonl", [t | {"loss": 0, "reward": v} for t, v in rewards])
    write("02-rl.before-1/metrics.jsonl", [{"loss": 9.0}])
    return tmp_path


def test_a_run_is_taken_in_as_it_is(run_dir: Path) -> None:
    found = figures_of(run_dir)
    assert list(found["stages"]) == ["sft", "rl"]
    assert found["stages"]["sft"]["curve"] == "loss" and found["stages"]["sft"]["done"]
    assert found["stages"]["rl"]["curve"] == "reward" and not found["stages"]["rl"]["done"]
    assert found["stages"]["rl"]["last"] == pytest.approx(0.2)  # the mean of all three
    told = gallery._measured(found)
    assert "stopped after 3" in told and "0:02:00" in told and "by the clock" in told
    assert "ernie_train 9.9.0 at abcdef0" in told
    (run_dir / "spent.json").write_text('{"cpu_s": 61.0, "wall_s": 90.0, "peak_gb": 0.5}')
    told = gallery._measured(figures_of(run_dir))
    assert "0:01:01 (h:mm:ss) of one core, 0.5 GB at most" in told
    draw(run_dir, run_dir / "pictures/tiny.png")
    with Image.open(run_dir / "pictures/tiny.png") as picture:
        assert picture.width > 2 * picture.height


def test_what_is_no_run_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no run directory"):
        figures_of(tmp_path)
