"""The device, the seeds and the kernels that Paddle has."""

import random

import numpy as np
import pytest

from ernie_train.core import devices
from ernie_train.core.errors import ConfigError


def test_devices() -> None:
    import paddle

    assert devices.select_device("cpu") == "cpu"
    assert paddle.get_device() == "cpu"
    expected = (
        "gpu" if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() else "cpu"
    )
    assert devices.select_device("auto") == expected
    with pytest.raises(ConfigError, match="unknown device 'tpu'; use auto, cpu or gpu"):
        devices.select_device("tpu")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import paddle

    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: False)
    assert devices.gpu_problem() == "", "a CPU build is what was installed"
    with pytest.raises(ConfigError, match=r"CPU build; install requirements-gpu\.txt"):
        devices.select_device("gpu")
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(paddle.version, "cuda", lambda: "12.6")
    with pytest.raises(ConfigError, match=r"sees no GPU; check nvidia-smi .* CUDA 12 or later"):
        devices.select_device("gpu")
    assert devices.select_device("auto") == "cpu"
    assert devices.gpu_problem().endswith("for CUDA 12 or later")


def test_a_gpu_computes_float32_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would round what routers and norms multiply to 11 bits."""
    import paddle
    from paddle.base import core

    said: list[object] = []
    monkeypatch.setattr(devices, "why_no_gpu", lambda: None)
    monkeypatch.setattr(paddle, "set_device", said.append)
    monkeypatch.setattr(core, "set_cublas_switch", said.append)
    monkeypatch.setenv("FLAGS_selected_gpus", "3")
    assert devices.select_device("auto") == "gpu"
    assert said == ["gpu:3", False]
    assert devices.select_device("cpu") == "cpu"
    assert said[2:] == ["cpu"] and devices.compute_dtype("cpu") == "float32"


@pytest.mark.parametrize(("has_it", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_without_bfloat16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, has_it: bool, dtype: str
) -> None:
    """A V100 or T4: cuBLAS has no such product for it, and FlashMask no kernel."""
    import paddle

    asked: list[str] = []
    monkeypatch.setattr(
        paddle.amp, "is_bfloat16_supported", lambda device: asked.append(device) or has_it
    )
    monkeypatch.setenv("FLAGS_selected_gpus", "3")
    assert devices.compute_dtype("gpu") == dtype
    assert asked == ["gpu:3"]


def test_one_seed_for_all_generators() -> None:
    import paddle

    def draw(seed: int) -> tuple[float, float, float]:
        devices.seed_everything(seed)
        return random.random(), float(np.random.rand()), paddle.rand([1]).item()

    first = draw(7)
    assert draw(7) == first
    assert all(a != b for a, b in zip(first, draw(8), strict=True))
    draw(2**40)  # numpy takes 32 bits only


def test_registered_kernels_are_those_that_run() -> None:
    import paddle
    from paddle.incubate.nn.functional import fused_rotary_position_embedding
    from paddle.nn.functional import swiglu

    assert devices.kernel_available("swiglu", "cpu")
    assert swiglu(paddle.ones([2, 4])).shape == [2, 2]
    if not paddle.is_compiled_with_cuda():
        assert not devices.kernel_available("swiglu", "gpu")
    assert not devices.kernel_available("fused_rotary_position_embedding", "cpu")
    paddle.set_device("cpu")
    with pytest.raises((RuntimeError, NotImplementedError), match=r"fused_rotary|not registered"):
        fused_rotary_position_embedding(paddle.ones([1, 2, 2, 4]))
    assert not devices.kernel_available("no_such_kernel", "cpu")
    with pytest.raises(ValueError, match="cpu or gpu"):
        devices.kernel_available("swiglu", "tpu")
