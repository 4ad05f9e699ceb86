"""Uses of the cores by a run: ranks where the work can be shared out, threads otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ernie_train.cli.run import RunCommand
from ernie_train.core.blas import Processor
from ernie_train.core.cpu import CpuSetup
from ernie_train.launch import LaunchSettings, cores, launcher
from ernie_train.launch.cores import CorePlan, plan_cores
from ernie_train.model.configuration import PRESETS, Ernie4_5_MoeConfig

SFT = {
    "kind": "sft", "micro_batch_size": 4, "grad_accum_steps": 4, "seq_len": 512, "steps": 100,
}  # fmt: skip
RL = {
    "kind": "upo", "micro_batch_size": 16, "iterations": 50,
    "rollout": {"prompts_per_iteration": 16, "group_size": 8, "max_new_tokens": 64},
    "policy": {"minibatches": 2},
}  # fmt: skip


def plan(
    *stages: Any, count: int = 2, run_dir: Path | None = None, chosen: str = "", **values: Any
) -> CorePlan | None:
    """The plan on a machine of `count` cores; `chosen`: OMP_NUM_THREADS of the user."""
    setup = CpuSetup(Processor(), cores=count, threads=int(chosen) if chosen else count)
    setup.kept = {"OMP_NUM_THREADS": chosen} if chosen else {}
    recipe = {"device": "cpu", "stages": list(stages), **values}
    return plan_cores(recipe, run_dir, Path(), setup)


def ranks(*stages: Any, **settings: Any) -> int:
    found = plan(*stages, **settings)
    assert found is not None
    return found.ranks


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (2, 2), (3, 2), (4, 4), (6, 4), (64, 4)])
def test_as_many_ranks_as_share_the_micro_batches_evenly(count: int, expected: int) -> None:
    assert ranks(SFT, count=count) == expected


def test_every_stage_must_share_out_evenly() -> None:
    assert ranks(SFT, {**SFT, "grad_accum_steps": 6}, count=4) == 2
    assert ranks(SFT, RL, count=8) == 4  # 128 / 2 / 16 micro-batches
    assert ranks(SFT, {**SFT, "grad_accum_steps": 1}, count=4) == 1
    assert (
        ranks(
            {"kind": "dpo", "micro_batch_size": 4, "pairs_per_step": 8, "steps": 99, "seq_len": 64}
        )
        == 2
    )


def test_the_line_says_what_was_chosen_and_how_to_switch_it_off() -> None:
    assert (found := plan(SFT, count=6)) is not None
    assert found.line == "6 cores: 4 data ranks with 1 thread each (--nproc 1 switches ranks off)"
    assert (found := plan({**SFT, "grad_accum_steps": 1})) is not None
    advice = "(grad_accum_steps: 2 would use more cores)"
    assert found.line == f"2 cores: one process with 2 threads {advice}"
    assert (found := plan({**SFT, "grad_accum_steps": 1}, chosen="1")) is not None
    assert found.line == f"2 cores: one process with 1 thread {advice}"
    assert (found := plan(SFT, count=1)) is not None
    assert found.line == "1 core: one process with 1 thread"


@pytest.mark.parametrize(
    ("stages", "count", "advised"),
    [
        ([{**SFT, "grad_accum_steps": 1}], 8, 4),
        ([SFT, {**SFT, "grad_accum_steps": 1}], 3, 2),
        ([{**SFT, "grad_accum_steps": 3}], 2, None),  # 2 would shorten its steps
        ([{**SFT, "grad_accum_steps": 1, "steps": 2}], 2, None),
        ([{**SFT, "grad_accum_steps": 1}, {**RL, "micro_batch_size": 64}], 2, None),  # not by it
        ([], 2, None),
    ],
)
def test_advice_is_given_only_where_it_would_help(
    stages: list[Any], count: int, advised: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (found := plan(*stages, count=count)) is not None
    told = f" (grad_accum_steps: {advised} would use more cores)" if advised else ""
    assert found.line == f"{count} cores: one process with {count} threads{told}"
    if advised:
        changed = [{**stage, "grad_accum_steps": advised} for stage in stages]
        assert ranks(*changed, count=count) == advised
    monkeypatch.setattr(cores, "memory_bytes", lambda: {"total": 9})
    assert (found := plan(*stages, count=count)) is not None and "would" not in found.line


def test_short_runs_are_one_process(tmp_path: Path) -> None:
    assert ranks({**SFT, "steps": 2}) == 1
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "a.jsonl").write_text("x" * 40_000)
    epochs = {k: v for k, v in SFT.items() if k != "steps"} | {"data": [{"path": str(rows)}]}
    assert ranks({**epochs, "epochs": 2}) == 1
    assert ranks({**epochs, "epochs": 4}) == 2
    assert ranks({**epochs, "epochs": 4, "data": [{"path": str(rows / "*.jsonl")}]}) == 2


@pytest.mark.parametrize(
    ("name", "size", "path", "expected"),
    [
        ("a/b.jsonl", 40_000, "a", 2),
        ("a/b.jsonl", 40_000, "*/b.jsonl", 2),
        ("a/b/c.jsonl", 40_000, "**/*.jsonl", 2),
        ("a/b/c.jsonl", 40_000, "a/*", 2),
        ("a/b.jsonl", 20_000, "**", 1),  # once, though its directory matches too
        ("a/[b].jsonl", 40_000, "a/[b].jsonl", 2),
        ("b.jsonl.gz", 10_000, "b.jsonl.gz", 2),
        ("b.parquet", 10_000, "b.parquet", 2),
        ("b.parquet", 5_000, "*.parquet", 1),
    ],
)
def test_data_are_found_as_the_run_finds_them(
    name: str, size: int, path: str, expected: int, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(bytes(size))
    stage = {key: value for key, value in SFT.items() if key != "steps"}
    assert ranks({**stage, "epochs": 4, "data": [{"path": f"{tmp_path}/{path}"}]}) == expected


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ([{"seq_len": 512, "steps": 2}], 1),
        ([{"seq_len": 512, "steps": 2}, {"seq_len": 4096, "steps": 1}], 2),
        ([{"seq_len": 512, "tokens": 40_000}], 2),
        ([{"seq_len": 512, "steps": 2, "micro_batch_size": 16}], 2),
    ],
)
def test_phases_of_a_schedule_count(phases: list[dict[str, Any]], expected: int) -> None:
    stage = {"kind": "pretrain", "micro_batch_size": 2, "grad_accum_steps": 4}
    assert ranks({**stage, "rope_schedule": phases}) == expected


def test_threads_that_the_user_chose_stay_and_leave_fewer_ranks() -> None:
    assert ranks(SFT, count=4, chosen="2") == 2
    assert ranks(SFT, count=4, chosen="8") == 1
    assert ranks(SFT, count=4, chosen="1") == 4


@pytest.mark.parametrize("layout", [{"data": 1}, {"expert": 2}, {"sharding": True}])
def test_a_layout_of_the_recipe_decides(layout: dict[str, Any]) -> None:
    assert plan(SFT, parallel=layout) is None
    assert ranks(SFT, parallel={"recompute": True}) == 2


def test_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.importlib.metadata, "version", lambda name: "3.3.1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert plan(SFT, device="gpu") is None and plan(SFT, device="auto") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert ranks(SFT, device="auto") == 2


def test_a_run_keeps_its_ranks_where_there_are_cores_for_them(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("parallel: {data: 2}\n")
    assert (kept := plan(SFT, count=4, run_dir=tmp_path)) is not None
    assert kept.ranks == 2 and "as this run began" in kept.line
    assert (fewer := plan(SFT, count=1, run_dir=tmp_path)) is not None
    assert fewer.ranks == 1 and "this run began with 2, results differ by rounding" in fewer.line
    (tmp_path / "recipe.yaml").write_text("parallel: {data: 1}\n")
    assert ranks(SFT, count=4, run_dir=tmp_path) == 1


@pytest.mark.parametrize(
    ("data", "threads", "count", "chosen", "kept", "line"),
    [
        (2, 1, 4, "", 1, "4 cores: 2 data ranks with 1 thread each (as this run began"),
        (2, 2, 4, "", None, "4 cores: 2 data ranks with 2 threads each (as this run began"),
        (1, 2, 8, "", 2, "8 cores: one process with 2 threads (as this run began)"),
        (1, 8, 4, "", None, "one process with 4 threads (this run began with 8 threads, results"),
        (2, 1, 4, "2", None, "2 threads each (this run began with 1 thread, results differ"),
        (2, 3, 1, "", None, "this run began with 2, results differ"),
        (2, "many", 4, "", None, "2 data ranks with 2 threads each (as this run began"),
    ],
)
def test_a_run_keeps_the_threads_of_its_ranks(
    data: int, threads: Any, count: int, chosen: str, kept: int | None, line: str, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(f"parallel: {{data: {data}}}\n")
    (tmp_path / "environment.json").write_text(json.dumps({"cpu": {"threads": threads}}))
    assert (found := plan(SFT, count=count, run_dir=tmp_path, chosen=chosen)) is not None
    assert found.threads == kept and line in found.line


@pytest.mark.parametrize(("ranks", "threads"), [(1, 3), (2, 1)])
def test_the_process_and_its_ranks_take_the_threads_that_a_run_keeps(
    ranks: int, threads: int
) -> None:
    program = (
        "import os, subprocess, sys\n"
        "from ernie_train.core import cpu\n"
        f"cpu.use_threads({threads})\n"
        f"assert cpu.cpu_setup().done['MKL_NUM_THREADS'] == '{threads}'\n"
        "show = 'import os; from ernie_train.core import cpu; print(cpu.cpu_setup().threads, '\\\n"
        '    \'os.environ["MKL_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"])\'\n'
        "exec(show)\n"
        f"environ = {{**os.environ, 'PADDLE_LOCAL_SIZE': '{ranks}'}}\n"
        "subprocess.run([sys.executable, '-c', show], env=environ, check=True)\n"
    )
    names = ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ERNIE_TRAIN_CPU_SETUP")
    environ = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-u", "-c", program],
        env=environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [f"{threads} {threads} {threads}"] * 2


def test_a_run_leaves_ranks_that_its_recipe_no_longer_allows(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("parallel: {data: 4}\n")
    for added, expected in ((1, 1), (6, 2), (8, 4)):
        stages = SFT, {**SFT, "grad_accum_steps": added}
        assert (found := plan(*stages, count=4, run_dir=tmp_path)) is not None
        assert found.ranks == expected
        said = "as this run began" if expected == 4 else "this run began with 4, results differ"
        assert said in found.line


@pytest.mark.parametrize("begun", [None, 1, 4])
def test_one_process_quantizes_the_export(begun: int | None, tmp_path: Path) -> None:
    if begun is not None:
        (tmp_path / "recipe.yaml").write_text(f"parallel: {{data: {begun}}}\n")
    export = {"path": "out", "quantize": {"method": "rtn"}}
    assert (found := plan(SFT, count=4, run_dir=tmp_path, export=export)) is not None
    assert found.ranks == 1
    assert begun == 1 or "export.quantize: one rank quantizes" in found.line
    assert ranks(SFT, count=4, export={"quantize": None}) == 4
    assert ranks(SFT, count=4, export=None) == 4


@pytest.mark.parametrize("stages", [3, {"a": 1}, [None], ["sft"], [{**SFT, "steps": "many"}], []])
def test_what_cannot_be_read_is_left_to_the_run(stages: Any) -> None:
    assert ranks(stages=stages) == 1


def test_copies_of_the_model_must_fit_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "more.safetensors").symlink_to("nowhere")
    model = {"path": str(tmp_path)}
    for total, expected in ((100_000, 4), (30_000, 2), (9_000, 1)):
        monkeypatch.setattr(cores, "memory_bytes", lambda total=total: {"total": total})
        assert ranks(SFT, count=4, model=model) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_presets_count_as_large_as_they_are(name: str) -> None:
    assert cores.PRESET_PARAMETERS[name] == Ernie4_5_MoeConfig.preset(name).num_parameters()[0]


def test_copies_of_a_preset_must_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "memory_bytes", lambda: {"total": 20_000_000_000})
    assert ranks(SFT, count=4, model={"preset": "tiny"}) == 4
    assert ranks(SFT, count=4, model={"preset": "0.3b"}) == 2
    assert ranks(SFT, count=4, model={"preset": "21b-a3b"}) == 1
    assert ranks(SFT, count=4, model={"preset": "no such"}) == 4  # the run refuses it
    assert ranks(SFT, count=4, model={"preset": "tiny", "hidden_size": 65536}) == 1


def test_the_verb_starts_the_ranks_or_runs_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: x\n")
    done: list[Any] = []
    monkeypatch.setattr(RunCommand, "run_here", lambda self, console: done.append("here"))
    monkeypatch.setattr(
        RunCommand,
        "launch",
        lambda self, settings, console, debug: done.append((settings, self.overrides)) or 3,
    )
    command = RunCommand(recipe, ["seed=2"], tmp_path / "run", None, None, False, None)
    console = type("Silent", (), {"print": lambda *_, **__: None})()
    used: list[int] = []
    monkeypatch.setattr("ernie_train.core.cpu.use_threads", used.append)
    for number in (1, 2):
        monkeypatch.setattr(
            "ernie_train.launch.cores.plan_cores",
            lambda *_, number=number: CorePlan(number, "", 3 if number == 2 else None),
        )
        assert command.run_on_cores(console, console, debug=False) == (3 if number == 2 else 0)
    assert used == [3]
    assert done == ["here", (LaunchSettings(2), ["seed=2", "parallel.data=2"])]
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")  # in a rank nothing is planned again
    command.run_on_cores(console, console, debug=False)
    assert done[2:] == ["here"]
