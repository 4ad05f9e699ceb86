"""Sweeps: what is run and measured, in which order, how often, and what is refused."""

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ernie_train.core.errors import ConfigError
from tests.tools.evidence.made_sweeps import make_sweep
from tools.evidence import prepare, runs, sweep
from tools.evidence.runs import train
from tools.evidence.sweep import Runner, Step, Sweep, load_sweep


def test_a_finished_run_is_not_repeated(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run_dir: Path, step: Step) -> dict[str, Any]:
        if len(trained) == 3:
            raise KeyboardInterrupt
        return {"loss": float(len(trained))}

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweep, "measured", interrupted)
        Runner(make_sweep(), tmp_path).results(["quick", "slow"], [1, 2])
    results = Runner(make_sweep(), tmp_path).results(["quick", "slow"], [1, 2])
    # The run that was not measured is gone through again, and no other.
    assert trained == ["quick-seed1", "slow-seed1", "quick-seed2", "quick-seed2", "slow-seed2"]
    assert [(r["arm"], r["seed"], r["loss"]) for r in results] == [
        ("quick", 1, 1.0), ("slow", 1, 2.0), ("quick", 2, 4.0), ("slow", 2, 5.0),
    ]  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == results


def test_results_of_other_overrides_are_refused(tmp_path: Path, trained: list[str]) -> None:
    Runner(make_sweep(), tmp_path).result(("quick", 1))
    changed = make_sweep(arms={"quick": {"stages.sft.steps": 4}})
    with pytest.raises(ValueError, match="other settings"):
        Runner(changed, tmp_path).result(("quick", 1))
    assert trained == ["quick-seed1"]


def test_results_of_other_shared_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.yaml").write_text("name: made-up\n")
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    sweep.claim(make_sweep(recipe="r.yaml"), tmp_path)
    sweep.claim(make_sweep(recipe="r.yaml", seeds=[3], arms={}), tmp_path)  # which may differ
    with pytest.raises(SystemExit, match="holds results with other measure; choose another --out"):
        sweep.claim(make_sweep(recipe="r.yaml", measure={"name": "stages"}), tmp_path)
    (tmp_path / "r.yaml").write_text("name: another\n")
    with pytest.raises(SystemExit, match="other sha256"):
        sweep.claim(make_sweep(recipe="r.yaml"), tmp_path)


def test_overrides_come_in_order_and_know_the_directory() -> None:
    shared = {"model.path": "{out}/start", "stages.sft.steps": 2}
    made = make_sweep(shared=shared, overrides=["stages.sft.steps=4"])
    assert made.overrides_of("quick", Path("/o")) == [
        'model.path="/o/start"', "stages.sft.steps=3", "stages.sft.steps=4",
    ]  # fmt: skip


