"""What the ablation tools share, and what each of them measures."""

import json
import os
import random
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from ernie_train.run.recipe import load_recipe
from ernie_train.train.pretrain import PretrainConfig
from ernie_train.train.sft import SftConfig
from tools.data import make_needles
from tools.evidence import ablate_balance, ablate_long_context, ablations
from tools.evidence.ablations import Arm

ARM = Arm("quick", ("stages.sft.steps=3",))


@pytest.fixture(autouse=True)
def recipes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests with made-up runs have made-up recipes: r.yaml, s.yaml and recipes/x.yaml."""
    if not {"trained", "command"} & set(request.fixturenames):
        return
    root = tmp_path_factory.mktemp("root")
    (root / "recipes").mkdir()
    for name in ("r.yaml", "s.yaml", "recipes/x.yaml"):
        (root / name).write_text("name: made-up\n")
    request.getfixturevalue("monkeypatch").setattr(ablations, "ROOT", root)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Training is a note in this list and takes one second."""
    notes: list[str] = []

    def train(recipe: str, arm: Arm, seed: int, run_dir: Path) -> dict[str, float]:
        notes.append(f"{arm.name}-{seed}")
        run_dir.mkdir(parents=True, exist_ok=True)
        return {"wall_s": 2.0, "cpu_s": 1.0}

    monkeypatch.setattr(ablations, "train", train)
    return notes


def test_a_finished_run_is_not_repeated(tmp_path: Path, trained: list[str]) -> None:
    def measure(run_dir: Path) -> dict[str, Any]:
        if len(trained) == 3:
            raise KeyboardInterrupt
        return {"loss": float(len(trained))}

    arms = [ARM, Arm("slow")]
    with pytest.raises(KeyboardInterrupt):
        ablations.results_of("r.yaml", arms, [1, 2], tmp_path, measure)
    results = ablations.results_of("r.yaml", arms, [1, 2], tmp_path, measure)
    # The run that was not measured is gone through again, and no other.
    assert trained == ["quick-1", "slow-1", "quick-2", "quick-2", "slow-2"]
    assert [(r["arm"], r["seed"], r["loss"]) for r in results] == [
        ("quick", 1, 1.0), ("slow", 1, 2.0), ("quick", 2, 4.0), ("slow", 2, 5.0),
    ]  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == results
    assert ablations.values_of(results, "slow", "loss") == [2.0, 5.0]


