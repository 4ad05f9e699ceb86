"""The floors of the house: who may import whom. Walks every import, those in functions too.

A module imports lower floors, or modules listed before it on its own floor. The packages of floor 1
never import one another. Only distributed.py and parallel/ touch paddle.distributed.
"""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ernie_train"

# A name stands for a module or a package. One that is planned and not there yet may be listed.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "errors", "meeting", "distributed", "storage", "yaml_files", "schema", "problems",
        "config", "runtime", "processes", "forked", "progress", "alerts", "metrics", "thinking",
    ),
    ("model", "losses", "datasets", "rewards"),
    (
        "parallel", "optim", "tensor_files", "hf_layout", "hf", "checkpoint",
        "model_directory", "sampling", "generation", "spread", "critic",
    ),
    (
        "objective", "balance", "moe_health", "trainer", "evaluate", "score_file", "rollout",
        "experience",
    ),
    ("stages",),
    (
        "run_directory", "transformers_reader", "export", "recipe", "plan", "tables", "gates",
        "preflight", "outcome", "rank_report", "pipeline", "launch", "report", "run_verb",
        "status", "commands", "doctor", "cli", "__main__",
    ),
)  # fmt: skip
INDEPENDENT_FLOOR = 1
# Numpy at most: these start fast and run in workers that must not load Paddle.
WITHOUT_PADDLE = {
    "errors", "storage", "yaml_files", "schema", "problems", "config", "thinking", "progress",
    "processes", "forked", "meeting", "rank_report", "launch", "datasets", "rewards",
}  # fmt: skip
MAY_DISTRIBUTE = {"distributed", "parallel"}
# They take seconds to import, or drag Paddle in, so only the function that needs one imports it.
ONLY_IN_FUNCTIONS = {"paddlenlp", "math_verify", "reasoning_gym", "visualdl", "matplotlib"}
# Paddle fixes its CPU settings on import, and ernie_train's __init__ imports this floor.
PADDLE_ONLY_IN_FUNCTIONS = set(FLOORS[0])


class Import(NamedTuple):
    """One import: the full name of the module, the line, and whether it stands in a function."""

    name: str
    line: int
    in_function: bool


def is_module(root: Path, name: str) -> bool:
    path = root.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(root: Path, path: Path) -> Iterator[Import]:
    package = path.parent.relative_to(root.parent).parts
    todo: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text(encoding="utf-8")), False)]
    while todo:
        node, inside = todo.pop()
        for name in _names_imported(root, package, node):
            yield Import(name, getattr(node, "lineno", 0), inside)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        todo += [(child, inside) for child in ast.iter_child_nodes(node)]


