r"""Read numbers as people write them, with or without a unit, to exact values.

12, -0.5, 1,000, 3/4, \frac{3}{4}, 1\frac{3}{4}, 2.5 \times 10^{3}, 1e-15, 0.1\overline{6}, 10%,
12 thousand, $12, 5 cm, 20 m/s, 3 hours 20 minutes, 42 个苹果. There is no parser of expressions,
and only ASCII digits count. 10% is 1/10, so it is not 10. A quantity without a unit equals one with
a known unit or a thing that is counted, as "12 apples" answers "how many apples"; two with units
must agree in value and kind: 5 m is 500 cm and not 5 cm.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from ernie_train.rewards.verifiers.answer_text import HEDGES, denies, fold, hedges, talks

_DIGITS = r"\d{1,200}"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d{{0,200}})?|\.{_DIGITS})"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\s*(?:
      (?P<whole>\d{{1,200}})?\s*\\frac\s*(?:\{{\s*(?P<ln>[+-]?{_DIGITS})\s*\}}\s*
                                            \{{\s*(?P<ld>{_DIGITS})\s*\}}|(?P<sn>\d)(?P<sd>\d))
    | (?P<mixed>\d{{1,200}})\ (?P<mn>{_DIGITS})/(?P<md>{_DIGITS})
    | (?P<n>{_DIGITS})\s*/\s*(?P<d>[+-]?{_DIGITS})
    | (?P<start>\d{{0,50}}\.\d{{0,50}})
      (?:\\(?:overline|bar|dot)\s*(?:\{{(?P<cycle>\d{{1,50}})\}}|(?P<digit>\d))
        |\((?P<round>\d{{1,50}})\)|(?P<dots>\.\.\.|\\[lc]?dots|\u2026))
    | 10\s*\^\s*(?:\{{(?P<ten>[+-]?\d{{1,3}})\}}|(?P<bare_ten>[+-]?\d{{1,3}}))(?![\d^])
    | (?P<decimal>{_DECIMAL})
      (?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{{?(?P<power>[+-]?\d{{1,3}})\}}?
        |[eE](?P<e>[+-]?\d{{1,3}})(?!\w))?
    )""",
    re.VERBOSE | re.ASCII,
)
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])", re.ASCII)
_DOTTED_CYCLE = re.compile(r"\\dot\s*\{?(\d)\}?(\d{0,20})\\dot\s*\{?(\d)\}?", re.ASCII)
# 0.333..., 0.1666..., 0.142857142857...: a cycle that is seen often enough.
_SEEN_CYCLE = re.compile(r"(\d*?)(?:(\d)\2{2,}|(\d{2,20}?)\3+)", re.ASCII)
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})(?:\s*(?P<scale>[CF])(?![A-Za-z]))?")
_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
    "twenty",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SAID = re.compile(
    rf"^(?:(negative|minus)\s+)?(?:({'|'.join(_TENS)})(?:[- ]({'|'.join(_WORDS[1:10])}))?(?![\w-])"
    rf"|({'|'.join(_WORDS)})(?![\w-])|(?=\d))",
    re.IGNORECASE,
)
_PERCENT = re.compile(r"\s*(?:\\?%|per ?cent|\uff05)")
_PER_HUNDRED = re.compile(r"百分之\s*(\d+(?:\.\d+)?)", re.ASCII)
_PER_CENT = r"(?:per\s?cent(?:age)?s?\b|\\?%)"
# A question for a percentage, not one that tells some: what percent, in percent, x%, 百分之几.
_ASKS_PERCENT = re.compile(
    r"\b(?:what|which|how many|(?:find|calculate|compute|determine|give|estimate|state) the)"
    r"(?:\s+(?:is|was|are|were|will|would|be|the|a|an|its|his|her|their|this|total|overall|new"
    r"|approximate|average|annual|yearly|monthly|maximum|minimum|\w+'s))*"
    rf"\s+(?:{_PER_CENT}|(?:interest|tax|growth|discount|inflation|success|error) rate\b)"
    rf"|\b(?:as|in|into|to|of)\s+(?:(?:a|an|the)\s+)?(?:(?:nearest|whole|exact)\s+)?{_PER_CENT}"
    rf"|(?<![A-Za-z\\])[b-hj-z]\$?\s?{_PER_CENT}"
    r"|百分(?:之(?:几|多少)|比|率|数)|(?:几|多少)个?(?:%|百分点)|率(?:各?[是为约])?(?:多少|几)",
    re.IGNORECASE,
)
_SCALES = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "dozen": 12, "十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8,
}  # fmt: skip
_SCALE = re.compile(
    r"\s+(hundred|thousand|million|billion|trillion|dozen)s?(?![a-z])"
    r"|\s*([十百千万亿]{1,3})(?![克米瓦焦牛卡赫帕伏安])"
)
_CURRENCIES = {"$": "dollar", "\u20ac": "euro", "\u00a3": "gbp", "\u00a5": "元", "\uffe5": "元"}