def test_a_derived_arm_begins_when_its_source_is_done(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then the other job takes the second seed, here until the derived one has begun."""
    begun, first_done, second_began = threading.Event(), threading.Event(), threading.Event()

    def later(run_dir: Path) -> list[str]:
        assert first_done.is_set() or run_dir.name != "slow-seed1"
        begun.set()
        return [f"model.path={run_dir.name}"]

    def measured(run_dir: Path, step: Step) -> dict[str, Any]:
        if run_dir.name == "slow-seed1":
            assert second_began.wait(30)
            first_done.set()
        elif run_dir.name == "slow-seed2":
            second_began.set()
            assert begun.wait(30)
        return {"loss": 0.0}

    monkeypatch.setattr(sweep, "measured", measured)
    monkeypatch.setitem(prepare.DERIVED, "later", later)
    made = make_sweep(derived={"control": {"arm": "slow", "by": "later"}})
    results = Runner(made, tmp_path, jobs=2).results(["control", "slow"], [1, 2])
    assert [(r["arm"], r["seed"]) for r in results] == [
        ("slow", 1), ("control", 1), ("slow", 2), ("control", 2),
    ]  # fmt: skip
    assert results[-1]["overrides"] == ["model.path=slow-seed2"]


def test_an_arm_may_take_some_of_the_seeds(tmp_path: Path, trained: list[str]) -> None:
    Runner(make_sweep(some_seeds={"slow": [2]}), tmp_path).results(["quick", "slow"], [1, 2])
    assert trained == ["quick-seed1", "quick-seed2", "slow-seed2"]


def test_a_mistake_in_a_sweep_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: r.yaml\nseed: [1]\nmeasure: {name: balance}\narms: {}\ntables: []\n")
    with pytest.raises(ConfigError, match="seed: unknown key; did you mean 'seeds'"):
        load_sweep(str(file))


# ---- programs ------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for Python; its arguments are in the file beside it. Fails for seed 13."""
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\n"
        'printf "%s\\n" "$PWD" "$OMP_NUM_THREADS" "$MKL_NUM_THREADS" "$@" > "$0.arguments"\n'
        'case "$*" in *seed=13*) exit 4;; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(runs.sys, "executable", str(script))
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    return script


def test_a_run_is_the_command_on_one_thread(command: Path, tmp_path: Path) -> None:
    spent = train("recipes/x.yaml", ["seed=7", "stages.sft.steps=3"], tmp_path / "run")
    given = command.with_suffix(".arguments").read_text().splitlines()
    assert given[:3] == [str(runs.ROOT), "1", "1"]
    run = ["-m", "ernie_train", "run", "recipes/x.yaml", "--run-dir", str(tmp_path / "run")]
    assert given[3:] == [*run, "parallel.data=1", "seed=7", "stages.sft.steps=3"]
    assert 0 <= spent["cpu_s"] <= spent["wall_s"] + 1


def test_a_failing_run_stops_the_sweep(command: Path, tmp_path: Path) -> None:
    with pytest.raises(runs.subprocess.CalledProcessError, match="exit status 4"):
        Runner(make_sweep(), tmp_path).results(["quick"], [13, 14])
    assert "seed=13" in command.with_suffix(".arguments").read_text()
    assert not list(tmp_path.glob("*/result.json"))


def test_costs_are_the_sum_over_all_starts(
    command: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first start fails, a second is interrupted, a third goes through."""
    interrupted = iter([False, True, False])
    ends = iter([(4 << 8, 2.0, 700), (3 << 8, 3.0, 900), (0, 5.0, 800)])
    clock = iter([10.0, 15.0, 100.0, 107.0, 200.0, 211.0])

    def wait4(pid: int, options: int) -> tuple[int, int, Any]:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        if next(interrupted, False):
            raise KeyboardInterrupt
        os.waitpid(pid, 0)
        status, cpu_s, peak_mb = next(ends)
        used = SimpleNamespace(ru_utime=cpu_s - 0.5, ru_stime=0.5, ru_maxrss=peak_mb * 1000)
        return pid, status, used

    monkeypatch.setattr(runs.os, "wait4", wait4)
    monkeypatch.setattr(runs.time, "perf_counter", lambda: next(clock))
    with pytest.raises(runs.subprocess.CalledProcessError):
        train("recipes/x.yaml", [], tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train("recipes/x.yaml", [], tmp_path / "run")
    spent = train("recipes/x.yaml", [], tmp_path / "run")
    assert spent == {"wall_s": 5.0 + 7.0 + 11.0, "cpu_s": 10.0, "peak_gb": 0.9}


def test_ctrl_c_ends_all_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both programs that run side by side are told to stop before the sweep ends."""
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\ntrap \'touch "$6.stopped"; exit 3\' TERM\ntouch "$6.began"\n'
        "while true; do sleep 0.05; done\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(runs.sys, "executable", str(script))
    marks = [tmp_path / f"{arm}-seed1" for arm in ("quick", "slow")]

    def interrupted(futures: Any, **_: Any) -> None:
        give_up = time.monotonic() + 60
        while not all(mark.with_suffix(".began").exists() for mark in marks):
            assert time.monotonic() < give_up, "the programs did not begin"
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Runner(make_sweep(), tmp_path, jobs=2).results(["quick", "slow"], [1])
    assert all(mark.with_suffix(".stopped").exists() for mark in marks)
    assert not list(tmp_path.glob("*/result.json"))


def test_ctrl_c_reaches_a_program_that_is_about_to_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted, begin = threading.Event(), runs.subprocess.Popen

    def late(command: list[str], **options: Any) -> Any:
        assert interrupted.wait(60)
        time.sleep(0.2)  # after the first round of signals
        return begin(["sleep", "60"], **options)

    def interrupt(futures: Any, **_: Any) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.subprocess, "Popen", late)
    monkeypatch.setattr(sweep, "wait", interrupt)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Runner(make_sweep(), tmp_path, jobs=2).results(["quick"], [1])
    assert time.monotonic() - started < 50


# ---- the whole in small --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_makes_everything_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, start = tmp_path / "out", "[stages.sft.steps=3, stages.sft.checkpoint.every_steps=3]"
    command = ["rl", "seeds=[1, 2]", "overrides=[stages.rl.iterations=2]", "--jobs", "2"]
    command += [f"prepare.options={{overrides: {start}}}", "fresh.options.problems=6"]
    command += ["measure.options.problems=6", "--out", str(out), "--arms", "group,loose-group"]
    sweep.main(command)
    names = ("table.md", "results.json", "rl_ablation.png", "rl_hacking.png")
    assert all((out / name).exists() for name in names)
    results = json.loads((out / "results.json").read_text())
    assert [(r["arm"], r["seed"]) for r in results] == [
        ("group", 1), ("loose-group", 1), ("group", 2), ("loose-group", 2),
    ]  # fmt: skip
    assert all(len(r["curve/reward"]) == 2 for r in results)
    assert len(results[1]["curve/solved"]) == 2
    text = (out / "table.md").read_text()
    for module, name in ((sweep, "run_program"), (prepare, "run_program"), (sweep, "train")):
        monkeypatch.setattr(module, name, None)  # nothing is done again
    monkeypatch.setattr(prepare, "train", None)
    sweep.main(command)
    assert (out / "table.md").read_text() == text


# ---- rates ---------------------------------------------------------------------------------------


def with_rates(**changes: Any) -> Sweep:
    rates = {
        "key": "lr", "trial_seed": 9, "best": "loss", "trial": {"steps": 2},
        "measure": {"name": "balance", "options": {"on": "{out}/validation"}},
        "arms": {"quick": [0.1, 0.3], "slow": "quick", "control": [0.1, 0.3]},
    }  # fmt: skip
    arms = {"quick": {"a": "{out}/x"}, "slow": {"a": 2}}
    derived = {"control": {"arm": "quick", "by": "later"}}
    return make_sweep(arms=arms, derived=derived, rates={**rates, **changes})


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], str]]:
    """Notes of name, overrides and what was measured on; the loss is 1 at a rate of 0.3, else 0."""
    notes: list[tuple[str, list[str], str]] = []

    def train(recipe: str, overrides: list[str], run_dir: Path) -> dict[str, float]:
        run_dir.mkdir(parents=True, exist_ok=True)
        notes.append((f"{run_dir.parent.name}/{run_dir.name}", overrides, ""))
        return {"wall_s": 2.0, "cpu_s": 1.0, "peak_gb": 0.1}

    def measured(run_dir: Path, step: Step) -> dict[str, Any]:
        name, overrides, _ = notes[-1]
        notes[-1] = (name, overrides, step.options.get("on", ""))
        best = "lr=0.1" if "control" in name else "lr=0.3"
        return {"loss": float(best in overrides)}

    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(sweep, "measured", measured)
    monkeypatch.setitem(prepare.DERIVED, "later", lambda run_dir: [f"from={run_dir.name}"])
    return notes


