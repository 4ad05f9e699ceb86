"""Settles what must be so before Paddle is imported: the processor, imports it can spare.

`configure_process` runs when `ernie_train` is imported, before Paddle is. It never overrides what
the user set in the environment, and it keeps a record that `doctor` and `environment.json` show.

Each setting was measured with paddlepaddle 3.3.1 (CPU wheel) on two cores of an AMD EPYC (Zen 5):

- MKL_DEBUG_CPU_TYPE=5, on AMD with AVX2 only: a 2048 x 2048 fp32 matmul on one thread went from 20
  to 80-120 GFLOP/s. The wheel's old MKL takes a slow path on processors that are not Intel's.
- MKL_NUM_THREADS: the same matmul went from 80 to 150 GFLOP/s with two threads. OMP_NUM_THREADS
  does the same, but Paddle warns on stderr when it is above 1, and no elementwise operator ran
  faster with it; FLAGS_paddle_num_threads changed nothing. So OMP_NUM_THREADS is set to 1, which
  is what Paddle itself does when it is unset.
- OPENBLAS_CORETYPE, where OpenBLAS does not know the processor: `core/blas.py` explains it.
- OPENBLAS_NUM_THREADS: the same number for numpy's matrix products; it would follow
  OMP_NUM_THREADS otherwise. Sampling gains little from it, and forks as many processes instead.
- glibc's mallopt, so that freed memory is used again instead of going back to the system: Paddle
  asks the system for every larger tensor, and its pages are cleared each time. Multiplying a
  tensor of 8 MB went from 22 to 4 ms, softmax of 32 MB from 41 to 11 ms. Memory that was used once
  stays with the process; its peak grew by about a tenth. Paddle's own pool
  (FLAGS_allocator_strategy=naive_best_fit) gained nothing.

`defer_imports` spares a start two of Paddle's imports until something asks for a name in them:
what compiles C++ operators, with setuptools and pkg_resources, and what downloads files. They are
200 of 2000 modules and 0.4 of the 2.1 processor seconds that a rank's imports take.
"""

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from ernie_train.core import blas

if TYPE_CHECKING:  # it imports 5 ms of other modules
    from importlib.abc import Loader

__version__ = "0.3.0"


# Lists the variables that an ernie_train process set, so that the processes it starts can tell
# them from the user's own and choose again: a rank has fewer cores than its launcher.
MARKER = "ERNIE_TRAIN_CPU_SETUP"
# Says that numpy's kernels were looked at, so that the processes started from here need not.
KERNELS_SEEN = "ERNIE_TRAIN_KERNELS_SEEN"
CACHE = "ERNIE_TRAIN_CACHE"
DEFERRED = frozenset({"httpx", "paddle.utils.cpp_extension"})
THREAD_VARIABLES = ("MKL_NUM_THREADS", "OMP_NUM_THREADS")
MALLOC_VARIABLES = (
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
)
# Parameters of mallopt(3) and the size below which freed memory is kept, in bytes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP_FREED_BYTES = 1 << 30


@dataclass
class CpuSetup:
    """Record of `configure_process`.

    Attributes:
        processor: what /proc/cpuinfo says.
        cores: those that this process may use.
        local_ranks: ranks of this job that share the cores.
        threads: those of matrix products.
        too_late: Paddle was imported first, so nothing could be set.
        done, kept: variables that were set here, and those that the user had set before.
        malloc: what was done to the memory allocator, in words.
    """

    processor: blas.Processor = field(default_factory=blas.Processor)
    cores: int = 1
    local_ranks: int = 1
    threads: int = 1
    too_late: bool = False
    done: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    malloc: str = "not tried"


_setup: CpuSetup | None = None