_UNITS: dict[str, tuple[str, Fraction]] = {}
for _kind, _names in {
    "length": "mm:1/1000 cm:1/100 dm:1/10 m:1 km:1000 Mm:1000000 millimeter:1/1000 "
    "centimeter:1/100 meter:1 kilometer:1000 metre:1 centimetre:1/100 kilometre:1000 "
    "in:127/5000 inch:127/5000 inche:127/5000 ft:381/1250 foot:381/1250 feet:381/1250 "
    "yd:1143/1250 yard:1143/1250 mi:201168/125 mile:201168/125 "
    "毫米:1/1000 厘米:1/100 分米:1/10 米:1 千米:1000 公里:1000",
    "mass": "mg:1/1000000 g:1/1000 kg:1 Mg:1000 t:1000 gram:1/1000 kilogram:1 ton:1000 tonne:1000 "
    "毫克:1/1000000 克:1/1000 千克:1 公斤:1 斤:1/2 吨:1000",
    "weight": "lb:1 pound:1 oz:1/16 ounce:1/16",
    "time": "ms:1/1000 Ms:1000000 s:1 sec:1 second:1 min:60 minute:60 h:3600 hr:3600 hour:3600 "
    "day:86400 week:604800 秒:1 分钟:60 小时:3600 时:3600 天:86400 日:86400 周:604800 星期:604800",
    "years": "year:1 yr:1 month:1/12 decade:10 century:100 centurie:100 年:1 个月:1/12 月:1/12",
    "volume": "mL:1/1000 ml:1/1000 ML:1000000 Ml:1000000 L:1 l:1 liter:1 litre:1 "
    "milliliter:1/1000 毫升:1/1000 升:1",
    "money": "dollar:1 usd:1 USD:1 cent:1/100 美元:1",
    "yuan": "yuan:1 rmb:1 元:1 角:1/10 分:1/100 块钱:1 人民币:1",
    "euro": "euro:1 eur:1 欧元:1",
    "gbp": "gbp:1 英镑:1",
    "angle": "degree:1 deg:1 circ:1 度:1",
    "temperature": "circC:1 摄氏度:1",
    "fahrenheit": "circF:1",
    "unit": "unit:1 单位:1",
    "points": "point:1",
    "energy": "mJ:1/1000 J:1 MJ:1000000 kJ:1000 joule:1 焦:1 焦耳:1",
    "force": "mN:1/1000 N:1 MN:1000000 kN:1000 newton:1 牛:1 牛顿:1",
    "power": "mW:1/1000 W:1 MW:1000000 kW:1000 watt:1 瓦:1 千瓦:1000",
    "pressure": "mPa:1/1000 Pa:1 MPa:1000000 kPa:1000 pascal:1 帕:1",
    "frequency": "mHz:1/1000 Hz:1 kHz:1000 MHz:1000000 hertz:1 赫兹:1",
    "resistance": "ohm:1 kiloohm:1000 欧:1 欧姆:1",
    "voltage": "mV:1/1000 V:1 MV:1000000 kV:1000 volt:1 伏:1",
    "current": "mA:1/1000 A:1 MA:1000000 ampere:1 安:1",
    "amount": "mol:1 mole:1",
}.items():
    for _entry in _names.split():
        _name, _, _factor = _entry.partition(":")
        _UNITS[_name] = (_kind, Fraction(_factor))
