"""Loading of the native kernels: compiled ahead, switched off, damaged, agreed on by ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from numba.core.dispatcher import Dispatcher

from ernie_train import kernels
from ernie_train.core.errors import UserError
from ernie_train.kernels import compiled, compiled_steps, loading
from ernie_train.run.earlier import change_of_kernels
from tests.kernels.cases import CASES, leaves, run


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """`load_kernels` asked anew, and again after the test."""
    loading.load_kernels.cache_clear()
    yield monkeypatch
    loading.load_kernels.cache_clear()


def test_the_kernels_can_be_switched_off_and_a_wrong_word_is_named(fresh) -> None:
    fresh.setenv(loading.KERNELS, "plain")
    assert not kernels.usable(paddle.zeros([1]))
    assert (
        kernels.describe_kernels() == "plain operators: switched off by ERNIE_TRAIN_KERNELS=plain"
    )
    fresh.setenv(loading.KERNELS, "fast")
    loading.load_kernels.cache_clear()
    with pytest.raises(UserError, match="KERNELS=fast: it must be one of native, plain"):
        kernels.usable(paddle.zeros([1]))


def no_numba() -> None:
    raise ImportError("No module named 'numba'")


def no_words() -> None:
    raise EOFError


COMPILED = {name: made for name, made in {**vars(compiled), **vars(compiled_steps)}.items()
            if isinstance(made, Dispatcher) and not name.startswith("_")}  # fmt: skip
NAMES = list(COMPILED)


def test_no_kernel_is_compiled_or_loaded_within_training(fresh) -> None:
    called = []

    def recorded(name: str) -> Callable:
        return lambda *a: called.append((name, tuple(map(type, a)))) or COMPILED[name](*a)

    loading._check(SimpleNamespace(**{name: recorded(name) for name in NAMES}))
    at_load = set(called)
    assert {name for name, _ in called} == set(NAMES) and len(NAMES) == 18
    module = SimpleNamespace(QUERY_BLOCK=64, **{name: recorded(name) for name in NAMES})
    fresh.setattr(loading, "_import_compiled", lambda: module)
    for function, _, shapes in CASES.values():
        run(function, leaves(shapes), "float32")
    assert len(called) > 2 * len(NAMES) and set(called) == at_load


@pytest.mark.slow
def test_a_damaged_cache_is_told_and_done_without(tmp_path) -> None:
    """Every kernel is compiled twice in a process of its own."""
    code = (
        "import sys, paddle; from ernie_train import kernels\n"
        "print(kernels.usable(paddle.zeros([1])), kernels.swiglu(*[paddle.ones([1])] * 2).item())"
    )
    environ = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for damage in (False, True):
        if damage:
            for file in tmp_path.rglob("compiled.rms_norm_backward-*.nbi"):
                file.write_bytes(file.read_bytes()[:20])
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ
        )
        assert done.stdout.startswith("True 0.731"), done.stderr
        assert ("cannot be used: compiled again" in done.stderr) == damage


def wrong(*arguments: object) -> int:
    return -1


@pytest.mark.parametrize(
    ("name", "found", "said"),
    [
        ("_import_compiled", no_numba, "ImportError: No module named 'numba'"),
        ("_import_compiled", no_words, "EOFError"),
        (
            "_import_compiled",
            lambda: SimpleNamespace(**dict.fromkeys(NAMES, wrong)),
            "WrongResultError: a result by the kernels is wrong on this processor",
        ),
    ],
)
def test_where_they_cannot_be_had_training_goes_on_and_one_line_says_so(
    name: str, found: Callable, said: str, fresh, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh.setattr(loading, name, found)
    for _ in range(3):
        assert not kernels.usable(paddle.zeros([1]))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"native kernels cannot be loaded ({said}): plain operators, slower"]
    function, formula, shapes = CASES["mlp"]
    arrays = leaves(shapes)
    ours, exact = run(function, arrays, "float32"), run(formula, arrays, "float64")
    np.testing.assert_allclose(ours[0], exact[0], atol=1e-4)


def test_nothing_is_loaded_before_the_first_tensor_asks() -> None:
    code = "import sys, ernie_train.model, ernie_train.train; print('numba' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.split() == ["False"]


def test_ranks_take_plain_operators_together_and_a_resume_by_others_is_told(monkeypatch) -> None:
    monkeypatch.setattr(loading, "_switched_off", False)
    native = kernels.agree_over_ranks()
    assert native == "native, by numba" and kernels.usable(paddle.zeros([1]))
    monkeypatch.setattr(loading.process_group, "any_rank", lambda flag: True)
    plain = kernels.agree_over_ranks()
    assert plain == "plain operators: another rank has no native kernels"
    assert not kernels.usable(paddle.zeros([1]))
    assert change_of_kernels(None, plain) is None
    assert change_of_kernels({"kernels": "plain operators: x"}, plain) is None
    assert "by native, by numba: figures differ" in change_of_kernels({"kernels": native}, plain)
