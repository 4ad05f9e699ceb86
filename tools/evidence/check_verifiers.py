"""Grades the answers of public data sets, as they are and perturbed, and shows every miss.

    python -m tools.evidence.check_verifiers DIRECTORY

DIRECTORY holds gsm8k/train.jsonl, folio/train.jsonl, knights_knaves/*.jsonl, mbpp/train.jsonl and
bfcl/simple_python*.jsonl, as their authors publish them; what is not there is left out. Right
answers should all score correct, perturbed ones never.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ernie_train.rewards import score_batch
from ernie_train.rewards.scoring.reference_completion import gold_completion, with_response
from tools.evidence import verifier_checks_code

# name, scored correct, total, descriptions of what scored unexpectedly
Check = tuple[str, int, int, list[str]]
Row = dict[str, Any]
# reward, row, right responses, wrong responses
Case = tuple[str, Row, list[str], list[str]]


def read_jsonl(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def gsm8k_cases(directory: Path) -> Iterator[Case]:
    """The solution, its boxed number and its number in a sentence; numbers that lie beside it."""
    for row in read_jsonl(directory / "gsm8k" / "train.jsonl"):
        solution, number = row["answer"], row["answer"].rpartition("####")[2].strip()
        value = int(number.replace(",", ""))
        right = [solution, f"\\boxed{{{value}}}", f"The answer is ${value}$.", number]
        right.append(f"So in the end there are {number} of them.")
        wrong = [f"\\boxed{{{value + 1}}}", f"#### {value * 10 + 1}", f"{value} or {value + 1}"]
        wrong += [f"{-value - 1}", f"{value}%", f"\\boxed{{{value}}} \\boxed{{{value + 1}}}"]
        wrong += [f"{value + 1} = {value}", solution.replace("####", "####-1"), f"{value}.5"]
        yield "math", {"answer": solution}, right, wrong if value else wrong[:4]


def folio_cases(directory: Path) -> Iterator[Case]:
    """The label by both names of the third; the other labels, hedging and denial."""
    labels = ("True", "False", "Unknown")
    for row in read_jsonl(directory / "folio" / "train.jsonl"):
        label = row["label"]
        graded = {"answer": label, "choices": list(labels)}
        right = [label, label.lower(), f"The answer is {label}.", f"\\boxed{{{label}}}"]
        if label == "Unknown":
            right.append("Uncertain")
        others = [other for other in labels if other != label]
        wrong = [*others, f"{label} or {others[0]}", f"not {label}", ", ".join(labels)]
        wrong += [f"\\boxed{{{others[0]}}}", f"The answer is {others[1]}."]
        yield "logic", graded, right, wrong


def knights_knaves_cases(directory: Path) -> Iterator[Case]:
    """Both texts of the solution, in order and reversed; each person's role turned round."""
    for file in sorted((directory / "knights_knaves").glob("*.jsonl")):
        for row in read_jsonl(file):
            people = dict(zip(row["names"], row["solution"], strict=True))
            listed = row["solution_text_format"]
            lines = [line.partition(") ")[2] for line in listed.splitlines()]
            right = [listed, row["solution_text"], "; ".join(reversed(lines))]
            right.append(f"<answer>{listed}</answer>")
            wrong = [_told({**people, name: not people[name]}) for name in people]
            wrong += ["; ".join(lines[1:]), f"{listed}\n{wrong[0].splitlines()[0]}"]
            wrong += [listed.replace(" is a ", " may be a "), f"{listed} or {wrong[0]}"]
            yield "logic", {"assignment": people}, right, wrong
            yield "logic", {"answer": listed}, right, wrong


def _told(people: dict[str, bool]) -> str:
    return "\n".join(f"{name} is a {'knight' if k else 'knave'}" for name, k in people.items())


CASES: dict[str, Callable[[Path], Iterator[Case]]] = {
    "gsm8k": gsm8k_cases,
    "folio": folio_cases,
    "knights_knaves": knights_knaves_cases,
}


def grade(name: str, cases: list[Case]) -> list[Check]:
    """One check of the right responses and one of the wrong ones."""
    checks = []
    for kind, place in (("right", 2), ("perturbed", 3)):
        items = [
            (reward, row, with_response(row, text))
            for reward, row, *texts in cases
            for text in texts[place - 2]
        ]
        if kind == "right":
            golds = [(case[0], case[1], gold_completion(case[0], case[1])) for case in cases]
            items += [(reward, row, gold) for reward, row, gold in golds if gold is not None]
        scores = score_batch(items)
        missed = [
            f"{row.get('answer', row)!r:.120}: {text[-120:]!r}: {score.status} {score.detail}"
            for (_, row, text), score in zip(items, scores, strict=True)
            if (score.status == "correct") != (kind == "right")
        ]
        correct = sum(score.status == "correct" for score in scores)
        checks.append((f"{name} {kind}", correct, len(items), missed))
    return checks


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--misses", type=int, default=20, help="how many to show of each check")
    options = parser.parse_args(argv)
    checks: list[Check] = []
    for name, cases in CASES.items():
        if (options.directory / name).is_dir():
            checks += grade(name, list(cases(options.directory)))
    checks += verifier_checks_code.checks(options.directory)
    for title, correct, total, misses in checks:
        share = 100 * correct / max(1, total)
        print(f"{title:28} {correct:6} of {total:6} correct  {share:7.3f} %")
        for miss in misses[: options.misses]:
            print(f"    {miss}")


if __name__ == "__main__":
    main()
