"""The device that Paddle computes on, its kernels, and the seeds of random numbers."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

from ernie_train.core import blas
from ernie_train.core.errors import ConfigError


def why_no_gpu() -> str | None:
    """Return the reason why Paddle has no GPU here and what to do, or None if it has one."""
    import paddle

    if not paddle.is_compiled_with_cuda():
        return "this Paddle is the CPU build; install requirements-gpu.txt"
    if paddle.device.cuda.device_count() == 0:
        # Paddle counts none too where the driver is older than its CUDA.
        cuda = paddle.version.cuda().partition(".")[0]
        return (
            "Paddle sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES: the driver must be one "
            f"for CUDA {cuda} or later"
        )
    return None


def gpu_problem() -> str:
    """Return what keeps a GPU build of Paddle from a GPU; "" with a GPU, and for the CPU build."""
    import paddle

    return (why_no_gpu() or "") if paddle.is_compiled_with_cuda() else ""


def select_device(name: str) -> str:
    """Select and return the device: `cpu`, or `gpu` for this rank's GPU.

    Args:
        name: `auto` (a GPU where Paddle has one, else the CPU), `cpu` or `gpu`.

    Raises:
        ConfigError: the name is another one, or there is no GPU that Paddle can use.
    """
    import paddle
    from paddle.base import core

    if name not in ("auto", "cpu", "gpu"):
        raise ConfigError(f"device: unknown device {name!r}; use auto, cpu or gpu")
    missing = why_no_gpu()
    if name == "gpu" and missing:
        raise ConfigError(f"device: gpu was asked for, but {missing}")
    device = "cpu" if missing or name == "cpu" else "gpu"
    if device == "gpu":
        paddle.set_device(_own_gpu())
        # Routers and norms are float32 for their digits: no TF32, whose products have 11 bits.
        core.set_cublas_switch(False)
    else:
        paddle.set_device("cpu")
    return device


@contextmanager
def on_cpu() -> Iterator[None]:
    """Compute on the CPU within the context, then on the device of before."""
    import paddle

    before = paddle.get_device()
    paddle.set_device("cpu")
    try:
        yield
    finally:
        paddle.set_device(before)


def _own_gpu() -> str:
    """Return this rank's GPU, which the launcher names in FLAGS_selected_gpus."""
    index = os.environ.get("FLAGS_selected_gpus", "0").split(",")[0] or "0"  # noqa: SIM112
    return f"gpu:{index}"


def compute_dtype(device: str) -> str:
    """Return the dtype of weights on a device: `bfloat16` on a GPU that has it, else `float32`.

    GPUs before Ampere (compute capability 8.0), such as T4 and V100, have no products in it.
    """
    import paddle

    if device == "gpu" and paddle.amp.is_bfloat16_supported(_own_gpu()):
        return "bfloat16"
    return "float32"


def release_cached_memory() -> None:
    """Give the GPU memory that Paddle keeps for later tensors to other processes."""
    import paddle

    if paddle.get_device().startswith("gpu"):
        paddle.device.cuda.empty_cache()


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and Paddle's global generators with the same number."""
    import numpy as np
    import paddle

    random.seed(seed)
    np.random.seed(seed % 2**32)
    paddle.seed(seed)


def kernel_available(op_name: str, device: str) -> bool:
    """Return whether Paddle has a kernel of this name for `cpu` or `gpu`.

    Args:
        op_name: the kernel's name in Paddle, such as `swiglu` or `flashmask_attention`.
        device: `cpu` or `gpu` (`gpu:0` too); GPU kernels include those of cuDNN.

    Raises:
        ValueError: another device.
    """
    # Paddle 3.3.1 has no public function for this. It lists every kernel as
    # "(BACKEND, LAYOUT, DTYPE)"; `all` adds kernels that have no operator of their own.
    from paddle.base import core

    backends = {"cpu": ("(CPU,",), "gpu": ("(GPU,", "(GPUDNN,")}.get(device.partition(":")[0])
    if backends is None:
        raise ValueError(f"device must be cpu or gpu, not {device!r}")
    kernels = core._get_registered_phi_kernels("all").get(op_name, [])
    return any(kernel.startswith(backends) for kernel in kernels)


def slow_products(processor: blas.Processor) -> list[str]:
    """Measure products of numpy and of Paddle on the processor; return a line for each slow one."""
    import numpy as np
    import paddle

    array = np.ones((blas.TIMED_SIZE, blas.TIMED_SIZE), np.float32)
    measured = {"numpy": blas.core_gflops(lambda: array @ array)}
    if paddle.get_device().startswith("cpu"):
        tensor = paddle.to_tensor(array)
        with paddle.no_grad():
            measured["Paddle"] = blas.core_gflops(lambda: paddle.matmul(tensor, tensor))
    lines = (blas.speed_problem(name, gflops, processor) for name, gflops in measured.items())
    return [line for line in lines if line]
