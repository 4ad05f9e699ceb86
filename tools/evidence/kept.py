"""Results of a sweep beside those of other seeds: of other machines, or kept from earlier days.

Only results of the same settings and of the same fresh test problems are put together.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.evidence.main_job import TEST_SEED

SETTINGS, RESULTS = "settings.json", "results.json.gz"

Result = dict[str, Any]
Task = tuple[str, int]  # arm, seed


def join_results(own: Sequence[Result], files: Sequence[Path], out: Path) -> list[Result]:
    """Return the results of the sweep in `out` and those of other results.json, by seed.

    Ends the program if what all runs share differs, by the settings.json and the test seed beside
    each file, or if an arm has a seed twice.
    """
    found = list(own)
    for file in files:
        _require_same(out, file.parent, SETTINGS)
        _require_same(out, file.parent, TEST_SEED)
        found += json.loads(file.read_text("utf-8"))
    return _each_once(found)


def begin(directory: Path, out: Path) -> list[Result]:
    """Return the results that are kept in `directory`, and let `out` have their test problems.

    Ends the program where `out` has other settings, or other test problems already.
    """
    if not (directory / RESULTS).exists():
        return []
    _require_same(out, directory, SETTINGS)
    if (directory / TEST_SEED).exists() and not (out / TEST_SEED).exists():
        shutil.copyfile(directory / TEST_SEED, out / TEST_SEED)
    _require_same(out, directory, TEST_SEED)
    with gzip.open(directory / RESULTS, "rt", encoding="utf-8") as stream:
        results: list[Result] = json.load(stream)
    return results


def keep(directory: Path, kept: Sequence[Result], own: Sequence[Result], out: Path) -> list[Result]:
    """Write the kept results and those of the sweep in `out` into `directory`; return them all.

    Paths under `out` are written as `{out}`, so that no file tells where it was made.
    """
    text = json.dumps(list(own)).replace(str(out), "{out}")
    results = _each_once([*kept, *json.loads(text)])
    directory.mkdir(parents=True, exist_ok=True)
    for name in (SETTINGS, TEST_SEED):
        if (out / name).exists():
            shutil.copyfile(out / name, directory / name)
    partial = directory / f"{RESULTS}.tmp"
    # Without the time of writing: the same results are the same bytes.
    partial.write_bytes(gzip.compress(json.dumps(results).encode(), mtime=0))
    partial.replace(directory / RESULTS)
    return results


def _require_same(out: Path, other: Path, name: str) -> None:
    """End the program unless both directories have a file with the same bytes, or both none."""
    files = [out / name, other / name]
    mine, theirs = (file.read_bytes() if file.exists() else None for file in files)
    if mine != theirs:
        what = "on other test problems" if name == TEST_SEED else "with other settings"
        sys.exit(f"{other} holds results {what}: compare {other / name} and {out / name}")


def _each_once(results: Sequence[Result]) -> list[Result]:
    seen: set[Task] = set()
    for result in results:
        task = (result["arm"], result["seed"])
        if task in seen:
            sys.exit(f"{task[0]} has seed {task[1]} twice; leave it out with seeds=[...]")
        seen.add(task)
    return sorted(results, key=lambda result: int(result["seed"]))
