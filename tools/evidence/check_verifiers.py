"""Grades the answers of public data sets, as they are and perturbed, and shows every miss.

    python -m tools.evidence.check_verifiers DIRECTORY

DIRECTORY holds gsm8k/train.jsonl, folio/train.jsonl, knights_knaves/*.jsonl, mbpp/train.jsonl,
humaneval/HumanEval.jsonl and bfcl/simple_python.answers.jsonl, as their authors publish them; what
is not there is left out. Right answers should all score correct, perturbed ones never.

Perturbed programs are another task's solution under the name that is tested, and the solution with
one operator or constant changed; only those that fail when program and asserts are run as one plain
script count. Perturbed calls differ from an allowed one in a value, an argument or the name.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ernie_train.data.completion_format import format_completion
from ernie_train.rewards import score_batch
from ernie_train.rewards.sandbox import api
from ernie_train.rewards.scoring.reference_completion import (
    build_reference_completion,
    with_response,
)
from ernie_train.rewards.verifiers import tool_call

Row = dict[str, Any]
_THREADS = 2
_MUTATIONS_TRIED = 8


class Case(NamedTuple):
    """A row and completions of it; the row's own answer is one more right one."""

    reward: str
    row: Row
    right: list[str]
    wrong: list[str]


class Check(NamedTuple):
    """A set's right or perturbed completions; `misses` describes what scored unexpectedly."""

    name: str
    correct: int
    total: int
    misses: list[str]


def responses(reward: str, row: Row, right: list[str], wrong: list[str]) -> Case:
    """Return a case whose completions have these texts in their response part."""
    texts = ([with_response(row, text) for text in texts] for texts in (right, wrong))
    return Case(reward, row, *texts)


