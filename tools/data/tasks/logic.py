"""Logic: chains of truth values (our own), and reasoning-gym's aiw."""

import random
import re

from .base import Item, held_out
from .gym import draw


def boolean(rng: random.Random, level: int) -> Item | None:
    """Ask for the value of three variables, joined from left to right; of four at the third level.

    At most one of them is negated at the first level, and at least two at the second.
    """
    names = rng.sample("pqrstuv", 4 if level == 3 else 3)
    values = {name: rng.random() < 0.5 for name in names}
    wanted = rng.random() < 0.5  # both answers equally often, whatever the operators
    text, total, lines = "", False, []
    for name in names:
        operator = rng.choice(["and", "or"]) if text else ""
        negated = rng.random() < 0.4
        value = values[name] != negated
        term = f"not {name}" if negated else name
        line = f"{term}: "
        if negated:
            line += f"not {_truth(values[name])} = "
        line += _truth(value)
        if operator:
            joined = (total and value) if operator == "and" else (total or value)
            line += f", {_truth(total)} {operator} {_truth(value)} = {_truth(joined)}"
            total = joined
        else:
            total = value
        text += f" {operator} {term}" if text else term
        lines.append(line)
    if total != wanted or (level < 3 and (text.count("not ") > 1) != (level == 2)):
        return None
    given = ", ".join(f"{name} = {_truth(values[name])}" for name in sorted(names))
    return Item(
        key=f"{given}: {text}",
        prompt=f"{given}. From left to right, what is {text}?",
        think="\n".join(lines),
        answer=_truth(wanted),
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