def test_each_arm_takes_the_rate_whose_trial_is_best(
    tmp_path: Path, tried: list[tuple[str, list[str], str]]
) -> None:
    made = with_rates()
    rates = sweep.choose_rates(made, tmp_path, 1)
    assert rates == {"quick": 0.3, "slow": 0.3, "control": 0.1}
    own, later = [f'a="{tmp_path}/x"', "steps=2"], ["from=quick-at-0.1-seed9"]
    assert [(name, overrides[1:]) for name, overrides, _ in tried] == [
        ("rates/quick-at-0.1-seed9", [*own, "lr=0.1"]),
        ("rates/quick-at-0.3-seed9", [*own, "lr=0.3"]),
        ("rates/control-at-0.1-seed9", [*later, "lr=0.1"]),
        ("rates/control-at-0.3-seed9", [*later, "lr=0.3"]),
    ]
    assert {on for _, _, on in tried} == {f"{tmp_path}/validation"}
    assert all(overrides[0] == "seed=9" for _, overrides, _ in tried)
    written = json.loads((tmp_path / "rates.json").read_text())
    assert written["chosen"] == rates and written["figures"]["quick-at-0.3"] == 1.0
    tried.clear()
    assert sweep.choose_rates(made, tmp_path, 1) == rates and not tried, "trials are kept"
    Runner(made, tmp_path, rates=rates).results(["quick", "slow", "control"], [1])
    ends = {name.split("/")[-1]: overrides[-1] for name, overrides, _ in tried}
    assert ends == {"quick-seed1": "lr=0.3", "slow-seed1": "lr=0.3", "control-seed1": "lr=0.1"}


