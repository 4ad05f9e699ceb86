r"""Unify the notation of mathematical texts: signs, spaces, delimiters and text commands."""

import re
from fractions import Fraction
from functools import partial

from ernie_train.rewards.verifiers.answer_text import boxes, squeeze

_SIGNS = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ",
    "\u00f7": "\\div ", "\u03c0": "\\pi ", "\u221e": "\\infty ", "\u00b0": "^\\circ",
    "\u2264": "\\le ", "\u2265": "\\ge ", "\u2a7d": "\\le ", "\u2a7e": "\\ge ", "\u2260": "\\ne ",
    "\u2248": "\\approx ", "\u222a": "\\cup ", "\u2208": "\\in ", "\u2205": "\\emptyset ",
    "\u00b1": "\\pm ", "\u211d": "\\mathbb{R}", "\u2220": "\\angle ", "\u00bd": "\\frac12 ",
    "\u00bc": "\\frac14 ", "\u00be": "\\frac34 ",
    "\u2009": "\\,", "\u202f": "\\,", "\u00a0": "\\,",
    "\uff0e": ".", "\uff0c": ", ", "\u3001": ", ", "\uff1b": "; ", "\uff1a": ":",
    "\u3002": ".", "\uff08": "(", "\uff09": ")", "\uff05": "%", "\uff1d": "=", "\uff1c": "<",
    "\uff1e": ">",
    "\u201c": '"', "\u201d": '"', "\u2044": "/", "\u2215": "/", "\u2236": ":",
    "\u03a9": "ohm", "\u2126": "ohm",
})  # fmt: skip
_ROOT_SIGN = re.compile("[\u221a-\u221c]\\s*(\\d+|\\([^()]*\\)|[a-z])?", re.ASCII)
_ROOTS = {"\u221a": "", "\u221b": "[3]", "\u221c": "[4]"}
_NEGATIVE = re.compile("\u8d1f\\s*(?=[\\d$\\\\])", re.ASCII)
# Digits in groups of three, apart by thin spaces: 10\,080 and 10{,}080. "1 2" stays two numbers.
_THIN_GROUPS = re.compile(
    r"(?<![\d.\\])\d{1,3}(?:(?:\\[,;: ]|\{,\}|\{\\,\})\d{3})+(?!\d)", re.ASCII
)
_TIE = re.compile(r"(?<=[\w}])~(?=[\w\\])")
_THIN = re.compile(r"\\[,;: ]|\{,\}|\{\\,\}")
_SCRIPTS = {
    "^": str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b"
                       "\u207f", "0123456789+-n"),
    "_": str.maketrans("".join(map(chr, range(0x2080, 0x208A))), "0123456789"),
}  # fmt: skip
_SCRIPT_RUNS = {
    "^": re.compile("(?<=[0-9A-Za-z)\\]}|\u4e00-\u9fff])"
                    "[\u2070\u00b9\u00b2\u00b3\u2074-\u207b\u207f]+"),
    "_": re.compile("(?<=[0-9A-Za-z)])[\u2080-\u2089]+"),
}  # fmt: skip
_ROW_SPACING = re.compile(r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm|in|mu|bp)\s*\]")
_SPACING = re.compile(
    r"\\(?:left|right|displaystyle|quad|qquad|limits|bigl?|bigr?|Bigl?|Bigr?)(?![A-Za-z])"
    r"|(?<!\\)\\[,;: ]"
)
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname|bm|boldsymbol|bold)"
    r"\s*\{([^{}]*)\}"
)
_COMMANDS = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(le|ge)(?:q?slant|qq?)(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"\\neq(?![A-Za-z])|\\not\s*="), r"\\ne "),
    (re.compile(r"\\cr(?![A-Za-z])"), r"\\\\ "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:varnothing)(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\lor(?![A-Za-z])"), r"\\vee"),
    (re.compile(r"\\land(?![A-Za-z])"), r"\\wedge"),
    (re.compile(r"\\(?:degree|textdegree)(?![A-Za-z])"), r"^\\circ"),
    (re.compile(r"\\(?:mathbb\s*\{?\s*R\s*\}?|R|Reals|reals|mathbf\s*\{R\})(?![A-Za-z])"),
     r"\\mathbb{R}"),
    (re.compile(r"\\(?:dotsc|dotsb|cdots|ldots|dots)(?![A-Za-z])"), r"\\ldots"),
)  # fmt: skip
# A letter that is a number keeps to the digits before it: 3\mathrm{i}.
_UNIT_NUMBER = re.compile(r"(?<=\d)\\(?:mathrm|text|operatorname)\s*\{([ie])\}", re.ASCII)
_PLAIN_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)")
_PLAIN_NAME = re.compile(r"(?<![\\A-Za-z])(pi|ln|log|sin|cos|tan)(?![A-Za-z])")
_PLAIN = re.compile(r"(?<![\\A-Za-z])(?:sqrt|pi|ln|log|sin|cos|tan)(?![A-Za-z])")
_INFINITY = re.compile(r"(?<![\\A-Za-z])(?:[Ii]nf(?:inity)?|oo)(?![A-Za-z])")
_UNION = re.compile(r"(?<=[)\]])\s*U\s*(?=[(\[])")
_STARRED_POWER = re.compile(r"(?<=[\w)\]}])\*\*(?=[\d({-]|[a-z](?![a-z]))", re.ASCII)
_BARE_POWER = re.compile(
    r"\^\s*(?:\(([^(){}]{1,20})\)|\{?(-?\d{0,9}\.\d{1,9})(?:\}|(?![\d}])))", re.ASCII
)
# "$42$ cm": the formula is a part of the text.
_SPAN_FIRST = re.compile(
    r"(?:\$([^$\s](?:[^$]{0,300}[^$\s])?)\$|\\\((.{1,300}?)\\\))(\s*[A-Za-z\u4e00-\u9fff%][^$]{0,60})"
)
_PLAIN_SET = re.compile(r"(^|\\in )\{([^{}]*,[^{}]*)\}$")
_RELATIONS = re.compile(r"<=|=<|>=|!=")
_RELATION_SIGNS = {"<=": "\\le ", "=<": "\\le ", ">=": "\\ge ", "!=": "\\ne "}
_NUMERALS = re.compile(r"[0-9 .,/+-]*", re.ASCII)
_BOLD = re.compile(r"\*\*(?=[\s.,]|$)|(?<=\s)\*\*(?=\S)|^\*\*")
_COMMAND = re.compile("|".join(pattern.pattern for pattern, _ in _COMMANDS))
_REWRITES = (("{,}", ","), ("\\%", "%"), ("\\$", "$"), ("\\lbrace", "\\{"), ("\\rbrace", "\\}"))
_WRAPPERS = (
    ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("__", "__"),
    ("`", "`"), ('"', '"'),
)  # fmt: skip
_FIRST_OF_WRAPPERS = tuple({opening[0] for opening, _ in _WRAPPERS})
_EQUALS_FIRST = re.compile(r"^=\s*(?=[^=\s])")
_DIGIT_INDEX = re.compile(r"_\{(\w)\}")
_SHORT_FRACTION = re.compile(
    r"\\frac\s*(?:(\d)(\d)|\{\s*(\\?\w+)\s*\}\s*\{\s*(\\?\w+)\s*\})", re.ASCII
)
_SYMBOL = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\?[A-Za-z]+|[^\s{}*\\]|\\\S")
_LONE_SPACE = re.compile(r"(?<![0-9A-Za-z])\s|\s(?![0-9A-Za-z])", re.ASCII)


