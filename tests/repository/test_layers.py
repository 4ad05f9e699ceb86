"""The order of the packages: who may import whom. Walks every import, those in functions too.

A package imports packages above it in PACKAGES; a module imports modules listed before it in its
own package. A nested package is a unit among the modules of its parent and has an order of its own;
from elsewhere it is reached through its `__init__` alone. Private names stay in their module.
"""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "ernie_train"

PACKAGES: dict[str, str] = {
    "core": "errors terminal foreign_files autograd signals processes blas cpu devices environment"
    " barrier worker_pool yaml config process_group consensus",
    "io": "threads files shipped outputs healthy python_files loggers metrics_log run_dir"
    " block_file safetensors",
    "kernels": "compiled compiled_steps loading packed call rows experts attention logprobs blocks",
    "losses": "advantages balance cross_entropy policy preference logprobs",
    "model": "foreign_keys configuration dtypes batch_layout rope layers kv_cache"
    " attention token_dispatcher batched_experts moe transformer lora partial numpy_layers"
    " numpy_decoder",
    "model.attention": "blocked online flashmask layer",
    "model.lora": "config pairs layers",
    "data": "completion_format documents cache formats files reader packing loader chat_template"
    " tokenizer report chat_messages conversation chat encoding sources",
    "data.chat_template": "sandbox template",
    "data.formats": "values columns messages record kinds",
    "data.files": "find heads rows",
    "data.tokenizer": "sentencepiece_proto hf_files base huggingface paddlenlp"
    " sentencepiece loading markers",
    "rewards": "score sandbox verifiers registry scoring",
    "rewards.sandbox": "guest seccomp backends pool process api",
    "rewards.sandbox.guest": "values candidate test_judge server",
    "rewards.verifiers": "answer_text math_worker math_process labels quantities expressions"
    " exact format math_answer logic tool_call tested_names programs code llm_judge user",
    "rewards.verifiers.labels": "assignments choices",
    "rewards.verifiers.expressions": "arithmetic notation real_sets structure stated",
    "rewards.scoring": "reference_completion worker worker_process service composition selfcheck",
    "environments": "config tool calculator lookup python_cells user_worker user_tools environment"
    " episodes",
    "parallel": "collectives expert lockstep recompute gradients build",
    "weights": "layout quantize peft_config adapters hf saving gguf_file gguf_tokenizer llama"
    " upcycle convert state checkpoint_config checkpoint model_directory",
    "weights.quantize": "scheme gptq calibration stored",
    "generate": "sampler device_sampler prompt_experts paddle_decoder lanes engine sharded engines",
    "generate.engines": "config protocol own answer endpoint guard process servers served build",
    "train": "loss_terms optimizer rope_schedule moe_balance moe_health trainer stage"
    " step_loop supervised_data supervised",
    "eval": "prompts problems estimates measured evaluation gates",
    "rl.batch": "sequences dealing",
    "rl.config": "rollout policy preference idle upo",
    "rl.reward": "model scoring stage",
    "rl.rollout": "prompt_order records files kept grading sampler second_reward sampler_gap",
    "rl": "config batch routing critic preference_data pair_stage estimators reward data rollout"
    " report pairs loss learner loop dpo",
    "launch": "addresses console rank_files logs launcher rank_group supervise cores",
    "run": "stages foreign_keys quantize sources recipe lineage check referee_script proof export"
    " llama_reference import_model render finalize earlier pipeline",
    "report": "run_files curves overview reading page",
    "plan": "layout workload activations memory cost search disk tables command",
    "selftest": "check fixture graph kernels training ranks report command",
    "cli": "arguments doctor model turn_view evaluate preview score generate grading chat run"
    " init recipes status watch main",
    "cli.init": "problems reinforced rows split command questions",
}
ROOT_MODULES = ("__main__",)
MOST_MODULES = 16
# Independent of each other, so that each can be read alone.
INDEPENDENT = {
    "losses": {"model", "data", "rewards"},
    "model": {"losses", "data", "rewards"},
    "data": {"losses", "model", "rewards"},
    "rewards": {"losses", "model"},
    "launch": {"model", "data", "train", "rl"},
}
# Numpy at most: these start fast and run in workers that must not load Paddle.
WITHOUT_PADDLE = {
    "core.errors", "core.terminal", "core.foreign_files", "core.yaml", "core.config",
    "core.processes", "core.worker_pool", "core.barrier", "core.signals",
    "core.cpu", "core.blas", "io.threads", "io.files", "io.python_files", "io.loggers",
    "launch", "data", "rewards", "environments", "report",
}  # fmt: skip
MAY_DISTRIBUTE = {"core.process_group", "parallel"}
# They take seconds to import, or drag Paddle in, so only the function that needs one imports it.
ONLY_IN_FUNCTIONS = {
    "paddlenlp",
    "math_verify",
    "reasoning_gym",
    "visualdl",
    "matplotlib",
    "tensorboardX",
    "plotly",
}
# Paddle fixes its CPU settings on import, and ernie_train's __init__ imports this package.
PADDLE_ONLY_IN_FUNCTIONS = {"core"}


