r"""Find the answer that a response names.

A response names its answer in a box (`\boxed{..}`), between `<answer>` tags or after words
("The answer is ..", "Answer: ..", "#### .."). Different answers of one response are all
returned: a response that names several has not decided, and a verifier compares them as a list.

Responses are hostile: everything here takes time linear in their length. Letters and digits that
only look like ASCII ones are left as they are, so that they equal nothing but themselves.
"""

import itertools
import re
import string
from collections.abc import Collection

# Longer responses are no answers and are not read.
MAX_RESPONSE_CHARACTERS = 100_000

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_MARKER = re.compile(r"\banswer[ *]{0,4}(?:is\b|:|=)[ *:]*", re.IGNORECASE)
_ANNOUNCES_AGAIN = re.compile(rf"(?:the )?(?:final |correct )?{_MARKER.pattern}", re.IGNORECASE)
# Characters read after a marker: more than any answer has, few enough for many markers.
_MARKED_CHARACTERS = 1000
_MAX_MARKERS = 64
_SENTENCE_END = re.compile(r"\.(?=\s+[A-Z]|\s*$)")
_FOLDED = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)

# Words by which a text withdraws a statement or leaves it open.
HEDGES = frozenset({
    "or", "not", "nor", "either", "neither", "maybe", "perhaps", "possibly", "if", "unless",
    "assume", "suppose", "cannot",
})  # fmt: skip
# Words that turn their neighbour into its opposite.
_DENIALS = frozenset({
    "except", "excluding", "excluded", "opposite", "hardly", "never", "nobody", "anything", "wrong",
    "incorrect", "untrue", "false", "denies", "lie", "rule", "ruled",
})  # fmt: skip
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")


def squeeze(text: str) -> str:
    """Return the text with every run of white space as one space, none at the ends."""
    return " ".join(text.split())


def fold(text: str) -> str:
    """Return the squeezed text, only ASCII capitals made small: the Kelvin sign is no k."""
    return squeeze(text).translate(_FOLDED)


def boxes(text: str) -> list[str]:
    r"""Return the content of each complete `\boxed{..}`, braces matched, without inner ones."""
    found: list[str] = []
    position = 0
    while opening := _BOX.search(text, position):
        end = _closing_brace(text, opening.end())
        if end < 0:
            break
        found.append(text[opening.end() : end])
        position = end + 1
    return found


def _closing_brace(text: str, start: int) -> int:
    """Return the position of the brace that closes the one before `start`; -1 if none does."""
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return brace.start()
    return -1


def named_answers(response: str) -> list[str]:
    """Return the answers that a response names, in its order, of the first kind that it has.

    The kinds: boxes, tags, "####" at the end, words. Empty if it names none: the whole response
    may then be the answer.
    """
    found = boxes(response) or tagged(response) or _hashed(response)
    if not found:
        found = _announced("\n".join(squeeze(line) for line in response.splitlines()))
    return [text for text in (squeeze(f).strip("*").strip() for f in found) if text]


def _announced(text: str) -> list[str]:
    """Return the text after each _MARKER to the end of its sentence; all of it for too many."""
    ends = [match.end() for match in itertools.islice(_MARKER.finditer(text), _MAX_MARKERS + 1)]
    if len(ends) > _MAX_MARKERS:
        return [text]
    rests = [text[end : end + _MARKED_CHARACTERS].partition("\n")[0] for end in ends]
    # "Final answer: the final answer is 17" announces one.
    rests = [rest for rest in rests if not _ANNOUNCES_AGAIN.match(rest)]
    return [_SENTENCE_END.split(rest, maxsplit=1)[0] for rest in rests]


def tagged(response: str) -> list[str]:
    """Return the text between each `<answer>` and `</answer>`, as written."""
    # Up to the last closing tag, every opening one has its end: the search stays linear.
    return _ANSWER_TAG.findall(response[: response.rfind("</answer>") + len("</answer>")])


def _hashed(response: str) -> list[str]:
    """Return the text after "####" on the last lines; elsewhere it begins a heading."""
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    hashed = itertools.takewhile(lambda line: line.startswith("####"), reversed(lines))
    return [line.removeprefix("####") for line in hashed][::-1]


def hedges(text: str) -> bool:
    """Return True if a text has a word of HEDGES or a contracted "not"."""
    return any(word in HEDGES or word.endswith("n't") for word in _words(text))


def denies(text: str, *, besides: Collection[str] = ()) -> bool:
    """Return True if a text has a word that denies ("wrong", "except") outside `besides`."""
    return any(word in _DENIALS and word not in besides for word in _words(text))


def _words(text: str) -> list[str]:
    return [word.translate(_FOLDED) for word in _WORD.findall(text)]