@pytest.mark.parametrize("change", ["overrides", "recipe", "content", "seed"])
def test_results_of_other_settings_are_refused(
    tmp_path: Path, trained: list[str], change: str
) -> None:
    ablations.result_of("r.yaml", ARM, 1, tmp_path, lambda run_dir: {})
    recipe, arm, seed = "r.yaml", ARM, 1
    if change == "overrides":
        arm = Arm(ARM.name, ("stages.sft.steps=4",))
    elif change == "recipe":
        recipe = "s.yaml"
    elif change == "content":
        (ablations.ROOT / recipe).write_text("name: another\n")
    else:
        seed = 2
    with pytest.raises(ValueError, match="other settings"):
        ablations.result_of(recipe, arm, seed, tmp_path, lambda run_dir: {})
    assert trained == ["quick-1"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for Python; what it was told is in the file beside it. Fails for seed 13."""
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\n"
        'printf "%s\\n" "$PWD" "$OMP_NUM_THREADS" "$MKL_NUM_THREADS" "$@" > "$0.told"\n'
        'case "$*" in *seed=13*) exit 4;; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(ablations.sys, "executable", str(script))
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    return script


def test_a_run_is_the_command_on_one_thread(command: Path, tmp_path: Path) -> None:
    seconds = ablations.train("recipes/x.yaml", ARM, 7, tmp_path / "run")
    told = command.with_suffix(".told").read_text().splitlines()
    assert told[:3] == [str(ablations.ROOT), "1", "1"]
    run = ["-m", "ernie_train", "run", "recipes/x.yaml", "--run-dir", str(tmp_path / "run")]
    assert told[3:] == [*run, "seed=7", "stages.sft.steps=3"]
    assert 0 <= seconds["cpu_s"] <= seconds["wall_s"] + 1


def test_a_failing_run_stops_the_tool(command: Path, tmp_path: Path) -> None:
    with pytest.raises(ablations.subprocess.CalledProcessError, match="exit status 4"):
        ablations.results_of("recipes/x.yaml", [ARM], [13, 14], tmp_path, lambda run_dir: {})
    assert "seed=13" in command.with_suffix(".told").read_text()
    assert not (tmp_path / "quick-seed13" / ablations.RESULT).exists()


def test_what_a_run_took_is_the_sum_over_its_starts(
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

    monkeypatch.setattr(ablations.os, "wait4", wait4)
    monkeypatch.setattr(ablations.time, "perf_counter", lambda: next(clock))
    with pytest.raises(ablations.subprocess.CalledProcessError):
        ablations.train("recipes/x.yaml", ARM, 7, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        ablations.train("recipes/x.yaml", ARM, 7, tmp_path / "run")
    spent = ablations.train("recipes/x.yaml", ARM, 7, tmp_path / "run")
    assert spent == {"wall_s": 5.0 + 7.0 + 11.0, "cpu_s": 10.0, "peak_gb": 0.9}


def test_mean_and_spread() -> None:
    values = [0.91, 0.98, 0.96]
    spread = np.std(np.array(values), ddof=1)
    expected = f"{np.mean(values):.3f} ± {spread:.3f}"
    assert ablations.mean_and_spread(values, 3) == expected == "0.950 ± 0.036"
    assert ablations.mean_and_spread([0.5], 2) == "0.50"


def test_a_table() -> None:
    table = ablations.markdown_table(["arm", "loss"], [["none", "1.0"]])
    assert table == "| arm | loss |\n| --- | ---: |\n| none | 1.0 |\n"


# ---- long context --------------------------------------------------------------------------------


def test_the_arms_differ_in_base_and_length_alone() -> None:
    arms = {arm.name: arm for arm in ablate_long_context.arms()}
    stages = {}
    for name, arm in arms.items():
        (stage,) = load_recipe(ablations.ROOT / ablate_long_context.RECIPE, [*arm.overrides]).stages
        assert isinstance(stage, PretrainConfig)
        stages[name] = stage
    assert list(stages) == ["short-only", "base-kept", "base-high", "base-raised"]
    short, kept, high, raised = (stage.phases() for stage in stages.values())
    tokens = {
        sum(phase.seq_len * phase.micro_batch_size * (phase.steps or 0) for phase in phases)
        for phases in (short, kept, high, raised)
    }
    assert len(tokens) == 1
    assert {phase.seq_len for phase in short} == {raised[0].seq_len}
    assert {phase.rope_theta for phase in (*short, *kept)} == {raised[0].rope_theta}
    assert {phase.rope_theta for phase in high} == {raised[-1].rope_theta}
    assert [replace(phase, rope_theta=None) for phase in kept] == [
        replace(phase, rope_theta=None) for phase in raised
    ]
    assert [replace(phase, rope_theta=None) for phase in high] == [
        replace(phase, rope_theta=None) for phase in raised
    ]
    assert raised[-1].seq_len == 8 * raised[0].seq_len == ablate_long_context.LENGTHS[-1]
    assert stages["short-only"].optim == stages["base-raised"].optim


def test_bases_keep_the_wavelengths_of_the_full_model() -> None:
    """Longest wavelength over length: as 10K at 8K, 160K at 32K and 500K at 128K, width 128."""

    def ratio(base: float, head_dim: int, length: int) -> float:
        return float(2 * np.pi * base ** ((head_dim - 2) / head_dim) / length)

    full = [(1e4, 8192), (1.6e5, 32768), (5e5, 131072)]
    phases = ablate_long_context.phases_of_recipe()
    for (base, length), phase in zip(full, phases, strict=True):
        ours = ratio(phase["rope_theta"], 32, phase["seq_len"])
        assert ours == pytest.approx(ratio(base, 128, length), rel=0.02)


class Oracle:
    """Stands for a model whose most probable token after position i is that at i + `ahead`."""

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead

    def model(self, ids: paddle.Tensor) -> SimpleNamespace:
        following = np.roll(ids.numpy(), -self.ahead, axis=1).reshape(-1, 1)
        return SimpleNamespace(hidden=paddle.to_tensor(following))

    def logits(self, hidden: paddle.Tensor) -> paddle.Tensor:
        return paddle.nn.functional.one_hot(hidden.squeeze(1), 2048)


def test_needles_are_counted_as_found(tmp_path: Path) -> None:
    tokenizer = make_needles.make_tokenizer(tmp_path)
    rng = random.Random(5)
    texts = [make_needles.make_text(rng, 96) for _ in range(4)]
    hits = ablate_long_context.found(Oracle(1), tokenizer, texts)  # type: ignore[arg-type]
    assert len(hits) == 4 * len(make_needles.VALUES)
    assert all(right for _, right in hits)
    distances = [n.asked_at - n.told_at for text in texts for n in text.needles]
    assert [distance for distance, _ in hits] == distances
    for ahead in (0, 2):
        wrong = ablate_long_context.found(Oracle(ahead), tokenizer, texts)  # type: ignore[arg-type]
        assert not any(right for _, right in wrong)


def test_accuracy_by_distance() -> None:
    hits = [(4, True), (7, False), (8, True), (15, True), (16, False)]
    assert ablate_long_context.by_distance(hits) == {"4": 0.5, "8": 1.0, "16": 0.0}


def test_table_and_plot_of_long_context(tmp_path: Path) -> None:
    results = [
        {
            "arm": arm.name,
            "seed": seed,
            "by_distance": {"8": 1.0, "16": 0.5},
            **{f"accuracy_{n}": 0.5 + seed / 10 for n in ablate_long_context.LENGTHS},
            **{f"swapped_{n}": 0.25 for n in ablate_long_context.LENGTHS},
        }
        for arm in ablate_long_context.arms()
        for seed in (0, 1)
    ]
    lines = ablate_long_context.table(results).splitlines()
    assert lines[2] == "| short-only | " + " | ".join(["55.0 ± 7.1"] * 4) + " |"
    assert lines[6] == "| short-only, read under 2600 | " + " | ".join(["25.0 ± 0.0"] * 4) + " |"
    ablate_long_context.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_recipe_runs_and_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_needles, "SIZES", {64: 200, 256: 20, 512: 20})
    monkeypatch.setattr(ablate_long_context, "TEXTS", 4)
    make_needles.main(["--out", str(tmp_path)])
    schedule = "stages.pretrain.rope_schedule"
    arm = Arm(
        "brief",
        (
            f"tokenizer.path={tmp_path}/tokenizer",
            f"stages.pretrain.data.0.path={tmp_path}/train",
            *(f"{schedule}.{at}.steps=2" for at in range(3)),
        ),
    )
    recipe, measure = ablate_long_context.RECIPE, ablate_long_context.retrieval
    (result,) = ablations.results_of(recipe, [arm], [1], tmp_path / "out", measure)
    assert result["rope_theta"] == ablate_long_context.last_base()
    assert [result[f"needles_{n}"] for n in ablate_long_context.LENGTHS] == [24] * 4
    # Six steps teach nothing: chance is 1 in 14 once the category is understood.
    assert all(result[f"accuracy_{n}"] < 0.5 for n in ablate_long_context.LENGTHS)


# ---- balance -------------------------------------------------------------------------------------


def test_balance_arms_are_settings_of_the_recipe() -> None:
    seen = []
    for arm in ablate_balance.ARMS:
        recipe = load_recipe(ablations.ROOT / ablate_balance.RECIPE, [*arm.overrides])
        assert recipe.model.build().moe_num_experts == 32
        (stage,) = recipe.stages
        assert isinstance(stage, SftConfig)
        seen.append(stage.balance)
    assert seen[0].active() == []
    assert all(balance.active() for balance in seen[1:])
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


def test_balance_figures_are_those_of_the_last_steps(tmp_path: Path) -> None:
    (tmp_path / "01-sft").mkdir()
    steps = range(1, ablate_balance.LAST_STEPS + 31)
    keys = [key for key, _ in ablate_balance.COLUMNS.values()]
    rows = [{"step": step, **{key: float(step) for key in keys}, "time": {}} for step in steps]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "01-sft" / "metrics.jsonl").write_text(text)
    measured = ablate_balance.measure(tmp_path)
    assert measured["load_cv_by_step"] == [float(step) for step in steps]
    assert measured["moe/load_cv"] == statistics.fmean(steps[-ablate_balance.LAST_STEPS :])
    assert measured["moe/load_cv"] > 31
    assert measured["validation_loss"] == steps[-1]


def test_table_and_plot_of_balance(tmp_path: Path) -> None:
    results = [
        {
            "arm": arm.name,
            "seed": seed,
            "load_cv_by_step": [1.0, 0.5],
            **{key: float(seed) for key, _ in ablate_balance.COLUMNS.values()},
            "validation_loss": seed + (0.0 if arm.name == "nothing" else 0.25 * seed),
        }
        for arm in ablate_balance.ARMS
        for seed in ((1, 3) if arm.name == "nothing" else (3, 1))  # pairs go by seed, not order
    ]
    lines = ablate_balance.table(results).splitlines()
    assert len(lines) == 2 + len(ablate_balance.ARMS)
    cells = "2.00 ± 1.41 | 2.0 ± 1.4 | 2.0 ± 1.4 | 2.00 ± 1.41 | 2.000 ± 1.414 | 2.000 ± 1.414"
    assert lines[2] == f"| nothing | {cells} | 0.000 ± 0.000 |"
    # Seed by seed 0.25 and 0.75: half a nat on average, less spread than the losses have.
    assert all(line.endswith("| 2.500 ± 1.768 | 0.500 ± 0.354 |") for line in lines[3:])
    ablate_balance.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