_UNIT = re.compile(r"([A-Za-z]+|[\u4e00-\u9fff]+)(?:\s?\^\s?\{?(-?[1-4])\}?)?")
_UNIT_TEXT = re.compile(r"[A-Za-z\u4e00-\u9fff][A-Za-z0-9\u4e00-\u9fff /^{}*.-]{0,60}")
_MAX_UNIT_WORDS = 4
# 3 hours 20 minutes, 5 ft 6 in, 3小时20分钟: falling units of one kind.
_PART = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s?([A-Za-z]+|[\u4e00-\u9fff]+)", re.ASCII)
_PARTS = re.compile(rf"{_PART.pattern}(?:(?:,? and |, | ?){_PART.pattern}){{1,3}}", re.ASCII)
_PARTED_KINDS = {"length", "mass", "weight", "time", "yuan"}
# Words that look like units after a number and belong to an expression.
_NO_UNITS = HEDGES | {"pi", "sqrt", "sin", "cos", "tan", "ln", "log", "and", "e", "i", "x", "y"}
# Words that make something else of a number than a count.
_NO_COUNTS = _NO_UNITS | set(_SCALES) | {
    "hundreds", "thousands", "millions", "billions", "trillions", "dozens", "is", "was", "are",
    "were", "be", "has", "have", "does", "plus", "minus", "times", "less", "more", "fewer", "at",
    "least", "most", "about", "around", "approximately", "roughly", "nearly", "almost", "over",
    "under", "than", "to", "of", "per", "a", "an", "the", "no", "none", "one", "two", "three",
    "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "twenty", "half",
    "halves", "third", "thirds", "quarter", "quarters", "fifths", "sixths", "eighths", "tenths",
    "divided", "multiplied", "mod", "modulo", "squared", "cubed", "factorial", "power", "base",
    "percents", "fails", "lies", "loses", "misses", "works", "seems", "looks", "gives", "makes",
    "equals", "always", "sometimes", "besides", "others", "else", "but", "as", "so", "because",
    "since", "which", "with", "without", "by", "yes", "thanks", "guess", "said", "says", "claims",
    "wrong", "false", "never", "off", "too", "ones", "tens", "sevenths", "ninths",
    "hundredths", "thousandths",
}  # fmt: skip
_PLURALS_WITHOUT_S = re.compile(
    r"people|children|(?:wo)?men|feet|teeth|mice|sheep|fish|deer|geese|oxen|dice|data|\w+ices"
)
_IN_TOTAL = re.compile(r"\s+(?:in total|in all|altogether|total|left|remaining)$")
_BEHIND_COUNTS = re.compile(r"\s+(?:each|old|long|tall|wide|high|deep)$")
_COUNTER = re.compile(
    r"[个只本支人名岁辆条张棵头次种件块页枚朵匹架艘台把位间层家座盒袋箱瓶杯双对倍组份题步颗粒根束片枝串筐"
    r"包卷套副排行列队圈场局轮站段句字道幅][\u4e00-\u9fff]{0,6}"
)
_INEXACT = re.compile(
    r"至少|至多|最多|最少|以上|以下|左右|超过|多于|少于|大约|上下|不到|约|多$|余$"
)
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "平方": "2", "立方": "3"}


@dataclass(frozen=True)
class Unit:
    """Describe a unit. `kinds`: the quantities measured and their powers; `factor`: base units.

    A thing that is counted is a kind of its own; `plausible` is False if only a gold answer with
    the same words makes it one.
    """

    kinds: tuple[tuple[str, int], ...]
    factor: Fraction
    plausible: bool = True

    def agrees(self, other: "Unit") -> bool:
        """Return True for the same kinds of unit; red apples are apples, 个苹果 are 个."""
        if self.kinds == other.kinds:
            return True
        one, two = (" ".join(name for name, _ in unit.kinds) for unit in (self, other))
        if not one.startswith("#") or not two.startswith("#"):
            return False
        short, long = sorted((one[1:], two[1:]), key=len)
        return long.startswith(short) if not short.isascii() else long.endswith(" " + short)


@dataclass(frozen=True)
class Quantity:
    """Hold an exact value with its unit, if any."""

    value: Fraction
    unit: Unit | None

    def equals(self, gold: "Quantity") -> bool:
        """Compare values; in base units if both sides have a unit of the same kind."""
        if self.unit is None or gold.unit is None:
            return self.value == gold.value and (self.unit is None or self.unit.plausible)
        if not self.unit.agrees(gold.unit):
            return False
        return self.value * self.unit.factor == gold.value * gold.unit.factor


def is_fraction(text: str) -> bool:
    """Return True if a number is written as a fraction, mixed or not."""
    number = _NUMBER.match(text.strip())
    return bool(number and (number["ld"] or number["sd"] or number["md"] or number["d"]))


