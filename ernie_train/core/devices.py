"""The processor, the device and the signals of this process.

`configure_process` runs when `ernie_train` is imported, before Paddle is. It never overrides what
the user set in the environment, and it keeps a record that `doctor` and `environment.json` show.

What it sets was measured with paddlepaddle 3.3.1 (CPU wheel) on two cores of an AMD EPYC (Zen 5):

- MKL_DEBUG_CPU_TYPE=5, on AMD only: a 2048 x 2048 fp32 matmul on one thread went from 20 to
  80-120 GFLOP/s. The wheel's old MKL takes a slow path on processors that are not Intel's.
- MKL_NUM_THREADS: the same matmul went from 80 to 150 GFLOP/s with two threads. OMP_NUM_THREADS
  does the same, but Paddle warns on stderr when it is above 1, and no elementwise operator ran
  faster with it; FLAGS_paddle_num_threads changed nothing. So OMP_NUM_THREADS is set to 1, which
  is what Paddle itself does when it is unset.
- OPENBLAS_NUM_THREADS: the same number for numpy's matrix products; it would follow
  OMP_NUM_THREADS otherwise. Sampling gains little from it, and forks as many processes instead.
- glibc's mallopt, so that freed memory is used again instead of going back to the system: Paddle
  asks the system for every larger tensor, and its pages are cleared each time. Multiplying a
  tensor of 8 MB went from 22 to 4 ms, softmax of 32 MB from 41 to 11 ms. Memory that was used once
  stays with the process; its peak grew by about a tenth. Paddle's own pool
  (FLAGS_allocator_strategy=naive_best_fit) gained nothing.
"""

import os
import random

from ernie_train.core.errors import ConfigError


def why_no_gpu() -> str | None:
    """Why Paddle has no GPU here, and what to do; None where it has one."""
    import paddle

    if not paddle.is_compiled_with_cuda():
        return "this Paddle is the CPU build; install requirements-gpu.txt"
    if paddle.device.cuda.device_count() == 0:
        return "Paddle sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return None


def select_device(name: str) -> str:
    """Selects and returns the device: `cpu`, or `gpu` for this rank's GPU.

    Args:
        name: `auto` (a GPU where Paddle has one, else the CPU), `cpu` or `gpu`.

    Raises:
        ConfigError: the name is another one, or there is no GPU that Paddle can use.
    """
    import paddle

    if name not in ("auto", "cpu", "gpu"):
        raise ConfigError(f"device: unknown device {name!r}; use auto, cpu or gpu")
    missing = why_no_gpu()
    if name == "gpu" and missing:
        raise ConfigError(f"device: gpu was asked for, but {missing}")
    device = "cpu" if missing or name == "cpu" else "gpu"
    if device == "gpu":
        # The launcher gives each rank its GPU in FLAGS_selected_gpus.
        index = os.environ.get("FLAGS_selected_gpus", "0").split(",")[0] or "0"  # noqa: SIM112
        paddle.set_device(f"gpu:{index}")
    else:
        paddle.set_device("cpu")
    return device


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and Paddle's global generators with the same number."""
    import numpy as np
    import paddle

    random.seed(seed)
    np.random.seed(seed % 2**32)
    paddle.seed(seed)


def kernel_available(op_name: str, device: str) -> bool:
    """Whether Paddle has registered a kernel of this name for `cpu` or `gpu`.

    Args:
        op_name: the kernel's name in Paddle, such as `swiglu` or `flashmask_attention`.
        device: `cpu` or `gpu` (`gpu:0` too); GPU kernels include those of cuDNN.

    Raises:
        ValueError: another device.
    """
    # Paddle has no public function for this question; every kernel is listed as
    # "(BACKEND, LAYOUT, DTYPE)". `all` adds kernels that have no operator of their own.
    from paddle.base import core

    backends = {"cpu": ("(CPU,",), "gpu": ("(GPU,", "(GPUDNN,")}.get(device.partition(":")[0])
    if backends is None:
        raise ValueError(f"device must be cpu or gpu, not {device!r}")
    kernels = core._get_registered_phi_kernels("all").get(op_name, [])
    return any(kernel.startswith(backends) for kernel in kernels)
