"""The report in headless Chromium: nothing fails, nothing leaves the page, everybody can read it.

Without Chromium these tests are skipped: `apt-get install chromium` (./run-tests does it where it
may), or ERNIE_TRAIN_CHROMIUM=/path/to/chromium.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from ernie_train.report import write_report
from tests.report.made_runs import HOSTILE, make_run

CHROMIUM = os.environ.get("ERNIE_TRAIN_CHROMIUM") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: apt-get install chromium, or name it by "
    "ERNIE_TRAIN_CHROMIUM",
)  # fmt: skip
WAIT_MS = 60_000  # a busy machine draws slowly

# Each element with text of its own that is seen: the contrast of WCAG 2.2 with what is behind it.
CONTRASTS = """() => {
  const channels = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((v) => {
      v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const c = channels(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
    if (e.closest("script, style, .skip") || e.disabled || e.closest("option")) continue;
    const style = getComputedStyle(e), isSvg = e.namespaceURI.endsWith("svg");
    const [a, b] = [light(channels(isSvg ? style.fill : style.color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, e.tagName + "." + (e.className.baseVal ?? e.className) + ": " +
      e.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        # Chromium's own sandbox refuses to start for root, as whom CI runs.
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    plain, hostile = make_run(root / "a"), make_run(root / "b", text=HOSTILE)
    broken = make_run(root / "c", steps=1000)
    for name in ("recipe.yaml", "environment.json", "02-rl/samples.jsonl"):
        (broken / name).unlink()
    return {
        "plain": write_report([plain])[0],
        "hostile": write_report([hostile])[0],
        "compared": write_report([plain, hostile, broken], root / "compared.html")[0],
    }


class Opened:
    """A page with what its console said and what it asked the network for."""

    def __init__(self, context: BrowserContext, path: Path) -> None:
        self.page: Page = context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.told: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.told.append(message.text))
        self.page.on("pageerror", lambda error: self.told.append(str(error)))
        self.page.on("dialog", lambda dialog: self.told.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = path.as_uri()
        self.page.goto(self.address)
        self.page.wait_for_selector("main[data-ready]", state="attached")

    def draw_all(self) -> None:
        for plot in self.page.query_selector_all(".plot"):
            if plot.is_visible():
                plot.scroll_into_view_if_needed()
                self.page.wait_for_function("p => p.querySelector('.main-svg')", arg=plot)


@pytest.fixture
def open_page(browser: Browser, pages: dict[str, Path]) -> Iterator[Any]:
    contexts: list[BrowserContext] = []

    def opened(name: str = "plain", width: int = 1280, scheme: str = "light") -> Opened:
        size: Any = {"width": width, "height": 800}
        context = browser.new_context(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]
        contexts.append(context)
        return Opened(context, pages[name])

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        ("plain", 1280, "light"),
        ("hostile", 1280, "dark"),
        ("compared", 360, "light"),
        ("plain", 360, "dark"),
    ],
)
def test_the_page_is_drawn_and_read_at_any_width_and_in_both_schemes(
    open_page: Any, name: str, width: int, scheme: str
) -> None:
    shown = open_page(name, width, scheme)
    shown.draw_all()
    shown.page.locator("details").evaluate_all("all => all.forEach((d) => { d.open = true; })")
    shown.draw_all()
    assert shown.told == []
    assert shown.requests == [shown.address]
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    contrasts = shown.page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert [found for found in contrasts if found[0] < 4.5] == []
    lines = shown.page.locator("#charts .js-line").count()
    assert lines >= shown.page.locator("#charts .plot").count() > 2
    if name != "plain":  # foreign text is shown, and runs nothing
        assert "onerror" in shown.page.inner_text("main")
    assert shown.page.evaluate("window.pwned") is None
    assert shown.page.locator("img, iframe, object, embed, form, base, link").count() == 0
    assert shown.page.locator("[onerror], [onclick], a[href^='javascript']").count() == 0
    assert shown.page.locator("script").count() == 3


def test_the_policy_stops_what_would_get_in(open_page: Any) -> None:
    shown = open_page()
    shown.page.evaluate(
        """() => {
          window.stopped = [];
          addEventListener("securitypolicyviolation", (e) => stopped.push(e.effectiveDirective));
          const box = document.createElement("div");
          box.innerHTML = "<img src='http://127.0.0.1:9/x' onerror='window.pwned = 1'>";
          document.body.append(box);
          const script = document.createElement("script");
          script.textContent = "window.pwned = 1";
          document.body.append(script);
          fetch("http://127.0.0.1:9/y").catch(() => {});
        }"""
    )
    shown.page.wait_for_function("() => stopped.length >= 4")
    assert set(shown.page.evaluate("stopped")) == {
        "img-src", "script-src-attr", "script-src-elem", "connect-src",
    }  # fmt: skip
    assert shown.page.evaluate("window.pwned") is None


def focused(page: Page) -> tuple[str, bool]:
    """What has the focus, and if that is seen; a radio button's mark is its label's text."""
    found = page.evaluate(
        """() => {
          const e = document.activeElement, mark = e.type === "radio" ? e.nextSibling : e;
          const style = getComputedStyle(mark), box = mark.getBoundingClientRect();
          const name = e.id || e.className || e.getAttribute("aria-label") || e.textContent;
          return [`${e.tagName} ${name}`.slice(0, 60),
            style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2 && box.width > 0];
        }"""
    )
    return found[0], found[1]


def test_the_keyboard_reaches_and_works_everything(open_page: Any) -> None:
    shown = open_page()
    page: Page = shown.page
    stops = []
    for _ in range(60):
        page.keyboard.press("Tab")
        stop = focused(page)
        if stop[0].startswith("BODY"):
            break
        stops.append(stop)
    assert [name for name, seen in stops if not seen] == []
    names = " ".join(name for name, _ in stops)
    order = ["A skip", "DIV wide", "INPUT", "smoothing", "reading-list", "SELECT column",
             "BUTTON next", "SUMMARY made"]  # fmt: skip
    places = [names.index(name) for name in order]
    assert places == sorted(places)
    assert page.locator("#charts h3").all_inner_texts()[0] == "loss"
    page.focus("#stage-choice input:checked")
    page.keyboard.press("ArrowRight")
    assert page.locator("#charts h3").all_inner_texts()[0] == "reward"
    page.focus("#smoothing")
    page.keyboard.press("End")
    assert page.inner_text("#smoothing-value") == "0.98"
    chosen = "[data-side=left] .column"
    assert page.input_value(chosen) == "0"
    assert page.locator("[data-side=left] .previous").is_disabled()
    page.focus("[data-side=left] .next")
    page.keyboard.press("Enter")
    assert page.input_value(chosen) == "1"
    assert "answer 2" in page.inner_text("[data-side=left] .cards")
    assert "answer 12" in page.inner_text("[data-side=right] .cards")
    page.focus("summary >> nth=0")
    assert shown.told == []
    assert hovered(page) > 0


def hovered(page: Page) -> float:
    """The value that is told where the mouse is on a curve."""
    plot = page.locator("#charts .plot").first
    plot.scroll_into_view_if_needed()
    page.wait_for_selector("#charts .js-line", state="attached")
    box = plot.locator(".nsewdrag").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#charts .hoverlayer text", state="attached")
    told = page.locator("#charts .hoverlayer text").last.text_content()
    return float((told or "").split()[-1])
