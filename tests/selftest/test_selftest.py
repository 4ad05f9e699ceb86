"""The self-test of a machine: every check passes here, and a planted fault turns it red."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from ernie_train import kernels as native_kernels
from ernie_train.core import devices
from ernie_train.core.errors import UserError
from ernie_train.core.terminal import Terminal
from ernie_train.model.batch_layout import AttentionLayout
from ernie_train.model.batched_experts import BatchedSwiGLU
from ernie_train.selftest import command, fixture, kernels, ranks, report, training
from ernie_train.selftest.check import FAIL, PASS, SKIPPED, Figure, Outcome, Result, Skip, run_check
from ernie_train.selftest.command import CHECKS


def outcome_of(name: str, device: str = "cpu") -> Outcome:
    return run_check(name, CHECKS[name], device)


# ---- planted faults, by check --------------------------------------------------------------------


def scaled(function: Any, factor: float) -> Any:
    return lambda *args, **kwargs: function(*args, **kwargs) * factor


def plant_operators(patch: pytest.MonkeyPatch) -> None:
    call = F.flashmask_attention
    patch.setattr(
        F,
        "flashmask_attention",
        lambda q, *rest, **given: call(q.astype("float32"), *rest, **given),
    )


def plant_index(patch: pytest.MonkeyPatch) -> None:
    right = AttentionLayout.document_ends.func
    wrong = property(lambda layout: right(layout).astype("int64"))
    patch.setattr(AttentionLayout, "document_ends", wrong)


def plant_attention(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kernels, "document_attention", scaled(kernels.document_attention, 1.001))


def plant_experts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BatchedSwiGLU, "apply", scaled(BatchedSwiGLU.apply, 1.001))


def plant_native(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(native_kernels, "swiglu", scaled(native_kernels.swiglu, 1.001))


def plant_step(patch: pytest.MonkeyPatch) -> None:
    train, calls = fixture.train_small, []

    def differs(dtype: str) -> dict[str, float]:
        calls.append(dtype)
        found = train(dtype, steps=2)
        return found | {"grad_norm": found["grad_norm"] * (1 + 0.01 * (len(calls) == 2))}

    patch.setattr(training, "train_small", differs)


def plant_recompute(patch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, what: Any) -> None:
        if what:
            run = model.model.run_layer
            model.model.run_layer = lambda layer, x, *rest: run(layer, x * 1.01, *rest)

    patch.setattr(fixture.parallel, "enable_recompute", broken)


def plant_sampling(patch: pytest.MonkeyPatch) -> None:
    logprobs = training.token_logprobs
    patch.setattr(training, "token_logprobs", lambda *a: logprobs(*a, temperature=1.1))


def plant_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(training, "memory_demand", lambda *a: SimpleNamespace(peak=1e9))


def plant_speed(patch: pytest.MonkeyPatch) -> None:
    counted = SimpleNamespace(training=lambda again: 1e15)
    patch.setattr(training, "token_flops", lambda *a: counted)


PLANTED = {
    "operators": plant_operators, "attention": plant_attention, "experts": plant_experts,
    "native": plant_native,
    "step": plant_step, "recompute": plant_recompute, "sampling": plant_sampling,
    "memory": plant_memory, "speed": plant_speed,
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_check_passes_and_a_planted_fault_turns_it_red(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "TIMED_STEPS", 1)
    sound = outcome_of(name)
    assert sound.status == PASS, sound
    assert sound.figures and all(math.isfinite(figure.value) for figure in sound.figures)
    PLANTED[name](monkeypatch)
    assert outcome_of(name).status == FAIL


BACKWARD = {"rms_norm_backward": 1, "swiglu_backward": 1, "experts_backward": 4,
            "attention_backward": 2, "linear_cross_entropy": 2, "rope": None, "sum_pairs": None,
            "gather_rows": None}  # fmt: skip


@pytest.mark.parametrize("name", BACKWARD)
def test_a_wrong_gradient_of_a_native_kernel_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, at = getattr(native_kernels, name), BACKWARD[name]

    def wrong(*args: Any, **kwargs: Any) -> Any:
        made = right(*args, **kwargs)
        if at is None:  # forward and backward are one function
            return made * 1.01
        return (*made[:at], None if made[at] is None else made[at] * 1.01, *made[at + 1 :])

    monkeypatch.setattr(native_kernels, name, wrong)
    assert outcome_of("native").status == FAIL


def test_a_gradient_that_is_no_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native_kernels.experts_backward

    def wrong(*args: Any) -> Any:
        *made, last = right(*args)
        return (*made, last * math.nan)

    monkeypatch.setattr(native_kernels, "experts_backward", wrong)
    assert outcome_of("native").status == FAIL
    whole, odd = np.ones(2), np.array([1, math.nan])
    assert math.isnan(fixture.largest_error([whole, odd], [whole, whole]))
    with pytest.raises(ValueError):
        fixture.largest_error([whole], [whole, whole])


@pytest.mark.parametrize("name", ["attention_block_backward", "moe_block_backward"])
def test_a_step_is_compared_with_plain_operators(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(native_kernels, name)

    def wrong(*args: Any) -> Any:
        dx, made = right(*args)
        return 2.0 * dx, made

    monkeypatch.setattr(native_kernels, name, wrong)
    assert outcome_of("step").status == FAIL


def test_weights_are_drawn_on_the_cpu_whatever_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's generator draws others, so that a step there would differ from the CPU's."""
    device, drawn = ["gpu:0"], []
    draw = paddle.randn
    monkeypatch.setattr(paddle, "get_device", lambda: device[0])
    monkeypatch.setattr(paddle, "set_device", lambda name: device.__setitem__(0, name))
    monkeypatch.setattr(paddle, "randn", lambda *a: drawn.append(device[0]) or draw(*a))
    model = fixture.new_trainer(fixture.small_config(), "float32").model
    assert set(drawn) == {"cpu"} and device == ["gpu:0"]
    low = fixture.new_trainer(fixture.small_config(), "bfloat16").model
    for name, tensor in model.state_dict().items():
        rounded = tensor.astype(low.state_dict()[name].dtype)
        assert bool((rounded == low.state_dict()[name]).all()), name