def _names_imported(root: Path, package: tuple[str, ...], node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
        base = ".".join(filter(None, (base, node.module or "")))
        for alias in node.names:
            # `from ernie_train import distributed` imports a module, not only a name.
            full = f"{base}.{alias.name}"
            own = base.split(".")[0] == root.name
            yield full if (is_module(root, full) if own else base == "paddle") else base
    elif isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        called = node.func.id if isinstance(node.func, ast.Name) else called
        if called in ("import_module", "__import__") and node.args:
            first = node.args[0]
            yield first.value if isinstance(first, ast.Constant) else "a name made at run time"
    elif isinstance(node, ast.Attribute) and ast.unparse(node) == "paddle.distributed":
        yield "paddle.distributed"


def place_of(unit: str) -> tuple[int, int] | None:
    for floor, units in enumerate(FLOORS):
        if unit in units:
            return floor, units.index(unit)
    return None


def violations(root: Path) -> list[str]:
    found, graph = [], {}
    for path in sorted(root.rglob("*.py")):
        name = module_name(root, path)
        imports = list(imports_of(root, path))
        graph[name] = {i.name for i in imports if i.name.split(".")[0] == root.name}
        if name == root.name:
            # The package itself prepares the process; it may only look at the ground floor.
            own = [i.name.split(".") for i in imports if i.name.startswith(f"{root.name}.")]
            units = sorted({parts[1] for parts in own})
            found += [f"__init__ imports {u}" for u in units if u not in FLOORS[0]]
            continue
        unit = name.split(".")[1]
        if place_of(unit) is None:
            found.append(f"{name} is on no floor")
            continue
        for imported in imports:
            reason = _complaint(root, unit, imported)
            if reason:
                found.append(f"{name}:{imported.line} {reason}")
    return found + [f"import cycle: {' -> '.join(cycle)}" for cycle in cycles(graph)]


def _complaint(root: Path, unit: str, imported: Import) -> str:
    name, parts = imported.name, imported.name.split(".")
    if parts[0] == root.name:
        return _floor_complaint(unit, parts[1] if len(parts) > 1 else "")
    if name == "a name made at run time":
        return "imports a name made at run time, which cannot be checked"
    if parts[:2] == ["paddle", "distributed"] and unit not in MAY_DISTRIBUTE:
        return "touches paddle.distributed"
    if parts[0] == "paddle" and unit in WITHOUT_PADDLE:
        return "imports paddle"
    lazy = ONLY_IN_FUNCTIONS | ({"paddle"} if unit in PADDLE_ONLY_IN_FUNCTIONS else set())
    if parts[0] in lazy and not imported.in_function:
        return f"imports {parts[0]} outside a function"
    return ""


def _floor_complaint(unit: str, target: str) -> str:
    if target == "":
        return ""  # `import ernie_train` alone
    own, other = place_of(unit), place_of(target)
    if own is None or other is None:
        return f"imports {target}, which is on no floor"
    if unit == target:
        return ""
    if other[0] > own[0]:
        return f"looks up: floor {own[0]} imports {target} of floor {other[0]}"
    if other[0] == own[0] == INDEPENDENT_FLOOR:
        return f"imports {target}: the packages of floor 1 are independent"
    if other[0] == own[0] and other[1] > own[1]:
        return f"imports {target}, which comes after it on its floor"
    return ""


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Import cycles between modules; a package's __init__ counts as its last module."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append([*trail[trail.index(name) :], name])
            return
        if name in done:
            return
        for target in sorted(graph.get(name, ())):
            # Importing a submodule runs the package's __init__ first; that is no edge of its own.
            visit(target, [*trail, name])
        done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_every_import_respects_the_floors() -> None:
    assert violations(PACKAGE) == []


def test_no_name_is_on_two_floors() -> None:
    names = [name for floor in FLOORS for name in floor]
    assert len(names) == len(set(names))


def test_the_walk_sees_the_whole_package() -> None:
    seen = {module_name(PACKAGE, path) for path in PACKAGE.rglob("*.py")}
    assert {"ernie_train", "ernie_train.config", "ernie_train.model", "ernie_train.cli"} <= seen
    names = {i.name for i in imports_of(PACKAGE, PACKAGE / "config.py")}
    assert {"ernie_train.errors", "pydantic", "json"} <= names


PLANTED = {
    "upwards": ("model/moe.py", "from ernie_train.trainer import Trainer", "looks up"),
    "upwards in a function": ("optim.py", "def f():\n    import ernie_train.stages", "looks up"),
    "upwards by the package": ("optim.py", "from ernie_train import trainer", "looks up"),
    "upwards relatively": ("model/moe.py", "from .. import trainer", "looks up"),
    "upwards from inside": ("model/moe.py", "from ..trainer import Trainer", "looks up"),
    "upwards by importlib": (
        "optim.py",
        "import importlib\nimportlib.import_module('ernie_train.trainer')",
        "looks up",
    ),
    "unreadable name": ("optim.py", "def f(x):\n    __import__(x)", "made at run time"),
    "for types only": (
        "optim.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ernie_train.trainer",
        "looks up",
    ),
    "neighbours": ("losses/x.py", "from ernie_train.model import moe", "independent"),
    "later on the floor": ("errors.py", "from ernie_train import config", "comes after"),
    "on no floor": ("helpers.py", "", "is on no floor"),
    "from no floor": ("optim.py", "import ernie_train.nowhere", "on no floor"),
    "distributed import": ("trainer.py", "import paddle.distributed as dist", "distributed"),
    "distributed from": ("trainer.py", "from paddle import distributed", "distributed"),
    "distributed below": (
        "trainer.py",
        "from paddle.distributed.fleet.utils import recompute",
        "distributed",
    ),
    "distributed attribute": (
        "trainer.py",
        "import paddle\npaddle.distributed.barrier()",
        "touches paddle.distributed",
    ),
    "paddle in data": ("datasets/x.py", "def f():\n    import paddle", "imports paddle"),
    "paddle too early": ("runtime.py", "import paddle", "outside a function"),
    "slow import": ("evaluate.py", "import matplotlib.pyplot", "outside a function"),
    "a busy __init__": ("__init__.py", "import ernie_train.model", "__init__ imports model"),
    "a cycle in a package": (
        "model/moe.py",
        "def f():\n    from ernie_train.model import rope",
        "import cycle",
    ),
}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small house without faults."""
    root = tmp_path / "ernie_train"
    (root / "model").mkdir(parents=True)
    for package in ("losses", "datasets", "parallel"):
        (root / package).mkdir()
        (root / package / "__init__.py").touch()
    for name in ("errors", "config", "trainer", "runtime", "evaluate", "optim"):
        (root / f"{name}.py").write_text("import paddle\n" if name == "trainer" else "import os\n")
    (root / "__init__.py").write_text("from ernie_train.runtime import x\n")
    (root / "model" / "__init__.py").write_text("from ernie_train.model.rope import y\n")
    (root / "model" / "rope.py").write_text("from ernie_train.model import moe\n")
    (root / "model" / "moe.py").write_text("from ernie_train.errors import e\n")
    (root / "parallel" / "wrap.py").write_text("import paddle.distributed\n")
    (root / "distributed.py").write_text("def f():\n    import paddle.distributed\n")
    return root


def test_a_sound_house_passes(house: Path) -> None:
    assert violations(house) == []


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_fault_is_found(house: Path, case: str) -> None:
    file, source, expected = PLANTED[case]
    path = house / file
    path.write_text(source + "\n")
    found = violations(house)
    assert len(found) == 1, found
    assert expected in found[0]


def test_stray_directories_are_not_overlooked(house: Path) -> None:
    shutil.copytree(house / "losses", house / "utils")
    assert violations(house) == ["ernie_train.utils is on no floor"]