class Import(NamedTuple):
    """One import: the full name of the module, the name taken from it, line, in a function?"""

    module: str
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
        for module, name in _names_imported(root, package, node):
            yield Import(module, name, getattr(node, "lineno", 0), inside)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        todo += [(child, inside) for child in ast.iter_child_nodes(node)]


def _names_imported(
    root: Path, package: tuple[str, ...], node: ast.AST
) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
        base = ".".join(filter(None, (base, node.module or "")))
        for alias in node.names:
            # `from ernie_train.core import errors` imports a module, not only a name.
            full = f"{base}.{alias.name}"
            own = base.split(".")[0] == root.name
            whole = is_module(root, full) if own else base == "paddle"
            yield (full, "") if whole else (base, alias.name)
    elif isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        called = node.func.id if isinstance(node.func, ast.Name) else called
        if called in ("import_module", "__import__") and node.args:
            first = node.args[0]
            name = first.value if isinstance(first, ast.Constant) else "a name made at run time"
            yield str(name), ""
    elif isinstance(node, ast.Attribute) and ast.unparse(node) == "paddle.distributed":
        yield "paddle.distributed", ""


def units(name: str) -> list[tuple[str, str]]:
    """(package, unit) at each depth: a.b.c -> ("", a), (a, b), (a.b, c)."""
    parts = name.split(".")
    return [(".".join(parts[:at]), part) for at, part in enumerate(parts)]


def place(package: str, unit: str) -> int | None:
    order = [name for name in PACKAGES if "." not in name] + list(ROOT_MODULES)
    order = order if package == "" else PACKAGES.get(package, "").split()
    return order.index(unit) if unit in order else None


def violations(root: Path) -> list[str]:
    found, graph = [], {}
    for path in sorted(root.rglob("*.py")):
        name = module_name(root, path)
        imports = list(imports_of(root, path))
        graph[name] = {i.module for i in imports if i.module.split(".")[0] == root.name}
        own = name.removeprefix(root.name).lstrip(".")
        if own == "":
            # The package itself prepares the process; it may only look at the lowest package.
            others = {
                i.module.split(".")[1] for i in imports if i.module.startswith("ernie_train.")
            }
            found += [f"__init__ imports {other}" for other in sorted(others - {"core"})]
            continue
        missing = [unit for package, unit in units(own) if place(package, unit) is None]
        if missing:
            found.append(f"{name} has no place in the order")
            continue
        for imported in imports:
            if reason := _complaint(root, own, imported):
                found.append(f"{name}:{imported.line} {reason}")
    return found + [f"import cycle: {' -> '.join(cycle)}" for cycle in cycles(graph)]


