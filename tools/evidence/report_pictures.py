"""Make the pictures of the report and of the terminal in docs/images/ from a run directory.

    python -m tools.evidence.report_pictures runs/tiny

Needs requirements-dev.txt and Chromium (`apt-get install chromium`).
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from rich.console import Console

from ernie_train.cli.watch import status_table
from ernie_train.report import read_run, write_report

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
COLOURS = 96


def main() -> None:
    run_dir = Path(sys.argv[1])
    chromium = os.environ.get("ERNIE_TRAIN_CHROMIUM") or shutil.which("chromium")
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as driver:
        page, _ = write_report([run_dir], Path(scratch) / "report.html")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        shoot_report(browser, page, "report", 1280, 1560, "light", "#stages")
        shoot_report(browser, page, "report_completions", 1280, 900, "dark", "#completions")
        shoot_report(browser, page, "report_phone", 360, 780, "light", "#curves")
        shoot_report(browser, page, "report_phone_dark", 360, 780, "dark", "#health")
        shoot_terminal(browser, run_dir, Path(scratch) / "terminal.svg")
        browser.close()


def shoot_report(
    browser: Browser,
    page: Path,
    name: str,
    width: int,
    height: int,
    scheme: Literal["light", "dark"],
    section: str,
) -> None:
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    shown = context.new_page()
    shown.set_default_timeout(60_000)
    shown.goto(page.as_uri())
    shown.wait_for_selector("main[data-ready]", state="attached")
    if section != "#stages":
        shown.locator(section).evaluate("e => e.scrollIntoView({ block: 'start' })")
    # Pictures of curves that come into view are drawn a moment later.
    shown.wait_for_function(
        """() => [...document.querySelectorAll(".plot")].every((plot) => {
          const box = plot.getBoundingClientRect();
          const seen = plot.checkVisibility() && box.bottom > 0 && box.top < innerHeight;
          return !seen || plot.querySelector(".main-svg");
        })"""
    )
    shown.wait_for_timeout(1000)
    save(shown.screenshot(), name)
    context.close()


def shoot_terminal(browser: Browser, run_dir: Path, svg: Path) -> None:
    console = Console(record=True, width=132, file=io.StringIO(), force_terminal=True)
    console.print(status_table(read_run(run_dir)))
    console.save_svg(str(svg), title=f"ernie-train status {run_dir.name} --follow")
    shown = browser.new_page(viewport={"width": 1100, "height": 420})
    shown.set_content(svg.read_text(encoding="utf-8"))
    save(shown.locator("svg").first.screenshot(), "terminal")


def save(png: bytes, name: str) -> None:
    """Write a picture with a palette, which halves its size and more."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    path = IMAGES / f"{name}.png"
    image.quantize(COLOURS).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
