"""Images: their steps run on what the build context holds, with the pins and as no root."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tools.docker_steps import ROOT, Step, context_files, read_steps, run_steps, stand_ins

CPU, GPU = ROOT / "docker/Dockerfile.cpu", ROOT / "docker/Dockerfile.gpu"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    stand_ins(tmp_path / "system")
    fake = tmp_path / "system/python"
    fake.write_text('#!/bin/sh\necho "$PWD: $*" >>"$LOG"\n')
    fake.chmod(0o755)
    path = f"{tmp_path / 'system'}:{os.environ['PATH']}"
    return {"PATH": path, "LOG": str(tmp_path / "log")}


def test_the_steps_of_the_cpu_image_run_on_what_is_copied(tmp_path, environment) -> None:
    assert run_steps(CPU, tmp_path, environment) == ["ernie-train"]
    assert (tmp_path / "log").read_text().splitlines() == [
        f"{tmp_path}/src: -m pip install -r requirements.txt",
        f"{tmp_path}/src: -m pip install --no-deps .",
        f"{tmp_path}/src: -m pip check",
    ]
    src, context = tmp_path / "src", set(context_files())
    assert {file.relative_to(src) for file in src.rglob("*") if file.is_file()} == context
    assert (tmp_path / "work").is_dir()


def test_a_step_that_fails_ends_the_build(tmp_path, environment) -> None:
    (tmp_path / "system/python").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(subprocess.CalledProcessError):
        run_steps(CPU, tmp_path, environment)


def test_the_context_holds_what_the_package_is_made_of_and_nothing_else() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "ernie_train", "recipes", "data"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    found = {str(file) for file in context_files()}
    missing = [name for name in tracked if name and name not in found and (ROOT / name).exists()]
    assert missing == []
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "requirements.txt"} <= found
    tops = {name.split("/")[0] for name in found}
    assert not tops & {"runs", "tests", "docs", "tools", ".git", ".venv"}


def test_the_gpu_image_differs_in_paddle_alone() -> None:
    told = [
        step
        for step in read_steps(GPU)
        if step.instruction != "ARG" and not step.text.startswith("NVIDIA_")
    ]
    swapped = [
        Step(
            step.instruction,
            step.text.replace('--extra-index-url "${PADDLE_INDEX:?}" ', "")
            .replace("requirements-gpu.txt", "requirements.txt"),
        )
        for step in told
    ]  # fmt: skip
    cpu = [Step(i, text.replace(" && python -m pip check", "")) for i, text in read_steps(CPU)]
    assert swapped == cpu
    assert "never built" in GPU.read_text().splitlines()[0]


@pytest.mark.parametrize("file", [CPU, GPU], ids=["cpu", "gpu"])
def test_the_base_is_pinned_and_the_user_is_not_root(file: Path) -> None:
    steps = read_steps(file)
    assert steps[0] == Step("FROM", "python:3.11.7-slim-bookworm")
    user = max(i for i, step in enumerate(steps) if step.instruction == "USER")
    assert steps[user].text == "trainer"
    assert all(step.instruction not in ("RUN", "COPY") for step in steps[user:])
    assert any("bubblewrap" in step.text for step in steps)
