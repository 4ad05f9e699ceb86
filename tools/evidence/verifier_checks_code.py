"""Public rows through the verifiers of programs and of tool calls: right ones and spoilt ones.

    checks(data_dir)    reads mbpp/train.jsonl, humaneval/HumanEval.jsonl and
                        bfcl/simple_python.answers.jsonl below data_dir, those that are there

Spoilt programs are another task's solution under the name that is tested, and the solution with one
operator or constant changed; only those that fail when program and asserts are run as one plain
script are spoilt. Spoilt calls differ from an allowed one in a value, an argument or the name.
"""

from __future__ import annotations

import ast
import copy
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_train.data.completion_format import format_completion
from ernie_train.rewards.sandbox import api
from ernie_train.rewards.score import Score
from ernie_train.rewards.verifiers import code, tool_call

# Name of the check, how many scored correct, of how many, and each miss.
Check = tuple[str, int, int, list[str]]
_THREADS = 2
_MUTATIONS_TRIED = 8


def checks(data_dir: Path) -> list[Check]:
    """For the names with "perturbed" a miss is one that scored correct, else one that did not."""
    found = []
    mbpp = data_dir / "mbpp" / "train.jsonl"
    if mbpp.exists():
        programs = [_from_mbpp(row) for row in _lines(mbpp)]
        found += [_reference("mbpp reference", programs), _swapped("mbpp", programs)]
        found.append(_mutated("mbpp", programs))
    humaneval = data_dir / "humaneval" / "HumanEval.jsonl"
    if humaneval.exists():
        programs = [_from_humaneval(row) for row in _lines(humaneval)]
        found += [_reference("humaneval reference", programs), _swapped("humaneval", programs)]
    bfcl = data_dir / "bfcl" / "simple_python.answers.jsonl"
    if bfcl.exists():
        answers = _lines(bfcl)
        found += [_bfcl_gold(answers), _bfcl_perturbed(answers)]
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


# ---- programs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """`solution` is a whole program; `script` ends well where a program put before it is right."""

    name: str
    row: dict[str, Any]
    solution: str
    function: str
    script: str


def mbpp_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as MBPP publishes it -> the fields that the verifier of programs reads."""
    return {
        "tests": row["test_list"],
        "hidden_tests": row["challenge_test_list"],
        "setup": row["test_setup_code"],
        "solution": row["code"],
    }


def humaneval_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as HumanEval publishes it -> the fields that the verifier of programs reads."""
    return {
        "tests": row["test"],
        "entry_point": row["entry_point"],
        "preamble": row["prompt"],
        "solution": row["canonical_solution"],
    }


def _from_mbpp(row: dict[str, Any]) -> _Problem:
    script = "\n".join([row["test_setup_code"], *row["test_list"]])
    return _Problem(f"task {row['task_id']}", mbpp_row(row), row["code"], _tested(row), script)


def _tested(row: dict[str, Any]) -> str:
    """The function of the solution that the first test calls."""
    defined = {n.name for n in ast.parse(row["code"]).body if isinstance(n, ast.FunctionDef)}
    names = [n.id for n in ast.walk(ast.parse(row["test_list"][0])) if isinstance(n, ast.Name)]
    return next(name for name in names if name in defined)


def _from_humaneval(row: dict[str, Any]) -> _Problem:
    solution, function = row["prompt"] + row["canonical_solution"], row["entry_point"]
    script = f"{row['test']}\ncheck({function})"
    return _Problem(row["task_id"], humaneval_row(row), solution, function, script)


def _check(name: str, items: list[tuple[_Problem, str]], *, right: bool) -> Check:
    def grade(item: tuple[_Problem, str]) -> Score:
        problem, source = item
        return code.score(problem.row, format_completion("-", f"```python\n{source}\n```"))

    with ThreadPoolExecutor(_THREADS) as pool:
        scores = list(pool.map(grade, items))
    misses = [
        f"{problem.name}: {score.status} {score.detail}"[:300]
        for (problem, _), score in zip(items, scores, strict=True)
        if (score.status == "correct") != right
    ]
    return name, sum(score.status == "correct" for score in scores), len(items), misses


def _reference(name: str, problems: list[_Problem]) -> Check:
    return _check(name, [(problem, problem.solution) for problem in problems], right=True)