def normalize(text: str) -> str:
    """Unify the spelling of signs, spaces, delimiters and text commands; keep the meaning."""
    if _NUMERALS.fullmatch(text):  # the usual answer: nothing to unify, and time counts
        text = squeeze(text)
        return text.removesuffix(".") if not text.endswith("..") else text
    if "~" in text:
        text = _TIE.sub(r"\\,", text)
    if not text.isascii():
        text = _ascii_signs(text)
    if "\\" in text or "{,}" in text:
        text = _plain_commands(text)
    if "=" in text:
        text = _RELATIONS.sub(lambda match: _RELATION_SIGNS[match.group()], text)
        text = _EQUALS_FIRST.sub("", text)
    if "**" in text:
        text = _BOLD.sub("", _STARRED_POWER.sub("^", text))
    if "^" in text:
        text = _BARE_POWER.sub(lambda found: f"^{{{found[1] or Fraction(found[2])}}}", text)
    if _PLAIN.search(text):
        text = _PLAIN_NAME.sub(r"\\\1 ", _PLAIN_ROOT.sub(r"\\sqrt{\1}", text))
    text = _UNION.sub(r" \\cup ", _INFINITY.sub(r"\\infty ", text))
    text = squeeze(_DIGIT_INDEX.sub(r"_\1", text) if "_" in text else text)
    if text[:1] in _FIRST_OF_WRAPPERS:
        text = _unwrapped(_unwrapped(text))
        if span := _SPAN_FIRST.fullmatch(text):
            text = squeeze(f"{span[1] or span[2]}{span[3]}")
    text = _PLAIN_SET.sub(r"\1\\{\2\\}", text)
    text = _unboxed(text)
    return text.removesuffix(".") if not text.endswith("..") else text


