"""How the tests are divided among workers: a file stays whole, and the longest begin first."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest

TESTS = Path(__file__).resolve().parents[1]


def test_the_longest_files_are_there() -> None:
    assert [name for name in conftest.LONGEST if not (TESTS / name).is_file()] == []


class Worker:
    def __init__(self) -> None:
        self.gateway, self.sent = SimpleNamespace(id=str(id(self))), []
        self.shutting_down = False

    def send_runtest_some(self, places: list[int]) -> None:
        self.sent += places

    def shutdown(self) -> None:
        self.shutting_down = True


@pytest.mark.parametrize("dist", ["load", "loadfile"])
def test_a_worker_gets_whole_files_in_the_order_of_collection(dist: str) -> None:
    option = SimpleNamespace(loadscopereorder=True)
    told: dict[str, Any] = {"dist": dist, "tx": ["2*popen"]}
    config: Any = SimpleNamespace(option=option, getvalue=told.get)
    scheduler = conftest.pytest_xdist_make_scheduler(config, None)
    names = ["a.py::1", "b.py::1", "b.py::2", "b.py::3", "c.py::1", "c.py::2"]
    workers = [Worker(), Worker()]
    for worker in workers:
        scheduler.add_node(worker)
        scheduler.add_node_collection(worker, names)
    scheduler.schedule()
    assert [names[worker.sent[0]] for worker in workers] == ["a.py::1", "b.py::1"]
    files = [{names[place].partition(":")[0] for place in worker.sent} for worker in workers]
    assert not files[0] & files[1]


@pytest.mark.parametrize(
    ("group", "use"),
    zip(
        conftest.TOGETHER,
        [
            r"^from tests\S* import .*\b(start_on_ranks|run_on)\b",
            r'\breferee\((script|\s*"[^ ]*")|"reader"',
        ],
        strict=True,
    ),
    ids=["ranks", "torch"],
)
def test_all_files_that_use_what_is_started_once_go_to_one_worker(
    group: tuple[str, ...], use: str
) -> None:
    found = {
        path.relative_to(TESTS.parent).as_posix()
        for path in TESTS.rglob("test_*.py")
        if re.search(use, path.read_text(), re.M) and path != Path(__file__)
    }
    assert found == set(group)
    config: Any = SimpleNamespace(
        option=SimpleNamespace(), getvalue={"dist": "loadfile", "tx": ["2*popen"]}.get
    )
    scheduler = conftest.pytest_xdist_make_scheduler(config, None)
    assert len({scheduler._split_scope(f"{name}::test") for name in found}) == 1


def test_another_distribution_is_left_alone() -> None:
    config: Any = SimpleNamespace(getvalue={"dist": "worksteal"}.get)
    assert conftest.pytest_xdist_make_scheduler(config, None) is None


def test_workers_begin_with_the_longest_files() -> None:
    def item(name: str) -> Any:
        return SimpleNamespace(path=TESTS / name, get_closest_marker=lambda _: None)

    names = ["io/test_files.py", conftest.LONGEST[1], "weights/test_hf.py", conftest.LONGEST[0]]
    for config, expected in (
        (SimpleNamespace(), names),
        (SimpleNamespace(workerinput={}), [names[3], names[1], names[0], names[2]]),
    ):
        items = [item(name) for name in names]
        conftest.pytest_collection_modifyitems(config, items)  # type: ignore[arg-type]
        assert [str(i.path.relative_to(TESTS)) for i in items] == expected