def test_equal_trials_give_the_lower_rate(
    tmp_path: Path, tried: list[tuple[str, list[str], str]]
) -> None:
    made = with_rates(arms={"quick": [0.5, 0.2], "slow": [0.7, 0.4]})
    assert sweep.choose_rates(made, tmp_path, 1) == {"quick": 0.2, "slow": 0.4}
    assert sweep.choose_rates(make_sweep(), tmp_path, 1) == {}


def test_rates_that_were_chosen_once_are_not_tried_again(
    tmp_path: Path, tried: list[tuple[str, list[str], str]]
) -> None:
    made = with_rates(chosen={"quick": 0.1, "control": 0.3})
    assert sweep.choose_rates(made, tmp_path, 1) == {"quick": 0.1, "slow": 0.1, "control": 0.3}
    assert not tried and not (tmp_path / "rates.json").exists()
    for chosen, said in (({"quick": 0.1}, "each arm"), ({"quick": 0.1, "control": 0.2}, "control")):
        with pytest.raises(ValueError, match=said):
            with_rates(chosen=chosen)


def test_what_no_choice_may_see_is_made_after_the_choice(
    tmp_path: Path, tried: list[tuple[str, list[str], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def fresh(out: Path, recipe: str, **options: Any) -> prepare.Starts:
        assert (out / "rates.json").exists()
        seen.extend([f"{len(tried)} trials", options["of"]])
        return {"start": {"loss": 0.5}}

    monkeypatch.setitem(prepare.PREPARE, "fresh", fresh)
    made = with_rates().model_dump(exclude_none=True)
    made |= {"fresh": {"name": "fresh", "options": {"of": "x"}}, "seeds": [1]}
    made["tables"] = [{"columns": {"loss": {"key": "loss"}}}]
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(made))
    sweep.main([str(file), "--out", str(tmp_path / "out")])
    assert seen == ["4 trials", "x"]
    ends = {name: overrides[-1] for name, overrides, _ in tried[4:]}
    assert ends == {
        "out/quick-seed1": "lr=0.3", "out/slow-seed1": "lr=0.3", "out/control-seed1": "lr=0.1",
    }  # fmt: skip
    table = (tmp_path / "out/table.md").read_text()
    assert "| start | 0.5 |" in table and "| control |" in table
    changed = {**made, "rates": {**made["rates"], "trial_seed": 8}}
    file.write_text(json.dumps(changed))
    with pytest.raises(SystemExit, match="other rates; choose another --out"):
        sweep.main([str(file), "--out", str(tmp_path / "out")])
