"""Logic: boolean expressions (our own), and reasoning-gym's aiw and family_relationships."""

import random
import re

from .base import Item, Slip
from .gym import draw

# Expression trees: a variable name, ("not", tree) or (tree, "and" | "or", tree).
Tree = str | tuple["Tree", ...]


def _random_tree(rng: random.Random, leaves: list[str]) -> Tree:
    """Return a random tree whose leaves are `leaves` in order, some of them negated."""
    if len(leaves) == 1:
        return ("not", leaves[0]) if rng.random() < 0.35 else leaves[0]
    cut = rng.randrange(1, len(leaves))
    left, right = _random_tree(rng, leaves[:cut]), _random_tree(rng, leaves[cut:])
    return (left, rng.choice(["and", "or"]), right)


def _show(tree: Tree, *, top: bool = True) -> str:
    if isinstance(tree, str):
        return tree
    if len(tree) == 2:
        return f"not {_show(tree[1], top=False)}"
    text = f"{_show(tree[0], top=False)} {tree[1]} {_show(tree[2], top=False)}"
    return text if top else f"({text})"


def _substitute(tree: Tree, values: dict[str, str]) -> Tree:
    if isinstance(tree, str):
        return values.get(tree, tree)
    return tuple(_substitute(part, values) for part in tree)


def _is_value(tree: Tree) -> bool:
    return tree in ("true", "false")


def _reduce(tree: Tree) -> Tree:
    """Evaluate every operation whose operands are values: one line of the worked steps."""
    if isinstance(tree, str):
        return tree
    if len(tree) == 2:
        return "false" if tree[1] == "true" else "true"
    left, operator, right = tree
    if not (_is_value(left) and _is_value(right)):
        return (_reduce(left), operator, _reduce(right))
    both, either = left == right == "true", "true" in (left, right)
    return "true" if (both if operator == "and" else either) else "false"


def _without_not(tree: Tree) -> Tree:
    if isinstance(tree, str):
        return tree
    if len(tree) == 2:
        return _without_not(tree[1])
    return (_without_not(tree[0]), tree[1], _without_not(tree[2]))


def _reduced(tree: Tree) -> list[Tree]:
    """Return the expression line by line, down to its value."""
    steps = [tree]
    while not _is_value(steps[-1]):
        steps.append(_reduce(steps[-1]))
    return steps


def boolean(rng: random.Random) -> Item | None:
    """Ask for the value of an expression of p, q and r, reduced line by line."""
    return _boolean(rng, "pqr")


def boolean_four(rng: random.Random) -> Item | None:
    """Ask for the value of an expression of four variables with any names."""
    return _boolean(rng, "".join(rng.sample("abcdefghjkmnpqrst", 4)))


def _boolean(rng: random.Random, variables: str) -> Item | None:
    names = rng.sample(variables, len(variables))
    values = {name: rng.choice(["true", "false"]) for name in names}
    tree = _random_tree(rng, names)
    wanted = rng.choice(["true", "false"])  # Both answers equally often, whatever the operators.
    steps = _reduced(_substitute(tree, values))
    if steps[-1] != wanted:
        return None
    given = ", ".join(f"{name} = {values[name]}" for name in sorted(names))
    in_order = ", ".join(f"{name} = {values[name]}" for name in names)
    expression = _show(tree)
    slip = None
    if "not " in expression:  # every one is passed over, which may still give the right value
        overlooked = _reduced(_substitute(_without_not(tree), values))
        slip = Slip("\n".join([in_order, *map(_show, overlooked)]), str(overlooked[-1]))
    return Item(
        key=f"{given}: {expression}",
        prompt=f"{given}. What is {expression}?",
        think="\n".join([in_order, *map(_show, steps)]),
        answer=wanted,
        reward="exact",
        slip=slip,
    )


def aiw(rng: random.Random) -> Item | None:
    """Ask how many sisters or friends another one of the family or circle has."""
    entry = draw("aiw", rng, task_type_weights=[0.7, 0.3, 0.0], max_entities=20)
    question = entry["question"]
    found = re.search(r"(\d+) (sisters|female friends)", question)
    if found is None:
        raise ValueError(f"aiw: no number of women in {question!r}")
    count, kind = int(found[1]), found[2]
    # The names change nothing, so problems that differ only in them share a key.
    people = re.sub(r"\b[A-Z]\w+'s\b", "X's", question)
    first = re.search(r"(\d+) (brothers|male friends)", question)
    slip = None
    if first is not None and first.start() < found.start() and int(first[1]) != count:
        others = int(first[1])  # the men, who are named first, taken for the women
        slip = Slip(f"{others} {kind}\n{others} + 1 = {others + 1}", str(others + 1))
    return Item(
        key=re.sub(r"\b(?!She|They|How)[A-Z]\w+\b", "X", people),
        prompt=question,
        think=f"{count} {kind}\n{count} + 1 = {count + 1}",
        answer=entry["answer"],
        reward="logic",
        slip=slip,
    )


_MEN = ["James", "John", "David", "Thomas", "Peter", "Daniel", "George", "Henry", "Jack", "Noah"]
_WOMEN = ["Mary", "Linda", "Susan", "Sarah", "Emma", "Anna", "Sophia", "Alice", "Lucy", "Luna"]

# reasoning-gym names in-laws, nieces and nephews after the wrong person ("How is Sarah related to
# Elizabeth?" gives mother-in-law for a daughter-in-law), so only these relations are used.
_RELATIONS = {
    "wife", "husband", "mother", "father", "daughter", "son", "grandmother", "grandfather",
}  # fmt: skip


def _generations(story: str) -> dict[str, int]:
    """Return the generation of each person, 1 for the oldest, in the order of the story."""
    generation: dict[str, int] = {}
    pair: list[str] = []
    for sentence in story.split(". "):
        words = sentence.rstrip(".").replace(",", "").split()
        if "married" in words:
            pair = [words[0], words[-1]]
            level = next((generation[name] for name in pair if name in generation), 1)
            generation.update(dict.fromkeys(pair, level))
        else:
            names = [name for name in words[words.index("called") + 1 :] if name != "and"]
            generation.update(dict.fromkeys(names, generation[pair[0]] + 1))
    return generation


def family_relationships(rng: random.Random) -> Item | None:
    """Ask for one person's relation to another in a family of four or five."""
    entry = draw(
        "family_relationships",
        rng,
        min_family_size=4,
        max_family_size=5,
        male_names=_MEN,
        female_names=_WOMEN,
    )
    if entry["answer"] not in _RELATIONS:
        return None
    one, other = entry["metadata"]["person1"], entry["metadata"]["person2"]
    story, question = entry["question"].split("\n\n")
    generation = _generations(story)
    sex = "man" if one in _MEN else "woman"
    everyone = ", ".join(f"{name} {number}" for name, number in generation.items())
    wanted = f"{one} {generation[one]} {sex}, {other} {generation[other]}"
    return Item(
        key=f"{story} {one} {other}",
        prompt=f"{story}\n{question}",
        think=f"Generations: {everyone}\nWanted: {wanted}",
        answer=entry["answer"],
        reward="logic",
    )