def is_power_of_ten(text: str) -> bool:
    r"""Return True if a number is written with a power of ten: 10^6, 1.5 \times 10^{-4}."""
    number = _NUMBER.match(text.strip())
    return bool(number and (number["ten"] or number["bare_ten"] or number["power"]))


def is_percent(text: str) -> bool:
    """Return True if a number is given in percent."""
    return re.search(r"(?:%|per ?cent|\uff05)\s*$", text) is not None


def asks_percentage(question: str) -> bool:
    """Return True for a question to which 24 and 24% are the same answer."""
    return _ASKS_PERCENT.search(question) is not None


def parse_quantity(text: str) -> Quantity | None:
    """Return a number and its unit; None if the text is anything else, or more than that."""
    text = (text.strip().removesuffix(".") if not text.rstrip().endswith("..") else text).strip()
    parted = _parted_quantity(text)
    return _read_quantity(text) if parted is None else parted


def _read_quantity(text: str) -> Quantity | None:
    text = _PER_HUNDRED.sub(r"\1%", text)
    if text[:1].isalpha():
        text = _SAID.sub(_in_digits, text)
    money = re.match(r"([+-]?)\s*\\?([$\u20ac\u00a3\u00a5\uffe5])\s*(?=[\d.])", text)
    if money:
        text = (money.group(1) + text[money.end() :]).removesuffix("$")
    if "," in text:
        text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    if "\\dot" in text:
        text = _DOTTED_CYCLE.sub(r"\\overline{\1\2\3}", text)
    number = _NUMBER.match(text)
    value = _value(number) if number else None
    if number is None or value is None:
        return None
    rest = _IN_TOTAL.sub("", text[number.end() :])
    if scale := _SCALE.match(rest):
        for name in [scale[1]] if scale[1] else scale[2]:
            value *= _SCALES[name]
        rest = rest[scale.end() :]
    if _PERCENT.fullmatch(rest.rstrip()):
        return Quantity(value / 100, None)
    if rest.strip() in _CURRENCIES.keys() - {"$"}:
        return Quantity(value, _known_unit(_CURRENCIES[rest.strip()]))
    if not rest.strip():
        return Quantity(value, _known_unit(_CURRENCIES[money[2]]) if money else None)
    unit = _read_unit(_DEGREES.sub(r" circ\g<scale>", rest) if "^" in rest else rest, value)
    return None if unit is None else Quantity(value, unit)


def _parted_quantity(text: str) -> Quantity | None:
    """Return the sum of 3 hours 20 minutes; None unless each part is less than one of the last."""
    if not _PARTS.fullmatch(text):
        return None
    parts = [(number, _known_unit(word)) for number, word in _PART.findall(text)]
    units = [unit for _, unit in parts if unit is not None]
    kinds = {unit.kinds for unit in units}
    first = units[0] if len(units) == len(parts) and len(kinds) == 1 else None
    if first is None or first.kinds[0][0] not in _PARTED_KINDS or first.kinds[0][1] != 1:
        return None
    # "5 m and 20 cm" may be two lengths; two times of which one is a part of the other are one.
    if first.kinds[0][0] != "time" and re.search(r",|\band\b", text):
        return None
    bound, total = None, Fraction(0)
    for at, (unit, (number, _)) in enumerate(zip(units, parts, strict=True)):
        amount = Fraction(number) * unit.factor
        whole = at == len(parts) - 1 or "." not in number
        if not whole or (bound is not None and amount >= bound):
            return None
        bound, total = unit.factor, total + amount
    return Quantity(total / first.factor, first)


