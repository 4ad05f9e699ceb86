"""Links between documents lead somewhere: files exist, headings exist."""

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "*.md"], cwd=REPOSITORY, capture_output=True, check=True
    )
    return [REPOSITORY / name for name in listed.stdout.decode().split("\0") if name]


def anchors(path: Path) -> set[str]:
    """Names that a forge gives the headings of a document."""
    found = HEADING.findall(CODE.sub("", path.read_text(encoding="utf-8")))
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h)) for h in found)
    return {heading.strip().lower().replace(" ", "-") for heading in plain}


def broken(path: Path) -> list[str]:
    found = []
    for first, second in LINK.findall(CODE.sub("", path.read_text(encoding="utf-8"))):
        target, _, anchor = (first or second).partition("#")
        if re.match(r"[a-z]+:", target):
            continue  # another site: tests have no network
        there = (path.parent / target) if target else path
        if not there.exists():
            found.append(f"{target} does not exist")
        elif anchor and there.suffix == ".md" and anchor not in anchors(there):
            found.append(f"{target}#{anchor}: no such heading")
    return found


@pytest.mark.parametrize("path", documents(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path: Path) -> None:
    assert broken(path) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](#a-heading) [b](#none) [c](gone.md) [d](https://x.org/y)\n")
    assert broken(page) == ["#none: no such heading", "gone.md does not exist"]
