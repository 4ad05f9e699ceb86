"""Ranks that are killed and stopped at random moments: every run continues to the same bits.

Slow: a start of Paddle's launcher takes seconds, and there are dozens. CHAOS_SEED chooses other
moments, CHAOS_INCIDENTS how many.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_train.core.processes import process_state
from tests.launch.launched import LIMIT_S, alive, left_behind, ranks_of, wait_for
from tests.rl.upo_stages import GAE, REWARD, stage, write_prompts
from tests.workspace import make_workspace, metrics_without_time, start, write_rows

INCIDENTS = int(os.environ.get("CHAOS_INCIDENTS", "20"))
RANKS = 2
HANG_S, STOPPED_S = 6.0, 2.0
MOST = 0.5  # of the time of an uninterrupted run, from when all ranks are there to an incident
KINDS = {
    "rank killed": 4, "rank stopped for a while": 3, "rank stopped for good": 3,
    "command killed": 2, "command asked to stop": 2,
}  # fmt: skip


class Chaos:
    """One recipe, run again and again in new directories, with incidents until there are enough."""

    def __init__(self, recipe: Path, expected: Path, stage_name: str, most_s: float) -> None:
        self.recipe, self.expected, self.stage_name = recipe, expected, stage_name
        self.most_s = most_s
        self.rng = random.Random(int(os.environ.get("CHAOS_SEED", "1")))
        self.happened: Counter[str] = Counter()

    def run(self, directory: Path) -> None:
        """Incidents in one directory until the run is through; then it must be the expected one."""
        while True:
            process = begin(self.recipe, directory, "--max-restarts", 50)
            try:
                status = self._disturb(process, directory)
            finally:
                process.kill()
                out, err = process.communicate()
            wait_for(lambda: not left_behind(directory), "processes were left behind", 5)
            if status == 0:
                break
            assert status in (3, -signal.SIGKILL), f"status {status}\n{out}\n{err}"
        assert_same(directory, self.expected, self.stage_name)

    def _disturb(self, process: subprocess.Popen[str], directory: Path) -> int:
        while process.poll() is None and self.happened.total() < INCIDENTS:
            ranks = set(ranks_of(directory).values())
            if len(ranks) < RANKS:
                time.sleep(0.02)
                continue
            time.sleep(self.rng.uniform(0, self.most_s))
            kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
            incident: Callable[..., int | None] = INCIDENT[kind]
            victim = self.rng.choice(sorted(ranks))
            if process.poll() is not None:
                break
            step = last_step(directory, self.stage_name)
            try:
                status = incident(process, victim, ranks)
            except Missed:
                continue
            self.happened[kind] += 1
            print(f"{directory.name}: {kind}, step {step}")
            if status is not None:
                return status
        return process.wait(LIMIT_S * 10)


class Missed(Exception):
    """The rank was ending by itself: no incident."""


def stop(rank: int) -> None:
    """Raises `Missed` where it is past being stopped."""

    def is_settled() -> bool:
        found = process_state(rank)
        return found is None or found.state in "TZX"

    send(rank, signal.SIGSTOP)
    wait_for(is_settled, "it does not stop")
    if not alive(rank):
        raise Missed


def kill_rank(process: subprocess.Popen[str], victim: int, ranks: set[int]) -> None:
    send(victim, signal.SIGKILL)
    wait_for(lambda: not any(map(alive, ranks)), "the others went on")


def stop_for_a_while(process: subprocess.Popen[str], victim: int, ranks: set[int]) -> None:
    stop(victim)
    time.sleep(STOPPED_S)
    assert alive(victim), "it was ended although it was stopped for a moment only"
    send(victim, signal.SIGCONT)


def stop_for_good(process: subprocess.Popen[str], victim: int, ranks: set[int]) -> None:
    stop(victim)
    wait_for(lambda: not any(map(alive, ranks)), "a rank that hangs was not ended")


def kill_command(process: subprocess.Popen[str], victim: int, ranks: set[int]) -> int:
    process.kill()
    return process.wait()


def ask_command(process: subprocess.Popen[str], victim: int, ranks: set[int]) -> int:
    process.terminate()
    return process.wait(LIMIT_S)


INCIDENT: dict[str, Callable[..., int | None]] = {
    "rank killed": kill_rank, "rank stopped for a while": stop_for_a_while,
    "rank stopped for good": stop_for_good, "command killed": kill_command,
    "command asked to stop": ask_command,
}  # fmt: skip


def begin(recipe: Path, directory: Path, *options: object) -> subprocess.Popen[str]:
    return start("run", recipe, "--run-dir", directory, "--nproc", RANKS,
                 "--hang-timeout-s", HANG_S, *options)  # fmt: skip


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        raise Missed from None


def last_step(directory: Path, stage_name: str) -> int:
    path = directory / f"01-{stage_name}/metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def files_of(directory: Path, stage_name: str) -> dict[str, bytes]:
    """What a stage leaves: the last checkpoint, the export, samples."""
    last = sorted((directory / f"01-{stage_name}/checkpoints").glob("step_*"))[-1]
    paths = [path for path in last.rglob("*") if path.is_file() and path.name != "MANIFEST.json"]
    paths += (directory / "export").glob("*.safetensors")
    paths += (directory / f"01-{stage_name}").glob("samples.jsonl")
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def assert_same(directory: Path, expected: Path, stage_name: str) -> None:
    assert metrics_without_time(directory, f"01-{stage_name}") == metrics_without_time(
        expected, f"01-{stage_name}"
    )
    found, wanted = files_of(directory, stage_name), files_of(expected, stage_name)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name] == wanted[name], name


def sft_recipe(root: Path) -> Path:
    recipe = yaml.safe_load(make_workspace(root).read_text())
    recipe["stages"][0] |= {"steps": 60, "validate_every_steps": 3}
    recipe["stages"][0]["checkpoint"]["every_steps"] = 3
    return rewrite(root, recipe | {"evaluation": None, "parallel": {"expert": 2}})


def rl_recipe(root: Path) -> Path:
    recipe = yaml.safe_load(make_workspace(root).read_text())
    prompts = write_prompts(root)
    preferences = [
        {"prompt": row["messages"][0]["content"], "rejected": "no",
         "chosen": f"<think>\n1\n</think>\n\n<response>\n{row['answer']}\n</response>"}
        for row in prompts[:10]
    ]  # fmt: skip
    write_rows(root / "preferences.jsonl", preferences)
    (root / "reward.py").write_text(REWARD)
    often = {"iterations": 24, "checkpoint": {"every_steps": 1, "keep_last": 2}}
    recipe |= {"evaluation": None, "export": None, "stages": [stage(root, **{**GAE, **often})]}
    return rewrite(root, recipe | {"parallel": {"data": 2, "sharding": True}})


def rewrite(root: Path, recipe: dict[str, Any]) -> Path:
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root / "recipe.yaml"


@pytest.mark.slow
@pytest.mark.parametrize(("make", "stage_name"), [(sft_recipe, "sft"), (rl_recipe, "rl")])
def test_whatever_happens_a_run_continues_to_the_same_bits(tmp_path, make, stage_name):
    recipe, expected = make(tmp_path), tmp_path / "expected"
    began = time.monotonic()
    process = begin(recipe, expected)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    whole_s = time.monotonic() - began
    print(f"uninterrupted: {whole_s:.0f} s")
    chaos = Chaos(recipe, expected, stage_name, MOST * whole_s)
    for number in range(INCIDENTS):
        chaos.run(tmp_path / f"run_{number}")
        if chaos.happened.total() >= INCIDENTS:
            break
    print(dict(chaos.happened))
    assert chaos.happened.total() >= INCIDENTS
