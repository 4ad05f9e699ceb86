"""What MkDocs does besides: README is the first page, links into the repository work on the site.

Documents are written to be read where they lie: README links to `docs/data.md`, a page of `docs/`
to `../recipes/tiny.yaml`. MkDocs knows `docs/` alone. So each file outside of it that a page links
to becomes a page as well, Markdown as it is and other texts as one block of code, and links are
written anew to lead there. A link to a file that does not exist is left as it stands: MkDocs warns
of it, which `--strict` makes an error.

    python -m mkdocs build --strict      # what `make docs` does
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

DOCS = "docs/"
# Files outside of docs/ that stand in the navigation, and their names on the site.
PAGES = {
    "README.md": "index.md",
    "README.zh.md": "zh.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
_CODE = re.compile(r"^(```|~~~).*?^\1[ \t]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\(|<(?:a|img)\b[^>]*?\b(?:href|src)=\")([^)\s\"]+)")
_SCHEME = re.compile(r"[a-z]+:|//|#")


def site_name(path: str) -> str:
    """Return the name on the site of a file, both by their paths: `docs/data.md` is `data.md`."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    if path in PAGES:
        return PAGES[path]
    return f"repository/{path}" + ("" if path.endswith(".md") else ".md")


def outside_links(text: str, path: str, root: Path) -> Iterator[str]:
    """Yield the existing files outside of docs/ that a document at `path` links to."""
    for match in _LINK.finditer(_CODE.sub("", text)):
        target = _resolved(match[2], path)
        if target and not target.startswith(DOCS) and (root / target).is_file():
            yield target


def rewritten(text: str, path: str, root: Path) -> str:
    """Return a document with its links as they are on the site."""
    here = posixpath.dirname(site_name(path))

    def link(match: re.Match[str]) -> str:
        target = _resolved(match[2], path)
        if target is None or not (root / target).is_file():
            return match[0]
        anchor = match[2].partition("#")[1:]
        return match[1] + posixpath.relpath(site_name(target), here or ".") + "".join(anchor)

    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts += [_LINK.sub(link, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, _LINK.sub(link, text[end:])])


def _resolved(target: str, path: str) -> str | None:
    """Return the path in the repository that a link leads to; None for one that leaves it."""
    file = target.partition("#")[0]
    if not file or _SCHEME.match(target):
        return None
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), file))
    return None if found.startswith("..") else found


def _as_page(path: str, text: str) -> str:
    if path.endswith(".md"):
        return text
    language = posixpath.splitext(path)[1].lstrip(".")
    return f"# {path}\n\n````{language}\n{text.rstrip()}\n````\n"


# ---- events of MkDocs, which finds them by name


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README and every other file outside of docs/ that a page links to."""
    root = _root(config)
    todo = [path for path in PAGES if (root / path).is_file()]
    for file in files.documentation_pages():
        todo += outside_links(file.content_string, DOCS + file.src_uri, root)
    while todo:
        path = todo.pop()
        name = site_name(path)
        if name in files.src_uris:
            continue
        text = (root / path).read_text(encoding="utf-8")
        file = File.generated(config, name, content=_as_page(path, text))
        file.inclusion = InclusionLevel.INCLUDED if path in PAGES else InclusionLevel.NOT_IN_NAV
        file.repository_path = path  # type: ignore[attr-defined]
        files.append(file)
        if path.endswith(".md"):
            todo += outside_links(text, path, root)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the links of a page anew."""
    path = getattr(page.file, "repository_path", DOCS + page.file.src_uri)
    if not path.endswith(".md"):
        page.meta["search"] = {"exclude": True}  # recipes and programs would crowd the pages out
        return markdown
    return rewritten(markdown, path, _root(config))


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).resolve().parent
