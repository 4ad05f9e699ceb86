"""docs/support.md is that of today, and says `tested` of nothing that no passing test proves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ernie_train.core.cpu import __version__
from tools import support_matrix
from tools.support_matrix import (
    NOT_PROVEN,
    PAGE,
    SLOW,
    TESTED,
    WRITTEN,
    Cell,
    Outcomes,
    cells_of,
    faults,
    read_matrix,
    render,
    unproven,
)

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a.test_x" name="test_good[1]"/>
<testcase classname="tests.a.test_x" name="test_good[2-b[c]]"/>
<testcase classname="tests.a.test_x" name="test_partly[1]"/>
<testcase classname="tests.a.test_x" name="test_partly[2]"><skipped message="no"/></testcase>
<testcase classname="tests.a.test_x" name="test_bad"><failure/></testcase>
<testcase classname="tests.a.test_x" name="test_torn"><error/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def outcomes(tmp_path: Path) -> Outcomes:
    (tmp_path / "junit.xml").write_text(JUNIT)
    return Outcomes(tmp_path / "junit.xml")


def test_the_page_is_that_of_today_and_every_named_test_exists() -> None:
    matrix = read_matrix()
    assert faults(matrix) == []
    assert render(matrix) == PAGE.read_text("utf-8"), "run: python -m tools.support_matrix --write"


def test_nothing_is_said_to_be_tested_on_a_gpu() -> None:
    for place, cell in cells_of(read_matrix()):
        assert not place.endswith(", GPU") or cell.claim not in (TESTED, SLOW), place


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("test_good", None),
        ("test_partly", "was skipped"),
        ("test_bad", "failed"),
        ("test_torn", "failed"),
        ("test_gone", "did not run"),
    ],
)
def test_a_test_proves_only_what_ran_and_passed(outcomes: Outcomes, name, why) -> None:
    test = f"tests/a/test_x.py::{name}"
    assert outcomes.why_not(test) == why
    told = unproven(Cell(TESTED, (test,)), outcomes)
    assert told == ([] if why is None else [f"{test} {why}"])
    matrix = {"S": {"f": {device: Cell(TESTED, (test,)) for device in support_matrix.DEVICES}}}
    assert (f"| f | {TESTED} |" in render(matrix, outcomes)) == (why is None)
    assert (f"| f | {NOT_PROVEN} |" in render(matrix, outcomes)) == (why is not None)


@pytest.mark.parametrize(("name", "status"), [("test_partly", None), ("test_bad", 1)])
def test_what_a_machine_skips_is_told_and_what_fails_is_an_error(
    tmp_path: Path, monkeypatch, capsys, name: str, status: int | None
) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT)
    cells = {device: Cell(TESTED, (f"tests/a/test_x.py::{name}",)) for device in ("cpu",)}
    matrix = {"S": {"f": {device: Cell("-", ()) for device in support_matrix.DEVICES} | cells}}
    page = tmp_path / "support.md"
    page.write_text(render(matrix))
    monkeypatch.setattr(support_matrix, "PAGE", page)
    monkeypatch.setattr(support_matrix, "read_matrix", lambda: matrix)
    monkeypatch.setattr(support_matrix, "faults", lambda matrix: [])
    monkeypatch.setattr("sys.argv", ["support_matrix", "--junit", str(tmp_path / "junit.xml")])
    if status is None:
        support_matrix.main()
        assert f"{name} was skipped" in capsys.readouterr().err
    else:
        with pytest.raises(SystemExit, match=f"{name} failed"):
            support_matrix.main()


def test_slow_tests_count_where_they_ran(outcomes: Outcomes) -> None:
    assert unproven(Cell(SLOW, ("tests/a/test_x.py::test_gone",)), outcomes) == []
    assert unproven(Cell(SLOW, ("tests/a/test_x.py::test_bad",)), outcomes)
    assert unproven(Cell(WRITTEN, ("tests/a/test_x.py::test_bad",)), outcomes) == []


def test_tests_that_are_gone_or_slow_are_found(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(
        "import pytest\n@pytest.mark.slow\ndef test_slow(): ...\ndef test_quick(): ...\n"
        "def helper(): ...\n"
    )
    (tmp_path / "s.py").write_text("pytestmark = pytest.mark.slow\ndef test_too(): ...\n")

    def told(claim: str, *tests: str) -> list[str]:
        cells = {"f": {"cpu": Cell(claim, tests)}}
        return [line.partition(": ")[2] for line in faults({"S": cells}, tmp_path)]

    assert told(TESTED, "t.py::test_quick") == told(SLOW, "t.py::test_slow", "s.py::test_too") == []
    assert told(TESTED, "t.py::test_slow") == ["t.py::test_slow is marked slow"]
    assert told(TESTED, "s.py::test_too") == ["s.py::test_too is marked slow"]
    assert told(SLOW, "t.py::test_quick") == ["t.py::test_quick is not marked slow"]
    for gone in ("t.py::test_none", "t.py::helper", "none.py::test_quick", "t.py"):
        assert told(WRITTEN, gone) == [f"there is no test {gone}"]


@pytest.mark.parametrize("cell", ["[]", "{slow: []}", "true", "{tested: [a]}", "text"])
def test_cells_without_proof_are_refused(tmp_path: Path, cell: str) -> None:
    (tmp_path / "support.yaml").write_text(f"S:\n  f: {{cpu: {cell}}}\n")
    with pytest.raises(SystemExit, match="no cell"):
        read_matrix(tmp_path / "support.yaml")
    (tmp_path / "support.yaml").write_text("S:\n  f: {tpu: no}\n")
    with pytest.raises(SystemExit, match="no such device"):
        read_matrix(tmp_path / "support.yaml")


def test_a_python_is_tested_by_a_run_with_todays_pins_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(support_matrix, "PYTHONS", tmp_path / "pythons.json")
    assert "| 3.12 | not run yet |" in render({})
    found = {"python": "3.12.1", "requirements": "other", "works": True, "tests": "9 passed"}
    found["ernie_train"] = f"{__version__} at abc"
    support_matrix.PYTHONS.write_text(json.dumps({"3.12": found}))
    ran = f"Python 3.12.1, ernie_train {__version__} at abc: 9 passed"
    assert f"| 3.12 | tested with earlier pins | {ran} |" in render({})
    support_matrix.PYTHONS.write_text(json.dumps({"3.12": found | {"ernie_train": "0.1 at abc"}}))
    assert f"| 3.12 | tested with earlier pins before {__version__} |" in render({})
    support_matrix.PYTHONS.write_text(json.dumps({"3.12": found | {"works": False}}))
    assert "| 3.12 | does not work" in render({})