def test_an_index_of_the_wrong_type_is_found_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_index(monkeypatch)
    found = outcome_of("operators")
    assert found.status == FAIL and "int32" in found.note


def test_ranks_that_differ_are_found() -> None:
    one = {"loss": 3.0, "grad_norm": 2.0, "last_loss": 1.0}
    most = ranks.TOLERANCES
    assert all(figure.passed for figure in ranks.compare({"expert": one}, one, most))
    off = ranks.compare({"expert": one, "data": one | {"grad_norm": 2.01}}, one, most)
    assert [f.name for f in off if not f.passed] == ["data: grad_norm, relative difference"]


def test_ranks_of_gpus_train_in_bfloat16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = {"loss": 3.0, "grad_norm": 2.0, "last_loss": 1.0}
    one = {"float32": exact, "bfloat16": {"loss": 3.02, "grad_norm": 2.1, "last_loss": 1.05}}
    monkeypatch.setattr(ranks, "train_small", one.__getitem__)
    for found, passes in ((one["bfloat16"], True), (exact | {"loss": 2.5}, False)):
        both = {"expert": exact, ranks.LOW: found}
        monkeypatch.setattr(ranks, "_on_two_ranks", lambda device, both=both: dict(both))
        figures = ranks.two_ranks("cpu").figures
        assert len(figures) == 6 and all(figure.passed for figure in figures) == passes


def test_flashmask_is_compared_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome_of("flashmask").status == SKIPPED
    monkeypatch.setattr(kernels, "compute_dtype", lambda device: "float32")
    assert outcome_of("flashmask", "gpu").status == SKIPPED, "a GPU without bfloat16"
    monkeypatch.setattr(kernels, "compute_dtype", lambda device: "bfloat16")
    monkeypatch.setattr(kernels, "flashmask_available", lambda x: True)
    # Any kernel in bfloat16 stands for it: the one that replaces it on a CPU.
    monkeypatch.setattr(kernels, "flashmask_document_attention", kernels.document_attention)
    assert outcome_of("flashmask", "gpu").status == PASS
    wrong = scaled(kernels.document_attention, 1.1)
    monkeypatch.setattr(kernels, "flashmask_document_attention", wrong)
    assert outcome_of("flashmask", "gpu").status == FAIL


