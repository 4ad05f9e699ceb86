"""Results of other seeds: joined with those of a sweep, and kept for later ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tools.evidence.made_sweeps import make_sweep
from tools.evidence import prepare, sweep
from tools.evidence.sweep import Sweep


def test_results_of_other_seeds_are_joined_and_none_counts_twice(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(sweep, "report", lambda made, results, *rest: shown.append(results) or "")
    monkeypatch.setattr(sweep, "load_sweep", lambda *given: make_sweep(seeds=seeds, **changes))

    def run(name: str, *options: str) -> list[tuple[str, int]]:
        sweep.main(["made", "--arms", "quick", "--out", str(tmp_path / name), *options])
        return [(result["arm"], result["seed"]) for result in shown[-1]]

    changes: dict[str, Any] = {}
    seeds = [2]
    run("other")
    theirs = ("--with", str(tmp_path / "other/results.json"))
    seeds = [1]
    assert run("own", *theirs) == [("quick", 1), ("quick", 2)]
    (tmp_path / "other/test_seed.json").write_text('{"seed": 5}')
    with pytest.raises(SystemExit, match="other test problems"):
        run("own", *theirs)
    (tmp_path / "other/test_seed.json").unlink()
    seeds = [1, 2]
    with pytest.raises(SystemExit, match="quick has seed 2 twice"):
        run("own", *theirs)
    changes, seeds = {"recipe": "recipes/tiny.yaml"}, [1]
    with pytest.raises(SystemExit, match="other settings"):
        run("changed", *theirs)


def test_kept_results_grow_by_seeds_and_are_not_made_again(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    fresh: list[int] = []

    def made(**changes: Any) -> Sweep:
        return make_sweep(
            fresh={"name": "drawn"}, arms={"quick": {"model.path": "{out}/x"}}, **changes
        )

    def drawn(out: Path, recipe: str) -> dict[str, Any]:
        file = out / "test_seed.json"
        if not file.exists():
            fresh.append(len(fresh))
            file.write_text(json.dumps({"seed": fresh[-1]}))
        return {}

    def run(name: str) -> list[tuple[str, int, float]]:
        sweep.main(["made", "--out", str(tmp_path / name), "--keep", str(tmp_path / "kept")])
        return [(result["arm"], result["seed"], result["loss"]) for result in shown[-1]]

    monkeypatch.setitem(prepare.PREPARE, "drawn", drawn)
    monkeypatch.setattr(sweep, "report", lambda made, results, *rest: shown.append(results) or "")
    monkeypatch.setattr(sweep, "load_sweep", lambda *given: settings)
    settings = made(seeds=[2])
    assert run("one") == [("quick", 2, 1.0)]
    before = {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()}
    assert run("one") == [("quick", 2, 1.0)]  # nothing is left to do, and nothing is written anew
    assert {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()} == before
    settings = made(seeds=[1, 2])
    assert run("two") == [("quick", 1, 2.0), ("quick", 2, 1.0)]
    assert trained == ["quick-seed2", "quick-seed1"]
    assert fresh == [0]  # the second directory has the test problems of the first
    assert shown[-1][0]["overrides"] == ['model.path="{out}/x"']
    (tmp_path / "three").mkdir()
    (tmp_path / "three/test_seed.json").write_text(json.dumps({"seed": 5}))
    with pytest.raises(SystemExit, match=r"other test problems: compare .*kept/test_seed.json"):
        run("three")
    settings = made(seeds=[3], measure={"name": "stages"})
    with pytest.raises(SystemExit, match=r"other settings: compare .*kept/settings.json"):
        run("four")
