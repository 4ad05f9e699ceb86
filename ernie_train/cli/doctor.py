"""The `doctor` verb: report versions, device and set-up, and how to fix what is slow or missing."""

import os
import platform
import shutil
import time
from collections.abc import Callable
from itertools import starmap
from typing import NamedTuple

import rich.console
import rich.table

from ernie_train.core import blas, cpu, devices, environment
from ernie_train.core.terminal import Terminal
from ernie_train.rewards.sandbox import SandboxUnavailable, layer_in_force

MATMUL_SIZE = 2048
# Threads on the fast path were measured at 70 or more; below this one has missed it.
SLOW_GFLOPS_PER_THREAD = 35.0
# numpy's product reaches 70 to 140 % of Paddle's where both take good kernels.
SLOW_SHARE_OF_PADDLE = 0.33
LOW_DISK_BYTES = 5 * 10**9
FLASHMASK = "flashmask_attention"  # the one kernel of Paddle's own that the model asks for, on GPUs


class Finding(NamedTuple):
    """One line of the report; `advice` is empty if nothing needs to be done."""

    name: str
    value: str
    advice: str = ""


def measure_matmul_gflops(size: int = MATMUL_SIZE, seconds: float = 1.0) -> float:
    """Return the best speed of several `size` x `size` float32 matmuls on this device, GFLOP/s."""
    import paddle

    a = paddle.randn([size, size])
    b = paddle.randn([size, size])

    def multiply() -> None:
        paddle.matmul(a, b)
        if "gpu" in paddle.get_device():
            paddle.device.synchronize()

    return 2 * size**3 / _shortest_s(multiply, seconds) / 1e9


def measure_numpy_gflops() -> float:
    """Return the best speed of several `MATMUL_SIZE`^3 float32 products of numpy, GFLOP/s."""
    import numpy as np

    a, b = np.random.default_rng(0).random((2, MATMUL_SIZE, MATMUL_SIZE), np.float32)
    return 2 * MATMUL_SIZE**3 / _shortest_s(lambda: np.matmul(a, b), 0.5) / 1e9


def _shortest_s(work: Callable[[], object], seconds: float) -> float:
    """Return the shortest time of `work` in so many seconds; the first call, a warm-up, aside."""
    work()
    end = time.perf_counter() + seconds
    times: list[float] = []
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def check_numpy_kernels(gflops: float, paddle_gflops: float, setup: cpu.CpuSetup) -> Finding:
    """Report the kernels of numpy's products, on which sampling depends, beside Paddle's speed."""
    core, error = blas.core_in_use(), blas.product_error()
    advice = blas.kernel_problem(core, setup.processor)
    if not error <= blas.PRODUCT_TOLERANCE:  # a NaN too
        advice = f"its products are wrong: set {blas.CORE_TYPE}=Haswell, or another core type"
    elif not advice and gflops < SLOW_SHARE_OF_PADDLE * paddle_gflops:
        advice = f"{paddle_gflops / gflops:.1f} times slower than Paddle: try {blas.CORE_TYPE}"
    value = f"{gflops:.0f} GFLOP/s{_of_peak(setup)}, kernels {core or 'not of OpenBLAS'}"
    return Finding("numpy's matmul", f"{value}, error {error:.0e}", advice)


def _of_peak(setup: cpu.CpuSetup) -> str:
    """Return what the processor's instructions allow, in words; empty where it is not known."""
    peak, best = setup.processor.peak_gflops(setup.threads), setup.processor.vector_set
    if peak is None or best is None:
        return ""
    clock = f"{setup.processor.mhz / 1e3:.1f} GHz"
    return (
        f" of at most {peak:.0f} ({best[0]}: {best[1]} a cycle, {clock}, {setup.threads} threads)"
    )


def matmul_advice(gflops: float, setup: cpu.CpuSetup, load: float) -> str:
    """Return what to do about a slow processor, "" if it is not slow.

    Args:
        gflops: the measured speed.
        setup: the record of the CPU set-up.
        load: the load average of the last minute, in processes.
    """
    if gflops >= SLOW_GFLOPS_PER_THREAD * setup.threads:
        return ""
    if (
        setup.processor.vendor == "AuthenticAMD"
        and setup.kept.get("MKL_DEBUG_CPU_TYPE", "5") != "5"
    ):
        return "set MKL_DEBUG_CPU_TYPE=5, or leave it unset, for the fast path on AMD"
    if setup.too_late:
        return "import ernie_train before paddle: its CPU settings came too late"
    if load > setup.cores:
        return (
            f"other work keeps {load:.1f} of {setup.cores} cores busy: wait, or use fewer threads"
        )
    return f"slow for {setup.threads} threads; fewer may do better: try MKL_NUM_THREADS=1"


def _versions() -> list[Finding]:
    versions = environment.installed_versions()
    findings = [Finding("python", platform.python_version()), *starmap(Finding, versions.items())]
    if not {"paddlepaddle", "paddlepaddle-gpu"} & set(versions):
        advice = "pip install -r requirements.txt"
        findings.append(Finding("paddlepaddle", "not installed by pip", advice))
    return findings


