"""Write docs/support.md: which feature runs on which device, proven by which test.

    python -m tools.support_matrix                  is the page that of today? (exit status 1: no)
    python -m tools.support_matrix --write          writes it
    python -m tools.support_matrix --junit FILE     the same by what pytest's --junitxml recorded: a
                                                    test that failed or is not in it is an error,
                                                    one that was skipped is told

tools/support.yaml names the tests of each cell. They must exist, and be slow or not as it says;
continuous integration gives its own record: no cell says `tested` without a test that passed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ernie_train.core.config import load_yaml
from ernie_train.core.cpu import __version__

ROOT = Path(__file__).resolve().parents[1]
SOURCE, PAGE, PYTHONS = (
    ROOT / name for name in ("tools/support.yaml", "docs/support.md", "docs/pythons.json")
)
DEVICES = {"cpu": "CPU, one process", "ranks": "CPU, several ranks", "gpu": "GPU"}
TESTED, SLOW, WRITTEN, NO = "tested", "tested, slow", "written, untested", "-"
NOT_PROVEN = "not proven"
_VERSIONS = ("3.11", "3.12")
_CI_VERSION = "3.11"


class Cell(NamedTuple):
    """Hold the claim of a feature on a device, and the tests that must back it."""

    claim: str
    tests: tuple[str, ...]

    @classmethod
    def of(cls, value: Any, place: str) -> Cell:
        """Read a cell of the source; raises `SystemExit` that names the place of a mistake."""
        if value is None or value == "no":
            return cls(NO, ())
        if isinstance(value, list) and value:
            return cls(TESTED, tuple(value))
        if isinstance(value, dict) and list(value) == ["slow"] and value["slow"]:
            return cls(SLOW, tuple(value["slow"]))
        if isinstance(value, dict) and list(value) == ["written"]:
            return cls(WRITTEN, tuple(value["written"] or ()))
        raise SystemExit(f"{SOURCE.name}: {place}: no cell: {value!r}")


Matrix = dict[str, dict[str, dict[str, Cell]]]  # section -> feature -> device -> cell


def read_matrix(source: Path = SOURCE) -> Matrix:
    """Read the source; raises `SystemExit` for cells and devices that are none."""
    matrix: Matrix = {}
    for section, features in load_yaml(source).items():
        for feature, cells in features.items():
            if unknown := set(cells) - set(DEVICES):
                raise SystemExit(f"{source.name}: {feature}: no such device: {sorted(unknown)}")
            row = {one: Cell.of(cells.get(one), f"{feature}, {one}") for one in DEVICES}
            matrix.setdefault(section, {})[feature] = row
    return matrix


def cells_of(matrix: Matrix) -> Iterator[tuple[str, Cell]]:
    """Yield every cell with the words that name it."""
    for features in matrix.values():
        for feature, row in features.items():
            for device, cell in row.items():
                yield f"{feature}, {DEVICES[device]}", cell


# ---- tests ---------------------------------------------------------------------------------------


@cache
def tests_in(file: Path) -> Mapping[str, bool]:
    """Return the tests that a file defines, each with whether it is marked slow."""
    tree = ast.parse(file.read_text("utf-8"))
    whole = any(
        "mark.slow" in ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    )
    return {
        node.name: whole or any("mark.slow" in ast.unparse(d) for d in node.decorator_list)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def faults(matrix: Matrix, root: Path = ROOT) -> list[str]:
    """Return what is wrong with the tests that cells name: gone, or slow where others are said."""
    found = []
    for place, cell in cells_of(matrix):
        for test in cell.tests:
            file, _, name = test.partition("::")
            known = tests_in(root / file) if (root / file).is_file() else {}
            if name not in known:
                found.append(f"{place}: there is no test {test}")
            elif known[name] != (cell.claim == SLOW):
                is_slow = "is" if known[name] else "is not"
                found.append(f"{place}: {test} {is_slow} marked slow")
    return found


class Outcomes:
    """Read what pytest recorded of tests, parameters taken together."""

    def __init__(self, junit: Path) -> None:
        self._seen: dict[str, Counter[str]] = {}
        for case in ET.parse(junit).iter("testcase"):
            name = f"{case.get('classname')}.{(case.get('name') or '').partition('[')[0]}"
            bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            self._seen.setdefault(name, Counter())[bad[0] if bad else "passed"] += 1

    def why_not(self, test: str) -> str | None:
        """Return why a test proves nothing, None if all of its cases ran and passed."""
        file, _, name = test.partition("::")
        seen = self._seen.get(f"{file.removesuffix('.py').replace('/', '.')}.{name}")
        if not seen:
            return "did not run"
        worst = next((one for one in ("error", "failure", "skipped") if seen[one]), None)
        return {None: None, "skipped": SKIPPED}.get(worst, "failed")

    def has(self, test: str) -> bool:
        return self.why_not(test) != "did not run"


def unproven(cell: Cell, outcomes: Outcomes | None) -> list[str]:
    """Return the tests of a claim that did not pass; slow ones count where they were run."""
    if outcomes is None or cell.claim not in (TESTED, SLOW):
        return []
    asked = [one for one in cell.tests if cell.claim == TESTED or outcomes.has(one)]
    return [f"{one} {why}" for one in asked if (why := outcomes.why_not(one))]


# ---- the page ------------------------------------------------------------------------------------

SKIPPED = "was skipped"

HEAD = """\
# What runs where

