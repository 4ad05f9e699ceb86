"""Kernels of numpy's matrix products, which sampling consists of: found, and chosen where needed.

numpy's OpenBLAS picks kernels from a table of the processors of its time (0.3.23 in numpy 1.26).
On a newer one it falls back to kernels of 2004 that use no AVX, and says nothing: a 2048 x 2048
float32 product ran at 30 instead of 184 GFLOP/s on two cores of a new Xeon. OPENBLAS_CORETYPE
chooses others, if it is set before numpy is loaded. So processes of their own find out what
OpenBLAS would take here, and whether better kernels work: an instruction that the processor lacks
would kill its process.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ernie_train.core.errors import UserError

CORE_TYPE = "OPENBLAS_CORETYPE"
_PROBE_TIMEOUT_S = 20.0
SLOW_FACTOR = 5.0  # AMD's AVX-512 of the first kind reaches a half of what is counted here
TIMED_SIZE = 320  # of a product: 0.7 ms of one core at 100 GFLOP/s
PRODUCT_TOLERANCE = 1e-5  # relative; sums of 192 products in float32 differ by about 1e-7

# Instruction sets, best first: name, what /proc/cpuinfo must list, float32 operations in a cycle
# (two units that multiply and add vectors; before AVX2 one that multiplies and one that adds), and
# OpenBLAS's kernels for them that need nothing else.
_SETS: tuple[tuple[str, frozenset[str], int, str], ...] = (
    (
        "AVX-512",
        frozenset({"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd", "avx2", "fma"}),
        64,
        "SkylakeX",
    ),
    ("AVX2", frozenset({"avx2", "fma"}), 32, "Haswell"),
    ("AVX", frozenset({"avx"}), 16, "Sandybridge"),
)
# OpenBLAS's kernels for x86_64 without AVX, and with AVX alone; all others use AVX2 or more.
_NO_AVX = {
    "generic", "katmai", "coppermine", "northwood", "prescott", "banias", "atom", "core2", "penryn",
    "dunnington", "nehalem", "athlon", "opteron", "opteron_sse3", "barcelona", "nano", "bobcat",
}  # fmt: skip
_AVX_ALONE = {"sandybridge", "bulldozer", "piledriver", "steamroller"}


@dataclass(frozen=True)
class Processor:
    """Facts of /proc/cpuinfo; fields are empty where the kernel does not say."""

    machine: str = ""  # x86_64, aarch64
    vendor: str = "unknown"  # AuthenticAMD, GenuineIntel
    flags: frozenset[str] = frozenset()
    mhz: float = 0.0
    model: str = ""

    @property
    def vector_set(self) -> tuple[str, int, str] | None:
        """Return name, float32 operations in a cycle and kernels of the best instruction set."""
        if self.machine != "x86_64":
            return None
        found = (rest for rest in _SETS if rest[1] <= self.flags)
        return next(((name, operations, core) for name, _, operations, core in found), None)

    def peak_gflops(self, threads: int) -> float | None:
        """Return what `threads` cores can reach in float32 at the present clock, if it is known."""
        found = self.vector_set
        return threads * self.mhz / 1e3 * found[1] if found and self.mhz else None


def read_processor(
    cpuinfo: Path = Path("/proc/cpuinfo"), machine: str = platform.machine()
) -> Processor:
    """Read the first processor of `cpuinfo`; what is not there stays unknown."""
    facts: dict[str, str] = {}
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    try:
        mhz = float(facts.get("cpu MHz", 0))
    except ValueError:
        mhz = 0.0
    flags = frozenset(facts.get("flags", "").split())
    model = " ".join(facts[key] for key in ("cpu family", "model", "stepping") if key in facts)
    return Processor(machine, facts.get("vendor_id", "unknown"), flags, mhz, model)


def better_core(core: str, processor: Processor) -> str | None:
    """Return kernels to take instead of `core`, None where it is no fallback or none are better.

    OpenBLAS's own choice stays wherever it uses AVX2 or more.
    """
    best = processor.vector_set
    name = core.lower()
    if best is None or name not in _NO_AVX | _AVX_ALONE:
        return None
    return None if best[0] == "AVX" and name in _AVX_ALONE else best[2]


# ---- before numpy is loaded ----------------------------------------------------------------------

_ASK_LIBRARY = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
for name in ("openblas_get_corename64_", "openblas_get_corename", "scipy_openblas_get_corename64_"):
    if function := getattr(library, name, None):
        function.restype = ctypes.c_char_p
        print(function().decode())
        break
"""
_TRY_PRODUCT = """
import numpy as np
from threadpoolctl import threadpool_info
rng = np.random.default_rng(0)
a, b = rng.standard_normal((193, 257)), rng.standard_normal((257, 131))
error = np.abs(a.astype(np.float32) @ b.astype(np.float32) - a @ b).max()
exact = np.einsum("ik,kj->ij", a, b)
assert error < 1e-4 and np.abs(a @ b - exact).max() < 1e-10, error
print(*[i["architecture"] for i in threadpool_info() if i["internal_api"] == "openblas"])
"""


def fallback_core() -> str | None:
    """Return the kernels that numpy's OpenBLAS would choose here; None if it has no OpenBLAS."""
    library = _openblas()
    if library is None:
        return None
    # It finds the Fortran library beside it through numpy's modules alone, or this variable.
    return _python(_ASK_LIBRARY, str(library), LD_LIBRARY_PATH=str(library.parent)) or None


