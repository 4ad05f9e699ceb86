"""Settings of the processor: what is set, what the user set, and what they do."""

import importlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ernie_train.core import blas, cpu
from tests.core.test_blas import PROCESSORS, child


@pytest.fixture(autouse=True)
def keep_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of configure_process in a test do not change this process's own record."""
    monkeypatch.setattr(cpu, "_setup", cpu.cpu_setup())


@pytest.fixture
def before_paddle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Paddle were not imported yet, on an AMD processor with six cores."""
    monkeypatch.delitem(sys.modules, "paddle", raising=False)
    monkeypatch.delitem(sys.modules, "numpy", raising=False)
    monkeypatch.setattr(blas, "read_processor", lambda: PROCESSORS["AMD with AVX2"])
    monkeypatch.setattr(blas, "choose_core", lambda processor, memory: None)
    monkeypatch.setattr(cpu, "available_cores", lambda: 6)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_the_control_group(
    files: dict[str, str], cores: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu._read_quota_cores(tmp_path, tmp_path / "none") == cores


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2.0),
        ("0::/a/b", {"a/b/cpu.max": "150000 100000", "a/cpu.max": "800000 100000"}, 1.5),
        ("0::/a/b", {"a/other/cpu.max": "100000 100000"}, None),
        ("0::/../b", {"cpu.max": "300000 100000", "b/cpu.max": "100000 100000"}, 3.0),
        ("0::/on/the/host", {"cpu.max": "300000 100000"}, 3.0),
        ("0::/u", {"unified/u/cpu.max": "300000 100000"}, 3.0),
        (
            "4:memory:/m\n3:cpu,cpuacct:/a\n0::/",
            {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        ("nonsense", {"cpu.max": "300000 100000"}, 3.0),
    ],
)
def test_the_smallest_quota_from_the_own_group_up_counts(
    own: str, files: dict[str, str], cores: float | None, tmp_path: Path
) -> None:
    for name, text in {"own": own, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cpu._read_quota_cores(tmp_path, tmp_path / "own") == cores


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (100.0, 8), (2.9, 2), (0.5, 1)])
def test_cores_are_cut_by_the_quota_but_never_to_none(
    quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cpu, "_read_quota_cores", lambda: quota)
    assert cpu.available_cores() == cores


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        ({}, 1),
        ({"PADDLE_LOCAL_SIZE": "4"}, 4),
        ({"PADDLE_LOCAL_SIZE": "none"}, 1),
        (
            {
                "PADDLE_CURRENT_ENDPOINT": "10.0.0.2:7000",
                "PADDLE_TRAINER_ENDPOINTS": "10.0.0.1:7000,10.0.0.2:7000,10.0.0.2:7001",
            },
            2,
        ),
        ({"PADDLE_TRAINER_ENDPOINTS": "10.0.0.1:7000,10.0.0.2:7000"}, 1),
    ],
)
def test_ranks_on_this_machine(environ: dict[str, str], ranks: int) -> None:
    assert cpu.local_rank_count(environ) == ranks


@pytest.mark.usefixtures("before_paddle")
class TestConfigureProcess:
    def test_it_sets_what_is_not_set(self) -> None:
        environ: dict[str, str] = {}
        cpu.configure_process(environ)
        marker = environ.pop(cpu.MARKER)
        assert environ.pop(cpu.KERNELS_SEEN)
        assert environ == {
            "MKL_DEBUG_CPU_TYPE": "5",
            "MKL_NUM_THREADS": "6",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "6",
        }
        assert marker == ";".join(f"{name}={value}" for name, value in environ.items())
        assert cpu.cpu_setup().threads == 6

    def test_only_amd_with_avx2_needs_the_cpu_type(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for other in ("unknown Intel with AVX-512", "AMD without AVX", "aarch64"):
            monkeypatch.setattr(blas, "read_processor", lambda other=other: PROCESSORS[other])
            environ: dict[str, str] = {}
            cpu.configure_process(environ)
            assert "MKL_DEBUG_CPU_TYPE" not in environ

    def test_what_the_user_set_stays(self) -> None:
        environ = {"MKL_DEBUG_CPU_TYPE": "4", "OMP_NUM_THREADS": "3"}
        cpu.configure_process(environ)
        del environ[cpu.MARKER], environ[cpu.KERNELS_SEEN]
        assert environ.pop("OPENBLAS_NUM_THREADS") == "3"
        assert environ == {"MKL_DEBUG_CPU_TYPE": "4", "OMP_NUM_THREADS": "3"}
        assert cpu.cpu_setup().threads == 3
        assert "kept OMP_NUM_THREADS=3, set before" in cpu.cpu_setup_report()

    def test_the_user_s_threads_of_numpy_stay(self) -> None:
        environ = {"OPENBLAS_NUM_THREADS": "2"}
        cpu.configure_process(environ)
        assert environ["OPENBLAS_NUM_THREADS"] == "2"
        assert environ["MKL_NUM_THREADS"] == "6"
        assert "kept OPENBLAS_NUM_THREADS=2, set before" in cpu.cpu_setup_report()

    def test_ranks_share_the_cores(self) -> None:
        environ = {"PADDLE_LOCAL_SIZE": "2"}
        cpu.configure_process(environ)
        assert environ["MKL_NUM_THREADS"] == "3"
        assert "6 cores, shared by 2 ranks: 3 threads" in cpu.cpu_setup_report()[0]

    def test_more_ranks_than_cores_have_a_thread_each(self) -> None:
        environ = {"PADDLE_LOCAL_SIZE": "9"}
        cpu.configure_process(environ)
        assert environ["MKL_NUM_THREADS"] == "1"

    def test_a_rank_chooses_anew_what_its_launcher_set(self) -> None:
        environ: dict[str, str] = {}
        cpu.configure_process(environ)
        environ["PADDLE_LOCAL_SIZE"] = "3"
        cpu.configure_process(environ)
        assert environ["MKL_NUM_THREADS"] == "2"

    def test_a_rank_keeps_what_the_user_changed_after_the_launcher(self) -> None:
        environ: dict[str, str] = {}
        cpu.configure_process(environ)
        environ |= {"PADDLE_LOCAL_SIZE": "3", "MKL_NUM_THREADS": "5"}
        cpu.configure_process(environ)
        assert environ["MKL_NUM_THREADS"] == "5"

    def test_numpy_is_given_better_kernels_once_and_never_against_the_user(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Path | None] = []
        monkeypatch.setattr(
            blas, "choose_core", lambda p, memory: asked.append(memory) or "Haswell"
        )
        environ = {"ERNIE_TRAIN_CACHE": "here"}
        cpu.configure_process(environ)
        assert environ[blas.CORE_TYPE] == cpu.cpu_setup().done[blas.CORE_TYPE] == "Haswell"
        cpu.configure_process(environ)  # a rank, which its launcher started
        assert environ[blas.CORE_TYPE] == cpu.cpu_setup().done[blas.CORE_TYPE] == "Haswell"
        environ = {blas.CORE_TYPE: "Prescott"}
        cpu.configure_process(environ)
        assert environ[blas.CORE_TYPE] == "Prescott"
        assert "kept OPENBLAS_CORETYPE=Prescott, set before" in cpu.cpu_setup_report()
        monkeypatch.setitem(sys.modules, "numpy", sys)  # loaded before: nothing can be chosen
        environ = {}
        cpu.configure_process(environ)
        assert blas.CORE_TYPE not in environ and asked == [Path("here")]

    def test_too_late_is_recorded_and_changes_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "paddle", sys)
        environ: dict[str, str] = {}
        cpu.configure_process(environ)
        assert environ == {}
        assert any("import ernie_train before paddle" in x for x in cpu.cpu_setup_report())

    def test_the_user_s_allocator_settings_stay(self) -> None:
        cpu.configure_process({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"})
        assert cpu.cpu_setup().malloc == "left alone, the user set GLIBC_TUNABLES"


def test_importing_the_package_sets_the_environment_and_leaves_paddle_alone() -> None:
    code = (
        "import os, sys, ernie_train; "
        "print(os.environ['OMP_NUM_THREADS'], os.environ.get('MKL_NUM_THREADS'), "
        "'paddle' in sys.modules, 'numpy' in sys.modules)"
    )
    cores = cpu.available_cores()
    assert child(code).split() == ["1", str(cores), "False", "False"]
    assert child(code, OMP_NUM_THREADS="7").split() == ["7", "None", "False", "False"]


def test_one_core_gets_one_thread() -> None:
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{core}}}); import ernie_train; "
    assert child(code + "print(os.environ['MKL_NUM_THREADS'])").strip() == "1"


@pytest.mark.skipif(
    cpu.cpu_setup().malloc.endswith("not glibc"), reason="the setting is one of glibc"
)
def test_freed_tensors_are_used_again() -> None:
    # 8 MB are 2048 pages; without the setting every result asks the system for all of them.
    code = (
        "import ernie_train, paddle, resource\n"
        "x = paddle.ones([2, 1024, 1024])\n"
        "for _ in range(20): x * 2\n"  # until the heap is as large as it gets
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): x * 2\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    assert int(child(code)) < 500
    # glibc's own default, given by the user, which therefore stays: the referee.
    assert int(child(code, MALLOC_MMAP_THRESHOLD_="131072")) > 10_000


def test_what_is_kept_between_starts_lies_where_the_user_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    assert cpu.cache_root({"ERNIE_TRAIN_CACHE": "here"}) == Path("here")
    assert cpu.cache_root({"ERNIE_TRAIN_CACHE": "off"}) is None
    assert cpu.cache_root({"XDG_CACHE_HOME": "caches"}) == Path("caches/ernie_train")
    assert cpu.cache_root({}) == Path.home() / ".cache" / "ernie_train"
    monkeypatch.setattr(Path, "home", no_home)
    assert cpu.cache_root({}) is None


def test_imports_that_a_start_does_not_need_wait_until_a_name_is_asked_for() -> None:
    told = child(
        """
import sys, ernie_train
from ernie_train.core.cpu import defer_imports
defer_imports()
import paddle, httpx, httpx as again
import paddle.utils.cpp_extension.extension_utils
print("setuptools" in sys.modules, "httpx._client" in sys.modules)
from httpx import Client
print(again.Client is Client, httpx.__version__[0].isdigit(), hasattr(httpx, "nothing"))
print(paddle.utils.cpp_extension.CppExtension.__name__, "setuptools" in sys.modules)
"""
    )
    assert told.split() == ["False", "False", "True", "True", "False", "CppExtension", "True"]


def test_a_deferred_package_is_there_once_for_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slowly.py").write_text("import time\ntime.sleep(0.3)\nvalue = object()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cpu, "DEFERRED", {"slowly"})
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    cpu.defer_imports()
    cpu.defer_imports()
    slowly = importlib.import_module("slowly")
    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(lambda _: slowly.value, range(4)))
    assert len(found) == 1
    assert sum(type(finder).__name__ == "_DeferringFinder" for finder in sys.meta_path) == 1
