"""The documentation builds as a site: every link and anchor leads somewhere, nothing is fetched."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from playwright.sync_api import sync_playwright

from tools.site import PAGES, rewritten, site_name

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = os.environ.get("ERNIE_TRAIN_CHROMIUM") or shutil.which("chromium")


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a repository, as `make docs` does."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


class Loaded(HTMLParser):
    """What a page makes a browser load, and the pictures among it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.pictures: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("href",) if tag == "link" else () if tag == "a" else ("src", "srcset", "data")
        loaded = [value for name, value in attrs if name in names and value]
        self.found += loaded
        self.pictures += loaded if tag == "img" else []


def test_every_page_is_there_and_loads_from_the_site_alone(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert {"index.html", "recipes.html", "adr/index.html"} <= {
        str(page.relative_to(site)) for page in pages
    }
    for page in pages:
        loaded = Loaded(page)
        assert [url for url in loaded.found if re.match(r"([a-z]+:)?//", url)] == [], page
        missing = [p for p in loaded.pictures if not (page.parent / unquote(p)).is_file()]
        assert missing == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text("utf-8"))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_asks_no_other_place_and_finds_words(site: Path) -> None:
    asked, told = [], []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: told.append(message.text))
        page.goto((site / "index.html").as_uri(), timeout=60_000)
        page.goto((site / "recipes.html").as_uri(), timeout=60_000)
        page.locator("input[name=query]").press_sequentially("bias_update_rate")
        page.wait_for_selector(".md-search-result__item", timeout=60_000)
        browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert told == []


def small_site(root: Path, text: str, **files: str) -> Path:
    """Write a repository of two pages with the settings and hooks of this one."""
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[0]
    nav = yaml.safe_dump({"nav": [{"Home": "index.md"}, {"Page": "page.md"}]})
    written = {"mkdocs.yml": f"{config}\n{nav}", "docs/page.md": text, **files}
    for name, content in {"README.md": "# Home\n", "docs/assets/site.css": "", **written}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    (root / "tools").mkdir()
    shutil.copy(ROOT / "tools/site.py", root / "tools/site.py")
    return root


BROKEN = {
    "[a](gone.md)": "gone.md",
    "[a](index.md#none)": "index.md#none",
    "[a](#nowhere)": "#nowhere",
    "[a](../recipes/gone.yaml)": "gone.yaml",
    "![a](pictures/gone.png)": "gone.png",
}


def test_broken_links_and_a_page_that_no_menu_has_fail_the_build(tmp_path: Path) -> None:
    text = "# Page\n" + "\n".join(BROKEN)
    small_site(tmp_path, text, **{"docs/lost.md": "# Lost\n"})
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert [told for told in [*BROKEN.values(), "lost.md"] if told not in done.stderr] == []


def test_links_into_the_repository_lead_to_pages(site: Path) -> None:
    def links(page: str) -> set[str]:
        return set(re.findall(r'href="([^"]+)"', (site / page).read_text("utf-8")))

    assert {"quick_start.html", "zh.html", "contributing.html"} <= links("index.html")
    assert {"repository/data/index.html", "repository/recipes/tiny.yaml.html"} <= links("tiny.html")
    assert "../security.html" in links("concepts/verifiers.html")
    assert "stages" in (site / "repository/recipes/tiny.yaml.html").read_text("utf-8")


def test_ci_and_make_do_not_silence_warnings() -> None:
    """With --quiet MkDocs counts no warnings, and --strict finds none."""
    for name in ("Makefile", ".ci/run"):
        (line,) = [x for x in (ROOT / name).read_text("utf-8").splitlines() if "mkdocs build" in x]
        assert "--strict" in line and "-q" not in line


def test_names_on_the_site() -> None:
    assert site_name("docs/adr/README.md") == "adr/README.md"
    assert site_name("recipes/tiny.yaml") == "repository/recipes/tiny.yaml.md"
    assert site_name("README.md") == PAGES["README.md"] == "index.md"
    text = '<img src="docs/images/report.png"> [x](https://x.org) [y](../z.md)'
    assert rewritten(text, "README.md", ROOT) == text.replace("docs/", "", 1)
