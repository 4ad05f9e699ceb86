"""Logic: chains of truth values (our own), and reasoning-gym's aiw."""

import random
import re

from .base import Item, held_out
from .gym import draw


def boolean(rng: random.Random, level: int) -> Item | None:
    """Ask for the truth after each of three variables, joined from left to right; four at level 3.

    At most one of them is negated at the first level, and at least two at the second. All of the
    values are asked for, each as often, since one alone is guessed every second time.
    """
    names = rng.sample("pqrstuv", 4 if level == 3 else 3)
    values = {name: rng.random() < 0.5 for name in names}
    wanted = [rng.random() < 0.5 for _ in names]
    text, lines = "", []
    totals: list[bool] = []
    for name in names:
        negated = rng.random() < 0.4
        value = values[name] != negated
        term = f"not {name}" if negated else name
        line = f"{term}: not {_truth(values[name])} = " if negated else f"{term}: "
        line += _truth(value)
        if totals:
            operator = rng.choice(["and", "or"])
            joined = (totals[-1] and value) if operator == "and" else (totals[-1] or value)
            line += f", {_truth(totals[-1])} {operator} {_truth(value)} = {_truth(joined)}"
            text += f" {operator} {term}"
            totals.append(joined)
        else:
            text = term
            totals.append(value)
        lines.append(line)
    if totals != wanted or (level < 3 and (text.count("not ") > 1) != (level == 2)):
        return None
    given = ", ".join(f"{name} = {_truth(values[name])}" for name in sorted(names))
    return Item(
        key=f"{given}: {text}",
        prompt=f"{given}. From left to right, what is {text} after each term?",
        think="\n".join(lines),
        answer=", ".join(map(_truth, totals)),
        reward="exact",
    )


def _truth(value: bool) -> str:
    return "true" if value else "false"


_COLLEAGUES = 2  # the third of its kinds of problems: after sisters and friends


def aiw(rng: random.Random, level: int) -> Item | None:
    """Ask how many sisters or friends another one of the family or circle has.

    At the second level those numbers of them of which there is no demonstration, colleagues at the
    third.
    """
    kind = _COLLEAGUES if level == 3 else rng.choice([0, 1])
    weights = [float(kind == one) for one in range(3)]
    entry = draw("aiw", rng, task_type_weights=weights, max_entities=20)
    question = entry["question"]
    found = re.search(r"(\d+) (sisters|female friends|female colleagues)", question)
    if found is None:
        raise ValueError(f"aiw: no number of women in {question!r}")
    count = int(found[1])
    if level < 3 and held_out("aiw", kind, count) != (level == 2):
        return None
    people = re.sub(r"\b[A-Z]\w+'s\b", "X's", question)
    return Item(
        # The names change nothing, so problems that differ only in them share a key.
        key=re.sub(r"\b(?!She|They|How)[A-Z]\w+\b", "X", people),
        prompt=question,
        think=f"{count} {found[2]}\n{count} + 1 = {count + 1}",
        answer=entry["answer"],
        reward="logic",
    )
