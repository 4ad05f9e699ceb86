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

import importlib.metadata
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ernie_train.core.cpu import __version__, cpu_setup

VERSIONED = (
    "paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "numpy", "safetensors", "sentencepiece",
    "pydantic", "typer", "rich", "visualdl", "matplotlib", "math-verify", "reasoning-gym",
)  # fmt: skip


def installed_versions(names: Iterable[str] = VERSIONED) -> dict[str, str]:
    """Version of each installed distribution among `names`; imports none of them."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> dict[str, int]:
    """`total` and `available` memory of the machine in bytes; empty where the kernel hides it."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return {}
    wanted = {"MemTotal:": "total", "MemAvailable:": "available"}
    split = (line.split() for line in lines)
    return {wanted[words[0]]: int(words[1]) * 1024 for words in split if words[0] in wanted}


def describe_environment() -> dict[str, Any]:
    """Versions, device, cores, memory and CPU set-up, as plain values that JSON can hold."""
    import paddle

    setup = cpu_setup()
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    return {
        "ernie_train": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": installed_versions(),
        "device": paddle.get_device(),
        "gpus": [paddle.device.cuda.get_device_name(index) for index in range(gpus)],
        "cpu": {
            "vendor": setup.vendor,
            "cores": setup.cores,
            "local_ranks": setup.local_ranks,
            "threads": setup.threads,
            "set": dict(setup.done),
            "kept": dict(setup.kept),
            "too_late": setup.too_late,
            "allocator": setup.malloc,
        },
        "memory_bytes": memory_bytes(),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
    }
