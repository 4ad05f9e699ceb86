"""Find out whose the names are that a row's tests use: theirs, a library's or the program's.

A program must not answer for the tests: were it asked for every name that they do not define, its
own `Counter = lambda *values: 0` would make any two answers equal. So names that libraries have
come from the libraries; the program is asked for its entry point, for what the row's solution
defines, for what the tests import from `solution`, and for names that nobody else has.
"""

import ast
import bisect
import builtins
import collections
import copy
import datetime
import decimal
import fractions
import functools
import heapq
import itertools
import math
import string
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass

# Modules whose names are used without saying so, after an import that is only in the prompt.
_LIBRARIES = (
    collections, itertools, functools, math, heapq, bisect, string, typing, fractions, decimal,
    datetime, copy,
)  # fmt: skip
_ALIASES = {"np": "numpy", "pd": "pandas", "plt": "matplotlib.pyplot", "nx": "networkx"}
_OTHERS = ("numpy", "pandas", "scipy", "sympy", "networkx", "torch", "sklearn", "pytest")
_IMPORTS = {
    **{
        name: f"from {module.__name__} import {name}"
        for module in reversed(_LIBRARIES)
        for name in dir(module)
        if not name.startswith("_")
    },
    **{alias: f"import {module} as {alias}" for alias, module in _ALIASES.items()},
    **{name: f"import {name}" for name in _OTHERS},
    "approx": "from pytest import approx",
}
# Tests may import the program by this name.
PROGRAM_MODULE = "solution"


class BadTests(Exception):
    """Signal that the row's tests cannot be used."""


@dataclass(frozen=True)
class TestedNames:
    """Hold the names that the program is asked for, and the imports that the tests leave out.

    `libraries` are the modules that setup and tests import, in any way.
    """

    program: list[str]
    imports: list[str]
    libraries: list[str]
    __test__ = False  # for pytest, which collects classes of this name


def find_tested_names(
    setup: str, tests: list[str], *, entry_point: str, preamble: str, solution: str
) -> TestedNames:
    """Return whose names setup and tests use; raises BadTests if none is the program's."""
    trees = [parsed(setup, "setup"), *(parsed(test, "a test") for test in tests)]
    used, own, asked = set[str](), set[str](), set[str]()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used.add(node.id)
        elif isinstance(node, ast.ImportFrom) and node.module == PROGRAM_MODULE:
            asked |= {alias.name for alias in node.names} - {"*"}
        else:
            own.update(bound_names(node))
    if "check" in own and not entry_point:
        raise BadTests("tests that define check(candidate) need entry_point")
    solved, imported = _defined(parsed(f"{preamble}\n{solution}", "the solution"))
    of_program = (solved | asked | {entry_point}) - {""}
    imports: dict[str, str] = {}
    for name in used - own - of_program:
        if name in imported:
            imports[name] = imported[name]
        elif name in sys.stdlib_module_names:
            imports[name] = f"import {name}"
        elif name in _IMPORTS and not hasattr(builtins, name):
            imports[name] = _IMPORTS[name]
    names = {n for n in used - own if n in of_program or not hasattr(builtins, n)} - imports.keys()
    names |= {entry_point, *asked} - {""}
    if not names:  # a program may be asked for a function that a library has too, like gcd
        names = {name for name in imports if name.islower() and imports[name].startswith("from")}
    if not names:
        raise BadTests("the tests use nothing of the program; name its entry_point")
    lines = sorted({line for name, line in imports.items() if name not in names})
    sources = [*trees, parsed("\n".join(lines), "the imports")]
    return TestedNames(sorted(names), lines, sorted(_modules(sources)))


def _defined(tree: ast.Module) -> tuple[set[str], dict[str, str]]:
    """Return the names that a program defines, and the import that gives each imported name."""
    names: set[str] = set()
    imported: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            line = ast.unparse(node)
            imported |= {name: line for name in bound_names(node) if name != "*"}
        else:
            names.update(top_level_names(node))
    return names, {name: line for name, line in imported.items() if name not in names}


def _modules(trees: list[ast.Module]) -> set[str]:
    """Return the top names of the modules that are imported, but for attempts in a `try`."""
    found: set[str] = set()
    todo: list[ast.AST] = list(trees)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
        if not (isinstance(node, ast.Try) and node.handlers):
            todo += ast.iter_child_nodes(node)
    return found - {PROGRAM_MODULE}


def bound_names(node: ast.AST) -> Iterator[str]:
    """Yield the names that this node binds, without its children."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
    elif isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name


def top_level_names(*nodes: ast.AST) -> Iterator[str]:
    """Yield the names that statements bind themselves, not those inside functions and classes."""
    for node in nodes:
        for child in [node] if hasattr(node, "name") else ast.walk(node):
            yield from bound_names(child)


def parsed(source: str, what: str) -> ast.Module:
    """Return the tree of a source; raises BadTests if it is no Python."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadTests(f"{what} is no Python: {error}: {source[:100]!r}") from error