def _in_digits(said: re.Match[str]) -> str:
    """Return the digits of a number that is said in words, or the sign before digits."""
    sign, tens, ones, word = (text.lower() if text else "" for text in said.groups())
    number = 10 * (_TENS.index(tens) + 2) + (_WORDS.index(ones) if ones else 0) if tens else None
    number = _WORDS.index(word) if word else number
    return "-" * bool(sign) + ("" if number is None else str(number))


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""Split an expression from a known unit of two letters or more after it: 12\pi cm^3."""
    words = re.sub(r"\s+\^", "^", text).split(" ")
    for i in range(max(1, len(words) - _MAX_UNIT_WORDS), len(words)):
        tail = " ".join(words[i:])
        if (tail[:2].isalpha() or not tail.isascii()) and (unit := _known_unit(tail)) is not None:
            return " ".join(words[:i]), unit
    return text, None


def _value(match: re.Match[str]) -> Fraction | None:
    part = match.groupdict()
    sign = -1 if part["sign"] == "-" else 1
    if part["decimal"] is not None:
        power = int(part["power"] or part["e"] or 0)
        return sign * Fraction(part["decimal"]) * Fraction(10) ** power
    if (ten := part["ten"] or part["bare_ten"]) is not None:
        return sign * Fraction(10) ** int(ten)
    if part["start"] is not None:
        value = _repeating(part)
        return None if value is None else sign * value
    numerator = part["ln"] or part["sn"] or part["mn"] or part["n"]
    denominator = part["ld"] or part["sd"] or part["md"] or part["d"]
    if int(denominator) == 0:
        return None
    whole = int(part["whole"] or part["mixed"] or 0)
    return sign * (whole + Fraction(int(numerator), int(denominator)))


def _repeating(part: dict[str, str | None]) -> Fraction | None:
    """Return the value of a decimal whose last digits repeat; None if no cycle is seen in dots."""
    whole, _, digits = (part["start"] or "").partition(".")
    cycle = part["cycle"] or part["digit"] or part["round"]
    if cycle is None:
        seen = _SEEN_CYCLE.fullmatch(digits)
        if seen is None:
            return None
        digits, cycle = seen[1], seen[2] or seen[3]
    start = Fraction(int(f"{whole}{digits}" or "0"), 10 ** len(digits))
    return start + Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(digits))


def _read_unit(text: str, value: Fraction) -> Unit | None:
    """Return the unit that follows a number; a thing that is counted is a kind of its own."""
    apart, text = text[0].isspace(), re.sub(r"\s*\\cdot\s*", " ", text).strip()
    if apart and text[0] == "(" and text[-1] == ")":
        text = text[1:-1].strip()
    if not _UNIT_TEXT.fullmatch(text):
        return None
    known = _known_unit(text)
    # `2m` and `2ab` are products, `2 m` and `2cm` are not.
    if known is not None and (apart or len(text) > 1 or not text.isascii()):
        return known
    if not text.isascii():
        plain = not (_INEXACT.search(text) or hedges(text) or denies(text) or talks(text))
        return _counted(text) if plain and _COUNTER.fullmatch(text) else None
    text = _BEHIND_COUNTS.sub("", f" {text}").strip()
    if apart and text and (known := _known_unit(text)) is not None:
        return known
    words = fold(text).split()
    if not apart or not 1 <= len(words) <= 3 or not all(word.isalpha() for word in words):
        return None
    if set(words) & _NO_COUNTS or len(words[0]) < 2:
        return None
    last = words[-1]
    plural = _PLURALS_WITHOUT_S.fullmatch(last) is not None or (
        last[-1] == "s" and last[-2:] not in ("ss", "us", "is")
    )
    name = " ".join(word.removesuffix("s") for word in words)
    return _counted(name, plausible=plural or abs(value) == 1)


def _counted(name: str, *, plausible: bool = True) -> Unit:
    return Unit(((f"#{name}", 1),), Fraction(1), plausible)


def _known_unit(text: str) -> Unit | None:
    """Return a known unit such as cm, m/s, m^2, km per hour, square meters, 平方米, or None."""
    kinds: dict[str, int] = {}
    factor, text = Fraction(1), re.sub(r"\s+\^", "^", text)
    text = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h"}.get(text, text)
    for place, side in enumerate(re.split(r"/|\bper\b|每", text)):
        side = re.sub(
            r"\b(square|sq|cubic) (\w+)|(平方|立方)([\u4e00-\u9fff]+)",
            lambda m: f"{m[2] or m[4]}^{_POWERS[m[1] or m[3]]}",
            side,
        )
        for written in side.replace("*", " ").split():
            match = _UNIT.fullmatch(written)
            name = match.group(1) if match else ""
            small = fold(name)  # KG; Mg is a unit of its own
            entry = _UNITS.get(name) or _UNITS.get(small) or _UNITS.get(small.removesuffix("s"))
            if match is None or entry is None:
                return None
            power = int(match.group(2) or 1) * (-1 if place else 1)
            kinds[entry[0]] = kinds.get(entry[0], 0) + power
            factor *= entry[1] ** power
    if not kinds:
        return None
    return Unit(tuple(sorted(kinds.items())), factor)
