"""CPU set-up, device, seeds, kernels and signals of a process."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ernie_train.core import cpu, devices, signals
from ernie_train.core.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def keep_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of configure_process in a test do not change this process's own record."""
    monkeypatch.setattr(cpu, "_setup", cpu.cpu_setup())


@pytest.fixture
def before_paddle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Paddle were not imported yet, on an AMD processor with six cores."""
    monkeypatch.delitem(sys.modules, "paddle", raising=False)
    monkeypatch.setattr(cpu, "cpu_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(cpu, "available_cores", lambda: 6)


def child(code: str, **environ: str) -> str:
    """Standard output of a fresh Python that starts without any CPU settings but `environ`."""
    names = ("MKL_DEBUG_CPU_TYPE", *cpu.THREAD_VARIABLES, *cpu.MALLOC_VARIABLES)
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


def test_the_vendor_is_read_from_the_kernel(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t: fpu\n")
    assert cpu.cpu_vendor(info) == "GenuineIntel"
    info.write_text("CPU implementer : 0x41\n")
    assert cpu.cpu_vendor(info) == "unknown"
    assert cpu.cpu_vendor(tmp_path / "missing") == "unknown"


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
    assert cpu._read_quota_cores(tmp_path) == cores


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
        assert environ == {
            "MKL_DEBUG_CPU_TYPE": "5",
            "MKL_NUM_THREADS": "6",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "6",
        }
        assert marker == ";".join(f"{name}={value}" for name, value in environ.items())
        assert cpu.cpu_setup().threads == 6

    def test_only_amd_needs_the_cpu_type(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu, "cpu_vendor", lambda: "GenuineIntel")
        environ: dict[str, str] = {}
        cpu.configure_process(environ)
        assert "MKL_DEBUG_CPU_TYPE" not in environ

    def test_what_the_user_set_stays(self) -> None:
        environ = {"MKL_DEBUG_CPU_TYPE": "4", "OMP_NUM_THREADS": "3"}
        cpu.configure_process(environ)
        del environ[cpu.MARKER]
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
    with pytest.raises(ConfigError, match=r"CPU build; install requirements-gpu\.txt"):
        devices.select_device("gpu")
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="sees no GPU; check nvidia-smi"):
        devices.select_device("gpu")
    assert devices.select_device("auto") == "cpu"


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


class TestStopFlag:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_is_noted(self, number: signal.Signals) -> None:
        with signals.StopFlag() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            assert stop.signal_name == number.name

    def test_handlers_come_back(self) -> None:
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        with pytest.raises(RuntimeError), signals.StopFlag():
            assert signal.getsignal(signal.SIGTERM) != before[0]
            raise RuntimeError
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

    def test_a_second_interrupt_does_not_wait(self) -> None:
        with signals.StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal_name == "SIGTERM"

    def test_flags_nest(self) -> None:
        with signals.StopFlag() as outer:
            with signals.StopFlag() as inner:
                os.kill(os.getpid(), signal.SIGTERM)
                assert inner.requested
            assert outer.requested
            with signals.StopFlag() as late:
                assert late.requested
        with signals.StopFlag() as fresh:
            assert not fresh.requested

    def test_interrupts_are_counted_through_nested_flags(self) -> None:
        with signals.StopFlag():
            os.kill(os.getpid(), signal.SIGINT)
            with signals.StopFlag(), pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)

    def test_a_stop_without_a_signal(self) -> None:
        with signals.StopFlag() as stop:
            stop.request("rank 3")
            assert stop.requested and stop.signal_name == "rank 3"