def _openblas() -> Path | None:
    """Return the file of numpy's OpenBLAS, None if it has another library."""
    spec = find_spec("numpy")
    if spec is None or spec.origin is None:
        return None
    libraries = Path(spec.origin).parents[1] / "numpy.libs"
    return next(iter(sorted(libraries.glob("*openblas*.so*"))), None)


def core_works(core: str) -> bool:
    """Return whether numpy takes the kernels `core` and its products agree with float64's."""
    return core.lower() in _python(_TRY_PRODUCT, **{CORE_TYPE: core}).lower().split()


def _python(code: str, *arguments: str, **environ: str) -> str:
    """Return what another Python prints; empty if it fails, dies or hangs."""
    keep = {name: value for name, value in os.environ.items() if name != CORE_TYPE}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *arguments],
            env={**keep, "OPENBLAS_NUM_THREADS": "1", **environ},
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def choose_core(processor: Processor, memory: Path | None = None) -> str | None:
    """Return kernels that numpy should be told to take, after trying them; None: leave it alone.

    What was tried is noted in the directory `memory`, for this processor and numpy's library, and
    not tried again: both processes take 0.2 s. A choice to leave numpy alone is not noted, since a
    process that a busy machine held up looks the same.
    """
    note = _note_of(processor, memory)
    if note is not None:
        with suppress(OSError, UnicodeError):
            if (known := note.read_text("ascii")) in {core for *_, core in _SETS}:
                return known
    core = fallback_core()
    better = better_core(core, processor) if core else None
    if better is None or not core_works(better):
        return None
    if note is not None:
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            part = note.with_name(f"{note.name}.{os.getpid()}")
            part.write_text(better, "ascii")
            part.replace(note)
    return better


def _note_of(processor: Processor, memory: Path | None) -> Path | None:
    """Return the file that a choice is noted in, by everything that it depends on."""
    library = _openblas()
    if memory is None or library is None:
        return None
    try:
        file = library.stat()
    except OSError:
        return None
    seen = (processor.machine, processor.vendor, processor.model, *sorted(processor.flags))
    facts = (*seen, str(library), file.st_size, file.st_mtime_ns)
    return memory / f"kernels-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


# ---- once numpy is loaded ------------------------------------------------------------------------


def core_in_use() -> str | None:
    """Return the kernels of numpy's products in this process; None if it has no OpenBLAS."""
    import numpy
    from threadpoolctl import threadpool_info

    home = Path(numpy.__file__).resolve().parents[1]  # the libraries' paths follow links, too
    for library in threadpool_info():
        file = Path(library["filepath"]).resolve()
        beside = file.is_relative_to(home / "numpy.libs") or file.is_relative_to(home / "numpy")
        if library["internal_api"] == "openblas" and beside:
            return str(library["architecture"])
    return None


def product_error() -> float:
    """Return the largest error of a float32 product of numpy, relative to float64's largest."""
    import numpy as np

    rng = np.random.Generator(np.random.Philox(key=1))
    a, b = rng.standard_normal((2, 192, 192)).astype(np.float32)
    exact = np.einsum("ik,kj->ij", a.astype(np.float64), b.astype(np.float64))
    return float(np.abs(a @ b - exact).max() / np.abs(exact).max())


def kernel_problem(
    core: str | None, processor: Processor, environ: Mapping[str, str] = os.environ
) -> str:
    """Say in one line that numpy's products take the kernels `core` though better ones would run.

    Returns "" where they are good, or where nothing better is known.
    """
    better = better_core(core, processor) if core else None
    best = processor.vector_set
    if better is None or best is None:
        return ""
    chosen = environ.get(CORE_TYPE)
    why = f"{CORE_TYPE}={chosen}" if chosen else "OpenBLAS does not know this processor"
    remedy = f"unset it or set {CORE_TYPE}={better}" if chosen else f"set {CORE_TYPE}={better}"
    return (
        f"numpy's matrix products take the kernels {core} ({why}), which leave {best[0]} unused: "
        f"sampling is several times slower; {remedy}"
    )


def require_sound_products(processor: Processor) -> str:
    """Check numpy's kernels before work that depends on them; return a warning, or "".

    Raises `UserError` where a product in float32 is wrong.
    """
    core = core_in_use()
    if not (error := product_error()) <= PRODUCT_TOLERANCE:  # a NaN too
        raise UserError(
            f"numpy's matrix products are wrong on this processor, by {error:.1e} of the largest "
            f"value, with the kernels {core or 'of its library'}: set {CORE_TYPE}=Haswell or "
            "another of OpenBLAS's core types, and look at `doctor`"
        )
    return kernel_problem(core, processor)


def core_gflops(multiply: Callable[[], object], tries: int = 5) -> float:
    """Return the GFLOP per processor second of a `TIMED_SIZE`^3 product, the best of some.

    By processor time of all threads, so that neither their number nor other programs count.
    """
    multiply()
    best = math.inf
    for _ in range(tries):
        began = time.process_time_ns()
        multiply()
        best = min(best, time.process_time_ns() - began)
    return 2.0 * TIMED_SIZE**3 / max(best, 1.0)


def speed_problem(library: str, gflops: float, processor: Processor) -> str:
    """Say in one line that products of a core are several times too slow; "" if they are not.

    gflops: as `core_gflops` measures them. Nothing is said where the processor is not known.
    """
    best, peak = processor.vector_set, processor.peak_gflops(1)
    if best is None or peak is None or gflops * SLOW_FACTOR >= peak:
        return ""
    return (
        f"{library}'s matrix products run at {gflops:.1f} GFLOP/s a core, where {best[0]} allows "
        f"about {peak:.0f}: this run is several times slower than it could be; see "
        "`ernie-train doctor`"
    )
