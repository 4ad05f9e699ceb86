"""Describes the machine and the software of a run: what `environment.json` records."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

from ernie_train.core.cpu import __version__, control_groups, cpu_setup

VERSIONED = (
    "paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "numpy", "numba", "safetensors",
    "sentencepiece", "pydantic", "typer", "rich", "visualdl", "matplotlib", "math-verify",
    "reasoning-gym",
)  # fmt: skip
GIT_TIMEOUT_S = 5.0  # a checkout on a slow network file system must not hold up a run
_CHECKOUT = Path(__file__).resolve().parents[2]


@cache
def installed_versions() -> Mapping[str, str]:
    """Return the version of each installed distribution of `VERSIONED`; imports none of them."""
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return MappingProxyType(versions)


def memory_bytes() -> dict[str, int]:
    """Return `total` and `available` memory in bytes, both at most what a container may use."""
    memory, limits = psutil.virtual_memory(), []
    for group in control_groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # "max" is no number
                limits.append(int((group / name).read_text()))
    limit = min(limits, default=memory.total)
    return {"total": min(memory.total, limit), "available": min(memory.available, limit)}


def code_version(checkout: Path = _CHECKOUT) -> dict[str, Any]:
    """Return the `commit` of the package's git checkout, and whether it is `dirty`.

    Dirty means that tracked files differ from the commit. Both are null where the package was
    installed without its repository, where git is missing and where it fails.

    Args:
        checkout: the directory that holds the package. It must itself be the top of a checkout: a
            repository further up, such as one with an installed environment in it, is not ours.
    """
    unknown = {"commit": None, "dirty": None}
    if not (checkout / ".git").exists():
        return unknown
    # Inside a git hook GIT_DIR and others name another repository. In a container the checkout
    # often belongs to another user, which git refuses without safe.directory.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-c", f"safe.directory={checkout}"]
    command += ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(
            command,
            cwd=checkout,
            env=environ,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return unknown
    commit, dash, _ = done.stdout.strip().partition("-")  # "<hash>" or "<hash>-dirty"
    return {"commit": commit, "dirty": bool(dash)}


# Once a process: it runs the code that it has imported, whatever is committed after that.
_imported_code = cache(code_version)


def describe_environment() -> dict[str, Any]:
    """Return versions, device, cores, memory and CPU set-up as plain values that JSON can hold."""
    import paddle

    setup = cpu_setup()
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    return {
        "ernie_train": __version__,
        "code": dict(_imported_code()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": dict(installed_versions()),
        "device": paddle.get_device(),
        "gpus": [paddle.device.cuda.get_device_name(index) for index in range(gpus)],
        "cpu": {
            "vendor": setup.processor.vendor,
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
