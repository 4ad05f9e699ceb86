r"""Find the answer that a response names.

A response names its answer in a box (`\boxed{..}`), between `<answer>` tags or after words
("The answer is ..", "Answer: ..", "#### ..", "答案是 .."). Different answers of one response are
all returned: a response that names several has not decided, and a verifier compares them as a list.
An answer that is begun and not given, as an empty last box, is returned as an empty text: what was
named before it was taken back.

Responses are hostile: everything here takes time linear in their length. Letters and digits that
only look like ASCII ones are left as they are, so that they equal nothing but themselves.
"""

import functools
import itertools
import re
import string
from collections.abc import Collection

# Longer responses are no answers and are not read.
MAX_RESPONSE_CHARACTERS = 100_000

# \boxed{..}, \boxed 7, \boxed\frac12; "\boxed here" only speaks of a box.
_BOX = re.compile(
    r"\\(?:boxed|fbox)(?:\s*(?P<brace>\{)|\s*(?P<bare>[-+]?(?:\d|\\[a-zA-Z]|[a-zA-Z](?![a-zA-Z]))"
    r"[^\s$]*)|\s*(?P<end>$))"
)
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_MARKER = re.compile(
    r"\banswers?[ *]{0,4}(?:is\b|are\b|:|=)[ *:]*|^[#*\s]{0,8}(?:final )?answer[#*\s]{0,8}$"
    r"|\b(?:solutions|roots) are[ *:]+(?=[-$\\\d(]|x\b)"
    r"|(?:正确|最终|最后)?(?:答案|结果)[ *]{0,4}(?:应该?)?[是为选:=\uff1a][ *:\uff1a]*"
    r"|(?:^|(?<=[,;\uff0c\u3002\uff1b]))[*\s]{0,4}答[:\uff1a][ *]*|【(?:答案|解答)】[ *]*",
    re.IGNORECASE | re.MULTILINE,
)
_ANNOUNCES_AGAIN = re.compile(
    rf"(?:the |所以|因此|故)?(?:final |correct )?(?:{_MARKER.pattern})",
    re.IGNORECASE | re.MULTILINE,
)
# Characters read after a marker: more than any answer has, few enough for many markers.
_MARKED_CHARACTERS = 1000
_MAX_MARKERS = 64
_SENTENCE_END = re.compile(r"\.(?=\s+[A-Z\u3400-\u9fff]|\s*$)|[。\uff0e]")
_FOLDED = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)

