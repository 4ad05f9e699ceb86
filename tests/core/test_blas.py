"""Kernels of numpy's products on processors that there are and that there are not."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ernie_train.core import blas, cpu, devices
from ernie_train.core.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
AVX512 = "avx avx2 fma avx512f avx512dq avx512bw avx512vl avx512cd"


def processor(vendor: str, flags: str, machine: str = "x86_64") -> blas.Processor:
    return blas.Processor(machine, vendor, frozenset(flags.split()), 2000.0)


PROCESSORS = {
    "unknown Intel with AVX-512": processor("GenuineIntel", AVX512),
    "unknown vendor with AVX-512": processor("unknown", AVX512),
    "AMD with AVX-512": processor("AuthenticAMD", AVX512),
    "AMD with AVX2": processor("AuthenticAMD", "sse4_2 avx avx2 fma"),
    "AVX-512 of the first kind": processor("GenuineIntel", "avx avx2 fma avx512f avx512cd"),
    "AVX2 without fused products": processor("GenuineIntel", "avx avx2"),
    "AVX alone": processor("GenuineIntel", "sse4_2 avx"),
    "AMD without AVX": processor("AuthenticAMD", "sse4_2"),
    "Intel without AVX": processor("GenuineIntel", "sse4_2"),
    "aarch64": processor("unknown", "", "aarch64"),
    "nothing known": blas.Processor(),
}


def child(code: str, **environ: str) -> str:
    """Standard output of a fresh Python that starts without any CPU settings but `environ`."""
    names = (
        "MKL_DEBUG_CPU_TYPE",
        *cpu.THREAD_VARIABLES,
        *cpu.MALLOC_VARIABLES,
        cpu.KERNELS_SEEN,
        blas.CORE_TYPE,
    )
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in (*names, cpu.MARKER) and not name.startswith("PADDLE_")
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=clean | environ,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    ("name", "core", "better"),
    [
        ("unknown Intel with AVX-512", "Prescott", "SkylakeX"),
        ("unknown Intel with AVX-512", "Nehalem", "SkylakeX"),
        ("unknown Intel with AVX-512", "Sandybridge", "SkylakeX"),
        ("unknown Intel with AVX-512", "Haswell", None),  # its own choice, not a fallback
        ("unknown Intel with AVX-512", "Cooperlake", None),
        ("unknown vendor with AVX-512", "Generic", "SkylakeX"),
        ("AMD with AVX-512", "Barcelona", "SkylakeX"),
        ("AMD with AVX-512", "Zen", None),
        ("AMD with AVX2", "Barcelona", "Haswell"),
        ("AMD with AVX2", "Excavator", None),
        ("AVX-512 of the first kind", "Core2", "Haswell"),
        ("AVX2 without fused products", "Prescott", "Sandybridge"),
        ("AVX alone", "Prescott", "Sandybridge"),
        ("AVX alone", "Sandybridge", None),
        ("AVX alone", "Bulldozer", None),
        ("AMD without AVX", "Barcelona", None),
        ("Intel without AVX", "Prescott", None),
        ("aarch64", "armv8", None),
        ("nothing known", "Prescott", None),
        ("AMD with AVX2", "a name of tomorrow", None),
    ],
)
def test_a_fallback_gives_way_to_the_best_that_the_processor_runs(
    name: str, core: str, better: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert blas.better_core(core, PROCESSORS[name]) == better
    monkeypatch.setattr(blas, "fallback_core", lambda: core)
    monkeypatch.setattr(blas, "core_works", lambda core: True)
    assert blas.choose_core(PROCESSORS[name]) == better
    monkeypatch.setattr(blas, "core_works", lambda core: False)
    assert blas.choose_core(PROCESSORS[name]) is None
    assert bool(blas.kernel_problem(core, PROCESSORS[name], {})) == (better is not None)


def test_a_choice_is_tried_once_for_a_processor_and_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    library = tmp_path / "libopenblas.so"
    library.write_text("first")
    monkeypatch.setattr(blas, "_openblas", lambda: library)
    monkeypatch.setattr(blas, "fallback_core", lambda: "Prescott")
    monkeypatch.setattr(blas, "core_works", lambda core: not tried.append(core))

    def chosen(name: str, tries: int, memory: Path | None = tmp_path / "memory/here") -> str | None:
        tried.clear()
        core = blas.choose_core(PROCESSORS[name], memory)
        assert len(tried) == tries
        return core

    assert chosen("AMD with AVX-512", 1) == chosen("AMD with AVX-512", 0) == "SkylakeX"
    assert chosen("AMD with AVX2", 1) == chosen("AMD with AVX2", 0) == "Haswell"
    assert chosen("AMD with AVX2", 1, None) == "Haswell"
    library.write_text("another")
    assert chosen("AMD with AVX2", 1) == "Haswell"
    for note in (tmp_path / "memory/here").iterdir():
        note.write_text("NoSuchCore\n")
    assert chosen("AMD with AVX2", 1) == chosen("AMD with AVX2", 0) == "Haswell"
    assert chosen("AMD with AVX2", 1, library) == "Haswell"  # no directory: nothing is noted


def test_what_did_not_work_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = iter([False, True])
    monkeypatch.setattr(blas, "fallback_core", lambda: "Prescott")
    monkeypatch.setattr(blas, "core_works", lambda core: next(works))
    found = [blas.choose_core(PROCESSORS["AMD with AVX2"], tmp_path) for _ in range(3)]
    assert found == [None, "Haswell", "Haswell"]


def test_a_library_that_is_not_openblas_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "fallback_core", lambda: None)
    assert blas.choose_core(PROCESSORS["AMD with AVX2"]) is None
    assert blas.kernel_problem(None, PROCESSORS["AMD with AVX2"], {}) == ""


def test_the_user_s_choice_is_told_what_it_costs() -> None:
    told = blas.kernel_problem(
        "Prescott", PROCESSORS["AMD with AVX2"], {blas.CORE_TYPE: "PRESCOTT"}
    )
    assert "(OPENBLAS_CORETYPE=PRESCOTT)" in told and told.endswith(
        "unset it or set OPENBLAS_CORETYPE=Haswell"
    )


def test_the_processor_is_read_from_the_kernel(tmp_path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu MHz\t: 2600.5\nflags\t: fpu avx\n\n"
        "processor\t: 1\nvendor_id\t: other\ncpu MHz\t: 800\nflags\t: fpu\n"
    )
    found = blas.read_processor(info, "x86_64")
    assert found == blas.Processor("x86_64", "GenuineIntel", frozenset({"fpu", "avx"}), 2600.5)
    assert found.peak_gflops(2) == pytest.approx(2 * 2.6005 * 16)
    info.write_text("CPU implementer : 0x41\nFeatures : asimd sve\n")
    assert blas.read_processor(info, "aarch64") == blas.Processor("aarch64")
    assert blas.read_processor(tmp_path / "missing", "x86_64") == blas.Processor("x86_64")
    assert blas.Processor("x86_64").peak_gflops(2) is None


@pytest.mark.skipif(blas.core_in_use() is None, reason="numpy has another library than OpenBLAS")
def test_the_library_is_asked_and_tried_in_processes_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert blas.core_works("Nehalem")  # every x86_64 processor of today runs it
    assert not blas.core_works("NoSuchCore")
    monkeypatch.setenv(blas.CORE_TYPE, "Nehalem")  # by the user; what it would choose is asked
    core = blas.fallback_core()
    assert core is not None and core != "Nehalem"
    monkeypatch.setattr(blas.sys, "executable", "/no/such/python")
    assert blas.fallback_core() is None
    assert not blas.core_works("Nehalem")


def test_wrong_products_stop_a_run_and_right_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < blas.product_error() < 1e-6
    monkeypatch.setattr(blas, "core_in_use", lambda: "Prescott")
    warning = blas.require_sound_products(PROCESSORS["AMD with AVX2"])
    assert "leave AVX2 unused" in warning and "\n" not in warning
    for error, told in ((0.1, r"1\.0e-01"), (float("nan"), "nan")):
        monkeypatch.setattr(blas, "product_error", lambda found=error: found)
        with pytest.raises(UserError, match=rf"products are wrong on this processor, by {told}"):
            blas.require_sound_products(PROCESSORS["AMD with AVX2"])


@pytest.mark.parametrize(
    ("name", "mhz", "gflops", "warns"),
    [
        ("unknown Intel with AVX-512", 2100.0, 15.0, True),  # Prescott's kernels
        ("unknown Intel with AVX-512", 2100.0, 60.0, False),  # Haswell's
        ("AMD with AVX-512", 3700.0, 50.0, False),  # 256 bits at a time
        ("AMD with AVX-512", 3700.0, 40.0, True),
        ("AMD with AVX2", 2500.0, 14.0, True),
        ("AMD with AVX2", 2500.0, 40.0, False),
        ("AVX alone", 2500.0, 7.0, True),
        ("AMD with AVX2", 0.0, 0.1, False),  # its clock is not known
        ("Intel without AVX", 2500.0, 0.1, False),
        ("aarch64", 2500.0, 0.1, False),
        ("nothing known", 2500.0, 0.1, False),
    ],
)
def test_products_several_times_too_slow_are_told_in_one_line(
    name: str, mhz: float, gflops: float, warns: bool
) -> None:
    told = blas.speed_problem("Paddle", gflops, replace(PROCESSORS[name], mhz=mhz))
    assert bool(told) == warns and "\n" not in told
    assert not warns or told.startswith(f"Paddle's matrix products run at {gflops:.1f} GFLOP/s")


def test_the_speed_of_both_libraries_is_measured_by_processor_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(0, 10**12, 10**9))  # a second from one look to the next
    monkeypatch.setattr(blas.time, "process_time_ns", lambda: next(clock))
    calls: list[int] = []
    gflops = blas.core_gflops(lambda: calls.append(1), tries=3)
    assert gflops == pytest.approx(2 * blas.TIMED_SIZE**3 / 1e9) and len(calls) == 4
    slow = replace(PROCESSORS["AMD with AVX2"], mhz=3000.0)
    lines = devices.slow_products(slow)
    assert [line.split("'")[0] for line in lines] == ["numpy", "Paddle"]
    monkeypatch.undo()
    assert devices.slow_products(replace(slow, mhz=1.0)) == []


@pytest.mark.skipif(
    blas.core_in_use() is None or blas.read_processor().vector_set is None,
    reason="numpy has another library, or the processor no AVX",
)
def test_a_process_on_an_unknown_processor_computes_with_the_better_kernels() -> None:
    code = (
        "import os, ernie_train; from ernie_train.core import blas, cpu\n"
        "blas.fallback_core = lambda: 'Prescott'\n"
        "os.environ.pop(cpu.KERNELS_SEEN, None)\n"
        "cpu.configure_process()\n"
        "import numpy; print(blas.core_in_use(), blas.product_error() < 1e-6)"
    )
    best = blas.read_processor().vector_set
    assert best is not None
    assert child(code).split() == [best[2], "True"]
    assert child(code, OPENBLAS_CORETYPE="Nehalem").split() == ["Nehalem", "True"]