[tools/support.yaml](../tools/support.yaml) names the tests behind each cell; `python -m
tools.support_matrix --write` makes this page of it, and continuous integration compares it with the
record of its own run. **Nothing was ever run or measured on a GPU, over NCCL or on several
machines**: on your GPU `ernie-train doctor --selftest` checks it ([doctor.md](doctor.md)).

- **tested**: the tests behind it run and pass with every change.
- **tested, slow**: the same with tests that take minutes (`./run-tests -m slow`).
- **written, untested**: the code is there, its parts may be tested with stand-ins, and no test runs
  it on such a device.
- **-**: not supported, or without meaning there.
"""


def render(matrix: Matrix, outcomes: Outcomes | None = None) -> str:
    """Return the page."""
    parts = [HEAD]
    for section, features in matrix.items():
        head = [section, *DEVICES.values()]
        rows = [
            [feature, *(_shown(row[device], outcomes) for device in DEVICES)]
            for feature, row in features.items()
        ]
        parts.append(f"## {section}\n\n{_table(head, rows)}")
    parts.append(_pythons())
    return "\n".join(parts)


def _shown(cell: Cell, outcomes: Outcomes | None) -> str:
    return NOT_PROVEN if unproven(cell, outcomes) else cell.claim


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _pythons() -> str:
    record = json.loads(PYTHONS.read_text("utf-8")) if PYTHONS.exists() else {}
    pins = hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest()
    rows = [[version, *_python_row(version, record.get(version), pins)] for version in _VERSIONS]
    about = (
        "Linux on x86-64. `tools/pythons.sh` installs the package with each as README says, "
        "trains, evaluates, exports, makes the report and runs a part of the tests."
    )
    return f"## Python\n\n{about}\n\n" + _table(["Python", "state", "what was run"], rows)


def _python_row(version: str, found: Mapping[str, Any] | None, pins: str) -> list[str]:
    if version == _CI_VERSION:
        return [TESTED, "all tests, with every change"]
    if found is None:
        return ["not run yet", "every pin has a release for it"]
    state = TESTED if found["works"] else "does not work"
    if found["requirements"] != pins:
        state += " with earlier pins"
    if found["ernie_train"].partition(" ")[0] != __version__:
        state += f" before {__version__}"
    ran = f"Python {found['python']}, ernie_train {found['ernie_train']}"
    return [state, f"{ran}: {found['tests']}"]


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--junit", type=Path)
    options = parser.parse_args()
    matrix = read_matrix()
    if wrong := faults(matrix):
        sys.exit("\n".join(wrong))
    outcomes = Outcomes(options.junit) if options.junit else None
    if options.write:
        PAGE.write_text(render(matrix, outcomes), "utf-8")
        return
    told = [
        f"{place}: {one}" for place, cell in cells_of(matrix) for one in unproven(cell, outcomes)
    ]
    # A machine without a browser or bubblewrap skips tests: told, but nothing of the change.
    skipped = [line for line in told if line.endswith(SKIPPED)]
    if skipped:
        print("Not proven by this run:\n" + "\n".join(skipped), file=sys.stderr)
    if wrong := [line for line in told if line not in skipped]:
        sys.exit("docs/support.md claims what this run does not prove:\n" + "\n".join(wrong))
    if PAGE.read_text("utf-8") != render(matrix):
        sys.exit("docs/support.md is not that of today: python -m tools.support_matrix --write")


if __name__ == "__main__":
    main()