# Words by which a text withdraws a statement or leaves it open.
HEDGES = frozenset({
    "or", "not", "nor", "either", "neither", "maybe", "perhaps", "possibly", "if", "unless",
    "assume", "suppose", "cannot", "might",
})  # fmt: skip
# Words that turn their neighbour into its opposite.
_DENIALS = frozenset({
    "except", "excluding", "excluded", "opposite", "hardly", "never", "nobody", "anything", "wrong",
    "incorrect", "untrue", "false", "denies", "lie", "rule", "ruled", "mistake", "mistaken",
})  # fmt: skip
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_CHINESE_HEDGE = re.compile(
    r"或|不(?!同的|等式)|(?<![分区类特])别[写选填]|并?非|没|无|未|可能|也许|大概|如果|假设|假如|除非"
)
_CHINESE_DENIAL = re.compile(r"错|相反|除了|除[^,\uff0c\u3002]{0,12}外")
# Words of someone who speaks about an answer, and does not give it.
_TALK = frozenset({
    "said", "say", "says", "saying", "tell", "tells", "told", "refuse", "refuses", "refused",
    "claim", "claims", "claimed", "asked", "pretend", "guess", "wonder", "whether", "heard",
    "according",
})  # fmt: skip
_CHINESE_TALK = re.compile(r"说|声称|猜|听闻|拒绝|假装|吗")
# Around an answer: "is not \boxed{7}", "I doubt that the answer is 7"; "7 is wrong", "7?".
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|isn't|cannot be|can't be|neither)|不(?:是|等于|为)|并?非|\\neq?|\\not\s*="
    r"|\u2260)\s*(?:equal to|be)?[\s$*:\uff1a(]*$"
    r"|(?:~~|\\(?:cancel|sout|xcancel|bcancel|st)\s*\{|\b(?:false|wrong|incorrect|untrue):)[\s$*]*$"
    r"|(?:如果|假设|假如|若|说|声称|猜|怀疑|否认)[^,\uff0c。;\n]*$"
    r"|(?:\b(?:wrong|false|incorrect|untrue|doubt|deny|denies|nobody|if|unless|assume|suppose|"
    rf"{'|'.join(sorted(_TALK))})|n't|\bnot (?:think|believe|mean|sure))\b[^,.;:\n]*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[\s$*)]*(?:(?:[.,;]?\s*(?:which|this|that|it|and that)\s+|,?\s*)"
    r"(?:is|was|isn't|seems|looks|would be|cannot be)\s+(?:the |a |an )?"
    r"(?:not|wrong|incorrect|false|untrue|lie|impossible)\b|isn't"
    r"|[.,;]?\s*(?:or (?!about|approx|roughly|around|equivalently)"
    r"|no\b|wait\b|actually\b|but\b|rather\b)"
    r"[^.\n\\]{0,20}\d"
    r"|,?\s*(?:\\(?:text|mathrm|mbox)\s*\{\s*)?or\b[\s}]*(?:maybe|perhaps|possibly|not|else|\$?-?\d)"
    r"|,?\s*not\b|\?|\uff1f|\\neq?(?![a-z])|\\not\s*=|\u2260"
    r"|[,\uff0c.\u3002]?\s*(?:这|那)?是?(?:不对|不正确|错|不是))",
    re.IGNORECASE,
)
_DISPLAYED = re.compile(r"(\\\[|\$\$)\s*(.{0,300}?)\s*(\\\]|\$\$)", re.DOTALL)
_REASONED = re.compile(
    r"(?P<answer>\S.{0,300}?),?\s*(?:[(,;\uff0c]\s*)?"
    r"(?:\b(?:because|since|as|given that|due to)\s|因为|由于)"
    r"(?P<reason>.+)",
    re.DOTALL | re.IGNORECASE,
)
_CONTEXT = 60
# The sign of a number that stands before its box; "8 - \boxed{3}" is a difference.
_SIGN_BEFORE = re.compile(r"(?:^|\n|[=($[{:,\uff1a是为]|\b(?:is|be))\s*[-\u2212]\Z")


# \boxed{12}\%, $\boxed{12}$%, \boxed{12} percent; a "%" that stands apart may begin a comment.
_PERCENT_BEHIND = re.compile(
    r"\$?%|(?:[\s$]|\\[,;: !])*(?:\\%|(?:\\text\s?\{\s?)?(?:\\%|per ?cent(?![A-Za-z])))"
)


def squeeze(text: str) -> str:
    """Return the text with every run of white space as one space, none at the ends."""
    return " ".join(text.split())


def fold(text: str) -> str:
    """Return the squeezed text, only ASCII capitals made small: the Kelvin sign is no k."""
    return squeeze(text).translate(_FOLDED)


def bracket_depths(text: str) -> list[int]:
    """Return how many brackets are open behind each character; below 0 where too many close."""
    return list(itertools.accumulate((c in "([{") - (c in ")]}") for c in text))


def boxes(text: str) -> list[str]:
    r"""Return the content of each `\boxed{..}`, braces matched, without inner ones.

    One that is never closed is empty; one that the words around it deny begins with "not ".
    """
    return [content for content, _ in _boxes(text)]


@functools.lru_cache(maxsize=4)  # several readings of one response ask for them
def _boxes(text: str) -> tuple[tuple[str, int], ...]:
    """Return the content of each box and the position behind it."""
    found: list[tuple[str, int]] = []
    position = 0
    while opening := _BOX.search(text, position):
        start, position = opening.span()
        if opening["brace"]:
            end = _closing_brace(text, position)
            content, position = (text[position:end], end + 1) if end >= 0 else ("", len(text))
        else:
            bare = re.sub(r"(?:[.,;:!*\u3002]|\\[)\]])+$", "", opening["bare"] or "")
            content = bare.removesuffix("\\")
        if content and _SIGN_BEFORE.search(text, max(0, start - _CONTEXT), start):
            content = f"-{content}"
        if content and (percent := _PERCENT_BEHIND.match(text, position, position + _CONTEXT)):
            content, position = f"{content}%", percent.end()
        if content and is_denied(text, start, position):
            content = f"not {content}"
        found.append((content, position))
    return tuple(found)