def _swapped(name: str, problems: list[_Problem]) -> Check:
    """The solution of the next problem, under the name of this one's function."""
    items = []
    for problem, other in zip(problems, problems[1:] + problems[:1], strict=True):
        source = f"{other.solution}\n\n{problem.function} = {other.function}\n"
        if _fails_as_script(problem, source):  # neighbours may ask for the same thing
            items.append((problem, source))
    return _check(f"{name} perturbed (another task)", items, right=False)


def _mutated(name: str, problems: list[_Problem]) -> Check:
    with ThreadPoolExecutor(_THREADS) as pool:
        mutants = list(pool.map(_broken_mutant, problems))
    items = [(p, m) for p, m in zip(problems, mutants, strict=True) if m is not None]
    return _check(f"{name} perturbed (one change)", items, right=False)


def _broken_mutant(problem: _Problem) -> str | None:
    """The solution with one change after which the tests fail; None where none was found."""
    draw = random.Random(problem.name)
    for _ in range(_MUTATIONS_TRIED):
        tree = ast.parse(problem.solution)
        sites = [node for node in ast.walk(tree) if _mutable(node)]
        if not sites:
            return None
        _mutate(draw.choice(sites), draw)
        source = ast.unparse(tree)
        if _fails_as_script(problem, source):
            return source
    return None


def _fails_as_script(problem: _Problem, source: str) -> bool:
    return api.run_script(f"{source}\n{problem.script}", "").kind == "failed"


def _mutable(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, bool | int)
    return isinstance(node, ast.Compare | ast.BinOp | ast.BoolOp)


def _mutate(node: ast.AST, draw: random.Random) -> None:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        node.value = not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        node.value += draw.choice([-1, 1])
    elif isinstance(node, ast.Compare):
        others: list[ast.cmpop] = [ast.Lt(), ast.GtE(), ast.Eq(), ast.NotEq()]
        node.ops[0] = draw.choice([op for op in others if type(op) is not type(node.ops[0])])
    elif isinstance(node, ast.BinOp):
        node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()


# ---- tool calls ---------------------------------------------------------------------------------


def bfcl_row(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer as the leaderboard publishes it -> the fields that the verifier reads."""
    calls = [
        {"name": name, "arguments": arguments}
        for call in answer["ground_truth"]
        for name, arguments in call.items()
    ]
    return {"expected_calls": calls}


def _bfcl_gold(answers: list[dict[str, Any]]) -> Check:
    misses = []
    for answer in answers:
        row = bfcl_row(answer)
        calls = tool_call.gold_calls(row) or []
        score = tool_call.score(row, format_completion("-", tool_calls=calls))
        if score.status != "correct":
            misses.append(f"{answer['id']}: {score.status} {score.detail}"[:300])
    return "bfcl gold", len(answers) - len(misses), len(answers), misses


def _bfcl_perturbed(answers: list[dict[str, Any]]) -> Check:
    misses, total = [], 0
    for answer in answers:
        row = bfcl_row(answer)
        for what, calls in _spoilt(row):
            total += 1
            score = tool_call.score(row, format_completion("-", tool_calls=calls))
            if score.status != "wrong":
                misses.append(f"{answer['id']}, {what}: {score.status} {calls}"[:300])
    return "bfcl perturbed", len(misses), total, misses


def _spoilt(row: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    calls = tool_call.gold_calls(row) or []
    name, arguments = calls[0]
    yield "no call", []
    yield "the call twice", [*calls, *calls]
    yield "another name", [(name + "_2", arguments), *calls[1:]]
    yield "one argument more", [(name, arguments | {"one_more": 1}), *calls[1:]]
    allowed = row["expected_calls"][0]["arguments"]
    for key, value in arguments.items():
        yield f"another {key}", [(name, arguments | {key: _other(value)}), *calls[1:]]
        yield f"{key} as a text", [(name, arguments | {key: f"<{value}>"}), *calls[1:]]
        if "" not in allowed[key]:
            left = {k: v for k, v in arguments.items() if k != key}
            yield f"no {key}", [(name, left), *calls[1:]]


def _other(value: Any) -> Any:
    """A value of the same type that is no allowed one."""
    if isinstance(value, bool):
        return None  # the other truth value may be allowed as well
    if isinstance(value, int | float):
        return value * 3 + 17
    if isinstance(value, str):
        return value + " or so"
    if isinstance(value, list):
        return [*copy.deepcopy(value), "one more"]
    return {**value, "one_more": 1}