def read_jsonl(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def gsm8k_cases(directory: Path) -> Iterator[Case]:
    """Try the solution, its boxed number and its number in a sentence; numbers close to it."""
    for row in read_jsonl(directory / "train.jsonl"):
        solution, number = row["answer"], row["answer"].rpartition("####")[2].strip()
        value = int(number.replace(",", ""))
        right = [solution, f"\\boxed{{{value}}}", f"The answer is ${value}$.", number]
        right.append(f"So in the end there are {number} of them.")
        wrong = [f"\\boxed{{{value + 1}}}", f"#### {value * 10 + 1}", f"{value} or {value + 1}"]
        wrong += [f"{-value - 1}", f"{value}%", f"\\boxed{{{value}}} \\boxed{{{value + 1}}}"]
        wrong += [f"{value + 1} = {value}", solution.replace("####", "####-1"), f"{value}.5"]
        yield responses("math", {"answer": solution}, right, wrong if value else wrong[:4])


def folio_cases(directory: Path) -> Iterator[Case]:
    """Try the label by both names of the third; the other labels, hedging and denial."""
    labels = ("True", "False", "Unknown")
    for row in read_jsonl(directory / "train.jsonl"):
        label = row["label"]
        right = [label, label.lower(), f"The answer is {label}.", f"\\boxed{{{label}}}"]
        if label == "Unknown":
            right.append("Uncertain")
        others = [other for other in labels if other != label]
        wrong = [*others, f"{label} or {others[0]}", f"not {label}", ", ".join(labels)]
        wrong += [f"\\boxed{{{others[0]}}}", f"The answer is {others[1]}."]
        yield responses("logic", {"answer": label, "choices": list(labels)}, right, wrong)


def knights_knaves_cases(directory: Path) -> Iterator[Case]:
    """Try both texts of the solution, in order and reversed; each person's role turned round."""
    for row in (row for file in sorted(directory.glob("*.jsonl")) for row in read_jsonl(file)):
        people = dict(zip(row["names"], row["solution"], strict=True))
        listed = row["solution_text_format"]
        lines = [line.partition(") ")[2] for line in listed.splitlines()]
        right = [listed, row["solution_text"], "; ".join(reversed(lines))]
        right.append(f"<answer>{listed}</answer>")
        wrong = [_sentences({**people, name: not people[name]}) for name in people]
        wrong += ["; ".join(lines[1:]), f"{listed}\n{wrong[0].splitlines()[0]}"]
        wrong += [listed.replace(" is a ", " may be a "), f"{listed} or {wrong[0]}"]
        yield responses("logic", {"assignment": people}, right, wrong)
        yield responses("logic", {"answer": listed}, right, wrong)


def _sentences(people: dict[str, bool]) -> str:
    return "\n".join(f"{name} is a {'knight' if k else 'knave'}" for name, k in people.items())


# ---- programs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """`solution` is a whole program; `script` ends well if a right program is put before it."""

    row: Row
    solution: str
    function: str
    script: str


def mbpp_cases(directory: Path) -> Iterator[Case]:
    problems = []
    for row in read_jsonl(directory / "train.jsonl"):
        fields = {
            "tests": row["test_list"],
            "hidden_tests": row["challenge_test_list"],
            "setup": row["test_setup_code"],
            "solution": row["code"],
        }
        script = "\n".join([row["test_setup_code"], *row["test_list"]])
        problems.append(Problem(fields, row["code"], _tested(row), script))
    return program_cases(problems)


def humaneval_cases(directory: Path) -> Iterator[Case]:
    problems = []
    for row in read_jsonl(directory / "HumanEval.jsonl"):
        function = row["entry_point"]
        fields = {
            "tests": row["test"],
            "entry_point": function,
            "preamble": row["prompt"],
            "solution": row["canonical_solution"],
        }
        solution = row["prompt"] + row["canonical_solution"]
        problems.append(Problem(fields, solution, function, f"{row['test']}\ncheck({function})"))
    return program_cases(problems)


def _tested(row: Row) -> str:
    """Return the function of the solution that the first test calls."""
    defined = {n.name for n in ast.parse(row["code"]).body if isinstance(n, ast.FunctionDef)}
    names = [n.id for n in ast.walk(ast.parse(row["test_list"][0])) if isinstance(n, ast.Name)]
    return next(name for name in names if name in defined)


def program_cases(problems: list[Problem]) -> Iterator[Case]:
    """Try the solution; that of the next problem under this one's name, and a changed solution."""
    with ThreadPoolExecutor(_THREADS) as pool:
        mutants = pool.map(_broken_mutant, problems)
        swapped = pool.map(_swapped, problems, problems[1:] + problems[:1])
    for problem, *perturbed in zip(problems, swapped, mutants, strict=True):
        wrong = [f"```python\n{source}\n```" for source in perturbed if source is not None]
        right = [f"```python\n{problem.solution}\n```"]
        yield responses("code", problem.row, right, wrong)


def _swapped(problem: Problem, other: Problem) -> str | None:
    """Return the other's solution under this one's name; None if it solves this one too."""
    source = f"{other.solution}\n\n{problem.function} = {other.function}\n"
    return source if _fails_as_script(problem, source) else None


def _broken_mutant(problem: Problem) -> str | None:
    """Return the solution with one change after which the tests fail; None if none was found."""
    draw = random.Random(problem.solution)
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


def _fails_as_script(problem: Problem, source: str) -> bool:
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


# ---- tool calls ----------------------------------------------------------------------------------


def bfcl_cases(directory: Path) -> Iterator[Case]:
    """Try the allowed call; calls that differ in a value, an argument or the name, or in number."""
    for answer in read_jsonl(directory / "simple_python.answers.jsonl"):
        calls = [
            {"name": name, "arguments": arguments}
            for call in answer["ground_truth"]
            for name, arguments in call.items()
        ]
        row = {"expected_calls": calls}
        wrong = [format_completion("-", tool_calls=calls) for calls in _perturbed_calls(row)]
        yield Case("tool_call", row, [], wrong)


def _perturbed_calls(row: Row) -> Iterator[list[tuple[str, Row]]]:
    calls = tool_call.reference_calls(row) or []
    name, arguments = calls[0]
    yield []
    yield [*calls, *calls]
    yield [(name + "_2", arguments), *calls[1:]]
    yield [(name, arguments | {"one_more": 1}), *calls[1:]]
    allowed = row["expected_calls"][0]["arguments"]
    for key, value in arguments.items():
        yield [(name, arguments | {key: _other(value)}), *calls[1:]]
        yield [(name, arguments | {key: f"<{value}>"}), *calls[1:]]
        if "" not in allowed[key]:
            yield [(name, {k: v for k, v in arguments.items() if k != key}), *calls[1:]]


def _other(value: Any) -> Any:
    """Return a value of the same type that is no allowed one."""
    if isinstance(value, bool):
        return None  # the other truth value may be allowed as well
    if isinstance(value, int | float):
        return value * 3 + 17
    if isinstance(value, str):
        return value + " or so"
    if isinstance(value, list):
        return [*copy.deepcopy(value), "one more"]
    return {**value, "one_more": 1}


# ---- grading -------------------------------------------------------------------------------------

CASES: dict[str, Callable[[Path], Iterator[Case]]] = {
    "gsm8k": gsm8k_cases,
    "folio": folio_cases,
    "knights_knaves": knights_knaves_cases,
    "mbpp": mbpp_cases,
    "humaneval": humaneval_cases,
    "bfcl": bfcl_cases,
}


def grade(name: str, cases: list[Case]) -> list[Check]:
    """Return one check of the right completions and one of the perturbed ones."""
    golds = [(case, build_reference_completion(case.reward, case.row)) for case in cases]
    right = [(case, text) for case in cases for text in case.right]
    right += [(case, text) for case, text in golds if text is not None]
    wrong = [(case, text) for case in cases for text in case.wrong]
    checks = []
    for kind, texts in (("right", right), ("perturbed", wrong)):
        # Another task's program may lack what the row's set-up needs, which looks like bad tests.
        expected = {"correct"} if kind == "right" else {"wrong", "bad_gold"}
        scores = score_batch([(case.reward, case.row, text) for case, text in texts])
        misses = [
            f"{case.row.get('answer', case.row)!r:.120}: {text[-120:]!r}: "
            f"{score.status} {score.detail}"
            for (case, text), score in zip(texts, scores, strict=True)
            if score.status not in expected
        ]
        correct = sum(score.status == "correct" for score in scores)
        checks.append(Check(f"{name} {kind}", correct, len(texts), misses))
    return checks


def checks(directory: Path) -> Iterator[Check]:
    for name, cases in CASES.items():
        if (directory / name).is_dir():
            yield from grade(name, list(cases(directory / name)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--misses", type=int, default=20, help="how many to show of each check")
    options = parser.parse_args(argv)
    for check in checks(options.directory):
        share = 100 * check.correct / max(1, check.total)
        print(f"{check.name:28} {check.correct:6} of {check.total:6} correct  {share:7.3f} %")
        for miss in check.misses[: options.misses]:
            print(f"    {miss}")


if __name__ == "__main__":
    main()