@pytest.mark.parametrize("fault", ["none", "turned", "shorter", "missing", "nan"])
def test_gradients_of_low_precision_are_compared(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outcome_of("bfloat16").status == SKIPPED
    rng = np.random.default_rng(0)
    exact = {"a": rng.normal(size=50), "b": rng.normal(size=(3, 4))}
    low = {name: g + 1e-3 for name, g in exact.items()}
    if fault == "turned":
        low["a"] = -low["a"]
    elif fault == "shorter":
        low = {name: 0.5 * g for name, g in low.items()}
    elif fault == "missing":
        low["c"] = np.zeros(1)
    elif fault == "nan":
        low["b"] = low["b"] * np.nan
    monkeypatch.setattr(
        training, "gradients", lambda dtype: (2.0, exact if dtype == "float32" else low)
    )
    figures = training.precision_figures("bfloat16").figures
    assert all(figure.passed for figure in figures) == (fault == "none")


# ---- the run and its report ----------------------------------------------------------------------


def test_a_check_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: str) -> Result:
        raise RuntimeError(f"kernel in {Path.home()}/secret|place")

    def skips(device: str) -> Result:
        raise Skip("no such device")

    def passes(device: str) -> Result:
        return Result([Figure("error", 0.5, most=1.0)], "a note")

    checks = {"one": fails, "two": skips, "three": passes}
    monkeypatch.setattr(command, "CHECKS", checks)
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    out = tmp_path / "report.md"
    assert not command.selftest([], out, Terminal(quiet=True))
    text = out.read_text()
    assert "1 passed, 1 failed, 1 skipped" in text
    assert "| three | pass | error 0.5 (at most 1); a note |" in text
    assert "| two | skipped | no such device |" in text
    assert "RuntimeError: kernel in ~/secret\\|place" in text
    assert str(Path.home()) not in text and "hf_very_secret" not in text
    assert '"paddlepaddle' in text
    assert command.selftest(["two", "three"], out, Terminal(quiet=True))
    assert "one" not in out.read_text().split("```")[0]
    again = tmp_path / "report.json"
    assert not command.selftest([], again, Terminal(quiet=True))
    told = json.loads(again.read_text())
    assert [row["status"] for row in told["checks"]] == ["fail", "skipped", "pass"]
    assert str(Path.home()) not in again.read_text()
    assert not command.selftest([], again, Terminal(quiet=True)), "a report may be replaced"


def test_a_gpu_build_that_finds_no_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "CHECKS", {})
    monkeypatch.setattr(command.devices, "gpu_problem", lambda: "the driver is too old")
    said = io.StringIO()
    assert command.selftest([], None, Terminal(file=said))
    assert "the driver is too old" in said.getvalue()


def test_mistakes_in_the_arguments_are_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    for only, out, said in (
        (["atention"], None, "did you mean"),
        ([], tmp_path / "report.txt", ".md or .json"),
        ([], tmp_path / "none" / "report.md", "no directory"),
        ([], tmp_path / "notes.md", "no report"),
        ([], tmp_path / "mine.json", "no report"),
    ):
        with pytest.raises(UserError, match=said):
            command.selftest(only, out, Terminal(quiet=True))
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_an_outcome_is_the_same_after_json() -> None:
    outcome = Outcome("x", FAIL, [Figure("a", 1.5, 1.0), Figure("b", math.nan)], "why", 0.25)
    back = Outcome.from_dict(json.loads(json.dumps(outcome.as_dict())))
    assert back.figures[0] == outcome.figures[0] and math.isnan(back.figures[1].value)
    assert (back.name, back.status, back.note) == (outcome.name, outcome.status, outcome.note)
    assert not back.figures[1].passed


def test_a_check_in_a_process_of_its_own_that_dies_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert command._apart("experts").status == PASS
    monkeypatch.setattr(command.sys, "executable", "/bin/false")
    found = command._apart("experts")
    assert found.status == FAIL and "ended with 1: without a word" in found.note


def test_the_device_of_before_is_selected_again() -> None:
    before = paddle.get_device()
    with devices.on_cpu():
        assert paddle.get_device() == "cpu"
    assert paddle.get_device() == before


def test_paths_are_left_out() -> None:
    assert report.without_paths(f"{Path.home()}/x") == "~/x"


@pytest.mark.slow
def test_the_whole_self_test_passes_here(tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    assert command.selftest([], out, Terminal(quiet=True)), out.read_text()


def test_a_home_beyond_ascii_stays_out_of_the_report(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/jos\u00e9")
    outcome = Outcome("ranks", FAIL, note="cannot read /home/jos\u00e9/x")
    for name in ("a.json", "a.md"):
        report.write_report(tmp_path / name, [outcome], {"ernie_train": "0"})
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "~/x" in text and "/home" not in text


def test_a_rank_that_died_is_found_while_the_other_waits() -> None:
    code = "import sys, time; time.sleep(float(sys.argv[1])); sys.exit(3)"
    started = [subprocess.Popen([sys.executable, "-c", code, s]) for s in ("60", "0")]
    try:
        assert ranks._wait(started) == [None, 3]
    finally:
        started[0].kill()
        started[0].wait()