def is_denied(text: str, start: int, end: int) -> bool:
    """Return True if the words around text[start:end] deny it or leave it open."""
    before = text[max(0, start - _CONTEXT) : start]
    return bool(_DENIED_BEFORE.search(before) or _DENIED_AFTER.match(text, end, end + _CONTEXT))


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
    may then be the answer. An empty last text means that the last answer is not given; earlier
    empty ones are left out.
    """
    found = boxes(response) or tagged(response) or _hashed(response) or announced(response)
    found = [squeeze(text).strip("*").strip() for text in found]
    return [text for text in found[:-1] if text] + found[-1:]


def announced(response: str) -> list[str]:
    """Return the text after each _MARKER to the end of its sentence; all of it for too many.

    After a marker at the end of a line it is the next line that is not empty. Where words around
    deny it, it begins with "not ".
    """
    response = _DISPLAYED.sub(lambda found: "".join(map(squeeze, found.groups())), response)
    text = "\n".join(line for line in map(squeeze, response.splitlines()) if line.strip("*-_ "))
    found = list(itertools.islice(_MARKER.finditer(text), _MAX_MARKERS + 1))
    if len(found) > _MAX_MARKERS:
        return [text]
    rests = []
    for marker in found:
        rest = text[marker.end() : marker.end() + _MARKED_CHARACTERS].lstrip("\n* ")
        # "Final answer: the final answer is 17" announces one.
        if _ANNOUNCES_AGAIN.match(rest):
            continue
        rest = rest.partition("\n")[0]
        said = _SENTENCE_END.split(rest, maxsplit=1)[0]
        denied = is_denied(text, marker.start(), marker.end() + rest.find(said) + len(said))
        rests.append(f"not {said}" if denied and said else said)
    return rests


def announced_behind_boxes(response: str) -> list[str]:
    """Return what a response announces behind its last box: it may be another answer."""
    ends = [end for _, end in _boxes(response)]
    return announced(response[ends[-1] :]) if ends else []


def tagged(response: str) -> list[str]:
    """Return the text between each `<answer>` and `</answer>`, as written; "" if not closed."""
    # Up to the last closing tag, every opening one has its end: the search stays linear.
    end = response.rfind("</answer>") + len("</answer>")
    found = _ANSWER_TAG.findall(response[:end]) if end >= len("</answer>") else []
    return found + [""] * ("<answer>" in response[max(end, 0) :])


def _hashed(response: str) -> list[str]:
    """Return the text after "####" on the last lines; elsewhere it begins a heading."""
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    if lines and not lines[-1].startswith("#") and "####" in lines[-1]:  # no heading within a line
        return [lines[-1].rpartition("####")[2]]
    hashed = itertools.takewhile(lambda line: line.startswith("####"), reversed(lines))
    return [line.removeprefix("####") for line in hashed][::-1]


def hedges(text: str) -> bool:
    """Return True if a text has a word of HEDGES, a contracted "not", or a Chinese one of these."""
    words = _words(text)
    english = any(word in HEDGES or word.endswith("n't") for word in words)
    return english or _CHINESE_HEDGE.search(text) is not None


def denies(text: str, *, besides: Collection[str] = ()) -> bool:
    """Return True if a text has a word that denies ("wrong", "except") outside `besides`."""
    english = any(word in _DENIALS and word not in besides for word in _words(text))
    return english or _CHINESE_DENIAL.search(text) is not None


def talks(text: str) -> bool:
    """Return True if a text speaks about what somebody says or asks."""
    return any(word in _TALK for word in _words(text)) or _CHINESE_TALK.search(text) is not None


def without_reason(text: str, *, besides: Collection[str] = ()) -> str:
    """Return an answer without the reason behind it ("18, because ..", "B since ..").

    A reason that names alternatives, or denies by a word outside `besides`, stays: the answer is
    then left open.
    """
    match = _REASONED.match(text)
    if match is None:
        return text
    words = set(_words(match["reason"]))
    opened = words & {"or", "maybe", "perhaps", "possibly", "either", "neither", "nor", "unless"}
    if opened or denies(match["reason"], besides=besides) or talks(match["reason"]):
        return text
    return match["answer"].rstrip()


def _words(text: str) -> list[str]:
    return [word.translate(_FOLDED) for word in _WORD.findall(text)]
