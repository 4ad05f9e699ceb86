"""Find the program in a response: the fenced block that matters, with the helpers that it needs.

Fences are those of CommonMark (``` or ~~~, indented, with a language and attributes) and what
models make of them: an opening behind words, a closing behind the last line of code, a last block
that is never closed. Takes time linear in the length of the response.
"""

import ast
import builtins
import re
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ernie_train.rewards.verifiers.tested_names import bound_names, top_level_names

_PYTHON = {"python", "python3", "py", "py3", "ipython", "ipython3"}
# A fence in a block quote: its lines stand behind "> ".
_QUOTED_FENCE = re.compile(r"^[ \t]*>[> \t]*(?:```|~~~)", re.MULTILINE)
_QUOTE = re.compile(r"^[ \t]*> ?", re.MULTILINE)
_OPENING = re.compile(
    r"(?P<indent>[ \t]*(?:(?:[-*+]|\d{1,3}[.)])[ \t]+)?)(?P<fence>`{3,}|~{3,})(?P<info>[^`\n]*)"
)
# Behind words only a fence that names Python opens a block: others may close one.
_LATE_OPENING = re.compile(r".*?(?P<fence>`{3,})(?P<info>(?i:python3?|py)\b[^`\n]*)")
_LANGUAGE = re.compile(r"[{. \t]*([A-Za-z0-9+#_-]*)")
_READS_INPUT = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\s*\(\s*0|\bfileinput\b|\bos\.read\b")
_MAX_CHARACTERS = 50_000
# More are no program; the last ones are read.
_MAX_BLOCKS = 32
# Statements of a helper that define something; its examples and prints are left out.
_DEFINITIONS = (
    ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef,
    ast.Assign, ast.AnnAssign,
)  # fmt: skip


@dataclass(frozen=True)
class _Block:
    """Hold a fenced block and its syntax tree; None if it is no Python."""

    language: str
    source: str
    tree: ast.Module | None

    @property
    def defined(self) -> set[str]:
        """Return the names that its statements define, methods of a class Solution too."""
        names = set[str]()
        for node in self.tree.body if self.tree else []:
            names.update(top_level_names(node))
            if isinstance(node, ast.ClassDef) and node.name == "Solution":
                names.update(top_level_names(*node.body))
        return names

    @property
    def runs(self) -> bool:
        return self.tree is not None and not all(
            isinstance(node, _DEFINITIONS) for node in self.tree.body
        )


def program_of(response: str, names: Collection[str] = ()) -> str:
    """Return the program of a response that is to define `names`; a script if there are none.

    It is the last block that defines one of them (a first draft does not count), in Python rather
    than without a language; of scripts the last that reads input, or else the last. Other blocks
    are added in front as far as they define what it uses. Without any block it is all of the
    response.
    """
    quoted = _QUOTED_FENCE.search(response) is not None
    text = _QUOTE.sub("", response) if quoted else response
    blocks = [_Block(language, source, None) for language, source in fenced_blocks(text)]
    python = [block for block in blocks if block.language in _PYTHON]
    usable = [block for block in blocks if block in python or not block.language][-_MAX_BLOCKS:]
    if not usable or _parsed(response) is not None:
        return response
    if len(usable) == 1:
        return usable[0].source
    usable = [_Block(block.language, block.source, _parsed(block.source)) for block in usable]
    labelled = [block for block in usable if block.language]
    found = _last_that_matters(labelled, names) or _last_that_matters(usable, names)
    return _with_helpers(found or (labelled or usable)[-1], usable)


def _last_that_matters(blocks: list[_Block], names: Collection[str]) -> _Block | None:
    if names:
        fitting = [block for block in blocks if block.defined & set(names)]
    else:
        running = [block for block in blocks if block.runs]
        fitting = [block for block in running if _READS_INPUT.search(block.source)]
        fitting = fitting or running
    return fitting[-1] if fitting else None


def _with_helpers(main: _Block, blocks: list[_Block]) -> str:
    """Return the block behind the definitions of other blocks that it and they use."""
    chosen, left = [main], [block for block in blocks if block is not main]
    while missing := _undefined(chosen):
        helper = next((block for block in reversed(left) if block.defined & missing), None)
        if helper is None:
            break
        left.remove(helper)
        chosen.append(helper)
    helpers = [_definitions(block) for block in blocks if block in chosen and block is not main]
    return "\n\n".join([*helpers, main.source])


def _undefined(blocks: list[_Block]) -> set[str]:
    nodes = [node for block in blocks if block.tree for node in ast.walk(block.tree)]
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    bound = {name for node in nodes for name in bound_names(node)}
    return {name for name in used - bound if not hasattr(builtins, name)}


def _definitions(block: _Block) -> str:
    body: list[ast.stmt] = []
    if block.tree is not None:
        body.extend(node for node in block.tree.body if isinstance(node, _DEFINITIONS))
    return ast.unparse(ast.Module(body, []))


def _parsed(source: str) -> ast.Module | None:
    if len(source) > _MAX_CHARACTERS:
        return None
    with warnings.catch_warnings():  # about escapes in its strings
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
            ast.unparse(tree)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
    return tree


def fenced_blocks(response: str) -> Iterator[tuple[str, str]]:
    """Yield (language, source) of each fenced block; the language in small letters, or empty."""
    opening: re.Match[str] | None = None
    lines: list[str] = []
    for line in response.splitlines():
        if opening is None or _opens_anew(line, opening):
            if opening is not None:
                yield _language(opening), _unindented(lines, _indent(opening))
            opening, lines = _OPENING.fullmatch(line) or _LATE_OPENING.fullmatch(line), []
        elif (last := _last_line(line, opening)) is None:
            lines.append(line)
        else:
            # The indentation of the first line of a response is lost.
            indent = max(_indent(opening), 0 if last.strip() else len(last))
            lines += filter(str.strip, [last])
            yield _language(opening), _unindented(lines, indent)
            opening = None
    if opening is not None:
        yield _language(opening), _unindented(lines, _indent(opening))


def _opens_anew(line: str, opening: re.Match[str]) -> bool:
    """Return True for the opening of a Python block in one that was never closed."""
    again = _OPENING.fullmatch(line)
    return bool(again and _language(again) in _PYTHON and _indent(again) <= _indent(opening))


def _last_line(line: str, opening: re.Match[str]) -> str | None:
    """Return the code before a closing fence at the end of a line; None if nothing is closed."""
    fence, text = opening["fence"], line.rstrip()
    code = text.rstrip(fence[0])
    if len(text) - len(code) < len(fence):
        return None
    # Deeper fences stand in documentation strings (CommonMark allows three more spaces).
    if not code.strip() and len(code) > _indent(opening) + 3:
        return None
    return code if not code.strip() or fence[0] == "`" else None


def _indent(opening: re.Match[str]) -> int:
    return len(opening.groupdict().get("indent") or "")


def _language(opening: re.Match[str]) -> str:
    match = _LANGUAGE.match(opening["info"])
    return match[1].lower() if match else ""


def _unindented(lines: list[str], indent: int) -> str:
    width = [min(indent, len(line) - len(line.lstrip())) for line in lines]
    return "\n".join(line[w:] for line, w in zip(lines, width, strict=True))