def _plain_commands(text: str) -> str:
    """Return a text with one command for each sign, without commands for spacing and fonts."""
    text = text.replace("\\!", "")
    text = _THIN_GROUPS.sub(lambda match: _THIN.sub("", match.group()), text)
    text = _UNIT_NUMBER.sub(r"\1", text)
    text = _TEXT.sub(r" \1 ", _SPACING.sub(" ", _ROW_SPACING.sub(r"\\\\ ", text)))
    if _COMMAND.search(text):
        for pattern, new in _COMMANDS:
            text = pattern.sub(new, text)
    for old, new in _REWRITES:
        text = text.replace(old, new)
    return text


def _ascii_signs(text: str) -> str:
    """Return a text with commands for signs, scripts and roots that are not ASCII."""
    for sign, run in _SCRIPT_RUNS.items():
        text = run.sub(partial(_script, sign), text)
    text = _NEGATIVE.sub("-", _ROOT_SIGN.sub(_root_command, text))
    return text.translate(_SIGNS)


def _root_command(sign: re.Match[str]) -> str:
    command = f"\\sqrt{_ROOTS[sign[0][0]]}"
    return f"{command}{{{sign[1].strip('()')}}}" if sign[1] else f"{command} "


def _unboxed(text: str) -> str:
    r"""Return the content of a text that is one \boxed{..} and no more."""
    inner = boxes(text) if text.startswith("\\boxed") else []
    alone = len(inner) == 1 and re.sub(r"[\s{}.]", "", text[6:]) == re.sub(r"[\s{}.]", "", inner[0])
    return squeeze(inner[0]) if alone else text


def _script(sign: str, run: re.Match[str]) -> str:
    return f"{sign}{{{run.group().translate(_SCRIPTS[sign])}}}"


def _unwrapped(text: str) -> str:
    for opening, closing in _WRAPPERS:
        if text.startswith(opening) and text.rstrip(".").endswith(closing):
            inside = text.removesuffix(".").removeprefix(opening).removesuffix(closing)
            if opening not in inside and "$" not in inside.strip("$"):
                text = squeeze(inside)
    return text


def compact(text: str) -> str:
    """Return the text without the spaces that separate nothing: "1 2" stays two numbers."""
    return _LONE_SPACE.sub("", text)


def symbols(text: str) -> list[str]:
    r"""Return what a normalized text is made of: \frac{1}{2} as 1, / and 2; no signs of products.

    A number is one symbol, so that 1/2 is no part of 11/25.
    """
    text = _SHORT_FRACTION.sub(lambda m: f" {m[1] or m[3]}/{m[2] or m[4]} ", text)
    found = [symbol for symbol in _SYMBOL.findall(text) if symbol not in ("\\cdot", "\\times")]
    return ["/" if symbol == "\\frac" else symbol for symbol in found]