_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def control_groups(
    controller: str, root: Path = _GROUPS, own: Path = _OWN_GROUPS
) -> Iterator[Path]:
    """Yield the directories of this process's control groups, from its own to the root.

    Limits of every one hold. Version 2 has one tree, version 1 one for each `controller`; with both
    (hybrid) that of version 2 may lie in `unified`. Inside a container the own group's path may be
    the host's, which is not mounted: the root is the container's then.
    """
    paths = {"": ".", controller: "."}
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, names, path = line.split(":", 2)
            shown = path.strip("/") if ".." not in path.split("/") else "."
            paths |= dict.fromkeys(names.split(","), shown)
    for tree, name in ((root, ""), (root / "unified", ""), (root / controller, controller)):
        group = tree / paths[name]
        yield from (part for part in (group, *group.parents) if part.is_relative_to(tree))


def _read_quota_cores(root: Path = _GROUPS, own: Path = _OWN_GROUPS) -> float | None:
    """Return how many cores the control groups' CPU quotas allow, or None without a quota."""
    quotas = []
    for group in control_groups("cpu", root, own):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with suppress(OSError, IndexError, ValueError):
                words = " ".join((group / name).read_text() for name in files).split()
                quota, period = float(words[0]), float(words[1])  # "max" is no number
                quotas += [quota / period] if quota > 0 and period > 0 else []
    return min(quotas, default=None)


def available_cores() -> int:
    """Return how many cores this process may use, by its affinity and its control groups' quotas.

    os.cpu_count and psutil know nothing of the quota, by which containers are limited.
    """
    cores = len(os.sched_getaffinity(0))
    quota = _read_quota_cores()
    return max(1, min(cores, int(quota))) if quota is not None else cores


def local_rank_count(environ: MutableMapping[str, str]) -> int:
    """Return how many ranks of this job share this machine (1 outside a launcher).

    `paddle.distributed.launch` sets PADDLE_LOCAL_SIZE; older launchers only list all endpoints,
    from which those with this rank's host are counted.
    """
    size = environ.get("PADDLE_LOCAL_SIZE", "")
    if size.isdigit() and int(size) > 0:
        return int(size)
    own_host = environ.get("PADDLE_CURRENT_ENDPOINT", "").rpartition(":")[0]
    endpoints = environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    hosts = [endpoint.strip().rpartition(":")[0] for endpoint in endpoints]
    return max(1, hosts.count(own_host)) if own_host else 1


def _keep_freed_memory(environ: MutableMapping[str, str]) -> str:
    chosen = [name for name in MALLOC_VARIABLES if name in environ]
    if chosen:
        return f"left alone, the user set {', '.join(chosen)}"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if platform.libc_ver()[0] != "glibc" or mallopt is None:
        return "left alone, this is not glibc"
    accepted = [
        mallopt(parameter, KEEP_FREED_BYTES) == 1
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)
    ]
    return "keeps freed memory for reuse" if all(accepted) else "refused by glibc's mallopt"