def _within(name: str, names: set[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in names)


def _complaint(root: Path, own: str, imported: Import) -> str:
    module, parts = imported.module, imported.module.split(".")
    if parts[0] == root.name:
        return _order_complaint(own, ".".join(parts[1:]), imported.name)
    if module == "a name made at run time":
        return "imports a name made at run time, which cannot be checked"
    if parts[:2] == ["paddle", "distributed"] and not _within(own, MAY_DISTRIBUTE):
        return "touches paddle.distributed"
    if parts[0] == "paddle" and _within(own, WITHOUT_PADDLE):
        return "imports paddle"
    lazy = ONLY_IN_FUNCTIONS | ({"paddle"} if _within(own, PADDLE_ONLY_IN_FUNCTIONS) else set())
    if parts[0] in lazy and not imported.in_function:
        return f"imports {parts[0]} outside a function"
    return ""


def _order_complaint(own: str, target: str, name: str) -> str:
    if target == "":
        return ""  # `import ernie_train` alone
    if any(place(package, unit) is None for package, unit in units(target)):
        return f"imports {target}, which has no place in the order"
    if name.startswith("_") and not name.startswith("__"):
        return f"imports {name}, which is private to {target}"
    if _within(target, INDEPENDENT.get(own.split(".")[0], set())):
        return f"imports {target}: {own.split('.')[0]} is independent of it"
    depth = target.count(".")
    if depth > 1 and own.split(".")[:1] != target.split(".")[:1]:
        return f"imports {target}, which is inner to {target.rpartition('.')[0]}"
    for (package, mine), (other_package, theirs) in zip(units(own), units(target), strict=False):
        if package != other_package or mine == theirs:
            continue
        a, b = place(package, mine), place(package, theirs)
        if a is not None and b is not None and b > a:
            return f"looks up: {theirs} comes after {mine}"
        return ""
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


def test_every_import_respects_the_order() -> None:
    assert violations(PACKAGE) == []


def test_the_order_names_what_there_is_and_nothing_else() -> None:
    for package, order in PACKAGES.items():
        directory = PACKAGE.joinpath(*package.split("."))
        there = {p.stem for p in directory.glob("*.py")} - {"__init__"}
        there |= {p.parent.name for p in directory.glob("*/__init__.py")}
        assert sorted(order.split()) == sorted(there), package
        assert 1 < len(there) <= MOST_MODULES, f"{package} has {len(there)} modules"
    loose = {p.stem for p in PACKAGE.glob("*.py")}
    assert loose == {"__init__", *ROOT_MODULES}


def test_every_package_says_what_it_is_for() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert len(text) > 40, path


def test_the_walk_sees_the_whole_package() -> None:
    seen = {module_name(PACKAGE, path) for path in PACKAGE.rglob("*.py")}
    assert {"ernie_train", "ernie_train.core.config", "ernie_train.model"} <= seen
    names = {i.module for i in imports_of(PACKAGE, PACKAGE / "core" / "config.py")}
    assert {"ernie_train.core.errors", "pydantic", "json"} <= names


TRAINER = "train/trainer.py"
PLANTED = {
    "upwards": ("model/moe.py", "from ernie_train.train.trainer import Trainer", "looks up"),
    "upwards in a function": ("io/files.py", "def f():\n    import ernie_train.run", "looks up"),
    "upwards by the package": ("io/files.py", "from ernie_train import train", "looks up"),
    "upwards relatively": ("model/moe.py", "from .. import train", "looks up"),
    "upwards from inside": ("model/moe.py", "from ..train.trainer import Trainer", "looks up"),
    "upwards by importlib": (
        "io/files.py",
        "import importlib\nimportlib.import_module('ernie_train.train.trainer')",
        "looks up",
    ),
    "unreadable name": ("io/files.py", "def f(x):\n    __import__(x)", "made at run time"),
    "for types only": (
        "io/files.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ernie_train.train.trainer",
        "looks up",
    ),
    "neighbours": ("losses/policy.py", "from ernie_train.data import loader", "independent"),
    "later in the package": ("core/errors.py", "from ernie_train.core import config", "looks up"),
    "no place": ("core/helpers.py", "", "has no place"),
    "from no place": ("io/files.py", "import ernie_train.nowhere", "no place"),
    "inner module": (
        TRAINER,
        "from ernie_train.data.tokenizer.base import Tokenizer",
        "inner to data.tokenizer",
    ),
    "private name": (TRAINER, "from ernie_train.model.rope import _rotate", "is private to"),
    "distributed import": (TRAINER, "import paddle.distributed as dist", "distributed"),
    "distributed from": (TRAINER, "from paddle import distributed", "distributed"),
    "distributed below": (
        TRAINER,
        "from paddle.distributed.fleet.utils import recompute",
        "distributed",
    ),
    "distributed attribute": (
        TRAINER,
        "import paddle\npaddle.distributed.barrier()",
        "touches paddle.distributed",
    ),
    "paddle in data": ("data/loader.py", "def f():\n    import paddle", "imports paddle"),
    "paddle too early": ("core/devices.py", "import paddle", "outside a function"),
    "slow import": (TRAINER, "import matplotlib.pyplot", "outside a function"),
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
    sources = {
        "core/errors.py": "import os",
        "core/config.py": "import os",
        "core/devices.py": "def f():\n    import paddle",
        "core/process_group.py": "def f():\n    import paddle.distributed",
        "io/files.py": "import os",
        "losses/policy.py": "import paddle",
        "model/rope.py": "from ernie_train.core.errors import e",
        "model/moe.py": "from ernie_train.core.errors import e",
        "data/loader.py": "import os",
        "data/tokenizer/base.py": "import os",
        "parallel/build.py": "import paddle.distributed",
        "train/trainer.py": "import paddle\nfrom ernie_train.data.tokenizer import Tokenizer",
        "run/recipe.py": "import os",
        "__init__.py": "from ernie_train.core.cpu import x",
        "core/cpu.py": "import os",
        "model/__init__.py": "from ernie_train.model.moe import y",
    }
    for name, source in sources.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(source + "\n")
    return root


def test_a_sound_house_passes(house: Path) -> None:
    assert violations(house) == []


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_fault_is_found(house: Path, case: str) -> None:
    if case == "a cycle in a package":
        (house / "model" / "rope.py").write_text("from ernie_train.model import moe\n")
    file, source, expected = PLANTED[case]
    path = house / file
    path.write_text(source + "\n")
    found = violations(house)
    assert any(expected in line for line in found), found


def test_stray_directories_are_not_overlooked(house: Path) -> None:
    shutil.copytree(house / "losses", house / "utils")
    assert any("utils has no place" in line for line in violations(house))