def _device() -> list[Finding]:
    device = devices.select_device("auto")
    setup = cpu.cpu_setup()
    gflops = measure_matmul_gflops()
    of_peak = "" if device == "gpu" else _of_peak(setup)
    speed = f"{gflops:.0f} GFLOP/s{of_peak}, {MATMUL_SIZE} x {MATMUL_SIZE}, float32"
    advice = "" if device == "gpu" else matmul_advice(gflops, setup, os.getloadavg()[0])
    findings = [Finding("device", device, devices.gpu_problem())]
    findings += _gpus() if device == "gpu" else []
    findings += [Finding("CPU set-up", line) for line in cpu.cpu_setup_report()]
    findings.append(Finding("Paddle's matmul", speed, advice))
    findings.append(check_numpy_kernels(measure_numpy_gflops(), gflops, setup))
    if device == "cpu":
        from ernie_train import kernels

        native = kernels.describe_kernels()
        slow = "" if native.startswith("native") else "training is about 1.4 times slower"
        findings.append(Finding("training kernels", native, slow))
    else:
        there = devices.kernel_available(FLASHMASK, device)
        used = f"Paddle's {FLASHMASK}" if there else f"plain operators; Paddle has no {FLASHMASK}"
        findings.append(Finding("attention kernel", used))
    return findings


def _gpus() -> list[Finding]:
    """Report each GPU, and the CUDA libraries that Paddle was built with."""
    import paddle

    findings = []
    for index in range(paddle.device.cuda.device_count()):
        gpu = paddle.device.cuda.get_device_properties(index)
        memory, capability = f"{gpu.total_memory / 1e9:.0f} GB", f"{gpu.major}.{gpu.minor}"
        has_it = paddle.amp.is_bfloat16_supported(f"gpu:{index}")
        advice = "" if has_it else "it has no bfloat16: models are float32 on it, twice as large"
        value = f"{gpu.name}, {memory}, compute capability {capability}"
        findings.append(Finding(f"GPU {index}", value, advice))
    version = paddle.version
    libraries = f"CUDA {version.cuda()}, cuDNN {version.cudnn()}, NCCL {version.nccl()}"
    return [*findings, Finding("Paddle's libraries", libraries)]


def check_sandbox() -> Finding:
    """Report the sandbox for programs that a model writes, found by running one in it."""
    name = "sandbox"
    try:
        layer = layer_in_force()
    except SandboxUnavailable as unavailable:
        advice = "apt-get install bubblewrap; until then programs of a model are not scored"
        return Finding(name, f"none works: {unavailable}", advice)
    if layer == "bubblewrap":
        return Finding(name, layer)
    advice = (
        "bubblewrap stops more: apt-get install bubblewrap, and allow user namespaces. Programs "
        "can ask which paths exist, lock files that they may read and fill the disk for seconds"
    )
    return Finding(name, layer, advice)


def _ranks() -> list[Finding]:
    import paddle

    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    places, kind = (gpus, "GPU") if gpus else (cpu.cpu_setup().cores, "core")
    value = f"run --nproc {places} starts one for each {kind}"
    return [Finding("ranks", value)]


def _surroundings() -> list[Finding]:
    free = shutil.disk_usage(os.getcwd()).free
    low = free < LOW_DISK_BYTES
    memory = {name: f"{size / 1e9:.1f}" for name, size in environment.memory_bytes().items()}
    git = shutil.which("git")
    advice = "" if git else "apt-get install git; runs then record the code's commit"
    return [
        check_sandbox(),
        Finding("free disk", f"{free / 1e9:.1f} GB", "make room for checkpoints" if low else ""),
        Finding("memory", f"{memory['available']} of {memory['total']} GB available"),
        Finding("git", git or "not found", advice),
        _code(),
    ]


def _code() -> Finding:
    """Report the code's version as each start of a run records it in environment.json."""
    code = environment.code_version()
    value = f"ernie_train {cpu.__version__}"
    if code["commit"] is None:
        return Finding("code", f"{value}, no commit known: runs record this version alone")
    state = ", with changes" if code["dirty"] else ""
    return Finding("code", f"{value} at commit {code['commit'][:12]}{state}")


def doctor_report() -> list[Finding]:
    """Collect all findings; measuring the matmul takes about a second."""
    return [*_versions(), *_device(), *_ranks(), *_surroundings()]


def print_doctor_report(
    findings: list[Finding], console: rich.console.Console | None = None
) -> None:
    """Print the findings as a table, with the advice in the last column and in colour."""
    table = rich.table.Table(box=None, pad_edge=False)
    for column in ("", "found", "what to do"):
        table.add_column(column, overflow="fold")
    last = ""
    for name, value, advice in findings:
        cells = ["" if name == last else name, value, advice]
        table.add_row(*map(rich.text.Text, cells), style="yellow" if advice else "")
        last = name
    (console or Terminal()).print(table)