def configure_process(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the processor up for Paddle, as the top of this file explains.

    Args:
        environ: the environment to read and to change; the process's own outside of tests.
    """
    global _setup
    ours = {
        name
        for name, _, value in (item.partition("=") for item in environ.get(MARKER, "").split(";"))
        if name and environ.get(name) == value
    }
    setup = CpuSetup(
        processor=blas.read_processor(),
        cores=available_cores(),
        local_ranks=local_rank_count(environ),
        too_late="paddle" in sys.modules,
    )
    setup.threads = max(1, setup.cores // setup.local_ranks)

    wanted: dict[str, str] = {}
    if setup.processor.vendor == "AuthenticAMD" and {"avx2", "fma"} <= setup.processor.flags:
        wanted["MKL_DEBUG_CPU_TYPE"] = "5"
    # One thread variable set by the user decides: MKL follows OMP where only OMP is set.
    if not any(name in environ and name not in ours for name in THREAD_VARIABLES):
        wanted |= {"MKL_NUM_THREADS": str(setup.threads), "OMP_NUM_THREADS": "1"}
    else:
        setup.threads = _threads_chosen_by_user(environ)
    wanted["OPENBLAS_NUM_THREADS"] = str(setup.threads)
    if not setup.too_late:
        wanted |= _kernels_wanted(environ, ours, setup.processor)
        for name, value in wanted.items():
            if name not in environ or name in ours:
                environ[name] = value
                setup.done[name] = value
        environ[MARKER] = ";".join(f"{name}={value}" for name, value in setup.done.items())
    for name in ("MKL_DEBUG_CPU_TYPE", *THREAD_VARIABLES, "OPENBLAS_NUM_THREADS", blas.CORE_TYPE):
        if name in environ and name not in setup.done:
            setup.kept[name] = environ[name]
    setup.malloc = _keep_freed_memory(environ)
    _setup = setup


def _kernels_wanted(
    environ: MutableMapping[str, str], ours: set[str], processor: blas.Processor
) -> dict[str, str]:
    """Return the variable that gives numpy better kernels; nothing where it needs none."""
    if blas.CORE_TYPE in ours:
        return {blas.CORE_TYPE: environ[blas.CORE_TYPE]}
    settled = blas.CORE_TYPE in environ or KERNELS_SEEN in environ or "numpy" in sys.modules
    if settled or processor.vector_set is None:
        return {}
    environ[KERNELS_SEEN] = "1"
    core = blas.choose_core(processor, cache_root(environ))
    return {blas.CORE_TYPE: core} if core else {}


def cache_root(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the directory of what is kept between starts; None if nothing may be.

    $ERNIE_TRAIN_CACHE ("off": None), else ernie_train in $XDG_CACHE_HOME or ~/.cache.
    """
    asked = environ.get(CACHE)
    if asked:
        return None if asked == "off" else Path(asked)
    try:
        caches = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home directory, as containers have them
        return None
    return Path(caches) / "ernie_train"


def _threads_chosen_by_user(environ: MutableMapping[str, str]) -> int:
    for name in THREAD_VARIABLES:
        value = environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return 1


def use_threads(threads: int) -> None:
    """Set the threads of this process's matrix products, and of the ranks that it starts.

    To be called before Paddle is imported, for another number than `configure_process` chose. The
    ranks find it as one that the user set, and keep it.
    """
    setup = cpu_setup()
    for name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        if name not in setup.kept:
            os.environ[name] = setup.done[name] = str(threads)
    setup.threads = threads


def cpu_setup() -> CpuSetup:
    """Return the record of `configure_process`, which importing `ernie_train` has called."""
    if _setup is None:
        raise RuntimeError("configure_process has not run; import ernie_train first")
    return _setup


def cpu_setup_report() -> list[str]:
    """Describe in one line each what was set, what the user had set and what came too late."""
    setup = cpu_setup()
    share = f", shared by {setup.local_ranks} ranks" if setup.local_ranks > 1 else ""
    lines = [
        f"processor {setup.processor.vendor}, {setup.cores} cores{share}: {setup.threads} threads"
    ]
    lines += [f"set {name}={value}" for name, value in setup.done.items()]
    lines += [f"kept {name}={value}, set before" for name, value in setup.kept.items()]
    if setup.too_late:
        lines.append(
            "too late for settings, paddle was imported first: import ernie_train before paddle"
        )
    lines.append(f"memory allocator: {setup.malloc}")
    return lines


# ---- imports that can wait -----------------------------------------------------------------------


def defer_imports() -> None:
    """Have the packages in `DEFERRED` run their code when a name in them is first asked for.

    importlib's LazyLoader would run it at their second import already, and Paddle imports both
    twice.
    """
    if not any(isinstance(finder, _DeferringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeferringFinder())


class _DeferringFinder:
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        found = PathFinder.find_spec(name, path, target) if name in DEFERRED else None
        if found is not None and found.loader is not None:
            found.loader = cast("Loader", _DeferringLoader(found.loader))
        return found


class _DeferringLoader:
    def __init__(self, loader: "Loader") -> None:
        self._loader = loader
        self._lock, self._has_begun = threading.RLock(), False

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        def ask(name: str) -> Any:
            with self._lock:  # another thread waits until all names are there
                if not self._has_begun:
                    self._has_begun = True
                    self._loader.exec_module(module)
                    if vars(module).get("__getattr__") is ask:
                        del vars(module)["__getattr__"]
                if name not in vars(module):
                    raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
                return vars(module)[name]

        vars(module)["__getattr__"] = ask
